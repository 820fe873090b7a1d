# SPDX-License-Identifier: Apache-2.0
"""Steps of biases, which need no room in the file: each is the input's step times the weight's."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from qdbev_ros.engine.graph import Graph

# Between a product and the sum with its bias, or between a tensor and its step, these change no step.
_SHAPES = (
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Flatten",
    "MaxPool",
    "Resize",
    "Gather",
    "Split",
    "Identity",
)


def derive_bias_steps(graph: Graph) -> None:
    """Puts the product of two steps in the place of every bias's own, where it is that to the bit."""
    for bias in graph.nodes("DequantizeLinear"):
        codes = graph.initializers.get(bias.input[0])
        if codes is None or codes.data_type != TensorProto.INT32:
            continue
        steps = graph.constant(bias.input[1])
        for source, weight in _factors(graph, bias):
            if np.array_equal(graph.constant(source) * graph.constant(weight), steps):
                product = f"{bias.output[0]}_steps"
                graph.add(helper.make_node("Mul", [source, weight], [product]))
                graph.set_input(bias, 1, product)
                break


def _factors(graph: Graph, bias: onnx.NodeProto) -> list[tuple[str, str]]:
    """(step of the input, steps of the weight) of what the bias is added to: a convolution, or a matrix product."""
    found = []
    for user in graph.users(bias.output[0]):
        product = user if user.op_type == "Conv" else _product_behind(graph, user, bias.output[0])
        if product is not None:
            steps = [_step(graph, name) for name in product.input[:2]]
            if steps[0] is not None and steps[1] is not None:
                found.append((steps[0], steps[1]))
    return found


def _product_behind(graph: Graph, add: onnx.NodeProto, bias: str) -> onnx.NodeProto | None:
    """The MatMul whose result an Add puts the bias on."""
    if add.op_type != "Add":
        return None
    product = graph.producer(next(name for name in add.input if name != bias))
    return product if product is not None and product.op_type == "MatMul" else None


def _step(graph: Graph, name: str) -> str | None:
    """The name of the step of a tensor that lies on a grid."""
    node = graph.producer(name)
    while node is not None and node.op_type in _SHAPES:
        node = graph.producer(node.input[0])
    return node.input[1] if node is not None and node.op_type == "DequantizeLinear" else None
