# SPDX-License-Identifier: Apache-2.0
"""Time of convolutions in W4A6: our kernel beside ONNX Runtime's, on the layers of tiny's backbone and neck.

Both run in turn in one process on the same number of threads, channels last in and out (pictures come as planes), and
have to give the same codes. ONNX Runtime cuts codes off, and adds the shortcut, in operators of their own. Weights and
pictures are random.

example: python benchmarks/convolution.py --threads 2
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from tqdm import tqdm

from qdbev_ros.core.variant import CAMERAS, load_variant
from qdbev_ros.engine.convolution import Convolution, ConvolutionKernel, Grid, PreparedConvolution, Shortcut
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sessions import session_options

BLOCKS = (3, 4, 6, 3)  # of ResNet-50
CODES = Grid(0, 0, 63)
Codes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layer:
    """`count` convolutions of one kind; rows and columns of the picture that they read."""

    where: str
    count: int
    rows: int
    columns: int
    inputs: int
    outputs: int
    size: int
    stride: int = 1
    shortcut: bool = False

    @property
    def kind(self) -> str:
        stride = f", stride {self.stride}" if self.stride > 1 else ""
        added = ", with its shortcut" if self.shortcut else ""
        return f"{self.size}x{self.size}{stride}, {self.inputs} to {self.outputs}{added}"


def layers() -> list[Layer]:
    """The layers of tiny that make up most of its time."""
    image = load_variant("tiny").image
    high, wide = image.padded_height, image.padded_width
    found = [Layer("stem", 1, high, wide, 3, 64, 7, 2)]
    for stage, blocks in enumerate(BLOCKS):
        rows, columns = (-(-side // (4 << stage)) for side in (high, wide))
        planes, where = 64 << stage, f"layer{stage + 1}"
        found.append(Layer(where, blocks - 1, rows, columns, 4 * planes, planes, 1))
        found.append(Layer(where, blocks - (stage > 0), rows, columns, planes, planes, 3))
        if stage > 0:
            found.append(Layer(where, 1, 2 * rows, 2 * columns, planes, planes, 3, 2))
        found.append(Layer(where, blocks, rows, columns, planes, 4 * planes, 1, shortcut=True))
    return [*found, Layer("neck", 1, rows, columns, 256, 256, 3)]


def made_up(layer: Layer) -> Convolution:
    """Weights on four bits, a ReLU's codes in and out, half of these between the ends."""
    random, inputs = np.random.default_rng(0), layer.inputs
    weights = random.integers(-8, 8, (layer.outputs, inputs, layer.size, layer.size)).astype(np.int8)
    bias = random.integers(-3000, 3000, layer.outputs).astype(np.int32)
    factors = random.uniform(0.5, 1.5, layer.outputs) * 0.09 / np.sqrt(inputs) / layer.size
    # Steps of one: then both round the same sums.
    shortcut = Shortcut("other", 0, 1.0, 1.0, CODES) if layer.shortcut else None
    scale, padding = factors.astype(np.float32), layer.size // 2
    return Convolution("x", "y", weights, bias, scale, layer.stride, padding, CODES, CODES, shortcut)


