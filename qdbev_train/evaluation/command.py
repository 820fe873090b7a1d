# SPDX-License-Identifier: Apache-2.0
"""`qdbev eval`: the official nuScenes score of a checkpoint or a package."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

EXAMPLE = "example: qdbev eval nano.qdbev data/town --version v1.0-trainval --split val --json score.json"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "eval",
        help="official NDS and mAP of a checkpoint or a package",
        description="Runs a model over a split, as the node would, and scores it with nuscenes-devkit.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, help=".qdbev package, or .safetensors checkpoint (float or quantised)"
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--results", type=Path, metavar="FILE", help="keep the detections, in nuScenes' result format"
    )
    parser.set_defaults(run=run)


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """What `eval` and `score` share: where the ground truth is and where the numbers go."""
    parser.add_argument("dataroot", type=Path, help="folder that holds the tables' folder and samples/")
    parser.add_argument("--version", required=True, help="folder of the tables, for example v1.0-mini")
    parser.add_argument("--split", required=True, help="split to score, for example mini_val")
    parser.add_argument(
        "--scene", action="append", metavar="NAME", help="only this scene of the split; repeatable"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")


def run(args: argparse.Namespace) -> int:
    from qdbev_train.data.tables import all_frames, load_scenes
    from qdbev_train.evaluation.inference import detect, open_engine
    from qdbev_train.evaluation.metrics import official_score
    from qdbev_train.evaluation.results import write_json, write_results

    frames = all_frames(load_scenes(args.dataroot, args.version, args.split, args.scene))
    engine = open_engine(args.model)
    start = time.monotonic()
    results = detect(engine, frames)
    per_frame = (time.monotonic() - start) / len(frames)
    if args.results:
        write_results(args.results, results)
    score = official_score(args.dataroot, args.version, args.split, results)
    if args.json:
        data = {"model": args.model.name, "version": args.version, "split": args.split}
        write_json(args.json, data | score.to_dict() | {"seconds_per_frame": per_frame})
    print(f"{args.model}, {args.dataroot} {args.version} {args.split}, {per_frame * 1e3:.0f} ms a frame")
    print(score.text())
    return 0
