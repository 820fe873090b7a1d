# SPDX-License-Identifier: Apache-2.0
"""One scene in every bag convention through the running node: the official score of each must be the same.

Example: python -m benchmarks.conventions data/nuscenes --scene scene-0916 --model demo/nano.qdbev
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from qdbev_ros.core.files import write_json
from qdbev_ros.ros.calibration_file import write_calibration
from qdbev_ros.ros.domain import free_domain
from qdbev_ros.ros.presets import preset_names
from qdbev_train.bags.writer import write_bag
from qdbev_train.data.tables import load_scenes
from tests.conventions import CALIBRATED_BY_FILE, convert


def score(preset: str, source: Path, rig: Path, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """NDS, mAP and the number of answered samples of a convention."""
    bag, out, result = folder / "bag.mcap", folder / "answers.mcap", folder / "score.json"
    convert(source, preset, bag)
    words = [f"model:={args.model}", f"bag:={bag}", f"record:={out}", f"preset:={preset}", "queue_size:=4"]
    words.append(f"rate:={args.rate}")
    words += [f"calibration:={rig}"] if preset in CALIBRATED_BY_FILE else []
    environment = os.environ | {"ROS_DOMAIN_ID": str(free_domain())}
    subprocess.run([sys.executable, "-m", "qdbev_ros.bringup", *words], check=True, env=environment)
    data = [str(args.dataroot), "--version", args.version, "--split", args.split, "--json", str(result)]
    command = [sys.executable, "-m", "qdbev_train.cli", "score", str(out), *data]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    found = json.loads(result.read_text())
    bag.unlink()  # raw pictures: a gigabyte for twenty seconds
    return {name: found[name] for name in ("nds", "mAP", "answered")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("--version", default="v1.0-mini")
    parser.add_argument("--split", default="mini_val")
    parser.add_argument("--scene", required=True)
    parser.add_argument("--model", type=Path, default=Path("demo/nano.qdbev"))
    parser.add_argument(
        "--rate", default="1.0", help="speed of the bag; slower on a busy machine, where sets get lost"
    )
    parser.add_argument("--preset", nargs="*", default=preset_names(), help="default: all")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    frames = load_scenes(args.dataroot, args.version, scenes=[args.scene])[args.scene]
    results = {}
    with tempfile.TemporaryDirectory(prefix="qdbev-") as name:
        folder = Path(name)
        write_bag(frames, folder / "source.mcap")
        cameras = {camera.calibration.name: camera.calibration for camera in frames[0].cameras}
        write_calibration(folder / "rig.yaml", cameras, frames[0].lidar2ego)
        for preset in args.preset:
            results[preset] = score(preset, folder / "source.mcap", folder / "rig.yaml", args, folder)
            print(preset, results[preset], flush=True)
    if args.json:
        write_json(args.json, results)


if __name__ == "__main__":
    main()
