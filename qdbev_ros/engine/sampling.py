# SPDX-License-Identifier: Apache-2.0
"""Deformable sampling as one node of the graph, so that every engine can put its own form in its place.

In the master it is a function local to the model, `qdbev::DeformableSampling_...`, whose body is made of standard
operators (GridSample): a runtime that knows nothing of it computes the same. Inputs: value (B, S, heads, depth), the
levels' maps one after the other, each row-major · locations (B, Q, heads, levels, points, 2): (x, y), 0..1 over the
map · weights (B, Q, heads, levels, points). Output (B, Q, heads * depth): weighted sums of bilinear samples, zeros
outside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.graph import Graph

DOMAIN = "qdbev"
PREFIX = "DeformableSampling"
OPSET = 21
_ATTRIBUTES = ("heads", "depth", "points", "sizes")
Constant = Callable[[Any], str]  # makes a constant of a value, returns its name


@dataclass(frozen=True)
class Sampling:
    """One node: its tensors by name and its shape. sizes: (height, width) of each level's map."""

    value: str
    locations: str
    weights: str
    output: str
    heads: int
    depth: int
    points: int
    sizes: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, node: onnx.NodeProto) -> Sampling:
        """Reads a node. Raises PackageError where it isn't one of ours."""
        found = {a.name: [a.i] if a.type == a.INT else list(a.ints) for a in node.attribute}
        try:
            [heads], [depth], [points], flat = (found.pop(name) for name in _ATTRIBUTES)
            value, locations, weights = node.input
            [output] = node.output
            sizes = tuple(zip(flat[::2], flat[1::2], strict=True))
            if found or min(heads, depth, points, *flat, len(flat)) < 1:
                raise ValueError
        except (KeyError, ValueError):
            kind = f"node {node.name!r} ({node.op_type})"
            raise PackageError(f"{kind} is no deformable sampling that we know") from None
        return cls(value, locations, weights, output, heads, depth, points, sizes)

    @property
    def op_type(self) -> str:
        """Name of the function: one for every shape, because a body cannot loop over levels."""
        maps = "_".join(f"{height}x{width}" for height, width in self.sizes)
        return f"{PREFIX}_{self.heads}x{self.depth}_{self.points}_{maps}"


def samplings(graph: Graph) -> list[tuple[onnx.NodeProto, Sampling]]:
    """The sampling nodes of a graph."""
    return [(node, Sampling.of(node)) for node in graph.all_nodes() if is_sampling(node)]


def is_sampling(node: onnx.NodeProto) -> bool:
    return bool(node.domain == DOMAIN and node.op_type.startswith(PREFIX))


def replace_samplings(graph: Graph, form: Callable[[Sampling, Constant], list[onnx.NodeProto]]) -> int:
    """Puts an engine's own form in the place of every sampling node; returns how many there were.

    form(sampling, constant) makes the nodes that compute `sampling.output`; names of what they have in between must
    start with that output's, which no other node has.
    """
    found = samplings(graph)
    for node, sampling in found:
        graph.replace(node, form(sampling, graph.add_constant))
    return len(found)


def inline_samplings(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model in standard operators alone, for runtimes that do not know functions."""
    graph = Graph(model)
    replace_samplings(graph, grid_sample_form)
    return graph.finish(model.producer_name, OPSET)


def define_functions(graph: Graph) -> None:
    """Gives torch's bare nodes the names of their functions, and the model the functions."""
    for node, sampling in samplings(graph):
        node.op_type = sampling.op_type
        graph.functions[sampling.op_type] = function_of(sampling)


def function_of(sampling: Sampling) -> onnx.FunctionProto:
    """The function of all samplings of this shape: always the same, to the bit."""
    body: list[onnx.NodeProto] = []

    def constant(value: Any) -> str:
        name = f"constant_{len(body)}"
        tensor = numpy_helper.from_array(np.asarray(value))
        body.append(helper.make_node("Constant", [], [name], value=tensor))
        return name

    inputs = ("value", "locations", "weights")
    own = replace(sampling, value=inputs[0], locations=inputs[1], weights=inputs[2], output="output")
    body += grid_sample_form(own, constant)
    opset = helper.make_opsetid("", OPSET)
    return helper.make_function(DOMAIN, sampling.op_type, inputs, ["output"], body, [opset], _ATTRIBUTES)


def grid_sample_form(sampling: Sampling, constant: Constant) -> list[onnx.NodeProto]:
    """The sampling in standard operators: one GridSample for every level."""
    s, nodes = sampling, []

    def add(op: str, inputs: list[str], label: str, **attributes: Any) -> str:
        name = f"{s.output}_{label}"
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def integers(*values: int) -> str:
        return constant(np.array(values, np.int64))

    double = add("Mul", [s.locations, constant(np.float32(2.0))], "double")
    grids = add("Sub", [double, constant(np.float32(1.0))], "grids")
    total, start = "", 0
    for i, (height, width) in enumerate(s.sizes):
        bounds = [integers(start), integers(start + height * width), integers(1)]
        start += height * width
        flat = add("Slice", [s.value, *bounds], f"flat{i}") if len(s.sizes) > 1 else s.value
        turned = add("Transpose", [flat], f"turned{i}", perm=[0, 2, 3, 1])  # (B, heads, depth, h * w)
        maps = add("Reshape", [turned, integers(-1, s.depth, height, width)], f"maps{i}")
        # (B, Q, heads, points, 2) -> (B * heads, Q, points, 2)
        own = add("Gather", [grids, constant(np.int64(i))], f"own{i}", axis=3)
        own = add("Transpose", [own], f"own_turned{i}", perm=[0, 2, 1, 3, 4])
        own = add("Flatten", [own], f"own_flat{i}", axis=2)
        grid = add("Reshape", [own, integers(0, -1, s.points, 2)], f"grid{i}")
        modes = {"mode": "linear", "padding_mode": "zeros", "align_corners": 0}
        samples = add("GridSample", [maps, grid], f"samples{i}", **modes)  # (B * heads, depth, Q, points)
        weight = add("Gather", [s.weights, constant(np.int64(i))], f"weight{i}", axis=3)
        weight = add("Transpose", [weight], f"weight_turned{i}", perm=[0, 2, 1, 3])
        weight = add("Flatten", [weight], f"weight_flat{i}", axis=2)
        weight = add("Reshape", [weight, integers(0, 1, -1, s.points)], f"weight_grid{i}")
        part = add("Mul", [samples, weight], f"weighted{i}")
        part = add("ReduceSum", [part, integers(-1)], f"part{i}", keepdims=0)  # (B * heads, depth, Q)
        total = add("Add", [total, part], f"total{i}") if total else part
    whole = add("Reshape", [total, integers(-1, s.heads * s.depth, 0)], "whole")
    return [*nodes, helper.make_node("Transpose", [whole], [s.output], name=s.output, perm=[0, 2, 1])]
