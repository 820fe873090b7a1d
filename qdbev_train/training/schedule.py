# SPDX-License-Identifier: Apache-2.0
"""How long a run is, and the learning rate of each of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qdbev_train.training.config import TrainConfig

FIRST, LAST = 1 / 3, 1e-3  # of the learning rate, at the beginning of the warm-up and at the end


@dataclass(frozen=True)
class Plan:
    """A run in steps. An epoch that is no whole number of steps borrows its last samples from the next one."""

    steps: int
    steps_per_epoch: int
    evaluate_every: int | None  # steps


def make_plan(config: TrainConfig, samples: int, processes: int) -> Plan:
    """The plan of a run on `samples` frames an epoch."""
    per_epoch = -(-samples // (config.batch * processes))
    every = None if config.evaluation is None else config.evaluation.every.steps(per_epoch)
    return Plan(config.length.steps(per_epoch), per_epoch, every)


def learning_rate_at(step: int, config: TrainConfig, plan: Plan) -> float:
    """Linear warm-up from a third, and a cosine down to a thousandth.

    A run of epochs is BEVFormer's: the cosine falls from epoch to epoch, the warm-up multiplies its first part. In a
    run of steps the cosine begins after the warm-up.
    """
    warmup = min(1.0, FIRST + (1 - FIRST) * step / max(1, config.warmup_steps))
    if config.length.unit == "epochs":
        progress = (step // plan.steps_per_epoch) / config.length.count
    else:
        progress = max(0, step - config.warmup_steps) / max(1, plan.steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.learning_rate * warmup * (LAST + (1 - LAST) * cosine)
