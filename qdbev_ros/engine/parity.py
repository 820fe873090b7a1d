# SPDX-License-Identifier: Apache-2.0
"""The parity gate: does an engine compute what the package says? Before the first use on a device, and fail closed.

The package says what plain ONNX Runtime, all its optimisations off, computes from the master. Engines may differ from
that where a value lies between two codes and a sum was rounded otherwise; such flips are rare, fall to both sides alike
and average out. A wrong kernel is wrong everywhere in the same direction. So every stage is held to two figures, see
docs/engines.md for how the limits came about.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
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
    from qdbev_ros.engine.runner import Runner

LOG = logging.getLogger(__name__)
VERDICT = "parity.json"
Outputs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Limits:
    """The most that a stage may differ: `spread` by scatter, `shift` by a channel's mean, in parts of its size."""

    spread: float
    shift: float


LIMITS = {
    "image features": Limits(0.25, 0.10),
    "BEV": Limits(0.20, 0.09),
    "class logits": Limits(0.10, 0.05),
    "boxes": Limits(0.35, 0.15),
}
# Networks that double every rounding from layer to layer are allowed this much of what they do to the reference itself.
CHAOS = 2.0


@dataclass(frozen=True)
class StageResult:
    """How far one stage of one frame is from the reference, and how far it may be.

    spread: root mean square of the difference over that of the reference · shift: the largest difference of a
    channel's means, over the same
    """

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

    def beside(self, rounding: StageResult) -> StageResult:
        """The same with limits that grow with what rounding alone does to this stage."""
        spread = max(self.spread_limit, CHAOS * rounding.spread)
        return replace(self, spread_limit=spread, shift_limit=max(self.shift_limit, CHAOS * rounding.shift))


@dataclass(frozen=True)
class Verdict:
    """What the gate found, in the order of frames and stages."""

    results: tuple[StageResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.results) and all(result.passed for result in self.results)

    def beside(self, rounding: Verdict) -> Verdict:
        """The same results with limits for a network that makes much of little."""
        others = {(result.frame, result.stage): result for result in rounding.results}
        return Verdict(tuple(own.beside(others[own.frame, own.stage]) for own in self.results))

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
    reference = reference_outputs(package.model, package, threads)
    verdict = settle(judge(package, engine, reference), package, reference, threads)
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


def settle(verdict: Verdict, package: Package, reference: Sequence[Outputs], threads: int | None) -> Verdict:
    """The verdict with the limits that this package needs, which cost a second reference, so only where it failed."""
    return verdict if verdict.passed else verdict.beside(rounding_alone(package, reference, threads))


def demand(verdict: Verdict, description: str) -> None:
    """Raises EngineError unless everything passed; the first stage that failed is where to look."""
    failed = [str(result) for result in verdict.results if not result.passed]
    if failed or not verdict.results:
        raise EngineError(
            f"{description} does not compute what the package says and must not run: "
            f"{failed[0] if failed else 'nothing was compared'}"
        )


def judge(package: Package, engine: Engine, reference: Sequence[Outputs]) -> Verdict:
    """Runs the gate's frames through an engine; its history is the reference's, so that errors don't add up."""
    results = []
    bev: NDArray[np.float32] | None = None
    for number, (frame, wanted) in enumerate(zip(gate_frames(package.variant), reference, strict=True)):
        history = None if frame.first else bev
        tensors = engine.tensors(frame.images, frame.lidar2img, frame.can_bus, history)
        results += compare(number, wanted, _run_with_stages(engine.runner, tensors))
        bev = wanted["bev"]
    return Verdict(tuple(results))


def _run_with_stages(runner: Runner, tensors: dict[str, NDArray[Any]]) -> Outputs:
    before, runner.stage_outputs = runner.stage_outputs, True
    try:
        return runner.run(tensors)
    finally:
        runner.stage_outputs = before


def rounding_alone(package: Package, reference: Sequence[Outputs], threads: int | None) -> Verdict:
    """How far the reference itself moves when every activation's step moves by a millionth: ties fall otherwise."""
    model = parse_master(package.model)
    steps = sorted({node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"})
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for index, name in enumerate(step for step in steps if step in tensors):
        moved = onnx.numpy_helper.to_array(tensors[name]) * np.float32(1.0 + (-1) ** index * 1e-6)
        tensors[name].CopyFrom(onnx.numpy_helper.from_array(moved.astype(np.float32), name))
    outputs = reference_outputs(model.SerializeToString(), package, threads)
    pairs = enumerate(zip(reference, outputs, strict=True))
    return Verdict(tuple(result for number, (a, b) in pairs for result in compare(number, a, b)))


def reference_outputs(master: bytes, package: Package, threads: int | None) -> list[Outputs]:
    """What plain ONNX Runtime computes from a master for each of the gate's frames, stage outputs included."""
    from qdbev_ros.engine.engine import Engine
    from qdbev_ros.engine.reference_runner import ReferenceRunner

    engine = Engine(package, ReferenceRunner(with_stage_outputs(master), threads))
    outputs: list[Outputs] = []
    for frame in gate_frames(package.variant):
        history = None if frame.first else outputs[-1]["bev"]
        tensors = engine.tensors(frame.images, frame.lidar2img, frame.can_bus, history)
        outputs.append(engine.runner.run(tensors))
    return outputs


def compare(frame: int, wanted: Outputs, got: Outputs) -> list[StageResult]:
    """One result a stage. Feature maps of several levels count as one stage; an engine may leave out stage outputs."""
    stages = {"image features": [n for n in wanted if n.startswith(FEATURES) and n in got]}
    stages |= {"BEV": ["bev"], "class logits": ["class_logits"], "boxes": ["boxes"]}
    results = []
    for stage, names in stages.items():
        pairs = [_figures(wanted[name], got[name], stage == "boxes") for name in names]
        if pairs:
            spread, shift = (float(np.max(figures)) for figures in zip(*pairs, strict=True))
            limits = LIMITS[stage]
            results.append(StageResult(frame, stage, spread, shift, limits.spread, limits.shift))
    return results


def _figures(wanted: NDArray[np.float32], got: NDArray[np.float32], own_units: bool) -> tuple[float, float]:
    """(spread, shift); `own_units`: every channel is measured by its own size, as metres and logarithms must."""
    if wanted.shape != got.shape:
        return float("nan"), float("nan")
    a, b = (np.moveaxis(x, 1, 0).reshape(x.shape[1], -1).astype(np.float64) for x in (wanted, got))
    unit = np.sqrt(np.mean(a**2, axis=1 if own_units else None, keepdims=True))
    difference = (b - a) / np.maximum(unit, 1e-6)
    return float(np.sqrt(np.mean(difference**2))), float(np.abs(difference.mean(axis=1)).max())
