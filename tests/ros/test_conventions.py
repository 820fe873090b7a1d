# SPDX-License-Identifier: Apache-2.0
"""The same drive in another converter's bag, through the real node: the same boxes.

One convention with Odometry and a calibration file for the mounting; one without CameraInfo, whose pictures name no
frame and whose transforms are all on /tf.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.recording import read_detections
from tests.conventions import CALIBRATED_BY_FILE, convert
from tests.ros.graph import Graph


def replay(folder: Path, package: Path, bag: Path, preset: str, calibration: Path) -> dict[int, Boxes]:
    """stamp -> boxes that the node answers to the bag in the convention of a preset."""
    converted, out = convert(bag, preset, folder / f"{preset}.mcap"), folder / f"{preset}-out.mcap"
    given = [f"calibration:={calibration}"] if preset in CALIBRATED_BY_FILE else []
    arguments = (
        f"model:={package}",
        f"bag:={converted}",
        f"record:={out}",
        f"preset:={preset}",
        "queue_size:=4",
    )
    with Graph(folder) as graph:
        run = graph.start("qdbev_ros.bringup", *arguments, *given)
        assert run.wait(200) == 0, run.output
        with BagReader(out) as recording:
            return read_detections(recording, "qdbev_detector")


@pytest.fixture(scope="module")
def expected(
    package: Path, short_bag: Path, calibration: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Boxes]:
    """The answers to raw pictures with CameraInfo and tf_static."""
    answers = replay(tmp_path_factory.mktemp("raw"), package, short_bag, "raw", calibration)
    assert len(answers) == 4
    return answers


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["chris7462", "nuscenes2bag"])
def test_another_convention_gives_the_same_boxes(
    package: Path, short_bag: Path, calibration: Path, expected: dict[int, Boxes], tmp_path: Path, preset: str
) -> None:
    answers = replay(tmp_path, package, short_bag, preset, calibration)
    assert sorted(answers) == sorted(expected)
    for stamp, boxes in expected.items():
        np.testing.assert_allclose(answers[stamp].scores, boxes.scores, atol=1e-5)
        np.testing.assert_allclose(answers[stamp].centers[:20], boxes.centers[:20], atol=1e-3)
