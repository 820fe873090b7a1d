# SPDX-License-Identifier: Apache-2.0
"""`qdbev compress`: a quantised student of a float model, by calibration alone or by training."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

EXAMPLE = """example:
  qdbev compress config/compress/nano_town_ptq.yaml       # calibration alone, a minute or two
  qdbev compress config/compress/nano_town_vgd.yaml       # progressive training, then view-guided distillation
  qdbev export out/compress/nano_town_vgd/model.safetensors nano.qdbev
On several GPUs (batch is that of each):
  torchrun --nproc_per_node 8 -m qdbev_train.cli compress config/compress/tiny_nuscenes.yaml
Training that was stopped (Ctrl-C and SIGTERM save first) goes on where its `out` folder stands. The settings are
explained in docs/quantisation.md."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "compress",
        help="quantise a float model to W4A6, with or without training; resumable",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="compression settings, e.g. config/compress/nano_town_vgd.yaml")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdbev_train.training.compress import compress
    from qdbev_train.training.compression import read_compression

    config = read_compression(args.config)
    if config.evaluation is not None:
        from qdbev_train.evaluation.metrics import require_devkit, require_tables

        require_devkit(config.data.version, config.evaluation.split)
        require_tables(Path(config.data.root) / config.data.version)
    path = compress(config)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        print(f"wrote {path}")
