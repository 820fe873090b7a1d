# SPDX-License-Identifier: Apache-2.0
"""The engine does not look at the picture of a camera that is masked out, and does without a camera at all."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdbev_ros.core.projection import lidar_to_image, scale_to_input, stack_lidar2img
from qdbev_ros.engine import load_package
from qdbev_train.data.tables import load_scenes

DEMO = Path(__file__).resolve().parents[2] / "demo"


@pytest.mark.parametrize("absent", [0, 3])
def test_what_a_masked_camera_shows_changes_no_bit_and_unmasked_it_does(absent: int) -> None:
    engine = load_package(DEMO / "nano.qdbev", threads=1)
    image = engine.variant.image
    frame = next(iter(load_scenes(DEMO / "town", "v1.0-mini", "mini_val", None).values()))[0]
    matrices = [
        scale_to_input(
            lidar_to_image(c.calibration, frame.lidar2ego, c.ego2global, frame.ego2global),
            c.calibration,
            image,
        )
        for c in frame.cameras
    ]
    rng = np.random.default_rng(3)
    pictures = rng.normal(size=(6, 3, image.padded_height, image.padded_width)).astype(np.float32)
    others = pictures.copy()
    others[absent] = rng.normal(size=pictures.shape[1:])
    masked = stack_lidar2img([None if i == absent else m for i, m in enumerate(matrices)])
    can_bus = np.zeros(18, np.float32)
    one, two = (engine.infer(shown, masked, can_bus, None) for shown in (pictures, others))
    np.testing.assert_array_equal(one.bev, two.bev)
    np.testing.assert_array_equal(one.class_logits, two.class_logits)
    np.testing.assert_array_equal(one.boxes, two.boxes)
    assert np.isfinite(one.boxes).all()
    seen = engine.infer(others, stack_lidar2img(matrices), can_bus, None)
    assert not np.array_equal(seen.bev, engine.infer(pictures, stack_lidar2img(matrices), can_bus, None).bev)
