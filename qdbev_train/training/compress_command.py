# SPDX-License-Identifier: Apache-2.0
"""`qdbev compress`: post-training quantisation of a float model."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdbev_train.training.config import DataConfig

EXAMPLE = """example:
  qdbev compress config/compress/nano_town.yaml
  qdbev export out/compress/nano_town/model.safetensors nano.qdbev
Calibration takes a minute or two. To train the quantised model on, give it as `init` to `qdbev train`."""


@dataclass(frozen=True)
class CompressConfig:
    """One compression. `teacher` is a float model file; the quantiser's settings are those of QuantConfig."""

    teacher: str
    data: DataConfig
    out: str
    calibration_steps: int
    batch: int
    seed: int
    weight_bits: int
    activation_bits: int
    weight_range: str
    weight_rounding: str
    activation_range: str
    percentile: float
    bias_correction: bool


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compress",
        help="quantise a float model to W4A6 after training",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="compression settings, e.g. config/compress/nano_town.yaml")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from dataclasses import asdict
    from itertools import islice

    from tqdm import tqdm

    from qdbev_ros.core.errors import ConfigError
    from qdbev_train.checkpoint import load_model, save_model
    from qdbev_train.data.dataset import StreamDataset
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.quantization import QuantConfig, post_training_quantise
    from qdbev_train.training.config import read_config

    config = read_config(args.config, CompressConfig)
    model, variant, metadata = load_model(config.teacher)
    if "quantisation" in metadata:
        raise ConfigError(f"{config.teacher}: quantised already; compress starts from a float model")
    quantisation = QuantConfig(
        weight_bits=config.weight_bits,
        activation_bits=config.activation_bits,
        weight_range=config.weight_range,
        weight_rounding=config.weight_rounding,
        activation_range=config.activation_range,
        percentile=config.percentile,
        bias_correction=config.bias_correction,
    )
    scenes = load_scenes(Path(config.data.root), config.data.version, config.data.split)
    stream = StreamDataset(scenes, variant, config.batch, config.seed)
    batches = tqdm(
        islice(stream, config.calibration_steps), total=config.calibration_steps, desc="read frames"
    )
    model = post_training_quantise(model, batches, quantisation)
    path = Path(config.out) / "model.safetensors"
    provenance = {"teacher": metadata["provenance"], "compression": asdict(config)}
    save_model(path, model, variant, provenance, quantisation.to_dict())
    print(f"wrote {path}")
