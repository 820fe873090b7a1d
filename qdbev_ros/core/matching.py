# SPDX-License-Identifier: Apache-2.0
"""Which detections stand where an object is: a quick look at quality. The official score is `qdbev eval`'s."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes

MATCH_DISTANCE = 2.0  # metres between centres on the ground


def match_boxes(detections: Boxes, truth: Boxes, distance: float = MATCH_DISTANCE) -> NDArray[np.int64]:
    """(K,) for each detection the index of its object in `truth`, or -1.

    Best score first, each takes the nearest free object of its class within `distance`.
    """
    matched = np.full(len(detections), -1, np.int64)
    free = np.ones(len(truth), bool)
    for index in np.argsort(-detections.scores, kind="stable"):
        candidates = np.flatnonzero(free & (truth.labels == detections.labels[index]))
        if not len(candidates):
            continue
        offsets = truth.centers[candidates, :2] - detections.centers[index, :2]
        nearest = int(np.argmin(np.hypot(*offsets.T)))
        if np.hypot(*offsets[nearest]) <= distance:
            matched[index] = candidates[nearest]
            free[candidates[nearest]] = False
    return matched
