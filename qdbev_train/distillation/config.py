# SPDX-License-Identifier: Apache-2.0
"""The settings of a distillation, with the decisions that the paper leaves open."""

from __future__ import annotations

from dataclasses import dataclass

from qdbev_ros.core.errors import ConfigError

METHODS = ("vgd", "cwd_img", "cwd_bev")


@dataclass(frozen=True)
class DistillationConfig:
    """`docs/quantisation.md` has the equations.

    axis: what a softmax runs over, "channel" (of each cell or pixel) or "spatial" (the map of each channel; then single
    cells can count negatively, which is why it is for cwd_img and cwd_bev) · temperature: tau ·
    weighting: "fixed", `weight` is the loss's factor, or "gradient", `weight` is the size of its gradient at the
    student's features as a share of the task's · detach: the factor of the product that is a mere number, "image",
    "bev" or "none" · floor: added to the weight of every cell that a camera sees · combine: "product" (the paper's) or
    "sum" · further_teachers: model files of an ensemble with the teacher, whose distributions are averaged. They must
    have been trained on from the same model: channels of networks that began apart mean different things, and the mean
    of their softmax would mean nothing
    """

    axis: str = "channel"
    temperature: float = 1.0
    weighting: str = "gradient"
    weight: float = 0.5
    detach: str = "none"
    floor: float = 0.0
    combine: str = "product"
    further_teachers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        choices = {
            "axis": ("channel", "spatial"),
            "weighting": ("fixed", "gradient"),
            "detach": ("none", "image", "bev"),
            "combine": ("product", "sum"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"distillation: {key} {getattr(self, key)!r}; use one of {list(allowed)}")
        if self.temperature <= 0 or self.weight <= 0 or self.floor < 0:
            raise ConfigError(
                "distillation: temperature and weight must be above zero, floor must not be below"
            )
