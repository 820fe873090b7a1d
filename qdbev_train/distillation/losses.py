# SPDX-License-Identifier: Apache-2.0
"""View-guided distillation (QD-BEV, Zhang et al. 2023) and channel-wise distillation (Shu et al. 2021).

Every sample keeps its own values until the very end: averaged before the product, the cameras of one sample would weigh
the cells of another. Letters: B batch, N cameras, C channels, h_l w_l a level's map, cells = h * w of the BEV grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# What a softmax runs over: in image maps (B, N, C, h_l, w_l), and in BEV maps (B, cells, C).
IMAGE_DIMS: dict[str, tuple[int, ...]] = {"channel": (2,), "spatial": (3, 4)}
BEV_DIMS: dict[str, tuple[int, ...]] = {"channel": (2,), "spatial": (1,)}


def mean_target(maps: Sequence[Tensor], dims: tuple[int, ...], temperature: float) -> Tensor:
    """A map whose softmax (of map / tau over `dims`) is the mean of those of `maps`; a single map is its own."""
    if len(maps) == 1:
        return maps[0]
    scaled = [x.float() / temperature for x in maps]
    log_p = torch.stack([x - x.logsumexp(dims, keepdim=True) for x in scaled])
    return temperature * (log_p.logsumexp(0) - math.log(len(maps)))


def divergence_terms(teacher: Tensor, student: Tensor, dims: tuple[int, ...], temperature: float) -> Tensor:
    """tau^2 p (log p - log q), shaped as the inputs; p, q: softmax of teacher / tau and student / tau over `dims`.

    Summed over `dims` it is tau^2 D_KL(p, q), which is never negative; single terms can be.
    """
    scaled_teacher, scaled_student = teacher.float() / temperature, student.float() / temperature
    log_p = scaled_teacher - scaled_teacher.logsumexp(dims, keepdim=True)
    log_q = scaled_student - scaled_student.logsumexp(dims, keepdim=True)
    return temperature**2 * log_p.exp() * (log_p - log_q)


def image_divergence(
    teacher: Sequence[Tensor], student: Sequence[Tensor], axis: str, temperature: float, per_pixel: bool
) -> Tensor:
    """(B, N): L_img of every camera; maps [(B, N, C, h_l, w_l)], levels averaged.

    tau^2 / (W H C) D_KL as QD-BEV has it, or without W H where not `per_pixel`, as channel-wise distillation has it.
    """
    levels = []
    for wanted, got in zip(teacher, student, strict=True):
        channels, height, width = wanted.shape[2:]
        terms = divergence_terms(wanted, got, IMAGE_DIMS[axis], temperature).sum((2, 3, 4))
        levels.append(terms / (channels * height * width if per_pixel else channels))
    return torch.stack(levels).mean(0)


def bev_divergence(teacher: Tensor, student: Tensor, axis: str, temperature: float) -> Tensor:
    """(B, cells): L_bev of every cell, tau^2 / C D_KL; maps (B, cells, C).

    Over the channels of a cell it is not negative. Over space it is the cell's share of what is not negative in sum.
    """
    return divergence_terms(teacher, student, BEV_DIMS[axis], temperature).sum(2) / teacher.shape[2]


def view_guided(
    image: Tensor,
    bev: Tensor,
    mask: Tensor,
    combine: str = "product",
    detach: str = "none",
    floor: float = 0.0,
) -> Tensor:
    """(B,): L_vgd of every sample, the sum over cameras n and cells i of (M L_img(n)) L_bev(i).

    image (B, N) and bev (B, cells) as above, mask (B, N, cells) 1 where camera n sees cell i. So a cell's divergence is
    weighted by how far the images that feed it are off: w(i) = floor + sum over the cameras that see it of L_img(n).
    combine "sum" has L_img(n) + L_bev(i) in place of the product. Cells that no camera sees contribute nothing.
    """
    image = image.detach() if detach == "image" else image
    bev = bev.detach() if detach == "bev" else bev
    seen = mask.to(bev.dtype)
    if combine == "sum":
        return (seen * (image[:, :, None] + bev[:, None])).sum((1, 2))
    weights = torch.einsum("bn,bni->bi", image, seen) + floor * seen.amax(1)
    return (weights * bev).sum(1)
