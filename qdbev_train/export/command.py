# SPDX-License-Identifier: Apache-2.0
"""`qdbev export` packs a checkpoint for the vehicle; `qdbev inspect` shows what a package holds (without torch)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import DataError

EXPORT_EXAMPLE = """example:
  qdbev eval out/compress/nano_town/model.safetensors data/town --version v1.0-trainval --split val --json score.json
  qdbev export out/compress/nano_town/model.safetensors nano.qdbev --scores score.json"""
INSPECT_EXAMPLE = "example: qdbev inspect nano.qdbev --json nano.json"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds `export` and `inspect`."""
    raw = argparse.RawDescriptionHelpFormatter
    export = commands.add_parser(
        "export",
        help="pack a checkpoint as a .qdbev package",
        description="Writes a checkpoint as one file that the node runs: INT4 weights, manifest, hashes.",
        epilog=EXPORT_EXAMPLE,
        formatter_class=raw,
    )
    export.add_argument(
        "checkpoint", type=Path, help="model.safetensors, quantised (or float, for comparison)"
    )
    export.add_argument("out", type=Path, help="the package to write, e.g. nano.qdbev")
    export.add_argument(
        "--scores", type=Path, metavar="FILE", help="numbers of `qdbev eval --json` to put inside"
    )
    export.set_defaults(run=run_export)
    inspect = commands.add_parser(
        "inspect",
        help="show what a .qdbev package holds",
        description="Verifies a package and prints its layers, bits, sizes, exceptions, provenance and scores.",
        epilog=INSPECT_EXAMPLE,
        formatter_class=raw,
    )
    inspect.add_argument("package", type=Path, help="the .qdbev file")
    inspect.add_argument("--json", type=Path, metavar="FILE", help="write the same as JSON")
    inspect.set_defaults(run=run_inspect)


def run_export(args: argparse.Namespace) -> int:
    scores = {} if args.scores is None else _read_scores(args.scores)
    from qdbev_train.checkpoint import load_model
    from qdbev_train.export.package import export_package
    from qdbev_train.quantization import QuantConfig

    model, variant, metadata = load_model(args.checkpoint)
    grid = metadata.get("quantisation")
    config = None if grid is None else QuantConfig.from_dict(grid)
    digest = export_package(model, variant, config, args.out, metadata.get("provenance", {}), scores)
    form = "float" if config is None else f"W{config.weight_bits}A{config.activation_bits}"
    print(
        f"wrote {args.out}: {variant.name}, {form}, {args.out.stat().st_size / 1e6:.2f} MB, sha256 {digest[:16]}"
    )
    return 0


def _read_scores(path: Path) -> dict[str, Any]:
    try:
        scores = json.loads(path.read_text())
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(scores, dict):
        raise DataError(f"{path}: scores must be a mapping, as `qdbev eval --json` writes it")
    return scores


def run_inspect(args: argparse.Namespace) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_ros.engine.package import read_package
    from qdbev_train.export.inspection import inspect_package

    summary, text = inspect_package(read_package(args.package))
    print(text)
    if args.json:
        write_json(args.json, summary)
    return 0
