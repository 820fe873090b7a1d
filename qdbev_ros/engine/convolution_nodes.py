# SPDX-License-Identifier: Apache-2.0
"""Finds what our convolution kernel can have in a U8 graph, and puts nodes of ours in its place.

What is small stays where it is: each time that the runtime is left costs more than the kernel gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from qdbev_ros.engine.convolution import (
    LANES,
    PICTURE_CHANNELS,
    Convolution,
    Grid,
    MaxPool,
    Shortcut,
    window_fits,
)
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import clip_behind
from qdbev_ros.engine.sampling import DOMAIN

# Codes (B, C, h, w) uint8 in and out, but for pictures, which come as they are; all else is in the `Taken`.
CONVOLUTION, MAX_POOL = "Convolution", "MaxPoolCodes"
Taken = dict[str, Convolution | MaxPool]
Types = dict[str, onnx.ValueInfoProto]
LEAST_PRODUCTS = 200_000_000  # of a convolution: about half a millisecond on two cores


def take_convolutions(lowered: onnx.ModelProto, pictures: str | None) -> tuple[onnx.ModelProto, Taken]:
    """A U8 graph with nodes of ours for what the kernel can have, and these by their output.

    pictures: the tensor of the pictures' codes, (6, 3, H, W), if there is one
    """
    inferred = onnx.shape_inference.infer_shapes(lowered, data_prop=True).graph
    types = {v.name: v for v in inferred.value_info}
    graph, taken = Graph(lowered), Taken()
    # Pools first: whether a convolution reads codes shows only once its pool does.
    worthwhile = {own.output for _, own in _found(graph, types, pictures)}
    for node in graph.nodes("MaxPool"):
        _take_pool(graph, node, types, taken, worthwhile)
    for node, convolution in _found(graph, types, pictures):
        (quantise,) = graph.users(node.output[0])
        _replace(graph, node, convolution, [quantise, clip_behind(graph, quantise)])
        taken[convolution.output] = convolution
    for node in graph.nodes("Add"):
        _take_sum(graph, node, types, taken)
    model = graph.finish(lowered.producer_name, lowered.opset_import[0].version)
    model.graph.value_info.extend(types[name] for name in taken)
    return model, taken


def _replace(
    graph: Graph, node: onnx.NodeProto, own: Convolution, behind: list[onnx.NodeProto | None]
) -> None:
    inputs = [own.codes] if own.shortcut is None else [own.codes, own.shortcut.codes]
    for late in behind:
        if late is not None:
            graph.remove(late)
    graph.replace(node, [helper.make_node(CONVOLUTION, inputs, [own.output], name=node.name, domain=DOMAIN)])


def _found(graph: Graph, types: Types, pictures: str | None) -> list[tuple[onnx.NodeProto, Convolution]]:
    """The convolutions that the kernel can have and that are worth it."""
    read = ((node, _read(graph, node, types, pictures)) for node in graph.nodes("Conv"))
    return [(n, own) for n, own in read if own is not None and _products(own, types) >= LEAST_PRODUCTS]


def _products(own: Convolution, types: Types) -> int:
    """Multiplications of a convolution; 0 where the size of its result isn't known."""
    sides = _sides(types, own.output)
    pixels = int(np.prod([value for value, _ in (*sides[:1], *sides[2:])])) if len(sides) == 4 else 0
    return pixels * own.weights.size


def _take_pool(graph: Graph, pool: onnx.NodeProto, types: Types, taken: Taken, worthwhile: set[str]) -> None:
    """A pool of the numbers that a convolution's codes stand for, as one of the codes; numbers are made behind it."""
    source, window, sides = graph.producer(pool.input[0]), _window(pool), _sides(types, pool.output[0])
    if source is None or source.op_type != "DequantizeLinear" or source.input[0] not in worthwhile:
        return
    if window is None or len(pool.output) > 1 or len(sides) != 4:
        return
    own = MaxPool(source.input[0], f"{pool.output[0]}_codes", *window)
    made = helper.make_node(MAX_POOL, [own.codes], [own.output], name=pool.name, domain=DOMAIN)
    behind = helper.make_node("DequantizeLinear", [own.output, *source.input[1:]], list(pool.output))
    graph.replace(pool, [made, behind])
    shape = [value or name for value, name in sides]
    types[own.output] = helper.make_tensor_value_info(own.output, TensorProto.UINT8, shape)
    taken[own.output] = own


def _window(node: onnx.NodeProto, kernel: Sequence[int] = ()) -> tuple[int, int, int] | None:
    """(size, stride, padding) of a square window that leaves nothing out; `kernel`: sides of the weights, if any."""
    found: dict[str, Any] = {a.name: list(a.ints) or a.s or a.i for a in node.attribute}
    sides = [*found.get("kernel_shape", kernel)]
    odd = {*found.get("dilations", [1])} != {1} or found.get("group", 1) != 1 or found.get("ceil_mode", 0)
    if odd or found.get("auto_pad", b"NOTSET") != b"NOTSET" or (kernel and sides != [*kernel]):
        return None
    numbers = {*sides}, {*found.get("strides", [1])}, {*found.get("pads", [0])}
    if len(sides) != 2 or any(len(each) != 1 for each in numbers):
        return None
    size, stride, padding = (each.pop() for each in numbers)
    return (size, stride, padding) if window_fits(size, stride, padding) else None


