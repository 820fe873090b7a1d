# SPDX-License-Identifier: Apache-2.0
"""`qdbev rerun`: a bag and the node's answers to it as a Rerun recording."""

from __future__ import annotations

import argparse
from pathlib import Path

from qdbev_ros.core.files import write_json

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
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="calibration file that the detector was given"
    )
    parser.add_argument("--node", default="qdbev_detector", help="the detector's name (default: %(default)s)")
    parser.add_argument(
        "--threshold", type=float, default=0.3, help="lowest score that is shown (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what the recording holds, counted")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.ros.bags import BagReader
    from qdbev_ros.ros.calibration_file import RigCalibration, load_calibration
    from qdbev_ros.ros.presets import load_preset
    from qdbev_ros.ros.rerun_export import ADVICE, export

    preset = load_preset(args.preset)
    calibration = load_calibration(args.calibration) if args.calibration else RigCalibration()
    with BagReader(args.bag) as bag, BagReader(args.recording) as recording:
        counts, left_out = export(bag, recording, preset, calibration, args.node, args.threshold, args.out)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    print(f"{args.out}: {told}, {args.out.stat().st_size / 1e6:.1f} MB")
    if left_out:
        cameras = {reason: [c for c in left_out if left_out[c] == reason] for reason in left_out.values()}
        reasons = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in cameras.items())
        print(f"left out: {reasons}; {ADVICE}")
    if args.json:
        write_json(args.json, dict(counts))
    return 0
