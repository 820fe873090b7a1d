# SPDX-License-Identifier: Apache-2.0
"""`qdbev rerun`: a bag and the node's answers to it as a Rerun recording."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

EXAMPLE = "example: qdbev rerun demo/town.mcap out/demo/detections.mcap out/demo/demo.rrd && rerun out/demo/demo.rrd"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "rerun",
        help="turn a bag and the node's answers into a Rerun recording",
        description="Pictures, transforms and ground truth of BAG, boxes with headings and motion of RECORDING (what"
        " record:=RECORDING wrote), as one .rrd file that the Rerun viewer shows in 3D and projected into the cameras.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", type=Path, metavar="BAG", help="bag that was played")
    parser.add_argument(
        "recording", type=Path, metavar="RECORDING", help="the node's answers to it; may be BAG"
    )
    parser.add_argument("out", type=Path, metavar="OUT.rrd", help="replaced if it exists")
    parser.add_argument("--preset", default="nuscenes", help="topic and frame names (default: %(default)s)")
    parser.add_argument("--node", default="qdbev_detector", help="the detector's name (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="lowest score that is shown (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the recording holds, counted")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.ros.bags import BagReader
    from qdbev_ros.ros.presets import load_preset
    from qdbev_ros.ros.rerun_export import export

    with BagReader(args.bag) as bag, BagReader(args.recording) as recording:
        counts = export(bag, recording, load_preset(args.preset), args.node, args.threshold, args.out)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{args.out}: {told}, {args.out.stat().st_size / 1e6:.1f} MB")
    if args.json:
        temporary = args.json.with_name(f".{args.json.name}")
        temporary.write_text(json.dumps(dict(counts), indent=2) + "\n")
        os.replace(temporary, args.json)
    return 0
