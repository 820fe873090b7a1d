# SPDX-License-Identifier: Apache-2.0
"""Time and memory of the float model: one forward pass in PyTorch beside ONNX Runtime on the same graph, and one
training step through the real loop.

Each row is measured in a process of its own, which waits while the others run. They take turns, so that whatever else
the machine does hits all of them; a large matrix product takes its turn as well, and its best rate is the machine's
peak. A row's memory is the peak of its process from the first run on, once everything is loaded.

example: python benchmarks/float_model.py --variants tiny small --repeats 5
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.turns import Row, Turns, Worker, cores, cpu_name, free_gb, serve
from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import load_variant

ROOT = Path(__file__).resolve().parents[1]
TOWN = (ROOT / "demo" / "town", "v1.0-mini", "mini_val")  # comes with the project
RECIPE = ROOT / "config" / "train" / "tiny_nuscenes.yaml"
# The recipe asks for these; data and weights are others here.
UNUSED = {"QDBEV_NUSCENES": "-", "QDBEV_BACKBONE": "-"}
UNCOUNTED = ("export",)  # the tracing of torch's exporter does not survive the counter of operations
SMALL = ("nano", "tiny")  # warmed up, repeated and trained; the others run each forward pass once, cold
# Memory that must be free; variants that are not named here need as much as base.
NEEDED_GB = {"nano": 2.0, "tiny": 6.0, "small": 8.0, "base": 10.0}
GEMM = 2048  # rows and columns of the matrix product
SAME = 1e-3  # relative difference of the mean |logit| above which two engines do not run the same function

# What runs in a process of its own: each gets ready, then does its work once a turn.


def model_and_inputs(name: str) -> tuple[Any, dict[str, Any]]:
    """The model with the same random weights in every process, and the tensors of its graph for a real frame."""
    import torch

    from qdbev_train.data.queues import QueueDataset
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.export.graph import INPUTS
    from qdbev_train.model import build_model

    torch.manual_seed(0)
    model = build_model(name).eval()
    *_, batch = next(iter(QueueDataset(load_scenes(*TOWN), model.variant, batch=1, seed=0)))
    tables = model.camera_tables(batch.lidar2img)
    past = torch.randn(1, model.variant.bev.cells, model.variant.transformer.channels)
    history = model.align_history(batch.can_bus, past, None)
    geometry = (tables.points, tables.cells, tables.slots, tables.weights)
    tensors = (batch.images, *geometry, batch.can_bus, *history)
    return model, dict(zip(INPUTS, tensors, strict=True))


def export(name: str, folder: Path, turns: Turns) -> None:
    """Writes the graph and its inputs, so that ONNX Runtime's process needs no torch."""
    import numpy as np

    from qdbev_train.export.graph import export_master

    for _ in turns:
        model, inputs = model_and_inputs(name)
        np.savez(folder / "inputs.npz", **{key: tensor.numpy() for key, tensor in inputs.items()})
        (folder / "model.onnx").write_bytes(export_master(model, model.variant))


def torch_forward(name: str, folder: Path, turns: Turns) -> None:
    import torch

    model, inputs = model_and_inputs(name)
    model.requires_grad_(
        False
    )  # or the counter of operations looks for gradients that inference does not have
    with torch.inference_mode():
        for _ in turns:
            logits = model.forward_tensors(**inputs).class_logits[-1]
    (folder / "torch.txt").write_text(str(float(logits.abs().mean())))


def onnxruntime_forward(name: str, folder: Path, turns: Turns) -> None:
    import numpy as np
    import onnxruntime

    from qdbev_ros.engine.sessions import session_options

    path = str(folder / "model.onnx")
    session = onnxruntime.InferenceSession(path, session_options(cores()), providers=["CPUExecutionProvider"])
    wanted = {i.name for i in session.get_inputs()}
    inputs = {key: array for key, array in np.load(folder / "inputs.npz").items() if key in wanted}
    for _ in turns:
        logits = session.run(["class_logits", "boxes", "bev"], inputs)[0]
    (folder / "onnxruntime.txt").write_text(str(float(np.abs(logits).mean())))


def train_step(name: str, folder: Path, turns: Turns) -> None:
    """The published recipe's step on one queue: remember the past frames, learn from the last, update the weights."""
    import torch

    from qdbev_train.data.queues import QueueDataset
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.model import build_model
    from qdbev_train.training.config import Span, TrainConfig, read_config
    from qdbev_train.training.loop import TrainingData, train

    variant = load_variant(name)
    length = Span(1_000_000, "steps")
    config = read_config(RECIPE, TrainConfig)
    config = replace(config, variant=name, evaluation=None, out=str(folder), length=length, save_every=10**6)
    scenes = load_scenes(*TOWN)
    queue = next(iter(QueueDataset(scenes, variant, config.batch, seed=0)))
    torch.manual_seed(0)
    model = build_model(variant)
    model.freeze_backbone(1)
    data = TrainingData(len(scenes), lambda *_: (queue for _ in turns))
    with suppress(KeyboardInterrupt):  # the loop's word for data that end before the run does
        train(model, variant, config, data)


def matrix_product(name: str, folder: Path, turns: Turns) -> None:
    import torch

    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    for _ in turns:
        torch.mm(a, b)


