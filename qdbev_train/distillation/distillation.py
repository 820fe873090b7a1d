# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of a training step: teacher and student features in, one loss and what to log out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_train.data.dataset import Batch
from qdbev_train.distillation.config import METHODS, DistillationConfig
from qdbev_train.distillation.losses import bev_divergence, image_divergence, view_guided
from qdbev_train.distillation.teacher import Seen, Teacher
from qdbev_train.model import Output

# Steps between two measurements of the gradients, each of which costs most of a backward pass; how slowly they count.
MEASURE_EVERY = 50
MOMENTUM = 0.8


class Distillation(nn.Module):
    """Called once a step. Its state (the measured weight) belongs to a resumable run; the teacher is no part of it."""

    factor: Tensor
    calls: Tensor

    def __init__(self, teacher: Teacher, method: str, config: DistillationConfig) -> None:
        super().__init__()
        if method not in METHODS:
            raise ConfigError(f"distillation: method {method!r}; use one of {list(METHODS)}")
        self.teacher, self.method, self.config = teacher, method, config
        self.register_buffer("factor", torch.tensor(float("nan")))
        self.register_buffer("calls", torch.tensor(0))

    def forward(
        self,
        history: Sequence[Batch],
        batch: Batch,
        student: Output,
        task: Tensor,
        average: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log) of one step.

        student is the model's output for `batch`, task its own loss (a scalar with its graph), history the frames
        before it where each step brings its own past. `average` takes a number's mean over all devices.
        """
        loss, logged = self.divergence(self.teacher.see(history, batch), student)
        factor = self._measured(task, loss, student, average) if self.config.weighting == "gradient" else 1.0
        weight = torch.as_tensor(self.config.weight * factor, device=loss.device)
        return weight * loss, logged | {"raw": loss.detach(), "weight": weight.detach()}

    def divergence(self, teacher: Seen, student: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """The unweighted loss, averaged over the batch, and the mean of each of its factors."""
        config = self.config
        image = image_divergence(
            teacher.image_features,
            student.image_features,
            config.axis,
            config.temperature,
            per_pixel=self.method == "vgd",
        )
        bev = bev_divergence(teacher.bev, student.bev, config.axis, config.temperature)
        seen = teacher.mask.any(1)
        logged = {
            "image": image.detach().mean(),
            "bev": (bev.detach() * seen).sum() / seen.sum().clamp_min(1),
        }
        if self.method == "cwd_img":
            return image.mean(), logged
        if self.method == "cwd_bev":
            return bev.sum(1).mean(), logged
        per_sample = view_guided(image, bev, teacher.mask, config.combine, config.detach, config.floor)
        return per_sample.mean(), logged

    def _measured(
        self, task: Tensor, loss: Tensor, student: Output, average: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """How many times larger the task's gradient at the student's features is; a running mean, measured rarely."""
        if int(self.calls) % MEASURE_EVERY == 0:
            features = [student.bev, *student.image_features]
            task_norm, own_norm = (average(_gradient_norm(x, features)) for x in (task, loss))
            # A student that is its teacher has nothing to learn from it: no weight rather than an infinite one.
            ratio = torch.where(
                own_norm > 1e-12 * task_norm, task_norm / own_norm, torch.zeros_like(own_norm)
            )
            old = ratio if bool(self.factor.isnan()) else self.factor
            self.factor.copy_(MOMENTUM * old + (1 - MOMENTUM) * ratio)
        self.calls += 1
        return self.factor


def _gradient_norm(loss: Tensor, features: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    return torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt()
