# SPDX-License-Identifier: Apache-2.0
"""The parity gate: does an engine compute what the package says? Before the first use on a device, and fail closed.

The package says what plain ONNX Runtime, all its optimisations off, computes from the master. Engines may differ from
that where a value lies between two codes and a sum was rounded otherwise; such flips are rare, fall to both sides alike
and average out. A wrong kernel is wrong over whole areas in the same direction. So every stage is held to two figures,
and to limits from what other rounding does to the reference itself; docs/engines.md has the numbers behind them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.cache import EngineKey, discard, engine_folder, keep, read_json
from qdbev_ros.engine.master import FEATURES, parse_master
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.parity_frames import gate_frames
from qdbev_ros.engine.stage_outputs import with_stage_outputs

if TYPE_CHECKING:
    from qdbev_ros.engine.engine import Engine

LOG = logging.getLogger(__name__)
VERDICT = "parity.json"
Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Figures:
    """How far a stage is from the reference, or may be, in parts of the reference's root mean square.

    spread: root mean square of the difference · shift: the largest mean of it over an area of a channel
    """

    spread: float
    shift: float


# Limits are FACTOR times what rounding alone does to the reference; one rounding was seen to do 1.7 times what another
# does. At least LEAST: in small networks a flip or two are all that rounding does, and another machine may see none. At
# most MOST: an answer of nothing but zeros has a spread of 1.
FACTOR = 2.0
LEAST = Figures(0.10, 0.07)
MOST = Figures(0.7, 0.5)
# A channel is cut into up to AREAS successive pieces of the map, each large enough for flips to average out.
AREAS, SMALLEST_AREA = 16, 64


@dataclass(frozen=True)
class StageResult:
    """How far one stage of one frame is from the reference, and how far it may be; see Figures."""

    frame: int
    stage: str
    spread: float
    shift: float
    spread_limit: float
    shift_limit: float

    @property
    def passed(self) -> bool:
        # Not "larger than": NaN has to fail.
        return self.spread <= self.spread_limit and self.shift <= self.shift_limit

    def __str__(self) -> str:
        return (
            f"{self.stage}, frame {self.frame}: spread {self.spread:.3f} (limit {self.spread_limit:.2g}), "
            f"shift {self.shift:.3f} (limit {self.shift_limit:.2g})"
        )


@dataclass(frozen=True)
class Verdict:
    """What the gate found, in the order of frames and stages."""

    results: tuple[StageResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    def summary(self) -> str:
        """Half a line for descriptions."""
        worst = max(self.results, key=lambda r: r.spread)
        return f"checked: differs by at most {worst.spread:.1%} ({worst.stage})"

    def to_dict(self) -> dict[str, Any]:
        return {"results": [asdict(result) for result in self.results]}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> Verdict:
        """Raises KeyError, TypeError or ValueError where it is none."""
        return cls(tuple(StageResult(**result) for result in content["results"]))


@dataclass(frozen=True)
class Reference:
    """What plain ONNX Runtime answers to the gate's frames, and by stage how far an engine may be from it."""

    answers: tuple[Outputs, ...]
    limits: dict[str, Figures]

    def verdict(self, answers: Sequence[Outputs]) -> Verdict:
        """`answers`: an engine's, frame by frame."""
        results = []
        for number, (wanted, got) in enumerate(zip(self.answers, answers, strict=True)):
            for stage, own in compare(wanted, got).items():
                most = self.limits[stage]
                results.append(StageResult(number, stage, own.spread, own.shift, most.spread, most.shift))
        return Verdict(tuple(results))


def ensure_parity(
    package: Package, engine: Engine, key: EngineKey, artefact: str, threads: int | None
) -> Verdict:
    """The verdict of an earlier start, or a new one. Raises EngineError, naming stage and figures, unless it passed.

    artefact: SHA-256 of what was compiled; a verdict on other bytes under the same key is none
    """
    folder = engine_folder(key)
    kept = None if folder is None else _kept_pass(folder / VERDICT, artefact)
    if kept is not None:
        return kept
    description = engine.runner.description
    LOG.info("checking %s against plain ONNX Runtime, which takes seconds to minutes", description)
    verdict = judge(package, engine, make_reference(package, threads))
    if not verdict.passed:
        description += discard(key)
    elif folder is not None:
        content = {"artefact": artefact, **verdict.to_dict()}
        keep(folder / VERDICT, json.dumps(content, indent=1).encode())
    demand(verdict, description)
    return verdict


def _kept_pass(path: Path, artefact: str) -> Verdict | None:
    """The kept verdict, if these bytes passed; damaged is as good as not being there."""
    content = read_json(path) or {}
    try:
        verdict = Verdict.from_dict(content)
        return verdict if content["artefact"] == artefact and verdict.passed else None
    except (KeyError, TypeError, ValueError):
        return None


