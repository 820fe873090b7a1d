# SPDX-License-Identifier: Apache-2.0
"""`qdbev index`: builds or checks the index of a data set and says what is in it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdbev_train.data.index_frames import Index

EXAMPLE = "example: qdbev index data/nuscenes --version v1.0-trainval"
LISTED = 10  # scenes without a CAN bus file that are named on the terminal; all are in the JSON file


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "index",
        help="build or check the index of a data set",
        description="Reads all tables of a data set in nuScenes format and checks every record that is used. Large"
        " tables get an index, beside them or in the user's cache folder, which makes every other command start at"
        " once; those build it by themselves where it is missing. An interrupted build goes on with the next table.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("dataroot", type=Path, help="folder that holds the tables' folder and samples/")
    parser.add_argument("--version", required=True, help="folder of the tables, for example v1.0-trainval")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import time

    from qdbev_ros.core.files import write_json
    from qdbev_train.data.index import Source, open_index, remove_damaged

    begin = time.monotonic()
    for path in remove_damaged(Source(args.dataroot, args.version)):
        print(f"{path}: damaged, made anew")
    index = open_index(args.dataroot, args.version)
    numbers = contents(index) | {"seconds": time.monotonic() - begin}
    if args.json:
        write_json(args.json, numbers)
    print(f"{args.dataroot} {args.version}: scenes {numbers['scenes']}, samples {numbers['samples']}")
    print(f"{'boxes':22}{'all':>9}{'with points':>13}")
    for name, count in numbers["boxes"].items():
        print(f"  {name:20}{count['all']:9}{count['with_points']:13}")
    _say_which_have_no_can_bus(numbers["scenes_without_can_bus"])
    if index.files:
        print(
            f"index: {index.files[0].parent}, {numbers['index_bytes'] / 1e6:.1f} MB; {numbers['seconds']:.1f} s"
        )
    else:
        print(f"tables this small are read anew each time, without an index; {numbers['seconds']:.1f} s")
    return 0


def contents(index: Index) -> dict[str, Any]:
    """What is in a data set, as numbers and names."""
    import numpy as np

    from qdbev_ros.core.variant import CLASSES

    labels, points = index.arrays["label"], index.arrays["points"]
    every = np.bincount(labels, minlength=len(CLASSES)).tolist()
    seen = np.bincount(labels[points > 0], minlength=len(CLASSES)).tolist()
    return {
        "scenes": len(index.scenes),
        "samples": len(index),
        "boxes": {n: {"all": a, "with_points": s} for n, a, s in zip(CLASSES, every, seen)},
        "scenes_without_can_bus": [n for n, has in zip(index.scenes, index.arrays["has_can"]) if not has],
        "index": [str(path) for path in index.files],
        "index_bytes": sum(path.stat().st_size for path in index.files),
    }


def _say_which_have_no_can_bus(scenes: list[str]) -> None:
    if scenes:
        more = f" and {len(scenes) - LISTED} more" if len(scenes) > LISTED else ""
        print(f"without a CAN bus file: {', '.join(scenes[:LISTED])}{more}")
    else:
        print("every scene has its CAN bus file")
