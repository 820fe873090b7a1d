# SPDX-License-Identifier: Apache-2.0
"""`qdbev parity`: how far every engine of this machine is from what the package says (without torch)."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdbev_ros.core.errors import EngineError, EngineMissing

if TYPE_CHECKING:
    from qdbev_ros.engine.package import Package
    from qdbev_ros.engine.parity import Figures, Outputs, Verdict

    Outcome = Verdict | EngineError

EXAMPLE = """example:
  qdbev parity demo/nano.qdbev
  qdbev parity nano.qdbev --checkpoint out/compress/nano_town/model.safetensors --json parity.json
Exit status 2 where an engine is there and fails, or computes something else than the package says."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "parity",
        help="compare the engines of this machine with the package",
        description="Runs fixed frames through every engine that runs here and prints, stage by stage, how far each "
        "is from plain ONNX Runtime on the packed model, which is the measure (docs/engines.md).",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("package", type=Path, help="the .qdbev file")
    parser.add_argument("--backend", action="append", metavar="NAME", help="only this engine; repeatable")
    parser.add_argument("--threads", type=int, metavar="N", help="threads of engines on the CPU")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="the fake-quantised model that the package was made of, compared as well (needs torch)",
    )
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the table here, as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from qdbev_ros.core.files import write_text
    from qdbev_ros.engine.backends import BACKENDS, check_backend
    from qdbev_ros.engine.package import read_package
    from qdbev_ros.engine.parity import make_reference

    names = args.backend or [name for name in BACKENDS if name != "auto"]
    for name in names:
        check_backend(name, args.threads)
    package = read_package(args.package)
    jobs: dict[str, Callable[[], Sequence[Outputs]]] = {}
    if args.checkpoint is not None:
        jobs["pytorch"] = lambda: _torch(package, args.checkpoint)
    for name in names:
        jobs[name] = lambda name=name: _engine(package, name, args.threads)  # type: ignore[misc]
    outcomes: dict[str, Outcome] = {}
    with tqdm(total=len(jobs) + 1, desc="parity", unit=" engines", disable=None) as bar:
        reference = make_reference(package, args.threads)
        bar.update()
        for name, job in jobs.items():
            try:
                outcomes[name] = reference.verdict(job())
            except EngineError as error:
                outcomes[name] = error
            bar.update()
    rows = _rows(reference.limits, outcomes)
    print(_table(rows))
    if args.report:
        write_text(args.report, _markdown(rows))
    if args.json:
        _write(args.json, package, outcomes)
    refused = [name for name, outcome in outcomes.items() if _refused(outcome, name in (args.backend or ()))]
    if refused:
        raise EngineError(f"{args.package}: {', '.join(refused)} must not run this package here")
    return 0


def _refused(outcome: Outcome, asked_for: bool) -> bool:
    """An engine that is not installed is no failure, unless it was asked for."""
    if isinstance(outcome, EngineError):
        return asked_for or not isinstance(outcome, EngineMissing)
    return not outcome.passed


def _engine(package: Package, name: str, threads: int | None) -> Sequence[Outputs]:
    from qdbev_ros.engine.backends import open_runner
    from qdbev_ros.engine.engine import Engine
    from qdbev_ros.engine.parity import gate_answers

    return gate_answers(package, Engine(package, open_runner(package, name, threads).runner))


def _torch(package: Package, checkpoint: Path) -> Sequence[Outputs]:
    """The fake-quantised model on the same frames."""
    import torch

    from qdbev_ros.engine.master import FEATURES
    from qdbev_ros.engine.parity_frames import gate_frames
    from qdbev_train.checkpoint import load_model

    model = load_model(checkpoint)[0].eval()
    answers: list[Outputs] = []
    bev = None
    for frame in gate_frames(package.variant):
        arrays = (frame.images, frame.lidar2img, frame.can_bus)
        with torch.inference_mode():
            out = model(*(torch.tensor(array)[None] for array in arrays), None if frame.first else bev)
        bev = out.bev
        got = {f"{FEATURES}{i}": maps[0].numpy() for i, maps in enumerate(out.image_features)}
        got |= {"bev": bev[0].numpy(), "boxes": out.boxes[-1, 0].numpy()}
        answers.append(got | {"class_logits": out.class_logits[-1, 0].numpy()})
    return answers


def _rows(limits: dict[str, Figures], outcomes: dict[str, Outcome]) -> list[list[str]]:
    """Spread and shift of every stage, the worse of the frames: a row for each engine, its verdict or reason last."""
    head = ["spread / shift", *limits, ""]
    rows = [head, ["limit", *(f"{most.spread:.3f} / {most.shift:.3f}" for most in limits.values()), ""]]
    for name, outcome in outcomes.items():
        if isinstance(outcome, EngineError):
            rows.append([name, *("" for _ in limits), str(outcome)])
            continue
        cells = []
        for stage in limits:
            own = [result for result in outcome.results if result.stage == stage]
            worst = [max(r.spread for r in own), max(r.shift for r in own)] if own else []
            cells.append(" / ".join(f"{figure:.3f}" for figure in worst) or "-")
        rows.append([name, *cells, "passed" if outcome.passed else "FAILED"])
    return rows


def _table(rows: list[list[str]]) -> str:
    """For a terminal; a reason takes the room of the figures that it stands for."""
    lines = []
    for name, *cells, verdict in rows:
        figures = "".join(f"{cell:>18}" for cell in cells) if any(cells) else ""
        lines.append(f"{name:<14}{figures}  {verdict}".rstrip())
    return "\n".join(lines)


def _markdown(rows: list[list[str]]) -> str:
    head, *others = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *others]) + "\n"


def _write(path: Path, package: Package, outcomes: dict[str, Outcome]) -> None:
    from qdbev_ros.core.files import write_json

    engines: dict[str, Any] = {
        name: {"reason": str(outcome)}
        if isinstance(outcome, EngineError)
        else {"passed": outcome.passed, "results": [asdict(result) for result in outcome.results]}
        for name, outcome in outcomes.items()
    }
    write_json(path, {"package": str(package.path), "sha256": package.sha256, "engines": engines})
