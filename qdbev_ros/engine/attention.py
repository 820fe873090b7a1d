# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's own operator for attention of all queries to all keys, in place of the chain that is exported for it.

The chain writes a score for every pair of queries and reads it back several times; the operator keeps a block of them
in the cache. Values are the same to float rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
from onnx import helper

from qdbev_ros.engine.graph import Graph

_BY_HEADS, _TURNED = [0, 2, 1, 3], [0, 2, 3, 1]
# From the factor of queries and of keys back to their shape: the root of 1 / sqrt(depth).
_FACTOR = ["Sqrt", "Cast", "Div", "Sqrt", "Cast", "Slice", "Shape"]


@dataclass(frozen=True)
class _Heads:
    """A tensor (B, S, heads * depth) that is taken apart by heads, and the factor that it is multiplied by."""

    source: str
    heads: int
    factor: str


def fuse_attention(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
    """A graph with `MultiHeadAttention` wherever softmax(q k' / sqrt(depth)) v by heads is spelled out."""
    graph = Graph(model)
    for softmax in graph.nodes("Softmax"):
        _fuse(graph, softmax)
    return graph.finish(model.producer_name, opset)


def _fuse(graph: Graph, softmax: onnx.NodeProto) -> None:
    scores, weighted = graph.producer(softmax.input[0]), graph.only_user(softmax, "MatMul")
    if scores is None or scores.op_type != "MatMul" or weighted is None:
        return
    parts = (
        _heads(graph, scores.input[0], _BY_HEADS, scaled=True),
        _heads(graph, scores.input[1], _TURNED, scaled=True),
        _heads(graph, weighted.input[1], _BY_HEADS, scaled=False),
    )
    back = graph.only_user(weighted, "Transpose")
    end = None if back is None else graph.only_user(back, "Reshape")
    if back is None or end is None or _perm(back) != _BY_HEADS:
        return
    query, key, value = parts
    if query is None or key is None or value is None or query.factor != key.factor:
        return
    if len({query.heads, key.heads, value.heads}) != 1 or not _is_root_of_depth(graph, query.factor):
        return
    inputs = [query.source, key.source, value.source]
    fused = helper.make_node(
        "MultiHeadAttention",
        inputs,
        list(end.output),
        name=softmax.name,
        domain="com.microsoft",
        num_heads=query.heads,
    )
    graph.replace(end, [fused])


def _heads(graph: Graph, name: str, perm: list[int], scaled: bool) -> _Heads | None:
    node, factor = graph.producer(name), ""
    if scaled:
        if node is None or node.op_type != "Mul":
            return None
        factor, node = node.input[1], graph.producer(node.input[0])
    if node is None or node.op_type != "Transpose" or _perm(node) != perm:
        return None
    reshape = graph.producer(node.input[0])
    shape = None if reshape is None or reshape.op_type != "Reshape" else graph.producer(reshape.input[1])
    if reshape is None or shape is None or shape.op_type != "Concat" or len(shape.input) != 4:
        return None
    if not graph.is_constant(shape.input[2]):
        return None
    return _Heads(reshape.input[0], int(graph.constant(shape.input[2]).item()), factor)


def _is_root_of_depth(graph: Graph, factor: str) -> bool:
    """Whether the factor is made of a shape as the exporter does it."""
    made: list[str] = []
    node = graph.producer(factor)
    while node is not None and len(made) < len(_FACTOR):
        made.append(node.op_type)
        node = graph.producer(node.input[-1 if node.op_type == "Div" else 0])
    return made == _FACTOR


def _perm(node: onnx.NodeProto) -> list[int]:
    return next((list(a.ints) for a in node.attribute if a.name == "perm"), [])
