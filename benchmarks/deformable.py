# SPDX-License-Identifier: Apache-2.0
"""Time of deformable sampling: our kernel beside ONNX Runtime's GridSample, on the sizes and places of a real frame.

Both run in turn in one process on the same number of threads, so that whatever else the machine does hits both. Values,
offsets (a few pixels, as a trained network's) and weights are random.

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
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.projection import scale_to_input, stack_lidar2img, visible_cells
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import DOMAIN, PREFIX, define_functions, inline_samplings
from qdbev_ros.engine.sessions import session_options
from qdbev_train.data.tables import all_frames, load_scenes

ROOT = Path(__file__).resolve().parents[1]
TOWN = (ROOT / "demo" / "town", "v1.0-mini", "mini_val")  # comes with the project
OFFSET_PIXELS = 2.0
Sizes = list[tuple[int, int]]
Floats = NDArray[np.float32]


def places(variant: Variant) -> dict[str, tuple[Floats, int, Sizes]]:
    """Stage -> ((B, Q, P, 2) reference points, samples for each of them and head, sizes of the maps)."""
    bev, spec, image = variant.bev, variant.transformer, variant.image
    frame = all_frames(load_scenes(*TOWN))[0]
    matrices = [scale_to_input(frame.lidar2img(c), c.calibration, image) for c in frame.cameras]
    points = visible_cells(stack_lidar2img(matrices), bev, image).points
    strides = [
        2 ** (variant.backbone.out_stages[0] + 1 + level) for level in range(variant.backbone.neck_levels)
    ]
    maps = [(-(-image.padded_height // s), -(-image.padded_width // s)) for s in strides]
    y, x = np.mgrid[: bev.height, : bev.width]
    cells = np.stack([(x + 0.5) / bev.width, (y + 0.5) / bev.height], -1).reshape(1, -1, 1, 2)
    queries = np.random.default_rng(1).random((1, spec.queries, 1, 2))
    own = [(bev.height, bev.width)]
    return {
        "spatial": (points.astype(np.float32), spec.sca_points // points.shape[-2], maps),
        "temporal": (np.repeat(cells, 2, 0).astype(np.float32), spec.tsa_points, own),
        "decoder": (queries.astype(np.float32), spec.decoder_points, own),
    }


def tensors(variant: Variant, points: Floats, repeats: int, sizes: Sizes) -> dict[str, Floats]:
    """value, locations and weights of a sampling, as sampling.py describes them."""
    random, spec = np.random.default_rng(0), variant.transformer
    heads, depth = spec.heads, spec.channels // spec.heads
    batch, queries, pillar = points.shape[:3]
    shape = (batch, queries, heads, len(sizes), repeats, pillar, 2)
    scale = np.array([[w, h] for h, w in sizes])[:, None, None]
    offsets = random.normal(scale=OFFSET_PIXELS, size=shape) / scale
    locations = (points[:, :, None, None, None] + offsets).reshape(*shape[:4], -1, 2)
    value = random.normal(size=(batch, sum(h * w for h, w in sizes), heads, depth))
    weights = random.random(locations.shape[:-1])
    arrays = {"value": value, "locations": locations, "weights": weights}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in arrays.items()}


def grid_sample(feeds: dict[str, Floats], sizes: Sizes, threads: int) -> Callable[[], Any]:
    """One run of the GridSample form."""
    heads, depth = feeds["value"].shape[2:]
    shape = {"heads": heads, "depth": depth, "points": feeds["weights"].shape[-1]}
    flat = [side for size in sizes for side in size]
    node = helper.make_node(PREFIX, list(feeds), ["out"], domain=DOMAIN, sizes=flat, **shape)
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in feeds.items()]
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    graph = Graph(helper.make_model(helper.make_graph([node], "sampling", inputs, [output])))
    define_functions(graph)
    model = inline_samplings(graph.finish("benchmark", 21)).SerializeToString()
    session = ort.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])
    return lambda: session.run(None, feeds)


def own_kernel(feeds: dict[str, Floats], sizes: Sizes, threads: int) -> Callable[[], Any]:
    """One run of the kernel."""
    kernel = DeformableKernel(threads)
    value, locations, weights = feeds["value"], feeds["locations"], feeds["weights"]
    out = np.empty((*weights.shape[:3], value.shape[3]), np.float32)

    def run() -> None:
        # Taken here, so that the arrays stay alive.
        buffers = value.ctypes.data, locations.ctypes.data, weights.ctypes.data, out.ctypes.data
        kernel(buffers, value.shape, locations.shape, weights.shape, sizes)

    return run


def measure(name: str, threads: int, repeats: int) -> list[dict[str, Any]]:
    """The rows of a variant."""
    rows = []
    variant = load_variant(name)
    for stage, (points, samples, sizes) in places(variant).items():
        feeds = tensors(variant, points, samples, sizes)
        runs = {make.__name__: make(feeds, sizes, threads) for make in (grid_sample, own_kernel)}
        times: dict[str, list[float]] = {engine: [] for engine in runs}
        for turn in range(repeats + 2):  # two to warm up
            for engine, run in runs.items():
                start = time.perf_counter()
                run()
                if turn >= 2:
                    times[engine].append((time.perf_counter() - start) * 1e3)
        gain = min(times["grid_sample"]) / min(times["own_kernel"])
        for engine, ms in times.items():
            row = {"variant": name, "stage": stage, "engine": engine, "samples": feeds["weights"].size}
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
