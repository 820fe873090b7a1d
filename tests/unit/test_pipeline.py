# SPDX-License-Identifier: Apache-2.0
"""Pictures on their way to the engine: decoded side by side, raw ones of any order alike, wrong ones named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core import pipeline as module
from qdbev_ros.core.made_drive import made_frame
from qdbev_ros.core.pipeline import Frame, PictureError, Pipeline
from qdbev_ros.core.preprocess import RawPicture
from qdbev_ros.engine import load_package

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[Pipeline]:
    made = Pipeline(load_package(DEMO / "nano.qdbev", threads=1), workers=2)
    yield made
    made.close()


def raw_frame(red_first: bool) -> Frame:
    """Frame 0 of the made drive with raw pictures."""
    frame, cameras = made_frame(0), {}
    for name, camera in frame.cameras.items():
        pixels = cv2.imdecode(np.frombuffer(camera.picture, np.uint8), cv2.IMREAD_COLOR)  # type: ignore[arg-type]
        pixels = np.ascontiguousarray(pixels[:, :, ::-1]) if red_first else pixels
        cameras[name] = replace(camera, picture=RawPicture(pixels, red_first))  # type: ignore[arg-type]
    return replace(frame, cameras=cameras)


def test_pictures_of_a_set_are_decoded_side_by_side(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No decoder ends before another one has begun: alone, the first would wait in vain."""
    together, decode = threading.Barrier(2, timeout=60), module.decode_picture

    def meeting(*arguments: Any) -> Any:
        together.wait()
        return decode(*arguments)

    monkeypatch.setattr(module, "decode_picture", meeting)
    assert len(pipeline._decode(made_frame(0))) == 6


def test_the_order_of_a_raw_pictures_colours_changes_no_bit_of_the_input(pipeline: Pipeline) -> None:
    inputs = []
    for red_first in (False, True):
        frame = raw_frame(red_first)
        pipeline._prepare(frame, pipeline._decode(frame))
        inputs.append(pipeline._images.copy())
    np.testing.assert_array_equal(*inputs)


def test_a_raw_picture_of_another_size_than_its_calibration_is_refused_by_name(pipeline: Pipeline) -> None:
    frame = made_frame(0)
    small = replace(frame.cameras["CAM_BACK"], picture=RawPicture(np.zeros((450, 800, 3), np.uint8)))
    cameras = {**frame.cameras, "CAM_BACK": small}
    with pytest.raises(
        PictureError, match="CAM_BACK: the picture is 800x450 pixels, its CameraInfo says 1600x900"
    ):
        pipeline.run(replace(frame, cameras=cameras))
