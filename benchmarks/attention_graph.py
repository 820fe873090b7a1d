# SPDX-License-Identifier: Apache-2.0
"""A deformable attention between its linear layers as a graph of its own, in the nodes that the exporter leaves.

Used by the benchmark of our kernel and by the tests of what finds and runs such attentions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.sampling import DOMAIN, OPSET, PREFIX, define_functions

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Shape:
    """What an attention reads. sizes: (height, width) of each level's map.

    batch, queries: rows of offsets and logits · maps: that a row speaks of, batch 1 · pillar: places of a row, 0 where
    it has one alone · outputs, most: how many rows are gathered how often; none where rows are outputs
    """

    batch: int
    queries: int
    heads: int
    depth: int
    points: int
    sizes: tuple[tuple[int, int], ...]
    maps: int = 1
    pillar: int = 0
    outputs: int = 0
    most: int = 0

    @property
    def inputs(self) -> dict[str, list[int]]:
        """Shapes of the tensors, `slots` and `shares` last and only where rows are gathered."""
        columns = self.heads * self.maps * len(self.sizes) * self.points
        rows = [self.batch, *([self.maps] if self.maps > 1 else []), self.queries]
        found = {
            "value": [self.batch * self.maps, sum(h * w for h, w in self.sizes), self.heads * self.depth],
            "offsets": [self.batch, self.queries, 2 * columns],
            "logits": [self.batch, self.queries, columns],
            "references": [*rows, *([self.pillar] if self.pillar else []), 2],
        }
        if self.outputs:
            found |= {"slots": [self.outputs * self.most], "shares": [1, self.outputs, self.most]}
        return found


def feeds(shape: Shape, seed: int = 0) -> Arrays:
    """Random tensors: places on the map and beside it, offsets of a few pixels, slots that are no rows as well."""
    random = np.random.default_rng(seed)
    made: Arrays = {name: random.normal(size=sides) for name, sides in shape.inputs.items()}
    made |= {
        "references": random.uniform(-0.2, 1.2, shape.inputs["references"]),
        "offsets": 2.0 * made["offsets"],
    }
    made = {name: array.astype(np.float32) for name, array in made.items()}
    if shape.outputs:
        rows = shape.batch * shape.queries
        slots = random.integers(0, rows + 1, shape.inputs["slots"])
        used = (slots < rows).reshape(shape.inputs["shares"])
        shares = used / np.maximum(used.sum(-1, keepdims=True), 1)
        made |= {"slots": slots, "shares": shares.astype(np.float32)}
    return made


@dataclass
class _Builder:
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def __call__(self, op: str, inputs: list[str], name: str, *integers: int, **attributes: Any) -> str:
        """Adds a node, named as its output, with integers as its last input."""
        if integers:
            inputs = [*inputs, self.constant(f"{name}_by", np.array(integers, np.int64))]
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def constant(self, name: str, value: NDArray[Any]) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name


def attention_graph(s: Shape) -> onnx.ModelProto:
    """The tensors of `Shape.inputs` in, `output` (outputs or rows, heads * depth) out."""
    add, levels = _Builder(), len(s.sizes)
    value = add("Reshape", ["value"], "maps", s.batch * s.maps, -1, s.heads, s.depth)
    scale = np.array([[[w, h]] for h, w in s.sizes], np.float32)
    scale = add.constant("scale", scale if levels > 1 else scale[0])
    together = [s.batch * s.maps, -1, s.heads, levels, s.points]
    if s.maps > 1:
        offsets = add("Reshape", ["offsets"], "pairs", s.batch, -1, s.heads, s.maps, s.points, 2)
        offsets = add("Transpose", [offsets], "pairs_by_map", perm=[0, 3, 1, 2, 4, 5])
        offsets = add("Div", [offsets, scale], "fractions")
    else:
        offsets = add("Reshape", ["offsets"], "pairs", *together, 2)
        offsets = add("Div", [offsets, scale], "fractions")
        if s.pillar:
            shape = [*together[:4], s.points // s.pillar, s.pillar, 2]
            offsets = add("Reshape", [offsets], "fractions_of_pillars", *shape)
    around = "references"
    for i, axis in enumerate((3, 4) if s.maps > 1 else (2, 3, 4)):
        around = add("Unsqueeze", [around], f"around{i}", axis)
    locations = add("Add", [around, offsets], "places")
    if s.maps > 1 or s.pillar:
        locations = add("Reshape", [locations], "locations", *together, 2)
    if s.maps > 1:
        weights = add("Reshape", ["logits"], "rows", s.batch, -1, s.heads, s.maps, s.points)
        weights = add("Softmax", [weights], "softmax", axis=-1)
        weights = add("Transpose", [weights], "weights_by_map", perm=[0, 3, 1, 2, 4])
    else:
        weights = add("Reshape", ["logits"], "rows", s.batch, -1, s.heads, levels * s.points)
        weights = add("Softmax", [weights], "softmax", axis=-1)
    weights = add("Reshape", [weights], "weights", *together)
    attributes = {"heads": s.heads, "depth": s.depth, "points": s.points}
    sizes = [side for size in s.sizes for side in size]
    last = add(PREFIX, [value, locations, weights], "sampled", domain=DOMAIN, sizes=sizes, **attributes)
    channels = s.heads * s.depth
    if s.maps > 1:
        last = add("Reshape", [last], "sampled_by_map", s.batch, s.maps, -1, channels)
        last = add("ReduceMean", [last], "mean", 1, keepdims=0)
    elif s.outputs:
        flat = add("Reshape", [last], "flat", 1, -1, channels)
        padded = add("Pad", [flat], "padded", 0, 0, 0, 0, 1, 0)
        rows = add("Gather", [add("Reshape", [padded], "list", -1, channels), "slots"], "gathered", axis=0)
        rows = add("Reshape", [rows], "gathered_by_output", 1, s.outputs, -1, channels)
        product = add("Mul", [rows, add("Unsqueeze", ["shares"], "factors", 3)], "product")
        last = add("ReduceSum", [product], "sum", 2, keepdims=0)
    add("Reshape", [last], "output", -1, channels)
    kinds = {"slots": TensorProto.INT64}
    inputs = [
        helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), sides)
        for name, sides in s.inputs.items()
    ]
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    bare = helper.make_graph(add.nodes, "attention", inputs, [output], add.constants)
    graph = Graph(helper.make_model(bare))
    define_functions(graph)
    return graph.finish("attention", OPSET)
