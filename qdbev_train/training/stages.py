# SPDX-License-Identifier: Apache-2.0
"""The stages of a compression: which parts are on the grid in which of them, for how many steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from qdbev_ros.core.errors import ConfigError
from qdbev_train.distillation import METHODS as DISTILLED
from qdbev_train.quantization import PARTS

METHODS = ("ptq", "qat", "progressive", *DISTILLED, "float_control")
STAGED = ("progressive", *DISTILLED)
FINAL = "final"


@dataclass(frozen=True)
class StageLengths:
    """How the training is shared out: part after part is switched on; `final` has all of them, and the distillation.

    Only the proportions count. A part of length 0 is switched on together with the next one.
    """

    backbone: float
    neck: float
    encoder: float
    decoder: float
    final: float

    def __post_init__(self) -> None:
        lengths = self.of()
        if min(lengths.values()) < 0 or sum(lengths.values()) == 0:
            raise ConfigError("stages: lengths must not be below zero, nor all be zero")

    def of(self) -> dict[str, float]:
        """Length by stage, in order."""
        return {**{part: getattr(self, part) for part in PARTS}, FINAL: self.final}


@dataclass(frozen=True)
class Stage:
    """One stretch of training: `steps` steps from `first` on, counted over all stages, with `parts` on the grid."""

    name: str
    parts: tuple[str, ...]
    first: int
    steps: int
    distilled: bool


def plan_stages(method: str, lengths: StageLengths | None, parts: tuple[str, ...], steps: int) -> list[Stage]:
    """The stages of `steps` steps in all; none for ptq. `parts` are those to quantise.

    Marks are rounded on the whole, so that lengths add up. Raises ConfigError where a stage would have no step.
    """
    if method == "ptq":
        return []
    if method == "float_control":
        return [Stage(method, (), 0, steps, False)]
    if method == "qat":
        return [Stage(method, parts, 0, steps, False)]
    if lengths is None:
        raise ConfigError(f"stages: method {method} needs the lengths of its stages")
    used = {name: length for name, length in lengths.of().items() if length > 0}
    if foreign := [name for name in used if name != FINAL and name not in parts]:
        raise ConfigError(f"stages: {foreign} have a length but are not among the parts to quantise")
    if method in DISTILLED and FINAL not in used:
        raise ConfigError(f"stages: method {method} distils in the final stage, whose length is 0")
    marks = [0, *(round(steps * a / sum(used.values())) for a in accumulate(used.values()))]
    stages = []
    for name, first, end in zip(used, marks, marks[1:]):
        if end == first:
            raise ConfigError(f"stages: {name} would have no step of {steps}; train longer or set it to 0")
        reached = len(PARTS) if name == FINAL else PARTS.index(name) + 1
        own = tuple(part for part in PARTS[:reached] if part in parts)
        stages.append(Stage(name, own, first, end - first, name == FINAL and method in DISTILLED))
    if set(stages[-1].parts) != set(parts):
        raise ConfigError(
            "stages: the last one leaves parts in float; give `final` or the last part a length"
        )
    return stages
