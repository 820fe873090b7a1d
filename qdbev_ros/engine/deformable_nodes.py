# SPDX-License-Identifier: Apache-2.0
"""Finds the attentions around the samplings of a graph, and puts nodes of ours in their place.

Between the linear layers of an attention and its sampling there are a softmax, a sum of places that lie in pairs, and
changes of shape; behind it a mean over two maps, or a sum over cameras. ONNX Runtime takes longer for these than our
kernel for the sampling, so the kernel does them, too: it has every number at hand when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import side_of
from qdbev_ros.engine.sampling import DOMAIN, Sampling, samplings

ATTENTION = "DeformableAttention"
# Of rows that speak of two maps, (B, Q, heads, maps, ...), to a batch of maps.
_MAPS_FIRST = {5: [0, 3, 1, 2, 4], 6: [0, 3, 1, 2, 4, 5]}
Types = dict[str, onnx.ValueInfoProto]


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
    graph, taken = Graph(lowered), dict[str, Attention]()
    for node, sampling in samplings(graph):
        attention, end = _read(graph, node, sampling)
        if attention is not None and attention.output in types:
            made = helper.make_node(ATTENTION, attention.inputs, [attention.output], node.name, domain=DOMAIN)
            graph.replace(end, [made])
            taken[attention.output] = attention
    model = graph.finish(lowered.producer_name, lowered.opset_import[0].version)
    # No inference knows what comes out of our own nodes, those of before included.
    model.graph.value_info.extend([*lowered.graph.value_info, *(types[name] for name in taken)])
    return model, taken


def _read(graph: Graph, node: onnx.NodeProto, s: Sampling) -> tuple[Attention | None, onnx.NodeProto]:
    """The attention around a sampling, and the last of its nodes; None where it is another than we know."""
    places, logits, value = _places(graph, s), _logits(graph, s), graph.producer(s.value)
    if places is None or logits is None or value is None or value.op_type != "Reshape":
        return None, node
    offsets, references, by_maps = places
    if by_maps != logits[1]:
        return None, node
    found = (value.input[0], offsets, logits[0], references)
    mean, gathered = _mean(graph, node), _gathered(graph, node)
    if by_maps:
        maps, end = mean if mean is not None else (0, node)
        return (Attention(*found, "", "", end.output[0], maps, s), end) if maps else (None, node)
    if gathered is None:
        return Attention(*found, "", "", s.output, 1, s), node
    slots, shares, end = gathered
    return Attention(*found, slots, shares, end.output[0], 1, s), end


def _places(graph: Graph, s: Sampling) -> tuple[str, str, bool] | None:
    """(offsets in pixels, reference places, whether a row of offsets speaks of several maps)."""
    node = graph.producer(s.locations)
    if node is not None and node.op_type == "Reshape":
        node = graph.producer(node.input[0])
    if node is None or node.op_type != "Add":
        return None
    sources = [graph.producer(name) for name in node.input]
    for i, source in enumerate(sources):
        if source is not None and source.op_type == "Unsqueeze":
            references = node.input[i]
            while (maker := graph.producer(references)) is not None and maker.op_type == "Unsqueeze":
                references = maker.input[0]
            offsets, by_maps, divisor = _stripped(graph, node.input[1 - i])
            wanted = np.array([[width, height] for height, width in s.sizes], np.float32)
            if divisor is None or not np.array_equal(divisor.reshape(-1, 2), wanted):
                return None
            return offsets, references, by_maps
    return None


def _logits(graph: Graph, s: Sampling) -> tuple[str, bool] | None:
    """(what a softmax makes the weights of, whether its rows speak of several maps)."""
    name, by_maps, divisor = _stripped(graph, s.weights)
    softmax = graph.producer(name)
    if divisor is not None or softmax is None or softmax.op_type != "Softmax":
        return None
    axis = next((a.i for a in softmax.attribute if a.name == "axis"), -1)
    reshape = graph.producer(softmax.input[0])
    if axis != -1 or reshape is None or reshape.op_type != "Reshape":
        return None
    whole = side_of(graph, reshape.input[1], -1) == len(s.sizes) * s.points
    return (reshape.input[0], by_maps) if whole else None


def _stripped(graph: Graph, name: str) -> tuple[str, bool, NDArray[Any] | None]:
    """The tensor that another one is by its shape; whether maps were put first; what it was divided by."""
    by_maps, divisor = False, None
    while (node := graph.producer(name)) is not None:
        attributes = {a.name: a for a in node.attribute}
        if node.op_type == "Transpose":
            perm = list(attributes["perm"].ints)
            if by_maps or perm != _MAPS_FIRST.get(len(perm)):
                break
            by_maps = True
        elif node.op_type == "Div" and divisor is None and graph.is_constant(node.input[1]):
            divisor = graph.constant(node.input[1])
        elif node.op_type != "Reshape" and not (
            node.op_type == "Cast" and attributes["to"].i == onnx.TensorProto.FLOAT
        ):
            break
        name = node.input[0]
    return name, by_maps, divisor


def _mean(graph: Graph, node: onnx.NodeProto) -> tuple[int, onnx.NodeProto] | None:
    """(number of maps, the node that takes the mean over them) behind a sampling."""
    reshape = _only_user(graph, node, "Reshape")
    mean = None if reshape is None else _only_user(graph, reshape, "ReduceMean")
    if reshape is None or mean is None or not _removes_axis(graph, mean, 1):
        return None
    maps = side_of(graph, reshape.input[1], 1)
    return (maps, mean) if maps is not None and maps > 0 else None


def _gathered(graph: Graph, node: onnx.NodeProto) -> tuple[str, str, onnx.NodeProto] | None:
    """(slots, shares, the last node) where samples are gathered behind a row of zeros, weighted and summed."""
    chain, last = [], node
    for op_type in ("Reshape", "Pad", "Reshape", "Gather", "Reshape", "Mul", "ReduceSum"):
        user = _only_user(graph, last, op_type)
        if user is None:
            return None
        chain.append(last := user)
    *_, gather, reshape, product, total = chain
    shares = graph.producer(next(name for name in product.input if name != reshape.output[0]))
    if shares is None or shares.op_type != "Unsqueeze" or not _removes_axis(graph, total, 2):
        return None
    return gather.input[1], shares.input[0], total


def _removes_axis(graph: Graph, reduce: onnx.NodeProto, axis: int) -> bool:
    kept = next((a.i for a in reduce.attribute if a.name == "keepdims"), 1)
    axes = graph.constant(reduce.input[1]).tolist() if len(reduce.input) > 1 else []
    return not kept and axes == [axis]


def _only_user(graph: Graph, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
    users = graph.users(node.output[0])
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None
