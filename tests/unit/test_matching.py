# SPDX-License-Identifier: Apache-2.0
"""Greedy matching of detections to objects."""

from __future__ import annotations

import numpy as np

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.matching import match_boxes


def at(places: list[tuple[float, float]], labels: list[int], scores: list[float] | None = None) -> Boxes:
    n = len(places)
    centers = np.array([(x, y, 0.0) for x, y in places]).reshape(n, 3)
    scores_array = np.ones(n) if scores is None else np.array(scores)
    return Boxes(
        centers, np.ones((n, 3)), np.zeros(n), np.zeros((n, 2)), scores_array, np.array(labels, np.int64)
    )


def test_the_best_score_takes_the_object_and_the_second_goes_empty() -> None:
    detections = at([(0.5, 0), (0.1, 0)], [0, 0], [0.9, 0.4])
    assert match_boxes(detections, at([(0, 0)], [0])).tolist() == [0, -1]


def test_class_and_distance_must_fit() -> None:
    detections = at([(0, 0), (10, 0), (20, 2.1)], [1, 0, 0])
    assert match_boxes(detections, at([(0, 0), (11, 0), (20, 0)], [0, 0, 0])).tolist() == [-1, 1, -1]


def test_without_objects_nothing_matches() -> None:
    assert match_boxes(at([(0, 0)], [0]), at([], [])).tolist() == [-1]
    assert match_boxes(at([], []), at([(0, 0)], [0])).tolist() == []
