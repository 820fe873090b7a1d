# SPDX-License-Identifier: Apache-2.0
"""Finds the attentions around the samplings of a graph, and puts nodes of ours in their place.

Between the linear layers of an attention and its sampling there are a softmax, a sum of places that lie in pairs, and
changes of shape; behind it a mean over two maps, or a sum over cameras. ONNX Runtime takes longer for these than our
kernel for the sampling, so the kernel does them, too: it has every number at hand when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import side_of
from qdbev_ros.engine.sampling import DOMAIN, Sampling, samplings

ATTENTION = "DeformableAttention"
# Of rows that speak of two maps, (B, Q, heads, maps, ...), to a batch of maps.
_MAPS_FIRST = {5: [0, 3, 1, 2, 4], 6: [0, 3, 1, 2, 4, 5]}
Sides = list[int | None]
Shapes = dict[str, Sides]


@dataclass(frozen=True)
class Attention:
    """One node: its tensors by name; what they hold is said in deformable.c.

    maps: that a row of offsets and logits speaks of; the result is their mean · slots, shares: which rows each output
    is the sum of, and their shares; "" where each row is an output, or the mean over maps is
    """

    value: str
    offsets: str
    logits: str
    references: str
    slots: str
    shares: str
    output: str
    maps: int
    sampling: Sampling

    @property
    def inputs(self) -> list[str]:
        names = [self.value, self.offsets, self.logits, self.references, self.slots, self.shares]
        return [name for name in names if name]


def take_attentions(lowered: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Attention]]:
    """A graph with nodes of ours for the attentions that the kernel can have, and these by their output."""
    inferred = onnx.shape_inference.infer_shapes(lowered, data_prop=True).graph
    types = {v.name: v for v in inferred.value_info}
    shapes = {v.name: _sides(v) for v in (*types.values(), *inferred.input)}
    graph, taken = Graph(lowered), dict[str, Attention]()
    for node, sampling in samplings(graph):
        attention, end = _read(graph, shapes, node, sampling)
        if attention is not None and attention.output in types:
            made = helper.make_node(ATTENTION, attention.inputs, [attention.output], node.name, domain=DOMAIN)
            graph.replace(end, [made])
            taken[attention.output] = attention
    model = graph.finish(lowered.producer_name, lowered.opset_import[0].version)
    # No inference knows what comes out of our own nodes, those of before included.
    model.graph.value_info.extend([*lowered.graph.value_info, *(types[name] for name in taken)])
    return model, taken


def _sides(value: onnx.ValueInfoProto) -> Sides:
    return [d.dim_value if d.HasField("dim_value") else None for d in value.type.tensor_type.shape.dim]


def _read(
    graph: Graph, shapes: Shapes, node: onnx.NodeProto, s: Sampling
) -> tuple[Attention | None, onnx.NodeProto]:
    """The attention around a sampling, and the last of its nodes; None where it is another than we know."""
    places, logits, value = _places(graph, shapes, s), _logits(graph, s), graph.producer(s.value)
    if places is None or logits is None or value is None or value.op_type != "Reshape":
        return None, node
    offsets, references, by_maps = places
    mean = _mean(graph, node) if by_maps else (1, node)
    found = (value.input[0], offsets, logits[0], references)
    # The stages hand on what nodes make.
    if by_maps != logits[1] or mean is None or any(name in graph.initializers for name in found):
        return None, node
    maps, end = mean
    columns = maps * s.heads * len(s.sizes) * s.points
    for name, wanted in ((offsets, 2 * columns), (logits[0], columns)):
        if len(sides := shapes.get(name, [])) != 3 or sides[2] != wanted:
            return None, node
    gathered = None if by_maps else _gathered(graph, shapes, node)
    if gathered is None:
        return Attention(*found, "", "", end.output[0], maps, s), end
    slots, shares, end = gathered
    return Attention(*found, slots, shares, end.output[0], 1, s), end


def _places(graph: Graph, shapes: Shapes, s: Sampling) -> tuple[str, str, bool] | None:
    """(offsets in pixels, reference places, whether a row of offsets speaks of several maps)."""
    node = graph.producer(s.locations)
    if node is not None and node.op_type == "Reshape":
        node = graph.producer(node.input[0])
    if node is None or node.op_type != "Add":
        return None
    makers = [graph.producer(name) for name in node.input]
    wide = next(
        (i for i, maker in enumerate(makers) if maker is not None and maker.op_type == "Unsqueeze"), None
    )
    if wide is None:
        return None
    offsets, by_maps, division = _stripped(graph, node.input[1 - wide])
    if division is None or not _divides_by_maps(graph, shapes, division, s):
        return None
    references, sides = node.input[wide], shapes.get(node.input[wide], [])
    # (B, Q, 1, 1, 1, 2) beside heads, levels and points, or with places for each point of a pillar before the pair;
    # (B, maps, Q, 1, 1, 2) beside heads and points.
    ones, rank = (sides[3:5], 4) if by_maps else (sides[2:5], len(sides) - 3)
    if len(sides) not in ((6,) if by_maps else (6, 7)) or any(side != 1 for side in ones):
        return None
    while len(shapes.get(references, [])) > rank and (maker := graph.producer(references)) is not None:
        if maker.op_type != "Unsqueeze":
            return None
        references = maker.input[0]
    return (offsets, references, by_maps) if len(shapes.get(references, [])) == rank else None


def _divides_by_maps(graph: Graph, shapes: Shapes, division: onnx.NodeProto, s: Sampling) -> bool:
    """What is divided are pairs (..., levels, points, 2), and each of them by its own map's width and height."""
    divisor, sides = graph.constant(division.input[1]), shapes.get(division.input[0], [])
    wanted = np.array([[[width, height]] for height, width in s.sizes], np.float32)
    if len(s.sizes) == 1:  # whatever stands in front of the pairs
        return sides[-1:] == [2] and np.array_equal(divisor.reshape(-1), wanted.reshape(-1))
    return sides[-3:] == [len(s.sizes), s.points, 2] and np.array_equal(divisor, wanted)


