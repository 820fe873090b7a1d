# SPDX-License-Identifier: Apache-2.0
"""The training-only dense heads: what they are asked to say is what stands in the real scene."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from qdbev_ros.core.variant import CLASSES, load_variant
from qdbev_train.data.dataset import frame_lidar2img, frame_targets
from qdbev_train.data.frames import Frame
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.training.dense_heads import (
    HEADINGS,
    SPEEDS,
    DenseHeads,
    camera_centres,
    heading_loss,
    headings,
    speed_loss,
)
from qdbev_train.training.losses import Targets

CODE_WEIGHTS = torch.tensor([1.0] * 8 + [0.2] * 2)


@pytest.fixture(scope="module")
def frame() -> Frame:
    town = Path(__file__).parents[2] / "demo" / "town"
    return all_frames(load_scenes(town, "v1.0-mini", "mini_val"))[10]


def test_headings_are_the_annotated_yaws(frame: Frame) -> None:
    variant, boxes = load_variant("nano"), frame.annotations.boxes
    codes, labels = frame_targets(frame, variant)
    low, high = np.split(np.array(variant.bev.pc_range), 2)
    kept = ((boxes.centers > low) & (boxes.centers < high)).all(-1) & (frame.annotations.points > 0)
    found = headings(torch.from_numpy(codes)).numpy()
    assert len(labels) > 5
    np.testing.assert_allclose(np.exp(1j * found), np.exp(1j * boxes.yaws[kept]), atol=1e-5)


def test_camera_centres_are_those_of_the_calibration_moved_by_the_ego(frame: Frame) -> None:
    """Cameras take their pictures at other times than the lidar: where they were then, in the lidar's frame of now."""
    lidar2global = frame.lidar2global
    wanted = [
        (lidar2global.inverse() @ c.ego2global @ c.calibration.sensor2ego).translation for c in frame.cameras
    ]
    projections = torch.from_numpy(frame_lidar2img(frame, load_variant("nano")))
    np.testing.assert_allclose(camera_centres(projections).numpy(), np.stack(wanted), atol=2e-3)


def test_a_heading_is_free_for_classes_whose_two_ends_look_alike() -> None:
    logits, angles = torch.randn(2, HEADINGS), torch.zeros(2)
    labels = torch.tensor([CLASSES.index("barrier"), CLASSES.index("traffic_cone")])
    assert float(heading_loss(logits, angles, labels)) == 0.0


@pytest.mark.parametrize(("velocity", "bin_number"), [((0.0, 0.2), 0), ((-1.0, 1.0), 1), ((8.0, -8.0), 4)])
def test_speed_bins_take_the_length_of_the_velocity(velocity: tuple[float, float], bin_number: int) -> None:
    codes = torch.zeros(1, 10)
    codes[0, 8:] = torch.tensor(velocity)
    logits = torch.full((1, len(SPEEDS) + 1), -50.0)
    logits[0, bin_number] = 50.0
    assert float(speed_loss(logits, codes, torch.tensor([CLASSES.index("car")]))) == 0.0


@pytest.mark.parametrize("turns", [-1, 0, 2])
def test_heading_bins_cover_the_full_turn_once(turns: int) -> None:
    car = torch.tensor([CLASSES.index("car")])
    for bin_number in range(HEADINGS):
        angle = torch.tensor([(bin_number + 0.5) * 2 * math.pi / HEADINGS + turns * 2 * math.pi])
        logits = torch.full((1, HEADINGS), -50.0)
        logits[0, bin_number] = 50.0
        assert float(heading_loss(logits, angle, car)) == 0.0


def test_all_losses_fall_when_the_heads_learn_one_frame(frame: Frame) -> None:
    variant = load_variant("nano")
    torch.manual_seed(0)
    heads = DenseHeads(variant)
    codes, labels = (torch.from_numpy(x) for x in frame_targets(frame, variant))
    targets = [Targets(labels, codes)]
    bev = torch.randn(1, variant.bev.cells, variant.transformer.channels)
    features = torch.randn(1, 6, variant.transformer.channels, 18, 32)
    projections = torch.from_numpy(frame_lidar2img(frame, variant))[None]
    positives = torch.tensor(float(len(labels)))
    optimizer = torch.optim.Adam(heads.parameters(), 3e-3)
    history: list[dict[str, float]] = []
    for _ in range(30):
        losses = heads.bev_losses(bev, targets, positives, CODE_WEIGHTS)
        losses |= heads.image_losses(features, projections, targets, positives, (144, 256))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        history.append({k: float(v.detach()) for k, v in losses.items()})
    assert set(history[0]) == {"bev_dense", "bev_heading", "bev_speed", "image_dense", "image_heading"}
    assert all(history[-1][k] < 0.6 * history[0][k] for k in history[0])
