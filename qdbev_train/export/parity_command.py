# SPDX-License-Identifier: Apache-2.0
"""`qdbev parity`: how far every engine of this machine is from what the package says (without torch)."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdbev_ros.core.errors import EngineError

if TYPE_CHECKING:
    from qdbev_ros.engine.package import Package
    from qdbev_ros.engine.parity import Outputs, StageResult, Verdict

EXAMPLE = """example:
  qdbev parity demo/nano.qdbev
  qdbev parity nano.qdbev --checkpoint out/compress/nano_town/model.safetensors --json parity.json
Exit status 2 where an engine computes something else than the package says."""


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
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from qdbev_ros.engine.backends import BACKENDS, check_backend
    from qdbev_ros.engine.package import read_package
    from qdbev_ros.engine.parity import reference_outputs, settle

    names = args.backend or [name for name in BACKENDS if name != "auto"]
    for name in names:
        check_backend(name, args.threads)
    package = read_package(args.package)
    jobs: dict[str, Callable[[list[Outputs]], Verdict]] = {}
    if args.checkpoint is not None:
        jobs["pytorch"] = lambda reference: _torch(package, args.checkpoint, reference)
    for name in names:
        jobs[name] = lambda reference, name=name: _engine(package, name, args.threads, reference)  # type: ignore[misc]
    with tqdm(total=len(jobs) + 1, desc="parity", unit=" engines", disable=None) as bar:
        reference = reference_outputs(package.model, package, args.threads)
        bar.update()
        verdicts: dict[str, Verdict | None] = {}
        reasons: dict[str, str] = {}
        for name, job in jobs.items():
            try:
                verdicts[name] = settle(job(reference), package, reference, args.threads)
            except EngineError as error:
                verdicts[name], reasons[name] = None, str(error)
            bar.update()
    print(_table(verdicts, reasons))
    if args.json:
        _write(args.json, package, verdicts, reasons)
    failed = [name for name, verdict in verdicts.items() if verdict is not None and not verdict.passed]
    missing = [name for name in args.backend or [] if verdicts[name] is None]
    if failed or missing:
        raise EngineError(f"{args.package}: {', '.join(failed + missing)} must not run this package here")
    return 0


def _engine(package: Package, name: str, threads: int | None, reference: list[Outputs]) -> Verdict:
    from qdbev_ros.engine.backends import open_runner
    from qdbev_ros.engine.engine import Engine
    from qdbev_ros.engine.parity import judge

    return judge(package, Engine(package, open_runner(package, name, threads).runner), reference)


def _torch(package: Package, checkpoint: Path, reference: list[Outputs]) -> Verdict:
    """The fake-quantised model on the same frames."""
    import torch

    from qdbev_ros.engine.master import FEATURES
    from qdbev_ros.engine.parity import Verdict, compare
    from qdbev_ros.engine.parity_frames import gate_frames
    from qdbev_train.checkpoint import load_model

    model = load_model(checkpoint)[0].eval()
    results: list[StageResult] = []
    bev = None
    for number, (frame, wanted) in enumerate(zip(gate_frames(package.variant), reference, strict=True)):
        arrays = (frame.images, frame.lidar2img, frame.can_bus)
        with torch.inference_mode():
            history = None if bev is None else torch.tensor(bev)[None]
            out = model(*(torch.tensor(array)[None] for array in arrays), history)
        got = {f"{FEATURES}{i}": maps[0].numpy() for i, maps in enumerate(out.image_features)}
        got |= {"bev": out.bev[0].numpy(), "boxes": out.boxes[-1, 0].numpy()}
        got |= {"class_logits": out.class_logits[-1, 0].numpy()}
        results += compare(number, wanted, got)
        bev = wanted["bev"]
    return Verdict(tuple(results))


def _table(verdicts: dict[str, Verdict | None], reasons: dict[str, str]) -> str:
    """Spread and shift of every stage, the worse of the frames."""
    stages = ("image features", "BEV", "class logits", "boxes")
    lines = [f"{'spread / shift':<14}" + "".join(f"{stage:>18}" for stage in stages)]
    for name, verdict in verdicts.items():
        if verdict is None:
            lines.append(f"{name:<14}  {reasons[name]}")
            continue
        cells = []
        for stage in stages:
            own = [result for result in verdict.results if result.stage == stage]
            worst = [max(r.spread for r in own), max(r.shift for r in own)] if own else []
            cells.append(f"{' / '.join(f'{figure:.3f}' for figure in worst) or '-':>18}")
        lines.append(f"{name:<14}{''.join(cells)}  {'passed' if verdict.passed else 'FAILED'}")
    return "\n".join(lines)


def _write(
    path: Path, package: Package, verdicts: dict[str, Verdict | None], reasons: dict[str, str]
) -> None:
    from qdbev_ros.core.files import write_json

    engines: dict[str, Any] = {
        name: {"reason": reasons[name]}
        if verdict is None
        else {"passed": verdict.passed, "results": [asdict(result) for result in verdict.results]}
        for name, verdict in verdicts.items()
    }
    write_json(path, {"package": str(package.path), "sha256": package.sha256, "engines": engines})
