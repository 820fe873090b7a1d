# SPDX-License-Identifier: Apache-2.0
"""A compression as data: one YAML file, one frozen description, every key checked."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import ConfigError
from qdbev_train.distillation import METHODS as DISTILLED
from qdbev_train.distillation import DistillationConfig
from qdbev_train.quantization import EXCEPTIONS, PARTS, STRICT, QuantConfig
from qdbev_train.training.config import (
    DataConfig,
    EvaluationConfig,
    TrainConfig,
    build,
    read_yaml,
)
from qdbev_train.training.stages import METHODS, STAGED, StageLengths

# Exceptions to the rule of bits by name, for the key `overrides` of `quantisation`.
OVERRIDES = {"standard": EXCEPTIONS, "strict": STRICT}
# Of TrainConfig, what the rest of a compression says.
_SAID_ELSEWHERE = ("variant", "data", "evaluation", "out", "init", "seed")


@dataclass(frozen=True)
class CalibrationConfig:
    """Ranges are measured on `steps` batches of `batch` drives, in temporal order, anew before each stage."""

    steps: int
    batch: int

    def __post_init__(self) -> None:
        if min(self.steps, self.batch) < 1:
            raise ConfigError("calibration: steps and batch must be at least 1")


@dataclass(frozen=True)
class CompressConfig:
    """One compression of the float model file `teacher`.

    method: ptq (no training) · qat (everything switched at once) · progressive (part after part) · cwd_img, cwd_bev,
    vgd (progressive, then distilled) · float_control (the teacher trained on for as long) · training: how long and how
    in all, None for ptq · stages: their lengths, for the progressive methods · restart: each stage has a warm-up and a
    learning-rate curve of its own, instead of one over all · freeze_ranges: share of a stage after which running ranges
    stand still · stages_from: the `out` of another compression, equal but for what comes after them, whose
    finished stages are taken over; "" for none
    """

    method: str
    teacher: str
    data: DataConfig
    evaluation: EvaluationConfig | None
    out: str
    seed: int
    quantisation: QuantConfig
    calibration: CalibrationConfig
    training: TrainConfig | None
    stages: StageLengths | None
    restart: bool
    freeze_ranges: float
    stages_from: str
    distillation: DistillationConfig | None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ConfigError(f"method is {self.method!r}; use one of {list(METHODS)}")
        needed = {
            "training": self.method != "ptq",
            "stages": self.method in STAGED,
            "distillation": self.method in DISTILLED,
        }
        for key, wanted in needed.items():
            if wanted and getattr(self, key) is None:
                raise ConfigError(f"method {self.method} needs {key}")
        if self.method != "float_control" and not self.quantisation.parts:
            raise ConfigError(
                f"quantisation: parts is empty, method {self.method} needs some of {list(PARTS)}"
            )
        if not 0.0 < self.freeze_ranges <= 1.0:
            raise ConfigError("freeze_ranges must be above 0 and at most 1")
        if self.stages_from and self.method not in STAGED:
            raise ConfigError(f"stages_from: method {self.method} has no stages to take over")

    @property
    def further_teachers(self) -> tuple[str, ...]:
        """Those of a distillation; other methods have none, whatever the settings of one say."""
        if self.distillation is None or self.method not in DISTILLED:
            return ()
        return self.distillation.further_teachers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def read_compression(path: str | Path) -> CompressConfig:
    """Reads a YAML file; unknown, missing and mistyped keys are all named."""
    return compression(read_yaml(path), str(path))


def compression(raw: dict[str, Any], source: str) -> CompressConfig:
    """The description out of plain data; `source` names the place in errors."""
    names = [f.name for f in dataclasses.fields(CompressConfig)]
    if set(raw) != set(names):
        unknown, missing = sorted(set(raw) - set(names)), sorted(set(names) - set(raw))
        raise ConfigError(f"{source}: unknown keys {unknown}, missing keys {missing}")
    try:
        return _assembled(raw, source)
    except ConfigError as error:
        if source in str(error):
            raise
        raise ConfigError(f"{source}: {error}") from error


def _assembled(raw: dict[str, Any], source: str) -> CompressConfig:
    nested: dict[str, Any] = {
        key: None if raw[key] is None else build(kind, raw[key], f"{source}: {key}")
        for key, kind in (
            ("calibration", CalibrationConfig),
            ("stages", StageLengths),
            ("distillation", DistillationConfig),
        )
    }
    if nested["calibration"] is None:
        raise ConfigError(f"{source}: calibration must be a mapping")
    plain = {f.name: raw[f.name] for f in dataclasses.fields(_Plain)}
    rest = build(_Plain, plain, source)
    values = {f.name: getattr(rest, f.name) for f in dataclasses.fields(_Plain)}
    return CompressConfig(
        **values,
        **nested,
        quantisation=_quantisation(raw["quantisation"], f"{source}: quantisation"),
        training=_training(raw, source),
    )


@dataclass(frozen=True)
class _Plain:
    """The keys of CompressConfig that `build` knows how to read."""

    method: str
    teacher: str
    data: DataConfig
    evaluation: EvaluationConfig | None
    out: str
    seed: int
    restart: bool
    freeze_ranges: float
    stages_from: str


def _quantisation(data: Any, source: str) -> QuantConfig:
    if not isinstance(data, dict):
        raise ConfigError(f"{source} must be a mapping")
    missing = sorted({f.name for f in dataclasses.fields(QuantConfig)} - set(data))
    if missing:
        raise ConfigError(f"{source}: missing keys {missing}")
    overrides = data["overrides"]
    if isinstance(overrides, str):
        if overrides not in OVERRIDES:
            raise ConfigError(f"{source}: overrides {overrides!r}; use one of {list(OVERRIDES)}, or a list")
        overrides = [asdict(o) for o in OVERRIDES[overrides]]
    return QuantConfig.from_dict(data | {"overrides": overrides})


def _training(raw: dict[str, Any], source: str) -> TrainConfig | None:
    data = raw["training"]
    if data is None:
        return None
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: training must be a mapping, or null")
    if twice := sorted(set(data) & set(_SAID_ELSEWHERE)):
        raise ConfigError(f"{source}: training: unknown keys {twice}; they stand at the top")
    said = {key: raw[key] for key in ("data", "evaluation", "out", "seed")}
    # The teacher's file says which variant it is; its name is filled in when that is read.
    said |= {"variant": "", "init": raw["teacher"]}
    return build(TrainConfig, data | said, f"{source}: training")
