# SPDX-License-Identifier: Apache-2.0
"""Queues of frames as BEVFormer trains on them, and what is remembered of them."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import load_variant
from qdbev_train.data.augment import Augmentation
from qdbev_train.data.dataset import Batch
from qdbev_train.data.frames import Frame
from qdbev_train.data.queues import QueueDataset
from qdbev_train.data.tables import load_scenes
from qdbev_train.model import build_model
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.config import TrainConfig, read_config
from qdbev_train.training.objective import Objective
from tests.small_dataset import VERSION

CONFIG = Path(__file__).parents[2] / "config" / "train" / "nano_town.yaml"
NANO = load_variant("nano")
LENGTH = 2
SHORT = replace(NANO, temporal=replace(NANO.temporal, queue_length=LENGTH))
Scenes = dict[str, tuple[Frame, ...]]


@pytest.fixture(scope="module")
def scenes(small_root: Path) -> Scenes:
    return load_scenes(small_root, VERSION)


def queues(scenes: Scenes, count: int, batch: int = 2, **options: Any) -> list[list[Batch]]:
    return list(islice(QueueDataset(scenes, SHORT, batch, seed=3, **options), count))


def place(scenes: Scenes) -> dict[str, tuple[str, int]]:
    """Token -> scene and position in it."""
    return {f.sample_token: (name, i) for name, frames in scenes.items() for i, f in enumerate(frames)}


def test_every_frame_is_a_target_once_an_epoch(scenes: Scenes) -> None:
    total = sum(map(len, scenes.values()))
    targets = [queue[-1].tokens[0] for queue in queues(scenes, total, batch=1)]
    assert sorted(targets) == sorted(place(scenes))


def test_a_queue_is_an_ordered_past_of_its_target_in_the_same_scene(scenes: Scenes) -> None:
    where = place(scenes)
    for queue in queues(scenes, 10):
        assert len(queue) == LENGTH
        for row in range(2):
            spots = [where[batch.tokens[row]] for batch in queue]
            target_scene, target = spots[-1]
            assert {scene for scene, _ in spots} == {target_scene}
            positions = [i for _, i in spots]
            assert positions == sorted(positions)
            assert target - positions[0] <= LENGTH


def test_one_frame_before_the_target_is_dropped_at_random(scenes: Scenes) -> None:
    where = place(scenes)
    gaps = set()
    for queue in queues(scenes, 30, batch=1):
        before, target = (where[batch.tokens[0]][1] for batch in queue)
        if target >= LENGTH:
            gaps.add(target - before)
    assert gaps == {1, 2}


def test_motion_is_that_between_the_frames_kept(scenes: Scenes) -> None:
    frames = {f.sample_token: f for scene in scenes.values() for f in scene}
    for queue in queues(scenes, 10, batch=1):
        previous, target = (frames[batch.tokens[0]] for batch in queue)
        moved = target.ego2global.translation - previous.ego2global.translation
        np.testing.assert_allclose(queue[-1].can_bus[0, :3].numpy(), moved, atol=1e-4)


def test_a_scene_with_too_short_a_past_begins_anew_with_its_first_frame(scenes: Scenes) -> None:
    where = place(scenes)
    starts = [q for q in queues(scenes, 30, batch=1) if where[q[-1].tokens[0]][1] == 0]
    assert starts
    for queue in starts:
        assert len({batch.tokens[0] for batch in queue}) == 1
        assert [bool(batch.is_first) for batch in queue] == [True] * LENGTH


def test_a_later_start_skips_whole_steps(scenes: Scenes) -> None:
    tokens = [[b.tokens for b in q] for q in queues(scenes, 6)]
    assert [[b.tokens for b in q] for q in queues(scenes, 2, start_step=4)] == tokens[4:]


def test_remembering_is_running_the_frames_one_after_another(scenes: Scenes) -> None:
    torch.manual_seed(0)
    variant = replace(SHORT, transformer=replace(SHORT.transformer, dropout=0.5))
    model = build_model(variant).train()
    first, second = queues(scenes, 1, batch=1)[0]
    second = replace(second, is_first=torch.tensor([False]))
    config = replace(read_config(CONFIG, TrainConfig), precision="float32")
    remembered = Objective(model, TrainingHelps(variant, 0, 0, False), config, None).remember([first, second])
    assert model.training
    assert not remembered.requires_grad
    model.eval()
    with torch.no_grad():
        bev = model(first.images, first.lidar2img, first.can_bus).bev
        bev = model(second.images, second.lidar2img, second.can_bus, bev).bev
    torch.testing.assert_close(remembered, bev)


def without_boxes(frame: Frame) -> Frame:
    nothing = np.zeros(len(frame.annotations.points), bool)
    annotations = frame.annotations
    return replace(
        frame,
        annotations=replace(
            annotations, boxes=annotations.boxes.select(nothing), points=annotations.points[nothing]
        ),
    )


def test_a_queue_with_a_frame_without_boxes_is_drawn_again(scenes: Scenes) -> None:
    """As in BEVFormer: one frame of the past is enough."""
    name = sorted(scenes)[0]
    bare = scenes[name][1]
    thinned = {**scenes, name: [without_boxes(f) if i == 1 else f for i, f in enumerate(scenes[name])]}
    drawn = queues(thinned, 40, batch=1)
    tokens = {batch.tokens[0] for queue in drawn for batch in queue}
    assert bare.sample_token not in tokens
    assert {f.sample_token for f in scenes[name]} - tokens == {bare.sample_token}
    with pytest.raises(DataError, match="no box to learn"):
        queues({name: [without_boxes(f) for f in scenes[name]]}, 1)


def test_processes_share_the_queues_of_a_step(scenes: Scenes) -> None:
    """Two processes with batch 1 see what one with batch 2 sees."""
    one = [[b.tokens for b in q] for q in queues(scenes, 5)]
    parts = [queues(scenes, 5, batch=1, rank=rank, processes=2) for rank in range(2)]
    two = [[a.tokens + b.tokens for a, b in zip(*q)] for q in zip(*parts)]
    assert two == one


def test_only_the_frame_learned_from_is_masked_and_all_pictures_are_distorted(scenes: Scenes) -> None:
    plain = queues(scenes, 1)[0]
    masked = queues(scenes, 1, augmentation=Augmentation(grid_mask=1.0))[0]
    assert torch.equal(plain[0].images, masked[0].images)
    blank = masked[1].images == 0
    assert 0.05 < blank.float().mean() < 0.6
    assert torch.equal(masked[1].images[~blank], plain[1].images[~blank])
    assert torch.equal(blank[0, 0, 0], blank[0, 5, 2])
    distorted = queues(scenes, 1, augmentation=Augmentation(photometric=True))[0]
    for before, after in zip(plain, distorted):
        changed = (before.images - after.images).abs().amax((2, 3, 4)) > 0
        assert changed.float().mean() > 0.8  # each picture has a chance of 1 in 16 or less to stay as it is


def test_a_queue_is_mirrored_and_turned_as_a_whole(scenes: Scenes) -> None:
    mirrored = queues(scenes, 2, augmentation=Augmentation(mirror=1.0))
    for before, after in zip(queues(scenes, 2), mirrored):
        for one, other in zip(before, after):
            assert torch.equal(one.images[:, 0], other.images[:, 0].flip(-1))  # CAM_FRONT
    turned = queues(scenes, 2, augmentation=Augmentation(turn=True))
    lengths = [q[-1].can_bus[:, :2].norm(dim=1) for q in turned]
    for before, length, after in zip(queues(scenes, 2), lengths, turned):
        torch.testing.assert_close(before[-1].can_bus[:, :2].norm(dim=1), length, atol=1e-4, rtol=0)
        assert not torch.equal(before[-1].can_bus[:, 16], after[-1].can_bus[:, 16])
