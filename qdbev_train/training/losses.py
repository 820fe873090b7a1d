# SPDX-License-Identifier: Apache-2.0
"""Set prediction loss: Hungarian matching, focal and L1 loss of every decoder layer (BEVFormer, after DETR).

Letters: L decoder layers, B batch, Q queries, T boxes of one sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

FOCAL_ALPHA, FOCAL_GAMMA = 0.25, 2.0
CLASS_WEIGHT, BOX_WEIGHT = 2.0, 0.25
MATCHED_CODES = 8  # velocity takes no part in the matching


@dataclass(frozen=True)
class Targets:
    """The boxes of one sample: labels (T,) int64 and codes (T, 10) in metres of the LIDAR_TOP frame."""

    labels: Tensor
    codes: Tensor


def focal_loss(logits: Tensor, one_hot: Tensor) -> Tensor:
    """Elementwise sigmoid focal loss of logits (..., classes) against 0/1 targets of the same shape."""
    cross_entropy = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    p = logits.sigmoid()
    p_true = p * one_hot + (1 - p) * (1 - one_hot)
    alpha = FOCAL_ALPHA * one_hot + (1 - FOCAL_ALPHA) * (1 - one_hot)
    return alpha * (1 - p_true) ** FOCAL_GAMMA * cross_entropy


@torch.no_grad()
def match(logits: Tensor, codes: Tensor, targets: Targets) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment of one sample: query indices and box indices, both (min(Q, T),).

    logits (Q, classes), codes (Q, 10). Cost = 2.0 focal classification cost + 0.25 L1 distance of the first 8 codes.
    """
    p = logits.sigmoid()
    eps = 1e-12
    negative = -(1 - p + eps).log() * (1 - FOCAL_ALPHA) * p**FOCAL_GAMMA
    positive = -(p + eps).log() * FOCAL_ALPHA * (1 - p) ** FOCAL_GAMMA
    class_cost = (positive - negative)[:, targets.labels]
    box_cost = torch.cdist(codes[:, :MATCHED_CODES], targets.codes[:, :MATCHED_CODES], p=1)
    cost = CLASS_WEIGHT * class_cost + BOX_WEIGHT * box_cost
    # A diverging prediction must not stop the run: it is merely the most expensive partner.
    rows, columns = linear_sum_assignment(
        torch.nan_to_num(cost, nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    )
    device = logits.device
    return torch.as_tensor(rows, device=device), torch.as_tensor(columns, device=device)


Assignment = tuple[Tensor, Tensor]


def assigned_loss(
    logits: Tensor,
    codes: Tensor,
    targets: Sequence[Targets],
    assignments: Sequence[Assignment],
    positives: Tensor,
    code_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Focal and L1 loss of one layer for given assignments; logits (B, Q, classes), codes (B, Q, 10).

    `positives` is the number of assigned boxes in the whole batch (over all devices), at least 1; `code_weights` (10,)
    weigh the numbers of a box against each other.
    """
    one_hot = torch.zeros_like(logits)
    predicted, wanted = [], []
    for b, (target, (queries, boxes)) in enumerate(zip(targets, assignments, strict=True)):
        one_hot[b, queries, target.labels[boxes]] = 1.0
        predicted.append(codes[b, queries])
        wanted.append(target.codes[boxes])
    class_loss = focal_loss(logits, one_hot).sum() / positives
    found, true = torch.cat(predicted), torch.cat(wanted)
    difference = (found - true).abs() * code_weights
    # A box whose target isn't finite is left out whole, as in the original; so is a prediction that diverged.
    usable = torch.isfinite(true).all(-1, keepdim=True) & torch.isfinite(difference)
    difference = torch.where(usable, difference, torch.zeros_like(difference))
    return CLASS_WEIGHT * class_loss, BOX_WEIGHT * difference.sum() / positives


def detection_loss(
    class_logits: Tensor,
    codes: Tensor,
    targets: Sequence[Targets],
    positives: Tensor,
    code_weights: Tensor,
) -> dict[str, Tensor]:
    """Sum over the decoder layers, each matched on its own: class_logits (L, B, Q, classes), codes (L, B, Q, 10)."""
    class_total, box_total = class_logits.new_zeros(()), class_logits.new_zeros(())
    for layer_logits, layer_codes in zip(class_logits, codes, strict=True):
        pairs = [match(layer_logits[b], layer_codes[b], target) for b, target in enumerate(targets)]
        class_loss, box_loss = assigned_loss(
            layer_logits, layer_codes, targets, pairs, positives, code_weights
        )
        class_total, box_total = class_total + class_loss, box_total + box_loss
    return {"class": class_total, "box": box_total}
