# SPDX-License-Identifier: Apache-2.0
"""What a detector that makes no mistake would say, as boxes and as the network's numbers.

`python -m tests.truth DATAROOT VERSION SPLIT` scores it, once with the annotated attributes and once by the rule.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes, decode_boxes, encode_boxes
from qdbev_train.data.frames import Frame
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.evaluation.metrics import official_score
from qdbev_train.evaluation.results import Entry, result_entries

QUERIES = 900


def seen(frame: Frame) -> NDArray[np.int64]:
    """Rows of the annotations that count: those with a lidar or radar point."""
    return np.flatnonzero(frame.annotations.points > 0)


def network_answer(boxes: Boxes, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits (Q, 10) and codes (Q, 10) of a network that sees exactly `boxes`, each by another query.

    Scores differ: where all are equal the devkit takes every error of a class from a single box. Idle queries sit in
    a corner of the map, 72 m away, where no class is scored: the decoder always gives 300 boxes.
    """
    logits = np.full((QUERIES, 10), -20.0, np.float32)
    codes = np.zeros((QUERIES, 10), np.float32)
    logits[:, 0], codes[:, :2], codes[:, 7] = -8.0, 51.0, 1.0
    queries = rng.permutation(QUERIES)[: len(boxes)]
    logits[queries] = -20.0
    logits[queries, boxes.labels] = rng.uniform(0.0, 6.0, len(boxes))
    codes[queries] = encode_boxes(boxes.centers, boxes.sizes, boxes.yaws, boxes.velocities)
    return logits, codes


def whole_path(frames: Sequence[Frame], with_attributes: bool) -> dict[str, list[Entry]]:
    """Result entries of the truth by sample; with_attributes: the annotated ones in place of those by the rule."""
    rng = np.random.default_rng(0)
    results = {}
    for frame in frames:
        boxes = frame.annotations.boxes.select(seen(frame))
        decoded = decode_boxes(*network_answer(boxes, rng))
        attributes = annotated_attributes(frame, decoded) if with_attributes else None
        results[frame.sample_token] = result_entries(
            frame.sample_token, decoded, frame.lidar2ego, frame.ego2global, attributes
        )
    return results


def annotated_attributes(frame: Frame, decoded: Boxes) -> list[str]:
    """The attribute of the annotation nearest to each decoded box."""
    rows = seen(frame)
    centers = frame.annotations.boxes.centers[rows]
    nearest = np.linalg.norm(decoded.centers[:, None] - centers[None], axis=-1).argmin(axis=1)
    return [frame.annotations.attributes[rows[i]] for i in nearest]


def truth(frame: Frame) -> tuple[Boxes, tuple[str, ...]]:
    """The annotations that count, as detections: unknown velocities are 0, as nothing can be wrong about them."""
    kept = seen(frame)
    boxes = frame.annotations.boxes.select(kept)
    boxes = replace(boxes, velocities=np.nan_to_num(boxes.velocities))
    return boxes, tuple(frame.annotations.attributes[i] for i in kept)


def truth_entries(frame: Frame) -> list[Entry]:
    boxes, attributes = truth(frame)
    return result_entries(frame.sample_token, boxes, frame.lidar2ego, frame.ego2global, attributes)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataroot", type=Path)
    parser.add_argument("version")
    parser.add_argument("split")
    args = parser.parse_args()
    frames = all_frames(load_scenes(args.dataroot, args.version, args.split))
    for with_attributes, title in ((True, "annotated attributes"), (False, "attributes by the rule")):
        score = official_score(args.dataroot, args.version, args.split, whole_path(frames, with_attributes))
        print(f"{title}\n{score.text()}\n")


if __name__ == "__main__":
    main()