def runtime(c: Convolution, given: dict[str, Codes], threads: int) -> Callable[[], Codes]:
    """One run of ONNX Runtime's kernels; it turns channels last and back, which it leaves out where it can."""
    constants = {
        "one": np.float32(1.0), "zero": np.uint8(0), "w": c.weights, "ws": c.factors,
        "wz": np.zeros(len(c.bias), np.int8), "b": c.bias, "low": np.uint8(CODES.low), "high": np.uint8(CODES.high),
    }  # fmt: skip
    inputs, last, turn = (
        ["planes", "one", "zero", "w", "ws", "wz", "one", "zero", "b"],
        [0, 3, 1, 2],
        "Transpose",
    )
    window = {"pads": [c.padding] * 4, "strides": [c.stride] * 2}
    nodes = [
        helper.make_node("QLinearConv", inputs, ["wide"], **window),
        helper.make_node("Clip", ["wide", "low", "high"], ["cut"]),
    ]
    if c.weights.shape[1] == 3:
        nodes[0].input[0] = "x"
    else:
        nodes.insert(0, helper.make_node(turn, ["x"], ["planes"], perm=last))
    made = "cut"
    if c.shortcut is not None:
        added = ["cut", "one", "zero", "turned", "one", "zero", "one", "zero"]
        nodes += [
            helper.make_node(turn, ["other"], ["turned"], perm=last),
            helper.make_node("QLinearAdd", added, ["sum"], domain="com.microsoft"),
            helper.make_node("Clip", ["sum", "low", "high"], ["total"]),
        ]
        made = "total"
    nodes.append(helper.make_node(turn, [made], ["y"], perm=[0, 2, 3, 1]))
    ends = [helper.make_tensor_value_info(n, TensorProto.UINT8, codes.shape) for n, codes in given.items()]
    y = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    tensors = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    graph = helper.make_graph(nodes, "convolution", ends, [y], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 10
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(threads), providers=["CPUExecutionProvider"]
    )
    values = {name: ort.OrtValue.ortvalue_from_numpy(codes) for name, codes in given.items()}
    return lambda: session.run_with_ort_values(["y"], values)[0].numpy()


def own_kernel(c: Convolution, given: dict[str, Codes], threads: int) -> Callable[[], Codes]:
    """One run of the kernel."""
    prepared, codes = PreparedConvolution(c, ConvolutionKernel(threads)), given["x"]
    images, height, width, inputs = codes.shape
    if c.weights.shape[1] == 3:
        height, width, inputs = width, inputs, height
    sides = images, height, width, inputs
    out = np.empty(prepared.sides(sides), np.uint8)
    other = given["other"].ctypes.data if "other" in given else None

    def run() -> Codes:
        prepared(codes.ctypes.data, sides, out.ctypes.data, other)
        return out

    return run


def made_codes(layer: Layer) -> dict[str, Codes]:
    """What a layer reads, by the names of its tensors."""
    random, images = np.random.default_rng(1), len(CAMERAS)
    sides = (images, layer.rows, layer.columns, layer.inputs)
    if layer.inputs == 3:
        sides = (images, layer.inputs, layer.rows, layer.columns)
    shapes = {"x": sides}
    if layer.shortcut:
        shapes["other"] = (*sides[:3], layer.outputs)
    return {name: random.integers(0, 64, shape).astype(np.uint8) for name, shape in shapes.items()}


def measure(threads: int, repeats: int) -> list[dict[str, Any]]:
    """A row for each kind of layer. Raises KernelError without the kernel."""
    rows = []
    for layer in tqdm(layers(), unit="layer", disable=None):
        c, given = made_up(layer), made_codes(layer)
        runs = [make(c, given, threads) for make in (runtime, own_kernel)]
        if not np.array_equal(*(run() for run in runs)):
            raise KernelError(f"{layer.where}, {layer.kind}: the two do not agree")
        times: list[list[float]] = [[], []]
        for _ in range(repeats):
            for run, taken in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                taken.append((time.perf_counter() - start) * 1e3)
        theirs, ours = (f"{statistics.median(taken):.2f} [{min(taken):.2f}]" for taken in times)
        gain = round(statistics.median(times[0]) / statistics.median(times[1]), 2)
        picture, way = f"{layer.columns}x{layer.rows}", "Winograd" if c.by_winograd else "plain"
        rows.append(
            {"where": layer.where, "layers": layer.count, "picture": picture, "kind": layer.kind, "way": way}
            | {"runtime": theirs, "ours": ours, "gain": gain}
        )
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
    print("| where | layers | six pictures of | kind | our way | ONNX Runtime ms | ours ms | gain |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
