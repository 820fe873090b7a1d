# SPDX-License-Identifier: Apache-2.0
"""A training run as data: one YAML file, one frozen description, every key checked."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from qdbev_ros.core.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True)
class DataConfig:
    """Where the frames come from: a nuScenes-format data root, its version and split."""

    root: str
    version: str
    split: str


@dataclass(frozen=True)
class TrainConfig:
    """One run. `steps` counts optimiser steps of `batch` samples.

    init: "imagenet", or the path of a model file · history: "stream" (consecutive frames, the last step's map is the
    past) or "queue" (BEVFormer's recipe: each sample brings the variant's `queue_length` frames)
    """

    variant: str
    data: DataConfig
    out: str
    init: str
    history: str
    steps: int
    batch: int
    learning_rate: float
    backbone_factor: float
    weight_decay: float
    warmup_steps: int
    clip_norm: float
    query_groups: int
    denoising_groups: int
    dense_heads: bool
    mirror: float
    turn: bool
    light: float
    seed: int
    save_every: int


def read_config(path: str | Path, kind: type[T]) -> T:
    """Reads a YAML file into the frozen dataclass `kind`; unknown, missing and mistyped keys are all named."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"no configuration file {path}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return _build(kind, data, str(path))


def _build(kind: type[T], data: Any, source: str) -> T:
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown, missing = sorted(set(data) - set(fields)), sorted(set(fields) - set(data))
    if unknown or missing:
        raise ConfigError(f"{source}: unknown keys {unknown}, missing keys {missing}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        value, wanted = data[name], str(field.type)
        if wanted == "DataConfig":
            values[name] = _build(DataConfig, value, f"{source}: {name}")
            continue
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (int, float),
            "str": (str,),
            "bool": (bool,),
        }
        right = isinstance(value, kinds[wanted]) and (wanted == "bool") == isinstance(value, bool)
        if not right:
            raise ConfigError(f"{source}: {name} is {value!r}, expected {wanted}")
        # Paths may name environment variables, such as $QDBEV_NUSCENES.
        values[name] = (
            float(value) if wanted == "float" else os.path.expandvars(value) if wanted == "str" else value
        )
    return kind(**values)
