# SPDX-License-Identifier: Apache-2.0
"""`qdbev bench`: how long each stage of a package takes on each engine of this machine."""

from __future__ import annotations

import argparse
from pathlib import Path

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.files import write_json

EXAMPLE = """example:
  qdbev bench demo/nano.qdbev
  qdbev bench nano.qdbev --backend onnxruntime --backend openvino --frames 100 --threads 2 --json bench.json"""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bench",
        help="latency of a package per stage and engine",
        description="Runs frames of a made-up drive, six JPEG pictures of 1600x900 each, through the node's pipeline "
        "and prints the milliseconds of decoding, preprocessing, engine and postprocessing. Several engines take "
        "turns, so that they can be compared on a busy machine.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="the .qdbev file")
    parser.add_argument(
        "--backend",
        action="append",
        metavar="NAME",
        help="onnxruntime, openvino or tensorrt; repeatable (default: all that this machine has)",
    )
    parser.add_argument("--frames", type=int, default=50, help="frames that count (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, help="of engines on the CPU (default: the engine's own choice)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers to FILE")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.bench import as_json, available_backends, measure, table
    from qdbev_ros.engine import load_package
    from qdbev_ros.engine.cache import cpu_name

    if args.frames < 1:
        raise ConfigError(f"--frames is {args.frames}; give 1 or more")
    names = list(dict.fromkeys(args.backend or available_backends()))
    engines = {name: load_package(args.package, name, args.threads) for name in names}
    described = {name: engine.description for name, engine in engines.items()}
    rows = measure(engines, args.frames)
    for name, text in described.items():
        print(f"{name}: {text}")
    print(f"\n{args.package}, {args.frames} frames, {cpu_name()}\n{table(rows)}")
    if args.json:
        about = {"package": args.package.name, "frames": args.frames, "machine": cpu_name()}
        write_json(args.json, as_json(rows, described, about))
    return 0
