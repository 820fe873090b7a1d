# SPDX-License-Identifier: Apache-2.0
"""The study's pictures: score against size, and training curves with the marks of their stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from qdbev_ros.core.files import whole_file
from qdbev_train.checkpoint import read_tensors
from qdbev_train.distillation import METHODS as DISTILLED
from qdbev_train.study.config import Job, StudyConfig
from qdbev_train.training.plot_command import read_scalar
from qdbev_train.training.stages import FINAL

CURVES = ("qat", "progressive", "vgd", "float_control")  # those of the paper's figures, and the control
SMOOTHED = 0.04  # of a curve's length


def _axes(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.grid(alpha=0.3)
    return figure, axes


def _save(figure: Any, path: Path) -> None:
    import matplotlib.pyplot as plt

    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)


def draw_sizes(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """NDS against the package's size, a point for each row with the whole model, joined over its seeds."""
    figure, axes = _axes(8, 5)
    for name in dict.fromkeys(row["method"] for row in rows if row["table"] != "parts"):
        same = [row for row in rows if row["method"] == name]
        sizes, scores = [row["size_bytes"] / 1e6 for row in same], [row["nds"] for row in same]
        axes.plot(sizes, scores, "-", color="0.7", zorder=1)
        axes.scatter(sizes, scores, s=22, zorder=2)
        axes.annotate(name, (sizes[0], max(scores)), xytext=(4, 2), textcoords="offset points", fontsize=8)
    axes.set(xlabel="package, MB", ylabel="NDS on unseen scenes", xscale="log")
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    _save(figure, path)


def draw_curves(config: StudyConfig, path: Path) -> None:
    """The detection loss of the trained rows' first seeds; dashed lines where another part goes on the grid.

    The rows are those of CURVES, or all of a study that has other ways to train in place of the paper's.
    """
    figure, axes = _axes(9, 5)
    marks: dict[int, str] = {}
    named = [row.name for row in config.rows]
    for row in config.rows:
        job = Job(row, row.seeds[0])
        folder = config.folder(job)
        if ("qat" in named and row.name not in CURVES) or not (folder / "model.safetensors").is_file():
            continue
        stages = _stages(folder)
        if not stages:  # calibration alone
            continue
        steps, values = _curve(config, job, stages)
        window = max(1, round(SMOOTHED * len(values)))
        mean = np.convolve(values, np.full(window, 1 / window), "valid")
        axes.plot(steps[window - 1 :], mean, linewidth=1.6, label=row.name)
        if len(stages) > 1:
            ends = accumulate(stage["steps"] for stage in stages[:-1])
            marks |= dict(zip([0, *ends], [stage["name"] for stage in stages]))
    for step, name in marks.items():
        axes.axvline(step, color="0.5", linestyle="--", linewidth=0.8)
        axes.annotate(
            name,
            (step, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(3, -10),
            textcoords="offset points",
            fontsize=8,
        )
    axes.set(xlabel="step", ylabel="detection loss")
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    _save(figure, path)


def _stages(folder: Path) -> list[dict[str, Any]]:
    _, metadata = read_tensors(folder / "model.safetensors")
    return list(metadata["provenance"].get("stages", []))


def _curve(config: StudyConfig, job: Job, stages: Sequence[dict[str, Any]]) -> tuple[list[int], list[float]]:
    """(steps, detection losses) over all stages; those that were taken over lie in the other row's folder."""
    settings = config.compression(job)
    steps: list[int] = []
    values: list[float] = []
    for number, stage in enumerate(stages, start=1):
        name = f"{number}_{stage['name']}"
        own = Path(settings.out) / name
        where = own if own.is_dir() else Path(settings.stages_from) / name
        at, losses = read_scalar(where, "loss/total")
        if stage["name"] == FINAL and settings.method in DISTILLED:
            _, distilled = read_scalar(where, "loss/distillation")
            losses = [total - part for total, part in zip(losses, distilled, strict=True)]
        begun = len(steps)
        steps += [begun + step for step in at]
        values += losses
    return steps, values
