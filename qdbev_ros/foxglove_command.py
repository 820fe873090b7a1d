# SPDX-License-Identifier: Apache-2.0
"""`qdbev import-foxglove`: an MCAP file of Foxglove's schemas as a ROS 2 bag."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "example: qdbev import-foxglove NuScenes-v1.0-mini-scene-0916.mcap scene-0916.mcap"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "import-foxglove",
        help="turn an MCAP file of Foxglove's schemas into a ROS 2 bag",
        description="Writes pictures, camera calibrations and transforms of a file as foxglove/nuscenes2mcap makes it"
        " (protobuf or JSON) as ROS 2 messages on the same topics; play the result with preset:=nuscenes2mcap.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IN.mcap", help="file with Foxglove's schemas")
    parser.add_argument("out", type=Path, metavar="OUT.mcap", help="the bag; replaced if it exists")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_ros.ros.foxglove import import_foxglove

    imported = import_foxglove(args.source, args.out)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {imported.written.total()} messages on {len(imported.written)} topics, {size:.1f} MB")
    if imported.left_out:
        print(
            f"left out: {', '.join(f'{count} x {name}' for name, count in sorted(imported.left_out.items()))}"
        )
    return 0
