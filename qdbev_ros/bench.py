# SPDX-License-Identifier: Apache-2.0
"""Latency of a package's stages on several engines, which take turns frame by frame."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from qdbev_ros.core.made_drive import made_frame
from qdbev_ros.core.pipeline import STAGES, Engine, Pipeline

TOTAL = "end to end"
WARM_UP = 2  # frames of each engine that do not count


@dataclass(frozen=True)
class StageTimes:
    """Milliseconds of one stage on one engine."""

    engine: str
    stage: str
    ms_median: float
    ms_min: float


def available_backends() -> list[str]:
    """The backends that can run on this machine, fastest first."""
    from qdbev_ros.engine.cuda import missing

    backends = [] if missing() is not None else ["tensorrt"]
    modules = {"onnxruntime": "onnxruntime", "openvino": "openvino"}
    return backends + [name for name, module in modules.items() if importlib.util.find_spec(module)]


def measure(engines: Mapping[str, Engine], frames: int) -> list[StageTimes]:
    """The pipeline's stages over `frames` frames of a made drive, six JPEG pictures of 1600x900 each.

    The engines take turns, so that whatever else the machine does hits all of them alike.
    """
    samples: dict[tuple[str, str], list[float]] = {(e, s): [] for e in engines for s in (*STAGES, TOTAL)}
    with ExitStack() as stack:
        pipelines = {name: stack.enter_context(closing(Pipeline(e))) for name, e in engines.items()}
        for number in tqdm(range(WARM_UP + frames), unit=" frames", disable=None):
            frame = made_frame(number)
            for name, pipeline in pipelines.items():
                times = pipeline.run(frame).milliseconds
                if number >= WARM_UP:
                    for stage, ms in (*times.items(), (TOTAL, sum(times.values()))):
                        samples[name, stage].append(ms)
    return [
        StageTimes(engine, stage, round(statistics.median(ms), 2), round(min(ms), 2))
        for (engine, stage), ms in samples.items()
    ]


def table(rows: Iterable[StageTimes]) -> str:
    """median [minimum] in milliseconds, a line for each engine."""
    by_engine: dict[str, dict[str, StageTimes]] = {}
    for row in rows:
        by_engine.setdefault(row.engine, {})[row.stage] = row
    stages = (*STAGES, TOTAL)
    lines = [f"{'ms: median [least]':20}" + "".join(f"{stage:>17}" for stage in stages) + f"{'frames/s':>10}"]
    for engine, times in by_engine.items():
        cells = [f"{times[s].ms_median:.1f} [{times[s].ms_min:.1f}]" for s in stages]
        rate = 1e3 / times[TOTAL].ms_median
        lines.append(f"{engine:20}" + "".join(f"{cell:>17}" for cell in cells) + f"{rate:>10.1f}")
    return "\n".join(lines)


def as_json(
    rows: Iterable[StageTimes], described: Mapping[str, str], about: Mapping[str, Any]
) -> dict[str, Any]:
    """What --json writes: `about` the run, `engines` by name in words, `rows`."""
    return {**about, "engines": dict(described), "rows": [vars(row) for row in rows]}
