# SPDX-License-Identifier: Apache-2.0
"""`qdbev bag`: a nuScenes scene as a ROS 2 bag."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "example: qdbev bag data/nuscenes --version v1.0-mini --scene scene-0916 scene-0916.mcap"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "bag",
        help="write a nuScenes scene as a ROS 2 bag",
        description="Writes the key frames of a scene in nuScenes format as one MCAP file for `ros2 bag play`.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataroot", type=Path, help="folder that holds the tables' folder and samples/")
    parser.add_argument("out", type=Path, metavar="OUT.mcap", help="the bag; replaced if it exists")
    parser.add_argument("--scene", required=True, help="name of the scene, for example scene-0916")
    parser.add_argument(
        "--calibration", type=Path, metavar="RIG.yaml", help="also write the rig's calibration file"
    )
    parser.add_argument("--version", default="v1.0-mini", help="folder of the tables (default: %(default)s)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_train.bags.writer import write_bag
    from qdbev_train.data.tables import load_scenes

    frames = load_scenes(args.dataroot, args.version, scenes=[args.scene])[args.scene]
    count = write_bag(frames, args.out)
    if args.calibration:
        from qdbev_ros.ros.calibration_file import write_calibration

        cameras = {camera.calibration.name: camera.calibration for camera in frames[0].cameras}
        write_calibration(args.calibration, cameras, frames[0].lidar2ego)
    size = args.out.stat().st_size / 1e6
    print(f"{args.out}: {args.scene}, {len(frames)} frames, {count} messages, {size:.1f} MB")
    return 0