def demand(verdict: Verdict, description: str) -> None:
    """Raises EngineError unless everything passed; the first stage that failed is where to look."""
    failed = [str(result) for result in verdict.results if not result.passed]
    if failed or not verdict.results:
        raise EngineError(
            f"{description} does not compute what the package says and must not run: "
            f"{failed[0] if failed else 'nothing was compared'}"
        )


def judge(package: Package, engine: Engine, reference: Reference) -> Verdict:
    """Runs the gate's frames through an engine."""
    return reference.verdict(gate_answers(package, engine))


def gate_answers(package: Package, engine: Engine) -> tuple[Outputs, ...]:
    """What an engine says to the gate's frames, stage outputs included.

    As in use, its memory is the very array that it gave out: some runners then take it from where it lies.
    """
    answers: list[Outputs] = []
    before, engine.runner.stage_outputs = engine.runner.stage_outputs, True
    try:
        for frame in gate_frames(package.variant):
            history = None if frame.first else answers[-1]["bev"]
            tensors = engine.tensors(frame.images, frame.lidar2img, frame.can_bus, history)
            answers.append(engine.runner.run(tensors))
    finally:
        engine.runner.stage_outputs = before
    return tuple(answers)


def make_reference(package: Package, threads: int | None) -> Reference:
    """Runs the gate's frames through plain ONNX Runtime twice: as the package says, and rounded otherwise."""
    answers = _plain_answers(package.model, package, threads)
    moved = steps_moved(package.model, cycle((1, -1)))
    rounding = worst(answers, _plain_answers(moved, package, threads))
    return Reference(answers, {stage: limits(figures) for stage, figures in rounding.items()})


def limits(rounding: Figures) -> Figures:
    """How far a stage may be to which rounding alone does this."""
    spread, shift = FACTOR * rounding.spread, FACTOR * rounding.shift
    return Figures(min(MOST.spread, max(LEAST.spread, spread)), min(MOST.shift, max(LEAST.shift, shift)))


def worst(wanted: Sequence[Outputs], got: Sequence[Outputs]) -> dict[str, Figures]:
    """Of all frames, by stage."""
    frames = [compare(a, b) for a, b in zip(wanted, got, strict=True)]
    return {
        stage: Figures(max(f[stage].spread for f in frames), max(f[stage].shift for f in frames))
        for stage in frames[0]
    }


def _plain_answers(master: bytes, package: Package, threads: int | None) -> tuple[Outputs, ...]:
    from qdbev_ros.engine.engine import Engine
    from qdbev_ros.engine.reference_runner import ReferenceRunner

    return gate_answers(package, Engine(package, ReferenceRunner(with_stage_outputs(master), threads)))


def steps_moved(master: bytes, signs: Iterator[int]) -> bytes:
    """The master with every activation's step moved by a millionth, up (1) or down (-1): ties fall otherwise."""
    model = parse_master(master)
    steps = sorted({node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"})
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in (step for step in steps if step in tensors):
        moved = onnx.numpy_helper.to_array(tensors[name]) * np.float32(1.0 + next(signs) * 1e-6)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), name))
    return model.SerializeToString()


def compare(wanted: Outputs, got: Outputs) -> dict[str, Figures]:
    """By stage. Feature maps of several levels count as one stage; an engine may leave out stage outputs."""
    stages = {"image features": [n for n in wanted if n.startswith(FEATURES) and n in got]}
    stages |= {"BEV": ["bev"], "class logits": ["class_logits"], "boxes": ["boxes"]}
    figures = {}
    for stage, names in stages.items():
        pairs = [_figures(wanted[name], got[name], stage == "boxes") for name in names]
        if pairs:
            figures[stage] = Figures(*(float(np.max(column)) for column in zip(*pairs, strict=True)))
    return figures


def _figures(wanted: NDArray[np.float32], got: NDArray[np.float32], own_units: bool) -> tuple[float, float]:
    """(spread, shift); `own_units`: every channel is measured by its own size, as metres and logarithms must."""
    if wanted.shape != got.shape:
        return float("nan"), float("nan")
    a, b = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64) for x in (wanted, got))
    unit = np.sqrt(np.mean(a**2, axis=1 if own_units else None, keepdims=True))
    difference = (b - a) / np.maximum(unit, 1e-6)
    areas = np.array_split(difference, max(1, min(AREAS, a.shape[1] // SMALLEST_AREA)), axis=1)
    shift = np.max([np.abs(area.mean(axis=1)).max() for area in areas])
    return float(np.sqrt(np.mean(difference**2))), float(shift)
