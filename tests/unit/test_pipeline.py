# SPDX-License-Identifier: Apache-2.0
"""Pictures on their way to the engine: decoded side by side, raw ones of any order alike, wrong ones named."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core import pipeline as module
from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.made_drive import made_frame
from qdbev_ros.core.pipeline import Frame, PictureError, Pipeline
from qdbev_ros.core.preprocess import RawPicture
from qdbev_ros.core.variant import Variant
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


class Engine:
    """The demo's sizes without a network. Answers zeros, or `spoiled` with one number that is none."""

    picture_grid = None

    def __init__(self, variant: Variant) -> None:
        self.variant, self.spoiled, self.number = variant, "", np.nan
        self.pasts: list[np.ndarray | None] = []

    def infer(self, *inputs: np.ndarray | None) -> SimpleNamespace:
        self.pasts.append(inputs[3])
        spec, bev = self.variant.transformer, self.variant.bev
        answer = {name: np.zeros((spec.queries, 10)) for name in ("class_logits", "boxes")}
        answer["bev"] = np.zeros((bev.height * bev.width, spec.channels))
        answer = {name: part.astype(np.float32) for name, part in answer.items()}
        if self.spoiled:
            answer[self.spoiled][7, 3] = self.number
        return SimpleNamespace(**answer)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", ["class_logits", "boxes", "bev"])
def test_an_answer_that_is_not_finite_is_an_engines_failure_and_nothing_of_it_is_remembered(
    pipeline: Pipeline, part: str, number: float
) -> None:
    """As boxes it would be "nothing seen", and as a map it would spoil every answer to come."""
    engine = Engine(pipeline.variant)
    tried = Pipeline(engine, workers=1)
    tried.run(made_frame(0))
    engine.spoiled, engine.number = part, number
    with pytest.raises(EngineError, match=f"not finite: {part}$"):
        tried.run(made_frame(1))
    engine.spoiled = ""
    result = tried.run(made_frame(2))
    tried.close()
    assert [past is None for past in engine.pasts] == [True, False, True]
    assert result.memory.age == 0