JOBS: dict[tuple[str, str], Callable[[str, Path, Turns], None]] = {
    ("torch", "export"): export,
    ("torch", "forward"): torch_forward,
    ("onnxruntime", "forward"): onnxruntime_forward,
    ("torch", "train_step"): train_step,
    ("torch", "gemm"): matrix_product,
}


# What asks them in turn.


def worker(row: Row, folder: Path) -> Worker:
    """The process of a row; it is this file again."""
    return Worker(row, [__file__, "work", row.engine, row.stage, row.variant, str(folder)], UNUSED)


def measure(variant: str, repeats: int, folder: Path, bar: tqdm[Any]) -> list[Row]:
    """The rows of a variant; the matrix product is the first."""
    bar.set_description(f"{variant}: export")
    with worker(Row(variant, "torch", "export"), folder) as exporter:
        exporter.turn()
    bar.update()
    gemm = Row(variant, "torch", "gemm")
    rows = [Row(variant, "torch", "forward"), Row(variant, "onnxruntime", "forward")]
    if variant in SMALL:
        rows.append(Row(variant, "torch", "train_step"))
        with ExitStack() as stack:
            workers = [stack.enter_context(worker(row, folder)) for row in (gemm, *rows)]
            for number in range(repeats + 1):
                for one in workers:
                    bar.set_description(f"{variant}: {one.row.engine} {one.row.stage}")
                    one.turn()
                    if number == 0:  # the warm-up
                        one.row.seconds.clear()
                        one.row.cpu_seconds.clear()
                    bar.update()
    else:
        with worker(gemm, folder) as reference:
            for row in rows:
                bar.set_description(f"{variant}: {row.engine} {row.stage}")
                for _ in range(3):
                    reference.turn()
                # One at a time: two large models side by side might not fit.
                with worker(row, folder) as own:
                    own.turn()
                bar.update()
    torch_row, other = rows[:2]
    other.flops = torch_row.flops
    said = [float((folder / f"{row.engine}.txt").read_text()) for row in (torch_row, other)]
    if not abs(said[0] - said[1]) <= SAME * abs(said[0]):
        raise DataError(
            f"{variant}: PyTorch and ONNX Runtime differ: mean |logit| {said[0]:g} and {said[1]:g}"
        )
    return [gemm, *rows]


def run(variants: list[str], repeats: int) -> dict[str, Any]:
    """Measures all variants; plain data for the JSON file."""
    rows: list[Row] = []
    left_out: dict[str, str] = {}
    total = sum(1 + (4 * (repeats + 1) if v in SMALL else 2) for v in variants)
    with tqdm(total=total, unit="run", disable=None) as bar, tempfile.TemporaryDirectory() as folder:
        for variant in variants:
            needed = NEEDED_GB.get(variant, NEEDED_GB["base"])
            if free_gb() < needed:
                left_out[variant] = f"{free_gb():.1f} GB of memory free, {needed:.0f} wanted"
                continue
            place = Path(folder) / variant.replace("/", "_")
            place.mkdir()
            rows += measure(variant, repeats, place, bar)
    gemms = [row for row in rows if row.stage == "gemm"]
    peak = max((row.flops / min(row.seconds) for row in gemms), default=0.0)
    return {
        "machine": cpu_name(),
        "threads": cores(),
        "peak_gflops": round(peak / 1e9, 1),
        "rows": [row.to_dict(peak) for row in rows if row.stage != "gemm"],
        "left_out": left_out,
    }


def table(data: dict[str, Any]) -> str:
    """The numbers as a Markdown table."""
    lines = [
        f"{data['machine']}, {data['threads']} threads, {data['peak_gflops']:.0f} GFLOP/s in a float32 product of "
        f"{GEMM}x{GEMM} matrices",
        "",
        "| variant | stage | engine | median ms | least ms | CPU ms | runs | GFLOP | of peak | peak memory MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        times = [f"{row[key]:.0f}" for key in ("ms_median", "ms_min", "cpu_ms_median")]
        work = [
            str(row["runs"]),
            f"{row['gflop']:.0f}",
            f"{row['fraction_of_peak']:.0%}",
            str(row["peak_mb"]),
        ]
        cells = [row["variant"], row["stage"], row["engine"], *times, *work]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [f"{variant}: not run, {why}" for variant, why in data["left_out"].items()]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if arguments[:1] == ["work"]:
        engine, stage, variant, folder = arguments[1:]
        job = JOBS[engine, stage]
        serve(lambda turns: job(variant, Path(folder), turns), engine == "torch", stage not in UNCOUNTED)
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["nano", "tiny"], metavar="NAME")
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of nano and tiny after a warm-up (default: 3)"
    )
    parser.add_argument("--json", type=Path, default=ROOT / "out" / "float_bench.json", metavar="FILE")
    args = parser.parse_args(arguments)
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    try:
        for variant in args.variants:
            load_variant(variant)
        data = run(args.variants, args.repeats)
        write_json(args.json, data)
    except QdbevError as error:
        print(f"float_model.py: error: {error}", file=sys.stderr)
        return 2
    print(f"{table(data)}\n\nwrote {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
