# SPDX-License-Identifier: Apache-2.0
"""`qdbev init`: a checkpoint with random weights."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = """example:
  qdbev init tiny out/tiny_random.safetensors
  qdbev eval out/tiny_random.safetensors demo/town --version v1.0-mini --split mini_val"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "init",
        help="a checkpoint with random weights, to try a variant before it is trained",
        description="Writes a variant with random weights: runs, times, exports and scores like a trained one, and"
        " detects nothing.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("variant", help="nano, tiny, small, base, or the path of a variant's YAML file")
    parser.add_argument("out", type=Path, help="the checkpoint to write (.safetensors)")
    parser.add_argument("--seed", type=int, default=0, help="of the random numbers (default: 0)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import torch

    from qdbev_ros.core.errors import ConfigError
    from qdbev_ros.core.variant import load_variant
    from qdbev_train.checkpoint import save_model
    from qdbev_train.model import build_model

    if args.out.suffix != ".safetensors":
        raise ConfigError(f"{args.out}: a checkpoint's name ends in .safetensors")
    variant = load_variant(args.variant)
    torch.manual_seed(args.seed)
    model = build_model(variant)
    save_model(args.out, model, variant, {"init": "random", "seed": args.seed}, None)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"wrote {args.out}: {variant.name}, {parameters / 1e6:.1f} M random parameters")
    return 0
