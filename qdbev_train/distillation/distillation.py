# SPDX-License-Identifier: Apache-2.0
"""The distillation loss of a training step: teacher and student features in, one loss and what to log out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qdbev_ros.core.errors import ConfigError
from qdbev_train.data.dataset import Batch
from qdbev_train.distillation.config import METHODS, DistillationConfig
from qdbev_train.distillation.losses import (
    BEV_DIMS,
    IMAGE_DIMS,
    bev_divergence,
    image_divergence,
    mean_target,
    view_guided,
)
from qdbev_train.distillation.teacher import Seen, Teacher
from qdbev_train.model import Output

# Steps between two measurements of the gradients, each of which costs the heads' backward pass; how slowly they count.
# The divergence falls several times in a student's first hundred steps: a slower mean would be left far behind.
MEASURE_EVERY = 10
MOMENTUM = 0.5


class Distillation:
    """Called once a step. What a resumed run needs of it is in `state`; the teachers' weights are no part of that.

    teachers: one, or an ensemble; each keeps its own memory.
    """

    def __init__(self, teachers: Sequence[Teacher], method: str, config: DistillationConfig) -> None:
        if method not in METHODS:
            raise ConfigError(f"distillation: method {method!r}; use one of {list(METHODS)}")
        self.teachers, self.method, self.config = tuple(teachers), method, config
        self._factor: Tensor | None = None
        self._calls = 0

    def remember(self, history: Sequence[Batch], device: torch.device) -> None:
        """The past frames of a queue, for every teacher's memory."""
        for teacher in self.teachers:
            teacher.remember(history, device)

    def see(self, images: Tensor, lidar2img: Tensor, can_bus: Tensor, has_prev: Tensor | None) -> Seen:
        """What a frame's student is to match: the teacher's maps, or such as give the mean of all teachers' softmax."""
        seen = [teacher.see(images, lidar2img, can_bus, has_prev) for teacher in self.teachers]
        axis, tau = self.config.axis, self.config.temperature
        levels = zip(*(s.image_features for s in seen), strict=True)
        return Seen(
            [mean_target(level, IMAGE_DIMS[axis], tau) for level in levels],
            mean_target([s.bev for s in seen], BEV_DIMS[axis], tau),
            seen[0].mask,  # the calibration's, and so the same for all
        )

    def loss(self, seen: Seen, student: Output, task: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """(weighted loss, numbers to log) of one step.

        seen: what `see` gave · student: the model's output for the same frame · task: its own loss, a scalar with
        its graph.
        """
        raw, logged = self.divergence(seen, student)
        weight = torch.as_tensor(self.config.weight, device=raw.device)
        if self.config.weighting == "gradient":
            weight = weight * self._measured(task, raw, student)
        return weight * raw, logged | {"raw": raw.detach(), "weight": weight}

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, of this process."""
        memories = {_memory(i): teacher.memory for i, teacher in enumerate(self.teachers)}
        kept = {"calls": torch.tensor(self._calls), "factor": self._factor} | memories
        return {key: value for key, value in kept.items() if value is not None}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self._calls = int(state["calls"])
        self._factor = state.get("factor")
        for i, teacher in enumerate(self.teachers):
            teacher.memory = state.get(_memory(i))

    def divergence(self, seen: Seen, student: Output) -> tuple[Tensor, dict[str, Tensor]]:
        """The unweighted loss, averaged over the batch, and the mean of each of its factors."""
        config = self.config
        image = image_divergence(
            seen.image_features,
            student.image_features,
            config.axis,
            config.temperature,
            per_pixel=self.method == "vgd",
        )
        bev = bev_divergence(seen.bev, student.bev, config.axis, config.temperature)
        covered = seen.mask.any(1)
        logged = {
            "image": image.detach().mean(),
            "bev": (bev.detach() * covered).sum() / covered.sum().clamp_min(1),
        }
        if self.method == "cwd_img":
            return image.mean(), logged
        if self.method == "cwd_bev":
            return bev.sum(1).mean(), logged
        per_sample = view_guided(image, bev, seen.mask, config.combine, config.detach, config.floor)
        return per_sample.mean(), logged

    def _measured(self, task: Tensor, loss: Tensor, student: Output) -> Tensor:
        """How many times larger the task's gradient at the student's features is; a running mean, measured rarely.

        On several devices each has its own: their gradients are averaged with the weights already in them.
        """
        if self._calls % MEASURE_EVERY == 0:
            features = [student.bev, *student.image_features]
            task_norm, own_norm = _gradient_norm(task, features), _gradient_norm(loss, features)
            # A student that is its teacher has nothing to learn from it: no weight rather than an infinite one.
            ratio = torch.where(
                own_norm > 1e-12 * task_norm, task_norm / own_norm, torch.zeros_like(own_norm)
            )
            old = ratio if self._factor is None else self._factor.to(ratio.device)
            self._factor = MOMENTUM * old + (1 - MOMENTUM) * ratio
        self._calls += 1
        assert self._factor is not None
        return self._factor.to(loss.device)


def _memory(number: int) -> str:
    """The key of a teacher's memory in the saved state."""
    return f"memory_{number}" if number else "memory"


def _gradient_norm(loss: Tensor, features: Sequence[Tensor]) -> Tensor:
    gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    return torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt()
