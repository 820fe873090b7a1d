# SPDX-License-Identifier: Apache-2.0
"""3x3 convolutions by Winograd's F(2x2, 3x3) in int8: 16 products where the plain form has 36, and the same sums.

In networks of 8 bits the transformed numbers have 10 and lose their last ones. Ours have room: four codes of 6 bits add
up to 8 bits, nine weights of 4 bits to 7. The kernel is winograd.c; here is which convolutions it can have, and how
their weights are laid out for it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import clip_behind
from qdbev_ros.engine.native import KernelError, Team, load
from qdbev_ros.engine.sampling import DOMAIN

OP_TYPE = "Convolution3x3"  # codes (B, C, h, w) uint8 in and out; all else is in a `Convolution`
LANES = 64  # channels in and out divide by it
_MOST_SUM = 252  # of four codes, counted from the lowest: 128 must fit on top of their differences
_TWICE_G = np.array([[2, 0, 0], [1, 1, 1], [1, -1, 1], [0, 0, 2]], np.int32)
_SPOTS, _SUM_SPOT = 16, 5  # of a transformed tile; the one that is the sum of four codes


@dataclass(frozen=True)
class Convolution:
    """Stride 1, padding 1: codes in, codes out.

    weights (outputs, inputs, 3, 3) int8 codes · bias (outputs) int32, added to the sums · factors (outputs) float32,
    from sums to codes · zero, out_zero: codes of the value 0 · low, high: lowest and highest code of the result
    """

    codes: str
    output: str
    weights: NDArray[np.int8]
    bias: NDArray[np.int32]
    factors: NDArray[np.float32]
    zero: int
    out_zero: int
    low: int
    high: int


def take_convolutions(lowered: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Convolution]]:
    """A U8 graph with a node of ours for each convolution that the kernel can have, and these by their output."""
    types = {v.name: v for v in onnx.shape_inference.infer_shapes(lowered, data_prop=True).graph.value_info}
    graph, found = Graph(lowered), {}
    for conv in graph.nodes("Conv"):
        convolution = _read(graph, conv)
        if convolution is None or convolution.output not in types:
            continue
        found[convolution.output] = convolution
        (quantise,) = graph.users(conv.output[0])
        clip = clip_behind(graph, quantise)
        for node in (quantise, clip):
            if node is not None:
                graph.remove(node)
        own = helper.make_node(
            OP_TYPE, [convolution.codes], [convolution.output], name=conv.name, domain=DOMAIN
        )
        graph.replace(conv, [own])
    model = graph.finish(lowered.producer_name, lowered.opset_import[0].version)
    model.graph.value_info.extend(types[name] for name in found)
    return model, found


def _read(graph: Graph, conv: onnx.NodeProto) -> Convolution | None:
    """The convolution where it is of the kernel's kind: 3x3, 4-bit weights, 6-bit codes, rounded to one grid."""
    made = {a.name: list(a.ints) or a.i for a in conv.attribute if a.name != "auto_pad"}
    kind = {"kernel_shape": [3, 3], "pads": [1] * 4, "strides": [1, 1], "dilations": [1, 1], "group": 1}
    users, sources = graph.users(conv.output[0]), [graph.producer(name) for name in conv.input]
    if made != kind or [user.op_type for user in users] != ["QuantizeLinear"]:
        return None
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return None
    picture, weight, *biases = (list(source.input) for source in sources if source is not None)
    weights, clip_in = graph.constant(weight[0]), graph.producer(picture[0])
    outputs, inputs = weights.shape[:2]
    clip_out = clip_behind(graph, users[0])
    if clip_in is None or clip_in.op_type != "Clip" or clip_out is None or outputs % LANES or inputs % LANES:
        return None
    lowest, highest = (int(graph.constant(name)) for name in clip_in.input[1:])
    zero = int(graph.constant(picture[2]))
    wide = 4 * (highest - lowest) > _MOST_SUM or lowest not in (zero, zero - 32)
    if wide or np.abs(transformed(weights)).max() > np.iinfo(np.int8).max:
        return None
    low, high = (int(graph.constant(name)) for name in clip_out.input[1:])
    # In this order ONNX Runtime makes the factor, too.
    step = graph.constant(picture[1]) * graph.constant(weight[1])
    factors = (step / graph.constant(users[0].input[1])).astype(np.float32)
    return Convolution(
        picture[0],
        clip_out.output[0],
        weights,
        graph.constant(biases[0][0]) if biases else np.zeros(outputs, np.int32),
        np.broadcast_to(factors, outputs),
        zero,
        int(graph.constant(users[0].input[2])),
        low,
        high,
    )


