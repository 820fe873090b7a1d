# SPDX-License-Identifier: Apache-2.0
"""Streaming batches: shapes, order, resumption, and that they show what the node would see."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.pipeline import Pipeline
from qdbev_ros.core.variant import load_variant
from qdbev_train.data.augment import Augmentation
from qdbev_train.data.dataset import (
    Batch,
    StreamDataset,
    frame_images,
    frame_lidar2img,
    frame_targets,
)
from qdbev_train.data.frames import Frame, mirrored
from qdbev_train.data.tables import load_scenes
from qdbev_train.evaluation.inference import pipeline_frame
from tests.small_dataset import VERSION

NANO = load_variant("nano")
Scenes = dict[str, tuple[Frame, ...]]


@pytest.fixture(scope="module")
def scenes(small_root: Path) -> Scenes:
    return load_scenes(small_root, VERSION)


def batches(scenes: Scenes, count: int, **options: Any) -> list[Batch]:
    settings = {"batch": 2, "seed": 0, "workers": 1} | options
    return list(islice(StreamDataset(scenes, NANO, **settings), count))


def test_shapes_and_types(scenes: Scenes) -> None:
    batch = batches(scenes, 1)[0]
    assert batch.images.shape == (2, 6, 3, 144, 256)
    assert batch.lidar2img.shape == (2, 6, 4, 4)
    assert batch.can_bus.shape == (2, 18)
    assert {t.dtype for t in (batch.images, batch.lidar2img, batch.can_bus)} == {torch.float32}
    assert batch.is_first.tolist() == [True, True]
    # The cone has no lidar point, the stroller no class: car and pedestrian remain.
    assert [c.shape for c in batch.codes] == [(2, 10), (2, 10)]
    assert [label.tolist() for label in batch.labels] == [[0, 8], [0, 8]]


def test_each_row_continues_its_scene_and_says_where_it_starts_anew(scenes: Scenes) -> None:
    rows: list[list[tuple[str, bool]]] = [[], []]
    for batch in batches(scenes, 20):
        for row, token, first in zip(rows, batch.tokens, batch.is_first.tolist()):
            row.append((token, first))
    for row in rows:
        for (before, _), (now, first) in pairwise(row):
            scene, index = now.rsplit("-", 1)
            if first:
                assert index == "0"
            else:
                assert before == f"{scene}-{int(index) - 1}"
        assert sum(first for _, first in row) >= 5


def test_every_scene_is_visited_equally_often(scenes: Scenes) -> None:
    tokens = [token for batch in batches(scenes, 41) for token in batch.tokens]
    counts = {name: sum(token.startswith(name) for token in tokens) for name in scenes}
    assert abs(counts["scene-0103"] - counts["scene-0916"]) <= 8


def test_the_order_follows_from_the_seed(scenes: Scenes) -> None:
    tokens = [b.tokens for b in batches(scenes, 12)]
    assert [b.tokens for b in batches(scenes, 12, workers=3)] == tokens
    assert [b.tokens for b in batches(scenes, 12, seed=1)] != tokens


@pytest.mark.parametrize("start", [1, 7, 10])
def test_a_resumed_run_goes_on_with_the_same_frames_motion_and_augmentation(
    scenes: Scenes, start: int
) -> None:
    settings = {"augmentation": Augmentation(mirror=0.5, turn=True, photometric=True)}
    whole, resumed = (
        batches(scenes, 12, **settings),
        batches(scenes, 12 - start, start_step=start, **settings),
    )
    for a, b in zip(whole[start:], resumed, strict=True):
        assert a.tokens == b.tokens
        assert torch.equal(a.is_first, b.is_first)
        assert torch.equal(a.can_bus, b.can_bus)
        assert torch.equal(a.images, b.images)


def test_processes_share_the_streams(scenes: Scenes) -> None:
    """Two processes with batch 1 see what one with batch 2 sees."""
    parts = [batches(scenes, 12, batch=1, rank=rank, processes=2) for rank in range(2)]
    for whole, *rows in zip(batches(scenes, 12), *parts, strict=True):
        assert whole.tokens == [row.tokens[0] for row in rows]
        assert torch.equal(whole.can_bus, torch.cat([row.can_bus for row in rows]))
        assert torch.equal(whole.is_first, torch.cat([row.is_first for row in rows]))


def test_light_and_mirror_follow_from_the_seed_too(scenes: Scenes) -> None:
    augmentation = Augmentation(mirror=0.5, turn=True, light=0.3)
    one, two = (batches(scenes, 6, augmentation=augmentation, workers=w) for w in (1, 3))
    for a, b in zip(one, two):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.can_bus, b.can_bus)
    plain = batches(scenes, 6)
    assert not torch.equal(one[0].images, plain[0].images)


def test_what_is_trained_on_is_what_the_pipeline_feeds_its_engine(real_frames: Any) -> None:
    """Images, projections and can_bus of three consecutive frames, bit for bit."""
    fed: list[tuple[Any, ...]] = []

    class Probe:
        variant = NANO

        def infer(self, images: Any, lidar2img: Any, can_bus: Any, prev_bev: Any) -> Any:
            fed.append((images.copy(), lidar2img, can_bus, prev_bev is None))
            zeros = np.zeros((1, 10), np.float32)
            return type("Output", (), {"class_logits": zeros, "boxes": zeros, "bev": np.zeros((1600, 96))})

    pipeline = Pipeline(Probe())  # type: ignore[arg-type]
    for frame in real_frames[:3]:
        pipeline.run(pipeline_frame(frame))
    pipeline.close()
    for batch, (images, lidar2img, can_bus, first) in zip(batches({"s": real_frames}, 3, batch=1), fed):
        np.testing.assert_array_equal(batch.images[0].numpy(), images)
        np.testing.assert_array_equal(batch.lidar2img[0].numpy(), lidar2img)
        np.testing.assert_array_equal(batch.can_bus[0].numpy(), can_bus)
        assert bool(batch.is_first[0]) is first


def test_a_flipped_picture_belongs_to_the_mirrored_frame(real_frames: Any) -> None:
    """Camera by camera the mirrored input is the other side's picture, flipped."""
    frame = real_frames[0]
    plain, flipped = frame_images(frame, NANO), frame_images(mirrored(frame), NANO, flip=True)
    np.testing.assert_array_equal(flipped[0], plain[0][:, :, ::-1])  # CAM_FRONT
    np.testing.assert_array_equal(flipped[1], plain[2][:, :, ::-1])  # CAM_FRONT_RIGHT from CAM_FRONT_LEFT
    assert frame_lidar2img(mirrored(frame), NANO).shape == (6, 4, 4)


def test_targets_are_valid_boxes_inside_the_map(real_frames: Any) -> None:
    for frame in real_frames[::10]:
        codes, labels = frame_targets(frame, NANO)
        boxes, points = frame.annotations.boxes, frame.annotations.points
        wanted = (np.abs(boxes.centers[:, :2]) < 51.2).all(-1) & (points > 0)
        assert len(codes) == len(labels) == wanted.sum()
        assert np.abs(codes[:, :2]).max() < 51.2
        assert np.isfinite(codes).all()


def test_no_scene_and_a_lost_picture_are_named(scenes: Scenes, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no scene"):
        StreamDataset({}, NANO, 1, 0)
    frame = scenes["scene-0103"][0]
    lost = replace(frame.cameras[0], image=tmp_path / "lost.jpg")
    broken = replace(frame, cameras=(lost, *frame.cameras[1:]))
    with pytest.raises(DataError, match=r"lost\.jpg"):
        batches({"s": (broken,)}, 1)
