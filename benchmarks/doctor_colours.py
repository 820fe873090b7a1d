# SPDX-License-Identifier: Apache-2.0
"""How far the doctor's judgement of colours and of what is up can be trusted, over scenes in nuScenes format.

Example: python benchmarks/doctor_colours.py data/town --version v1.0-trainval --json out/doctor_colours.json
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from qdbev_ros.core.doctor import CameraSeen, Drive, PictureSeen
from qdbev_ros.core.doctor.pictures import check_pictures
from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.observe import look_at
from qdbev_train.data.tables import load_scenes

LOOKS = 6  # of each camera
EDITS: dict[str, Callable[[Any], Any]] = {
    "as they are": lambda picture: picture,
    "red for blue": lambda picture: picture[..., ::-1],
    "upside down": lambda picture: picture[::-1, ::-1],
}


def judged(pictures: dict[str, list[Any]], edit: Callable[[Any], Any]) -> str:
    """The code of the finding, or "nothing"."""
    drive = Drive({name: CameraSeen(name, name) for name in CAMERAS})
    for name, several in pictures.items():
        for picture in several:
            look = look_at(np.ascontiguousarray(edit(picture)))
            drive.cameras[name].pictures.append(PictureSeen(1, 1, name, look=look))
    return next((finding.code for finding in check_pictures(drive)), "nothing")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("--version", default="v1.0-trainval")
    parser.add_argument("--every", type=int, default=1, help="take every N-th scene (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    cv2.setNumThreads(1)
    counts: dict[str, Counter[str]] = {name: Counter() for name in EDITS}
    scenes = load_scenes(args.dataroot, args.version)
    for frames in tqdm([scenes[name] for name in sorted(scenes)][:: args.every], unit=" scenes"):
        chosen = frames[:: max(1, len(frames) // LOOKS)][:LOOKS]
        pictures = {
            camera.calibration.name: [cv2.imread(str(f.cameras[i].image)) for f in chosen]
            for i, camera in enumerate(frames[0].cameras)
        }
        for name, edit in EDITS.items():
            counts[name][judged(pictures, edit)] += 1
    for name, counter in counts.items():
        print(f"{name}: {dict(counter)}")
    if args.json:
        write_json(args.json, counts)


if __name__ == "__main__":
    main()