def _logits(graph: Graph, s: Sampling) -> tuple[str, bool] | None:
    """(what a softmax makes the weights of, whether its rows speak of several maps)."""
    name, by_maps, division = _stripped(graph, s.weights)
    softmax = graph.producer(name)
    if division is not None or softmax is None or softmax.op_type != "Softmax":
        return None
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    reshape = graph.producer(softmax.input[0])
    if axis != -1 or reshape is None or reshape.op_type != "Reshape":
        return None
    whole = side_of(graph, reshape.input[1], -1) == len(s.sizes) * s.points
    return (reshape.input[0], by_maps) if whole else None


def _stripped(graph: Graph, name: str) -> tuple[str, bool, onnx.NodeProto | None]:
    """The tensor that another one is by its shape; whether maps were put first; the division by a constant between."""
    by_maps, division = False, None
    while (node := graph.producer(name)) is not None:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Transpose":
            perm = list(attributes["perm"].ints)
            if by_maps or perm != _MAPS_FIRST.get(len(perm)):
                break
            by_maps = True
        elif node.op_type == "Div" and division is None and graph.is_constant(node.input[1]):
            division = node
        elif node.op_type != "Reshape" and not (
            node.op_type == "Cast" and attributes["to"].i == onnx.TensorProto.FLOAT
        ):
            break
        name = node.input[0]
    return name, by_maps, division


def _mean(graph: Graph, node: onnx.NodeProto) -> tuple[int, onnx.NodeProto] | None:
    """(number of maps, the node that takes the mean over them) behind a sampling."""
    reshape = graph.only_user(node, "Reshape")
    mean = None if reshape is None else graph.only_user(reshape, "ReduceMean")
    if reshape is None or mean is None or not _removes_axis(graph, mean, 1):
        return None
    maps = side_of(graph, reshape.input[1], 1)
    return (maps, mean) if maps is not None and maps > 0 else None


def _gathered(graph: Graph, shapes: Shapes, node: onnx.NodeProto) -> tuple[str, str, onnx.NodeProto] | None:
    """(slots, shares, the last node) where samples are gathered behind a row of zeros, weighted and summed."""
    chain, last = [], node
    for op_type in ("Reshape", "Pad", "Reshape", "Gather", "Reshape", "Mul", "ReduceSum"):
        user = graph.only_user(last, op_type)
        if user is None:
            return None
        chain.append(last := user)
    flat, _, _, gather, reshape, product, total = chain
    beside = next((name for name in product.input if name != reshape.output[0]), "")
    shares = graph.producer(beside)
    if shares is None or shares.op_type != "Unsqueeze" or not _removes_axis(graph, total, 2):
        return None
    # Rows of one batch element alone: each has a row of zeros of its own.
    if shapes.get(flat.output[0], [])[:1] != [1] or shapes.get(beside, [])[3:] != [1]:
        return None
    return None if any(a.i for a in gather.attribute) else (gather.input[1], shares.input[0], total)


def _removes_axis(graph: Graph, reduce: onnx.NodeProto, axis: int) -> bool:
    kept = next((a.i for a in reduce.attribute if a.name == "keepdims"), 1)
    axes = graph.constant(reduce.input[1]).tolist() if len(reduce.input) > 1 else []
    return not kept and axes == [axis]
