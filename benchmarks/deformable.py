# SPDX-License-Identifier: Apache-2.0
"""Time of deformable attention: our kernel beside ONNX Runtime's nodes, on the sizes and places of a real frame.

What lies between the linear layers of an attention: softmax, places, sampling (by GridSample in ONNX Runtime), and the
mean over maps or the sum over cameras. Both run in turn in one process on the same number of threads, so that whatever
else the machine does hits both. Values, offsets (a few pixels, as a trained network's) and logits are random.

example: python benchmarks/deformable.py --variants nano tiny --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.attention_graph import Arrays, Shape, attention_graph, feeds
from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.projection import scale_to_input, stack_lidar2img, visible_cells
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.deformable_nodes import take_attentions
from qdbev_ros.engine.kernel_steps import AttentionStep, Buffers
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import inline_samplings
from qdbev_ros.engine.sessions import session_options
from qdbev_train.data.tables import all_frames, load_scenes

ROOT = Path(__file__).resolve().parents[1]
TOWN = (ROOT / "demo" / "town", "v1.0-mini", "mini_val")  # comes with the project


def attentions(variant: Variant) -> dict[str, tuple[Shape, Arrays]]:
    """Stage -> (what the attention reads, its tensors)."""
    bev, spec, image = variant.bev, variant.transformer, variant.image
    frame = all_frames(load_scenes(*TOWN))[0]
    matrices = [scale_to_input(frame.lidar2img(c), c.calibration, image) for c in frame.cameras]
    seen = visible_cells(stack_lidar2img(matrices), bev, image)
    cameras, rows, pillar, _ = seen.points.shape
    first = variant.backbone.out_stages[0] + 1
    strides = [2 ** (first + level) for level in range(variant.backbone.neck_levels)]
    maps = tuple((-(-image.padded_height // s), -(-image.padded_width // s)) for s in strides)
    y, x = np.mgrid[: bev.height, : bev.width]
    cells = np.stack([(x + 0.5) / bev.width, (y + 0.5) / bev.height], -1).reshape(-1, 2)
    queries = np.random.default_rng(1).random((spec.queries, 2))
    spatial = {"references": seen.points, "slots": seen.slots.reshape(-1), "shares": seen.weights[None]}
    outputs, most = seen.slots.shape
    heads, depth, own = spec.heads, spec.channels // spec.heads, ((bev.height, bev.width),)
    gathered = {"pillar": pillar, "outputs": outputs, "most": most}
    found = {
        "spatial": (Shape(cameras, rows, heads, depth, spec.sca_points, maps, **gathered), spatial),
        "temporal": (
            Shape(1, bev.cells, heads, depth, spec.tsa_points, own, maps=2),
            {"references": [[cells] * 2]},
        ),
        "decoder": (
            Shape(1, spec.queries, heads, depth, spec.decoder_points, own),
            {"references": [queries]},
        ),
    }
    return {stage: (shape, _tensors(shape, real)) for stage, (shape, real) in found.items()}


def _tensors(shape: Shape, real: dict[str, Any]) -> Arrays:
    made = feeds(shape)
    return made | {name: np.asarray(array, made[name].dtype) for name, array in real.items()}


def grid_sample(model: onnx.ModelProto, arrays: Arrays, threads: int) -> Callable[[], Any]:
    """One run of the GridSample form and of the nodes around it."""
    plain = inline_samplings(model).SerializeToString()
    session = ort.InferenceSession(plain, session_options(threads), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, arrays)


def own_kernel(model: onnx.ModelProto, arrays: Arrays, threads: int) -> Callable[[], Any]:
    """One run of the kernel."""
    (attention,) = take_attentions(model)[1].values()
    step, buffers = AttentionStep(attention, DeformableKernel(threads)), Buffers()
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    return lambda: step(values, buffers)


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of a variant."""
    rows = []
    variant = load_variant(name)
    for stage, (shape, arrays) in attentions(variant).items():
        model = attention_graph(shape)
        runs = {make.__name__: make(model, arrays, threads) for make in (grid_sample, own_kernel)}
        times: dict[str, list[float]] = {engine: [] for engine in runs}
        for turn in range(repeats + 2):  # two to warm up
            for engine, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[engine].append((time.perf_counter() - start) * 1e3)
        gain = min(times["grid_sample"]) / min(times["own_kernel"])
        for engine, ms in times.items():
            row = {"variant": name, "stage": stage, "engine": engine, "samples": arrays["logits"].size}
            row |= {"ms_median": round(statistics.median(ms), 3), "ms_min": round(min(ms), 3)}
            rows.append(row | {"gain": round(gain if engine == "own_kernel" else 1.0, 1)})
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["nano", "tiny"], metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    if args.threads < 1 or args.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    try:
        rows = [row for name in args.variants for row in measure(name, args.threads, args.repeats)]
    except (QdbevError, KernelError) as error:
        print(f"deformable.py: error: {error}", file=sys.stderr)
        return 2
    print(
        "| variant | attention | engine | samples | median ms | least ms | gain |\n|---|---|---|---|---|---|---|"
    )
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    if args.json:
        write_json(args.json, {"threads": args.threads, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
