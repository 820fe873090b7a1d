# SPDX-License-Identifier: Apache-2.0
"""`qdbev score`: the official nuScenes score of what the running node answered."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from qdbev_train.evaluation.command import add_data_arguments

if TYPE_CHECKING:
    from qdbev_train.evaluation.recording import Matched

EXAMPLE = "example: qdbev score out/demo/detections.mcap data/nuscenes --version v1.0-mini --split mini_val"
LISTED = 10  # unanswered samples that are named on the terminal; all are in the JSON file


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "score",
        help="official NDS and mAP of a bag recorded from the node",
        description="Scores recorded detections with nuscenes-devkit, over the scenes that the recording touches."
        " Samples without an answer count as frames in which nothing was seen.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bag", type=Path, help="recording with the node's ~/objects (or ~/detections)")
    add_data_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.evaluation.metrics import official_score
    from qdbev_train.evaluation.recording import match, read_answers
    from qdbev_train.evaluation.results import write_json

    topic, answers = read_answers(args.bag)
    matched = match(answers, load_scenes(args.dataroot, args.version, args.split, args.scene))
    score = official_score(args.dataroot, args.version, args.split, matched.results)
    answered = len(matched.results) - len(matched.unanswered)
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
    print(
        f"{args.bag}: {len(answers)} messages on {topic}; {answered} of {len(matched.results)} samples answered"
    )
    if answers[0].attributes is None:
        print("the recording has no ~/objects: velocities are unknown and count as 0")
    _say_what_did_not_fit(matched)
    print(score.text())
    return 0


def _say_what_did_not_fit(matched: Matched) -> None:
    if matched.repeated:
        print(
            f"{matched.repeated} further answers for samples that had one (a looped bag?): the first one counts"
        )
    if matched.foreign:
        print(f"{matched.foreign} answers at no sample's time, left out")
    for frame in matched.unanswered[:LISTED]:
        print(f"unanswered: {frame.scene} {frame.stamp_ns / 1e9:.3f} s, sample {frame.sample_token}")
    if len(matched.unanswered) > LISTED:
        print(f"... and {len(matched.unanswered) - LISTED} more")
