# SPDX-License-Identifier: Apache-2.0
"""What a student's training has beside that of a float model: a teacher's guidance, and ranges that come to rest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdbev_train.data.dataset import Batch
from qdbev_train.distillation import Distillation
from qdbev_train.model import BEVFormer, Output
from qdbev_train.quantization import freeze_ranges


class StudentLoss:
    """The `ExtraLoss` of a student.

    freeze_after: steps of this stage after which running ranges stand still.
    """

    def __init__(self, model: BEVFormer, distillation: Distillation | None, freeze_after: int) -> None:
        self.model, self.distillation, self.freeze_after = model, distillation, freeze_after
        self._steps = 0

    def remember(self, history: Sequence[Batch], device: torch.device) -> None:
        """The past frames of a queue, for the teacher."""
        if self.distillation is not None:
            self.distillation.remember(history, device)

    def __call__(
        self, out: Output, images: Tensor, lidar2img: Tensor, can_bus: Tensor, has_prev: Tensor, task: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted distillation loss, where there is one, and its numbers; `task` is the loss of detection."""
        self._steps += 1
        if self._steps == self.freeze_after:
            freeze_ranges(self.model)
        if self.distillation is None:
            return {}, {}
        seen = self.distillation.see(images, lidar2img, can_bus, has_prev)
        loss, logged = self.distillation.loss(seen, out, task)
        return {"distillation": loss}, {f"distillation/{name}": value for name, value in logged.items()}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, of this process."""
        own = {"steps": torch.tensor(self._steps)}
        return own if self.distillation is None else own | self.distillation.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._steps = int(state["steps"])
        if self._steps >= self.freeze_after:
            freeze_ranges(self.model)
        if self.distillation is not None:
            self.distillation.load_state(state)
