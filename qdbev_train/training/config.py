# SPDX-License-Identifier: Apache-2.0
"""A training run as data: one YAML file, one frozen description, every key checked."""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qdbev_ros.core.errors import ConfigError
from qdbev_train.settings import require_plain

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where the frames come from: a nuScenes-format data root, its version and split."""

    root: str
    version: str
    split: str


@dataclass(frozen=True)
class Span:
    """A length of training, such as "24 epochs" or "300 steps"; an epoch takes as many samples as there are frames."""

    count: int
    unit: str  # "epochs" or "steps"

    @staticmethod
    def parse(text: str) -> Span:
        found = re.fullmatch(r"([1-9][0-9]*) (epoch|step)s?", text)
        if found is None:
            raise ValueError
        return Span(int(found[1]), found[2] + "s")

    def steps(self, steps_per_epoch: int) -> int:
        return self.count * (steps_per_epoch if self.unit == "epochs" else 1)


@dataclass(frozen=True)
class EvaluationConfig:
    """The official score of a split of the same data root, every so often during training and at its end."""

    split: str
    every: Span


@dataclass(frozen=True)
class TrainConfig:
    """One run; a step is an optimiser step of `batch` samples on each process.

    init: "imagenet", "random", "backbone:PATH" (a backbone's weights, the rest random), or the path of a model file ·
    precision: "float32", or "bf16" (positions, sampling and losses stay float32) · history: "stream" (consecutive
    frames, the last step's map is the past) or "queue" (BEVFormer's recipe: each sample brings the variant's
    `queue_length` frames) · length: with epochs the learning rate falls from epoch to epoch, with steps from step to
    step · save_every: steps · query_groups, denoising_groups, dense_heads: see auxiliary.py · angle_weight,
    velocity_weight: of sine and cosine and of the velocity in the box loss, where position and size have 1 (BEVFormer:
    1.0, 0.2) · mirror, turn, light, photometric, grid_mask: see data/augment.py
    """

    variant: str
    data: DataConfig
    evaluation: EvaluationConfig | None
    out: str
    init: str
    precision: str
    history: str
    length: Span
    batch: int
    learning_rate: float
    backbone_factor: float
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    query_groups: int
    denoising_groups: int
    dense_heads: bool
    angle_weight: float
    velocity_weight: float
    mirror: float
    turn: bool
    light: float
    photometric: bool
    grid_mask: float
    seed: int
    save_every: int

    def __post_init__(self) -> None:
        for name, wanted in (("precision", ("float32", "bf16")), ("history", ("stream", "queue"))):
            if getattr(self, name) not in wanted:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; use {wanted[0]!r} or {wanted[1]!r}")
        if self.grid_mask and self.history == "stream":
            raise ConfigError(
                "grid_mask: a stream's frames are all remembered, and the past stays whole; set 0.0"
            )
        if min(self.batch, self.save_every) < 1:
            raise ConfigError("batch and save_every must be at least 1")


def read_config(path: str | Path, kind: type[T]) -> T:
    """Reads a YAML file into the frozen dataclass `kind`; unknown, missing and mistyped keys are all named."""
    data = read_yaml(path)
    try:
        return build(kind, data, str(path))
    except ConfigError as error:
        if str(path) in str(error):
            raise
        raise ConfigError(f"{path}: {error}") from error


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must be a mapping")
    return data


def build(kind: type[T], data: Any, source: str) -> T:
    """The frozen dataclass `kind` from plain data; `source` names the place in errors."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(fields)), sorted(set(fields) - set(data))
    if unknown or missing:
        raise ConfigError(f"{source}: unknown keys {unknown}, missing keys {missing}")
    return kind(**{name: _value(data[name], str(f.type), f"{source}: {name}") for name, f in fields.items()})


_NESTED: dict[str, type] = {"DataConfig": DataConfig, "EvaluationConfig": EvaluationConfig}


def _value(value: Any, wanted: str, source: str) -> Any:
    """`value` as the type that a field's annotation names."""
    if value is None and wanted.endswith(" | None"):
        return None
    wanted = wanted.removesuffix(" | None")
    if wanted in _NESTED:
        return build(_NESTED[wanted], value, source)
    if wanted == "Span":
        try:
            return Span.parse(str(value))
        except ValueError:
            raise ConfigError(f'{source} is {value!r}, expected "24 epochs" or "300 steps"') from None
    if wanted == "tuple[str, ...]":
        if not isinstance(value, list):
            raise ConfigError(f"{source} is {value!r}, expected a list")
        return tuple(_value(one, "str", source) for one in value)
    require_plain(value, wanted, source)
    if isinstance(value, str):
        # Paths may name environment variables, such as $QDBEV_NUSCENES.
        value = os.path.expandvars(value)
        if unset := re.search(r"\$\{?(\w+)", value):
            raise ConfigError(f"{source} is {value!r}, but the environment variable {unset[1]} isn't set")
        return value
    return float(value) if wanted == "float" else value  # type: ignore[arg-type]
