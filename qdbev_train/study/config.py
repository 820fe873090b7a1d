# SPDX-License-Identifier: Apache-2.0
"""A study as data: one base compression, and rows that say how they differ from it."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import ConfigError
from qdbev_train.training.compression import CompressConfig, compression
from qdbev_train.training.config import read_yaml

FLOAT = "float"
TABLES = ("methods", "parts", "bits", "beyond")


@dataclass(frozen=True)
class Row:
    """One row of a table, once for each of its seeds.

    name: what `method` says in study.json; "float" is the teacher itself · change: settings that differ from the base
    compression, nested as there · stages_of: the row whose finished stages are taken over
    """

    name: str
    table: str
    text: str
    seeds: tuple[int, ...]
    change: dict[str, Any]
    stages_of: str

    def __post_init__(self) -> None:
        if not all(isinstance(value, str) for value in (self.name, self.text, self.stages_of)):
            raise ConfigError(f"row {self.name!r}: name, text and stages_of must be text")
        if self.table not in TABLES:
            raise ConfigError(f"row {self.name!r}: table {self.table!r}; use one of {list(TABLES)}")
        if not self.seeds or not all(type(seed) is int for seed in self.seeds):
            raise ConfigError(f"row {self.name!r}: seeds must be a list of whole numbers")
        if not isinstance(self.change, dict):
            raise ConfigError(f"row {self.name!r}: change must be a mapping")


@dataclass(frozen=True)
class StudyConfig:
    """base: the compression's YAML file, read already · split: the unseen scenes that everything is scored on · out:
    where trainings and scores are kept · docs: where study.json, tables and plots go · paper: published numbers by
    table, to stand beside"""

    title: str
    base: dict[str, Any]
    source: str
    split: str
    out: str
    docs: str
    rows: tuple[Row, ...]
    paper: dict[str, Any]

    def __post_init__(self) -> None:
        names = [row.name for row in self.rows]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ConfigError(f"{self.source}: rows {twice} are there twice")
        for number, row in enumerate(self.rows):
            if row.stages_of and row.stages_of not in names[:number]:
                raise ConfigError(f"{self.source}: row {row.name!r}: no row {row.stages_of!r} before it")

    @property
    def teacher(self) -> Path:
        return Path(str(self.base["teacher"]))

    def jobs(self) -> list[Job]:
        """Everything to be run, in an order in which each finds what it needs."""
        return [Job(row, seed) for row in self.rows for seed in row.seeds]

    def folder(self, job: Job) -> Path:
        return Path(self.out) / job.name

    def compression(self, job: Job) -> CompressConfig:
        """The settings of a job. Raises ConfigError naming the row and the key."""
        source = f"{self.source}: row {job.row.name!r}"
        raw = _merged(copy.deepcopy(self.base), job.row.change, source)
        raw |= {"seed": job.seed, "out": str(self.folder(job)), "evaluation": None, "stages_from": ""}
        if job.row.stages_of:
            raw["stages_from"] = str(Path(self.out) / _job_name(job.row.stages_of, job.seed))
        return compression(raw, source)


@dataclass(frozen=True)
class Job:
    """A row with one of its seeds."""

    row: Row
    seed: int

    @property
    def name(self) -> str:
        return _job_name(self.row.name, self.seed)


def _job_name(row: str, seed: int) -> str:
    return f"{row}_seed{seed}"


def read_study(path: str | Path) -> StudyConfig:
    """Reads a study's YAML file; every row's settings are checked at once."""
    raw = read_yaml(path)
    wanted = [f.name for f in dataclasses.fields(StudyConfig) if f.name != "source"]
    if set(raw) != set(wanted):
        unknown, missing = sorted(set(raw) - set(wanted)), sorted(set(wanted) - set(raw))
        raise ConfigError(f"{path}: unknown keys {unknown}, missing keys {missing}")
    if not all(isinstance(raw[key], str) for key in ("title", "base", "split", "out", "docs")):
        raise ConfigError(f"{path}: title, base, split, out and docs must be text")
    if not isinstance(raw["paper"], dict) or not all(isinstance(t, dict) for t in raw["paper"].values()):
        raise ConfigError(f"{path}: paper must be a mapping of tables, each a mapping of rows")
    if not isinstance(raw["rows"], list):
        raise ConfigError(f"{path}: rows must be a list")
    base = read_yaml(raw["base"])
    rows = tuple(_row(data, str(path)) for data in raw["rows"])
    study = StudyConfig(**(raw | {"base": base, "rows": rows}), source=str(path))
    for job in study.jobs():
        if job.row.name != FLOAT:
            study.compression(job)
    return study


def _row(data: Any, source: str) -> Row:
    defaults: dict[str, Any] = {"seeds": [0], "change": {}, "stages_of": ""}
    keys = {f.name for f in dataclasses.fields(Row)}
    if not isinstance(data, dict) or set(data) - keys or not {"name", "table", "text"} <= set(data):
        raise ConfigError(
            f"{source}: a row has the keys name, table, text and perhaps seeds, change, stages_of: {data}"
        )
    values = defaults | data
    seeds = values["seeds"]
    try:
        return Row(**(values | {"seeds": tuple(seeds) if isinstance(seeds, list) else ()}))
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def _merged(base: dict[str, Any], change: dict[str, Any], source: str) -> dict[str, Any]:
    """`base` with the values of `change`; mappings are merged key by key, and no key may be new."""
    for key, value in change.items():
        if key not in base:
            raise ConfigError(f"{source}: unknown key {key!r}; the base has {sorted(base)}")
        nested = isinstance(value, dict) and isinstance(base[key], dict)
        base[key] = _merged(base[key], value, source) if nested else value
    return base
