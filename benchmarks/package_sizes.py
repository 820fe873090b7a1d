# SPDX-License-Identifier: Apache-2.0
"""How large packages are beside their float32 checkpoints, and how long opening one takes.

A file's size depends on shapes, bits and how even the codes are, not on what was learned: random weights, with random
biases and without calibration. Pictures are small here, because no tensor in the file depends on their size.

example: python benchmarks/package_sizes.py nano tiny --json out/package_sizes.json
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine import read_package
from qdbev_train.checkpoint import save_model
from qdbev_train.export.package import export_package
from qdbev_train.model import build_model
from qdbev_train.quantization import QuantConfig, quantise_model
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedLayer
from qdbev_train.quantization.ranges import weight_scales
from qdbev_train.quantization.tables import tables

SAMPLE = 64


@dataclass(frozen=True)
class Size:
    """Bytes of both files · CPU seconds to open and verify the package, the least of three times."""

    variant: str
    float32: int
    package: int
    open_seconds: float

    @property
    def ratio(self) -> float:
        return self.float32 / self.package


def measure(name: str, folder: Path) -> Size:
    """Writes both files of a variant and weighs them."""
    torch.manual_seed(0)
    variant = _small_pictures(load_variant(name))
    model = build_model(variant).eval()
    checkpoint, package = folder / f"{name}.safetensors", folder / f"{name}.qdbev"
    save_model(checkpoint, model, variant, {}, None)
    config = QuantConfig()
    quantise_model(model, config)
    with torch.no_grad():
        _settle(model)
    export_package(model, variant, config, package, {}, {})
    seconds = []
    for _ in range(3):
        start = time.process_time()
        read_package(package)
        seconds.append(time.process_time() - start)
    return Size(name, checkpoint.stat().st_size, package.stat().st_size, min(seconds))


def _small_pictures(variant: Variant) -> Variant:
    return replace(variant, image=replace(variant.image, height=96, width=160))


def _settle(model: torch.nn.Module) -> None:
    """Some step for everything, and biases whose codes are as uneven as they get."""
    for module in model.modules():
        if isinstance(module, ActivationQuantiser):
            module.set_sign(signed=not module.non_negative)
            module.scale.fill_(0.05 + 0.05 * float(torch.rand(())))
    for module in model.modules():
        if isinstance(module, QuantisedLayer):
            module.bias.normal_(std=0.3)
            # A sample of each channel will do: all that counts is how even the codes are.
            some = module.weight.flatten(1)[:, :SAMPLE]
            module.weight_scale.copy_(weight_scales(some, module.bits, "mse"))
    for table in tables(model):
        if table.quantiser is not None:
            table.quantiser.fit_scale(table.values, "mse")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variants", nargs="+", help="e.g. nano tiny small base")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    sizes = []
    for name in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            size = measure(name, Path(folder))
        sizes.append(size)
        print(
            f"{size.variant}: float32 {size.float32:,} bytes, package {size.package:,} bytes, {size.ratio:.2f} times "
            f"smaller, opened and verified in {size.open_seconds:.2f} s of CPU time",
            flush=True,
        )
    if args.json:
        write_json(args.json, [vars(size) | {"ratio": size.ratio} for size in sizes])


if __name__ == "__main__":
    main()
