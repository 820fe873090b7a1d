# SPDX-License-Identifier: Apache-2.0
"""Finds what our convolution kernel can have in a U8 graph, and puts nodes of ours in its place.

What is small stays where it is: each time that the runtime is left costs more than the kernel gains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper

from qdbev_ros.engine.convolution import (
    LANES,
    MOST_TAPS,
    PICTURE_CHANNELS,
    Convolution,
    Grid,
    MaxPool,
    Shortcut,
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
    read = ((node, _read(graph, node, pictures)) for node in graph.nodes("Conv"))
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
    """(size, stride, padding) of a square window that the kernel can have and that leaves nothing out."""
    found = {a.name: list(a.ints) or a.s or a.i for a in node.attribute}
    kernel = found.get("kernel_shape", kernel)
    odd = {*found.get("dilations", [1])} != {1} or found.get("group", 1) != 1 or found.get("ceil_mode", 0)
    sides = {*kernel}, {*found.get("strides", [1])}, {*found.get("pads", [0])}
    if odd or found.get("auto_pad", b"NOTSET") != b"NOTSET" or any(len(side) != 1 for side in sides):
        return None
    size, stride, padding = (side.pop() for side in sides)
    fits = len(kernel) == 2 and size * size <= MOST_TAPS and padding < size
    return (size, stride, padding) if fits else None


def _read(graph: Graph, conv: onnx.NodeProto, pictures: str | None) -> Convolution | None:
    """The convolution where it is of the kernel's kind: integers, rounded to one grid, channels that fit."""
    users, sources = graph.users(conv.output[0]), [graph.producer(name) for name in conv.input]
    if [user.op_type for user in users] != ["QuantizeLinear"]:
        return None
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return None
    picture, weight, *biases = (list(source.input) for source in sources if source is not None)
    weights = graph.constant(weight[0])
    window = _window(conv, weights.shape[2:])
    if window is None or weights.dtype != np.int8:
        return None
    outputs, inputs = weights.shape[:2]
    if picture[0] == pictures:
        fits = inputs == PICTURE_CHANNELS
    else:
        fits = inputs % 4 == 0 and _made(graph, picture[0])
    if not fits or outputs % LANES:
        return None
    grid, (quantise,) = _grid(graph, users[0]), users
    # In this order ONNX Runtime makes the factor, too.
    step = graph.constant(picture[1]) * graph.constant(weight[1])
    factors = (step / graph.constant(quantise.input[1])).astype(np.float32)
    return Convolution(
        picture[0],
        _codes_of(graph, quantise),
        weights,
        graph.constant(biases[0][0]) if biases else np.zeros(outputs, np.int32),
        np.broadcast_to(factors, outputs),
        *window[1:],
        _source_grid(graph, picture),
        grid,
    )


def _made(graph: Graph, codes: str) -> bool:
    """A node makes the codes. Those that are given to the graph lie channels first."""
    return graph.producer(codes) is not None


def _codes_of(graph: Graph, quantise: onnx.NodeProto) -> str:
    return str((clip_behind(graph, quantise) or quantise).output[0])


def _grid(graph: Graph, quantise: onnx.NodeProto) -> Grid:
    """The codes behind a QuantizeLinear."""
    zero, clip = int(graph.constant(quantise.input[2])), clip_behind(graph, quantise)
    return Grid(zero, 0, 255) if clip is None else Grid(zero, *_bounds(graph, clip))


def _bounds(graph: Graph, clip: onnx.NodeProto) -> tuple[int, int]:
    low, high = (int(graph.constant(name)) for name in clip.input[1:])
    return low, high


def _source_grid(graph: Graph, dequantised: list[str]) -> Grid:
    """The codes that a DequantizeLinear with these inputs reads."""
    zero, maker = int(graph.constant(dequantised[2])), graph.producer(dequantised[0])
    while maker is not None and maker.op_type in (MAX_POOL, "Resize"):
        maker = graph.producer(maker.input[0])
    return Grid(zero, *(_bounds(graph, maker) if maker is not None and maker.op_type == "Clip" else (0, 255)))


def _take_sum(graph: Graph, add: onnx.NodeProto, types: dict[str, onnx.ValueInfoProto], taken: Taken) -> None:
    """Lets one of our convolutions add what its codes are added to, where nobody else reads them."""
    sources, users = [graph.producer(name) for name in add.input], graph.users(add.output[0])
    if [user.op_type for user in users] != ["QuantizeLinear"] or len({*add.input}) < 2:
        return
    if any(source is None or source.op_type != "DequantizeLinear" for source in sources):
        return
    pair = [source for source in sources if source is not None]
    (quantise,), shape = users, _sides(types, add.output[0])
    for own, other in (pair, pair[::-1]):
        convolution, maker = taken.get(own.input[0]), graph.producer(own.input[0])
        if not isinstance(convolution, Convolution) or convolution.shortcut or convolution.by_winograd:
            continue
        alone = graph.users(own.input[0]) == [own] and graph.users(own.output[0]) == [add]
        fits = shape == _sides(types, own.output[0]) and _made(graph, other.input[0])
        if not alone or not fits or maker is None:
            continue
        steps = [graph.constant(node.input[1]) for node in (other, own)]
        factor, own_factor = (float(np.float32(step / graph.constant(quantise.input[1]))) for step in steps)
        zero = int(graph.constant(other.input[2]))
        shortcut = Shortcut(other.input[0], zero, factor, own_factor, _grid(graph, quantise))
        summed = replace(convolution, output=_codes_of(graph, quantise), shortcut=shortcut)
        if summed.output not in types:
            return
        _replace(graph, maker, summed, [own, add, quantise, clip_behind(graph, quantise)])
        del taken[convolution.output]
        taken[summed.output] = summed
        return


def _sides(types: Types, name: str) -> list[tuple[int, str]]:
    """The shape of a tensor, each side by its number or by its name; empty where it isn't known."""
    dims = types[name].type.tensor_type.shape.dim if name in types else ()
    return [(d.dim_value, d.dim_param) for d in dims]
