# SPDX-License-Identifier: Apache-2.0
"""Matching and losses of the set prediction head."""

from __future__ import annotations

import itertools

import pytest
import torch

from qdbev_train.training.dense_heads import draw_gaussians, gaussian_focal_loss
from qdbev_train.training.losses import Targets, detection_loss, focal_loss, match

# Position, size and angle count fully, velocity a fifth.
BEVFORMER_WEIGHTS = torch.tensor([1.0] * 8 + [0.2] * 2)


def make_targets(boxes: int, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(boxes, 10, generator=generator)
    codes[:, :2] *= 20
    return Targets(torch.randint(10, (boxes,), generator=generator), codes)


def test_focal_loss_equals_its_textbook_form() -> None:
    logits = torch.tensor([-2.0, 0.5, 3.0])
    p = logits.sigmoid()
    positive = -0.25 * (1 - p) ** 2 * p.log()
    negative = -0.75 * p**2 * (1 - p).log()
    torch.testing.assert_close(focal_loss(logits, torch.ones(3)), positive)
    torch.testing.assert_close(focal_loss(logits, torch.zeros(3)), negative)


def test_matching_finds_the_cheapest_assignment_of_all() -> None:
    torch.manual_seed(1)
    logits, codes, targets = torch.randn(4, 10), torch.randn(4, 10) * 5, make_targets(3)

    def cost(queries: tuple[int, ...]) -> float:
        total = 0.0
        for box, query in enumerate(queries):
            p = logits[query, targets.labels[box]].sigmoid()
            focal = -0.25 * (1 - p) ** 2 * p.log() + 0.75 * p**2 * (1 - p).log()
            total += float(2.0 * focal + 0.25 * (codes[query, :8] - targets.codes[box, :8]).abs().sum())
        return total

    best = min(itertools.permutations(range(4), 3), key=cost)
    queries, boxes = match(logits, codes, targets)
    found = tuple(int(queries[(boxes == box).nonzero()]) for box in range(3))
    assert found == best


def test_velocity_takes_no_part_in_the_matching() -> None:
    targets = make_targets(2)
    logits, codes = torch.zeros(2, 10), targets.codes.clone()
    codes[:, 8:] = codes[:, 8:].flip(0) * 100
    queries, boxes = match(logits, codes, targets)
    assert queries.tolist() == boxes.tolist()


def test_a_perfect_prediction_has_no_box_loss_and_almost_no_class_loss() -> None:
    targets = make_targets(3)
    logits = torch.full((1, 1, 3, 10), -12.0)
    logits[0, 0, torch.arange(3), targets.labels] = 12.0
    losses = detection_loss(
        logits, targets.codes[None, None], [targets], torch.tensor(3.0), BEVFORMER_WEIGHTS
    )
    assert float(losses["box"]) == 0.0
    assert float(losses["class"]) < 1e-6


def test_velocity_weighs_a_fifth() -> None:
    targets = make_targets(1)
    logits = torch.zeros(1, 1, 1, 10)
    moved, faster = targets.codes.clone(), targets.codes.clone()
    moved[:, 0] += 1.0
    faster[:, 8] += 1.0
    one = torch.tensor(1.0)
    position = float(detection_loss(logits, moved[None, None], [targets], one, BEVFORMER_WEIGHTS)["box"])
    velocity = float(detection_loss(logits, faster[None, None], [targets], one, BEVFORMER_WEIGHTS)["box"])
    assert position == pytest.approx(0.25)
    assert velocity == pytest.approx(0.05)


def test_every_layer_is_matched_on_its_own() -> None:
    targets = make_targets(2)
    swapped = targets.codes.flip(0)
    logits = torch.zeros(2, 1, 2, 10)
    losses = detection_loss(
        logits,
        torch.stack([targets.codes, swapped])[:, None],
        [targets],
        torch.tensor(2.0),
        BEVFORMER_WEIGHTS,
    )
    assert float(losses["box"]) == 0.0


def test_samples_without_boxes_teach_only_the_background() -> None:
    empty = Targets(torch.zeros(0, dtype=torch.long), torch.zeros(0, 10))
    logits = torch.zeros(1, 1, 4, 10, requires_grad=True)
    losses = detection_loss(logits, torch.zeros(1, 1, 4, 10), [empty], torch.tensor(1.0), BEVFORMER_WEIGHTS)
    losses["class"].backward()
    assert float(losses["box"]) == 0.0
    assert logits.grad is not None
    assert bool((logits.grad > 0).all())


def test_a_box_whose_target_is_not_finite_is_left_out_whole() -> None:
    """A box of no width: the logarithm of its size is minus infinity."""
    targets = make_targets(2)
    codes = targets.codes.clone() + 1.0
    targets.codes[0, 2] = -torch.inf
    logits = torch.full((1, 1, 2, 10), -12.0)
    logits[0, 0, torch.arange(2), targets.labels] = 12.0  # so that each query keeps its box
    loss = detection_loss(logits, codes[None, None], [targets], torch.tensor(2.0), BEVFORMER_WEIGHTS)["box"]
    assert float(loss) == pytest.approx(0.25 * (8 + 2 * 0.2) / 2)


def test_a_prediction_that_diverged_does_not_stop_the_run() -> None:
    targets = make_targets(2)
    codes = torch.full((1, 1, 3, 10), float("nan"))
    losses = detection_loss(torch.zeros(1, 1, 3, 10), codes, [targets], torch.tensor(2.0), BEVFORMER_WEIGHTS)
    assert float(losses["box"]) == 0.0


def test_heat_peaks_at_the_cell_of_the_centre() -> None:
    heat = draw_gaussians((2, 4, 6), torch.tensor([1]), torch.tensor([[4.7, 2.2]]), 0.8)
    assert float(heat[1, 2, 4]) == 1.0
    assert float(heat[0].max()) == 0.0
    assert float((heat[1] == 1.0).sum()) == 1.0


def test_the_heat_loss_is_least_for_the_right_map() -> None:
    heat = draw_gaussians((1, 5, 5), torch.tensor([0]), torch.tensor([[2.0, 2.0]]), 0.5)
    right = torch.where(heat == 1, 8.0, -8.0)
    assert float(gaussian_focal_loss(right, heat)) < 0.01
    assert float(gaussian_focal_loss(-right, heat)) > 10
