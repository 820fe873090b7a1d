# SPDX-License-Identifier: Apache-2.0
"""`qdbev score`: the official nuScenes score of what the running node answered, or of a result file."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qdbev_ros.core.errors import DataError
from qdbev_train.evaluation.command import add_data_arguments

if TYPE_CHECKING:
    from qdbev_train.data.frames import Frame
    from qdbev_train.evaluation.recording import Matched

    Scenes = Mapping[str, Sequence[Frame]]

EXAMPLE = """example:
  qdbev score out/demo/detections.mcap data/nuscenes --version v1.0-mini --split mini_val
  qdbev score run.mcap data/own --version v1.0-trainval --split val --preset rig.yaml
  qdbev score out/results.json data/nuscenes --version v1.0-trainval --split val"""
LISTED = 10  # unanswered samples that are named on the terminal; all are in the JSON file


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "score",
        help="official NDS and mAP of a bag recorded from the node, or of a result file",
        description="Scores recorded detections with nuscenes-devkit, over the scenes that the recording touches."
        " Samples without an answer count as frames in which nothing was seen; a result file (.json, as `qdbev eval"
        " --results` writes it) must have every sample.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "bag",
        type=Path,
        help="recording with the node's ~/objects (or ~/detections), or nuScenes result file (.json)",
    )
    add_data_arguments(parser)
    parser.add_argument(
        "--preset",
        metavar="NAME|FILE",
        help="the node's preset or remapping file (.yaml), where a recording's boxes are in a frame of another name",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.evaluation.metrics import require_devkit

    require_devkit(args.version, args.split)
    if not args.bag.exists():
        raise DataError(f"{args.bag}: no such file")
    from_file = args.bag.suffix == ".json"
    scenes = load_scenes(args.dataroot, args.version, args.split, args.scene)
    return _score_file(args, scenes) if from_file else _score_bag(args, scenes)


def _score_file(args: argparse.Namespace, scenes: Scenes) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_train.data.tables import all_frames
    from qdbev_train.evaluation.metrics import official_score
    from qdbev_train.evaluation.results import read_results

    tokens = [frame.sample_token for frame in all_frames(scenes)]
    results, others = read_results(args.bag, tokens, args.split)
    score = official_score(args.dataroot, args.version, args.split, results)
    print(f"{args.bag}, {args.dataroot} {args.version} {args.split}")
    if others:
        print(f"{others} samples of other scenes left out")
    print(score.text())
    if args.json:
        data = {"results": args.bag.name, "version": args.version, "split": args.split}
        write_json(args.json, data | score.to_dict())
    return 0


def _score_bag(args: argparse.Namespace, scenes: Scenes) -> int:
    from qdbev_ros.core.files import write_json
    from qdbev_train.evaluation.metrics import official_score
    from qdbev_train.evaluation.recording import match, read_answers

    topic, answers = read_answers(args.bag)
    matched = match(answers, scenes, args.preset)
    score = official_score(args.dataroot, args.version, args.split, matched.results)
    answered = len(matched.results) - len(matched.unanswered)
    print(
        f"{args.bag}: {len(answers)} messages on {topic}; {answered} of {len(matched.results)} samples answered"
    )
    if answers[0].attributes is None:
        print("the recording has no ~/objects: velocities are unknown and count as 0")
    _say_what_did_not_fit(matched)
    print(score.text())
    if args.json:
        data = {
            "bag": args.bag.name,
            "version": args.version,
            "split": args.split,
            "answered": answered,
            "unanswered": [frame.sample_token for frame in matched.unanswered],
            "repeated": matched.repeated,
            "foreign": matched.foreign,
        }
        write_json(args.json, data | score.to_dict())
    return 0


def _say_what_did_not_fit(matched: Matched) -> None:
    if matched.repeated:
        print(
            f"{matched.repeated} further answers for samples that had one (a looped bag, or more than 10 a second): "
            "the nearest in time counts, of equally near ones the first"
        )
    if matched.foreign:
        print(f"{matched.foreign} answers at no sample's time, left out")
    for frame in matched.unanswered[:LISTED]:
        print(f"unanswered: {frame.scene} {frame.stamp_ns / 1e9:.3f} s, sample {frame.sample_token}")
    if len(matched.unanswered) > LISTED:
        print(f"... and {len(matched.unanswered) - LISTED} more")
