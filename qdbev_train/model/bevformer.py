# SPDX-License-Identifier: Apache-2.0
"""BEVFormer, assembled: images of N cameras and the previous bird's-eye map in, boxes and the new map out.

Dimension letters, used in every shape of this package:
  B batch · N cameras (6) · C channels · H, W padded picture · h, w BEV grid, cells = h * w · h_l, w_l feature level
  Q object queries · G extra queries in training · L decoder layers · P pillar points of a cell
  M cells that the busiest camera sees, padded · K cameras that a cell can be seen by
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdbev_ros.core.ego_motion import bev_shift, rotation_sources
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.projection import VisibleCells, visible_cells
from qdbev_ros.core.variant import CAMERAS, Variant, load_variant
from qdbev_train.model.decoder import ExtraQueries
from qdbev_train.model.head import Head
from qdbev_train.model.mobilenet import MobileNetV2
from qdbev_train.model.neck import FPN
from qdbev_train.model.resnet import ResNet


class Output(NamedTuple):
    """What one call gives.

    image_features [(B, N, C, h_l, w_l)] neck output, finest level first · bev (B, cells, C), the next call's prev_bev
    class_logits (L, B, Q, 10) · boxes (L, B, Q, 10): cx, cy, log w, log l, cz, log h, sin yaw, cos yaw, vx, vy in
    metres and m/s of the LIDAR_TOP frame (yaw in the sense of core.boxes). Q + G queries where extra ones were given.
    """

    image_features: list[Tensor]
    bev: Tensor
    class_logits: Tensor
    boxes: Tensor


class EncoderInputs(NamedTuple):
    """The arguments of `BEVFormer.forward_tensors` between the pictures and the extra queries, in its order."""

    points: Tensor
    cells: Tensor
    slots: Tensor
    weights: Tensor
    can_bus: Tensor
    prev_bev: Tensor
    shift: Tensor
    use_prev: Tensor


@dataclass(frozen=True)
class CameraTables:
    """`core.projection.VisibleCells` of B frames, padded to one shape (letters as there, with B in front)."""

    points: Tensor  # (B, N, M, P, 2)
    cells: Tensor  # (B, N, M)
    slots: Tensor  # (B, cells, K)
    weights: Tensor  # (B, cells, K)
    mask: Tensor  # (B, N, cells) bool


def collate_tables(elements: list[VisibleCells]) -> CameraTables:
    """Pads M and K to the longest; slots count rows of the (N, M) list, so they are renumbered."""
    n, n_cells = elements[0].mask.shape
    m = max(e.cells.shape[1] for e in elements)
    k = max(e.slots.shape[1] for e in elements)
    points, cells, slots, weights = [], [], [], []
    for e in elements:
        own = e.cells.shape[1]
        points.append(np.pad(e.points, ((0, 0), (0, m - own), (0, 0), (0, 0))))
        cells.append(np.pad(e.cells, ((0, 0), (0, m - own)), constant_values=n_cells))
        # Row n * own + i becomes n * m + i; "no camera", N * own, becomes N * m by the same rule.
        renumbered = e.slots // own * m + e.slots % own
        more = ((0, 0), (0, k - e.slots.shape[1]))
        slots.append(np.pad(renumbered, more, constant_values=n * m))
        weights.append(np.pad(e.weights, more))
    stacked = (np.stack(x) for x in (points, cells, slots, weights, [e.mask for e in elements]))
    return CameraTables(*(torch.from_numpy(x) for x in stacked))


class BEVFormer(nn.Module):
    """The whole network; its state_dict has the keys and shapes of released BEVFormer checkpoints."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        build = ResNet if variant.backbone.kind == "resnet" else MobileNetV2
        self.img_backbone = build(variant.backbone)
        channels = variant.transformer.channels
        self.img_neck = FPN(self.img_backbone.out_channels, channels, variant.backbone.neck_levels)
        self.pts_bbox_head = Head(variant)

    def forward(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor | None = None,
        has_prev: Tensor | None = None,
        extra_queries: ExtraQueries | None = None,
    ) -> Output:
        """One frame of B vehicles.

        images (B, N, 3, H, W) normalised, padded, of any size · lidar2img (B, N, 4, 4) at the padded scale, zeros for
        an absent camera · can_bus (B, 18), deltas applied · prev_bev (B, cells, C) as the last call returned it, or
        None · has_prev (B,) bool: which elements have a history; all of them by default.
        Raises DataError where a shape does not fit.
        """
        self._check(images, lidar2img, can_bus, prev_bev)
        tables = self.camera_tables(lidar2img, images.shape[-2:])
        inputs = self.encoder_inputs(images, tables, can_bus, prev_bev, has_prev)
        return self.forward_tensors(images, *inputs, extra_queries=extra_queries)

    def forward_tensors(
        self,
        images: Tensor,
        points: Tensor,
        cells: Tensor,
        slots: Tensor,
        weights: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor,
        shift: Tensor,
        use_prev: Tensor,
        extra_queries: ExtraQueries | None = None,
    ) -> Output:
        """The tensor graph alone, which is what gets exported (with B = 1; M and K vary).

        images (B, N, 3, H, W) · points (B, N, M, P, 2) · cells (B, N, M) · slots, weights (B, cells, K) ·
        can_bus (B, 18) · prev_bev (B, cells, C) already turned, anything where there is none · shift (B, 2) as a
        fraction of the map · use_prev (B,) 0 or 1
        """
        features = self.image_features(images)
        bev = self.pts_bbox_head.encode(
            features, points, cells, slots, weights, can_bus, prev_bev, shift, use_prev
        )
        class_logits, boxes = self.pts_bbox_head.decode(bev, extra_queries)
        return Output(features, bev, class_logits, boxes)

    def remember(
        self,
        images: Tensor,
        lidar2img: Tensor,
        can_bus: Tensor,
        prev_bev: Tensor | None,
        has_prev: Tensor | None,
    ) -> Tensor:
        """The BEV map (B, cells, C) that a call would return, without the decoder: all that a past frame is for."""
        tables = self.camera_tables(lidar2img, images.shape[-2:])
        inputs = self.encoder_inputs(images, tables, can_bus, prev_bev, has_prev)
        return self.pts_bbox_head.encode(self.image_features(images), *inputs)

    def encoder_inputs(
        self,
        images: Tensor,
        tables: CameraTables,
        can_bus: Tensor,
        prev_bev: Tensor | None,
        has_prev: Tensor | None,
    ) -> EncoderInputs:
        """What the encoder takes beside image features, on the device of `images`; arguments as in a call."""
        turned, shift, use_prev = self.align_history(can_bus, prev_bev, has_prev)
        device = images.device
        return EncoderInputs(
            tables.points.to(device),
            tables.cells.to(device),
            tables.slots.to(device),
            tables.weights.to(device),
            can_bus.to(images.dtype),
            turned,
            shift,
            use_prev,
        )

    def image_features(self, images: Tensor) -> list[Tensor]:
        """(B, N, 3, H, W) -> [(B, N, C, h_l, w_l)], finest level first."""
        batch, cameras = images.shape[:2]
        flat = images.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        features = self.img_neck(self.img_backbone(flat))
        return [f.reshape(batch, cameras, *f.shape[1:]) for f in features]

    def camera_tables(self, lidar2img: Tensor, size: Sequence[int] | None = None) -> CameraTables:
        """Which BEV cells each camera sees, from lidar2img (B, N, 4, 4); computed by numpy, returned on the CPU.

        `size`: (H, W) of the padded pictures where it isn't the variant's own.
        """
        image = self.variant.image
        if size is not None:
            image = replace(image, height=size[0], width=size[1], pad_divisor=1)
        matrices = lidar2img.detach().cpu().numpy()
        return collate_tables([visible_cells(m, self.variant.bev, image) for m in matrices])

    def align_history(
        self, can_bus: Tensor, prev_bev: Tensor | None, has_prev: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Turns the previous BEV into this frame's axes: (turned (B, cells, C), shift (B, 2), use_prev (B,)).

        Never writes to `prev_bev`; without one the result is zeros and use_prev is 0.
        """
        batch, bev, temporal = len(can_bus), self.variant.bev, self.variant.temporal
        device = can_bus.device
        if prev_bev is None:
            empty = torch.zeros(batch, bev.cells, self.variant.transformer.channels, device=device)
            return empty, torch.zeros(batch, 2, device=device), torch.zeros(batch, device=device)
        vectors: NDArray[np.float32] = can_bus.detach().cpu().numpy()
        shift = torch.from_numpy(np.stack([bev_shift(v, bev) for v in vectors])).to(device)
        sources = np.stack([rotation_sources(float(v[17]), bev, temporal.rotate_center) for v in vectors])
        index = torch.from_numpy(sources).to(device)[..., None].expand_as(prev_bev)
        turned = prev_bev.gather(1, index.clamp(min=0)).masked_fill(index < 0, 0.0)
        use_prev = torch.ones(batch, device=device) if has_prev is None else has_prev.to(device).float()
        return turned, shift, use_prev

    def freeze_backbone(self, stages: int) -> None:
        """Stops training of the stem and the first `stages` stages; BEVFormer's recipe is 1.

        BatchNorm is frozen everywhere anyway.
        """
        for modules in self.img_backbone.stages()[: stages + 1]:
            for module in modules:
                module.requires_grad_(False)

    def _check(self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, prev_bev: Tensor | None) -> None:
        batch, n = len(images), len(CAMERAS)
        wanted = {
            # Any height and width: as the original, the network takes pictures of other sizes than its variant's.
            "images": (images, (batch, n, 3, *images.shape[3:5])),
            "lidar2img": (lidar2img, (batch, n, 4, 4)),
            "can_bus": (can_bus, (batch, 18)),
            "prev_bev": (prev_bev, (batch, self.variant.bev.cells, self.variant.transformer.channels)),
        }
        for name, (tensor, shape) in wanted.items():
            if tensor is not None and tuple(tensor.shape) != shape:
                raise DataError(f"{name} has shape {tuple(tensor.shape)}, {self.variant.name} takes {shape}")


def build_model(variant: str | Path | Variant) -> BEVFormer:
    """A freshly initialised model of a variant, given by name, YAML path or value."""
    return BEVFormer(variant if isinstance(variant, Variant) else load_variant(variant))