def _read(graph: Graph, conv: onnx.NodeProto, types: Types, pictures: str | None) -> Convolution | None:
    """The convolution where it is of the kernel's kind: integers, rounded to one grid, channels that fit."""
    users, sources = graph.users(conv.output[0]), [graph.producer(name) for name in conv.input]
    if [user.op_type for user in users] != ["QuantizeLinear"]:
        return None
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return None
    picture, weight, *biases = (source for source in sources if source is not None)
    codes, weights, (quantise,) = picture.input[0], graph.constant(weight.input[0]), users
    steps, grid = _per_tensor(graph, picture), _grid(graph, quantise)
    window = _window(conv, weights.shape[2:])
    if steps is None or grid is None or window is None or weights.dtype != np.int8:
        return None
    outputs, inputs = weights.shape[:2]
    fits = inputs == PICTURE_CHANNELS if codes == pictures else inputs % 4 == 0 and _made(graph, codes)
    bias = graph.constant(biases[0].input[0]) if biases else np.zeros(outputs, np.int32)
    if not fits or outputs % LANES or bias.shape != (outputs,) or not _are_bytes(types, codes):
        return None
    # In this order ONNX Runtime makes the factor, too.
    factors = (steps[0] * graph.constant(weight.input[1]) / graph.constant(quantise.input[1])).astype(
        np.float32
    )
    source, result = _source_grid(graph, codes, steps[1]), _codes_of(graph, quantise)
    if factors.size not in (1, outputs) or graph.is_output(result):
        return None
    factors = np.broadcast_to(factors.reshape(-1), outputs)
    return Convolution(codes, result, weights, bias, factors, *window[1:], source, grid)


def _per_tensor(graph: Graph, node: onnx.NodeProto) -> tuple[np.float32, int] | None:
    """(step, code of zero) of a QuantizeLinear or DequantizeLinear with one step for all of its bytes."""
    if len(node.input) != 3 or not all(graph.is_constant(name) for name in node.input[1:]):
        return None
    step, zero = (graph.constant(name) for name in node.input[1:])
    if step.size != 1 or zero.size != 1 or zero.dtype != np.uint8:
        return None
    return np.float32(step.item()), int(zero.item())


def _made(graph: Graph, codes: str) -> bool:
    """A node makes the codes. Those that are given to the graph lie channels first."""
    return graph.producer(codes) is not None


def _are_bytes(types: Types, codes: str) -> bool:
    return codes in types and types[codes].type.tensor_type.elem_type == TensorProto.UINT8


def _codes_of(graph: Graph, quantise: onnx.NodeProto) -> str:
    return str((clip_behind(graph, quantise) or quantise).output[0])


def _grid(graph: Graph, quantise: onnx.NodeProto) -> Grid | None:
    """The codes behind a QuantizeLinear."""
    steps = _per_tensor(graph, quantise)
    return None if steps is None else Grid(steps[1], *_bounds(graph, clip_behind(graph, quantise)))


def _bounds(graph: Graph, clip: onnx.NodeProto | None) -> tuple[int, int]:
    """The lowest and highest byte behind a Clip, or behind nothing that tells."""
    if clip is None or clip.op_type != "Clip" or len(clip.input) != 3 or not all(clip.input):
        return 0, 255
    low, high = (int(graph.constant(name)) for name in clip.input[1:])
    return low, high


def _source_grid(graph: Graph, codes: str, zero: int) -> Grid:
    maker = graph.producer(codes)
    while maker is not None and maker.op_type in (MAX_POOL, "Resize"):
        maker = graph.producer(maker.input[0])
    return Grid(zero, *_bounds(graph, maker))


def _take_sum(graph: Graph, add: onnx.NodeProto, types: Types, taken: Taken) -> None:
    """Lets one of our convolutions add what its codes are added to, where nobody else reads them."""
    sources, users = [graph.producer(name) for name in add.input], graph.users(add.output[0])
    if [user.op_type for user in users] != ["QuantizeLinear"] or len({*add.input}) < 2:
        return
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return
    pair, (quantise,) = [source for source in sources if source is not None], users
    grid, result, shape = _grid(graph, quantise), _codes_of(graph, quantise), _sides(types, add.output[0])
    # An Add may broadcast.
    alike = all(_sides(types, source.output[0]) == shape for source in pair)
    if grid is None or not alike or not shape or graph.is_output(result) or result not in types:
        return
    for own, other in (pair, pair[::-1]):
        convolution, maker, codes = taken.get(own.input[0]), graph.producer(own.input[0]), other.input[0]
        if not isinstance(convolution, Convolution) or convolution.shortcut or convolution.by_winograd:
            continue
        alone = graph.users(own.input[0]) == [own] and graph.users(own.output[0]) == [add]
        steps = _per_tensor(graph, other), _per_tensor(graph, own)
        if not alone or maker is None or steps[0] is None or steps[1] is None:
            continue
        if not _made(graph, codes) or not _are_bytes(types, codes):
            continue
        unit = graph.constant(quantise.input[1]).item()
        factor, own_factor = (float(np.float32(step / np.float32(unit))) for step, _ in (steps[0], steps[1]))
        summed = replace(
            convolution, output=result, shortcut=Shortcut(codes, steps[0][1], factor, own_factor, grid)
        )
        _replace(graph, maker, summed, [own, add, quantise, clip_behind(graph, quantise)])
        del taken[convolution.output]
        taken[result] = summed
        return


def _sides(types: Types, name: str) -> list[tuple[int, str]]:
    """The shape of a tensor, each side by its number or by its name; empty where it isn't known."""
    dims = types[name].type.tensor_type.shape.dim if name in types else ()
    return [(d.dim_value, d.dim_param) for d in dims]