def transformed(weights: NDArray[np.int8]) -> NDArray[np.int32]:
    """(16, outputs, inputs) of (outputs, inputs, 3, 3): 2G w 2G', four times what belongs to the plain sums."""
    made: NDArray[np.int32] = np.einsum("ai,ocij,bj->aboc", _TWICE_G, weights.astype(np.int32), _TWICE_G)
    return made.reshape(_SPOTS, *weights.shape[:2])


class _Shape(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("images", "height", "width", "inputs", "outputs")),
        *((name, ctypes.c_int32) for name in ("zero", "plain_sum", "out_zero", "low", "high")),
    ]


class WinogradKernel:
    """The compiled kernel, on `threads` threads. Raises KernelError where it cannot be built or the CPU lacks VNNI.

    artefact: SHA-256 of the compiled file
    """

    def __init__(self, threads: int | None = None) -> None:
        library, self.artefact = load("winograd")
        if not library.qdbev_winograd_runs():
            raise KernelError("this processor has no AVX-512 VNNI")
        self.function, self.scratch = library.qdbev_winograd, library.qdbev_winograd_scratch
        self.function.argtypes = [ctypes.c_void_p] * 8 + [ctypes.c_int64] * 2
        self.function.restype = None
        self.scratch.restype = ctypes.c_int64
        self.team = Team(threads, "convolution")


class PreparedConvolution:
    """A convolution with its weights laid out for the kernel."""

    def __init__(self, convolution: Convolution, kernel: WinogradKernel) -> None:
        self._kernel, self.convolution = kernel, convolution
        self.outputs, self._inputs = convolution.weights.shape[:2]
        spots = transformed(convolution.weights)
        # Bytes count from zero: 128 on top of every difference, and what that adds to the sums is where they start.
        offsets = np.full((_SPOTS, 1), 128, np.int32)
        self._plain_sum = convolution.zero == 0
        if self._plain_sum:
            offsets[_SUM_SPOT] = 0
        start = -offsets * spots.sum(2)
        lanes = self.outputs // LANES
        packed = spots.reshape(_SPOTS, lanes, LANES, self._inputs // 4, 4).transpose(1, 0, 3, 2, 4)
        self._arrays = (
            np.ascontiguousarray(packed, np.int8),
            np.ascontiguousarray(start.reshape(_SPOTS, lanes, LANES).transpose(1, 0, 2), np.int32),
            np.ascontiguousarray(convolution.bias, np.int32),
            np.ascontiguousarray(convolution.factors, np.float32),
        )
        self._scratch: list[NDArray[np.uint8]] = []

    def __call__(self, source: int, shape: tuple[int, int, int, int], target: int) -> None:
        """From the codes (images, height, width, inputs) at one address to those (..., outputs) at another.

        Raises EngineError where the shape is another one.
        """
        images, height, width, inputs = shape
        if inputs != self._inputs or min(shape) < 1:
            raise EngineError(
                f"{self.convolution.output}: codes of {list(shape)}, expected {self._inputs} channels"
            )
        c = self.convolution
        own = _Shape(*shape, self.outputs, c.zero, self._plain_sum, c.out_zero, c.low, c.high)
        kernel = self._kernel
        if not self._scratch:
            size = kernel.scratch(ctypes.byref(own))
            self._scratch = [np.empty(size, np.uint8) for _ in range(kernel.team.threads)]
        given = [array.ctypes.data for array in self._arrays]

        def work(thread: int, first: int, last: int) -> None:
            scratch = self._scratch[thread].ctypes.data
            kernel.function(ctypes.byref(own), source, *given, target, scratch, first, last)

        kernel.team.share(images * -(-height // 2) * -(-width // 2), work)
