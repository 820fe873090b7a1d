# SPDX-License-Identifier: Apache-2.0
"""Time of a 3x3 convolution in W4A6: our Winograd kernel beside ONNX Runtime's QLinearConv, on the sizes of tiny.

Both run in turn in one process on the same number of threads, channels last in and out, and have to give the same
codes. Weights and pictures are random.

example: python benchmarks/convolution.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from qdbev_ros.core.variant import CAMERAS, load_variant
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.onnxruntime_runner import session_options
from qdbev_ros.engine.winograd import Convolution, PreparedConvolution, WinogradKernel

BLOCKS = (3, 4, 6, 3)  # of ResNet-50; all but the last three stages' first have stride 1
Codes = NDArray[np.uint8]


def layers() -> dict[str, tuple[int, int, int, int, int]]:
    """Where -> (how many, rows, columns, channels, channels out) in tiny."""
    image = load_variant("tiny").image
    found = {}
    for stage, blocks in enumerate(BLOCKS):
        rows, columns = (-(-side // (4 << stage)) for side in (image.padded_height, image.padded_width))
        found[f"layer{stage + 1}"] = (blocks - (stage > 0), rows, columns, 64 << stage, 64 << stage)
    return found | {"neck": (1, rows, columns, 256, 256)}


def made_up(inputs: int, outputs: int) -> Convolution:
    """Weights on four bits, a ReLU's codes in and out, half of these between the ends."""
    random = np.random.default_rng(0)
    weights = random.integers(-8, 8, (outputs, inputs, 3, 3)).astype(np.int8)
    bias = random.integers(-3000, 3000, outputs).astype(np.int32)
    factors = random.uniform(0.5, 1.5, outputs) * 0.03 / np.sqrt(inputs)
    return Convolution("x", "y", weights, bias, factors.astype(np.float32), 0, 0, 0, 63)


def runtime(c: Convolution, codes: Codes, threads: int) -> Callable[[], Codes]:
    """One run of ONNX Runtime's kernel; it turns channels last and back, which it leaves out where it can."""
    constants = {
        "one": np.float32(1.0), "zero": np.uint8(0), "w": c.weights, "ws": c.factors,
        "wz": np.zeros(len(c.bias), np.int8), "b": c.bias, "low": np.uint8(c.low), "high": np.uint8(c.high),
    }  # fmt: skip
    given = ["planes", "one", "zero", "w", "ws", "wz", "one", "zero", "b"]
    nodes = [
        helper.make_node("Transpose", ["x"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("QLinearConv", given, ["wide"], pads=[1] * 4),
        helper.make_node("Clip", ["wide", "low", "high"], ["cut"]),
        helper.make_node("Transpose", ["cut"], ["y"], perm=[0, 2, 3, 1]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, codes.shape)
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "convolution", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    values = {"x": ort.OrtValue.ortvalue_from_numpy(codes)}
    return lambda: session.run_with_ort_values(["y"], values)[0].numpy()


def own_kernel(c: Convolution, codes: Codes, threads: int) -> Callable[[], Codes]:
    """One run of the kernel."""
    prepared = PreparedConvolution(c, WinogradKernel(threads))
    images, height, width, inputs = codes.shape
    out = np.empty((images, height, width, len(c.bias)), np.uint8)

    def run() -> Codes:
        prepared(codes.ctypes.data, (images, height, width, inputs), out.ctypes.data)
        return out

    return run


def measure(threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of layer. Raises KernelError without the kernel."""
    rows = []
    for where, (count, height, width, inputs, outputs) in tqdm(layers().items(), unit="layer", disable=None):
        random, c = np.random.default_rng(1), made_up(inputs, outputs)
        codes = random.integers(0, 64, (len(CAMERAS), height, width, inputs)).astype(np.uint8)
        runs = [make(c, codes, threads) for make in (runtime, own_kernel)]
        if not np.array_equal(*(run() for run in runs)):
            raise KernelError(f"{where}: the two do not agree")
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for run, taken in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                taken.append((time.perf_counter() - start) * 1e3)
        shown = [f"{statistics.median(taken):.2f} [{min(taken):.2f}]" for taken in times]
        size = f"{width}x{height}, {inputs} to {outputs} channels"
        row = {"where": where, "layers": count, "size": size, "runtime": shown[0], "ours": shown[1]}
        rows.append(row | {"gain": round(statistics.median(times[0]) / statistics.median(times[1]), 2)})
    return rows


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args(arguments)
    if args.threads < 1 or args.repeats < 1:
        parser.error("--threads and --repeats must be at least 1")
    try:
        rows = measure(args.threads, args.repeats)
    except KernelError as error:
        print(f"convolution.py: error: {error}", file=sys.stderr)
        return 2
    print(
        "| where | layers | six pictures of | ONNX Runtime ms | ours ms | gain |\n|---|---|---|---|---|---|"
    )
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
