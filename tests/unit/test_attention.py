# SPDX-License-Identifier: Apache-2.0
"""Attention of all queries to all keys by ONNX Runtime's own operator."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdbev_ros.engine.attention import fuse_attention
from qdbev_ros.engine.sessions import session_options

HEADS, DEPTH, OPSET = 3, 8, 21
SHAPES = {"q": [2, 7, HEADS * DEPTH], "k": [2, 5, HEADS * DEPTH], "v": [2, 5, HEADS * DEPTH]}


def chain(heads: int = HEADS, factor: str = "root", keep_scores: bool = False) -> onnx.ModelProto:
    """softmax(q k' / sqrt(depth)) v as PyTorch's exporter spells it out; `heads` are those of the values.

    factor: "root", or "constant" for a number where the exporter computes one from a shape
    """
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, np.ndarray] = {
        "batch": np.array([2]), "rest": np.array([-1]), "all": np.array([HEADS * DEPTH]),
        "heads": np.array([HEADS]), "depth": np.array([DEPTH]), "last": np.array([-1]), "end": np.array([9]),
        "one": np.array([1.0], np.float32), "number": np.array([DEPTH**-0.25], np.float32),
        "v_heads": np.array([heads]), "v_depth": np.array([HEADS * DEPTH // heads]),
    }  # fmt: skip

    def add(op: str, inputs: list[str], output: str, **attributes: object) -> str:
        nodes.append(helper.make_node(op, inputs, [output], name=output, **attributes))
        return output

    def by_heads(name: str, perm: list[int], heads: str = "heads", depth: str = "depth") -> str:
        shape = add("Concat", ["batch", "rest", heads, depth], f"{name}_shape", axis=0)
        return add("Transpose", [add("Reshape", [name, shape], f"{name}_4")], f"{name}_turned", perm=perm)

    query, key = by_heads("q", [0, 2, 1, 3]), by_heads("k", [0, 2, 3, 1])
    value = by_heads("v", [0, 2, 1, 3], "v_heads", "v_depth")
    side = add("Slice", [add("Shape", [query], "shape"), "last", "end"], "side")
    root = add("Sqrt", [add("Cast", [side], "number_of", to=TensorProto.FLOAT)], "root_of")
    root = add("Cast", [add("Div", ["one", root], "share")], "cast", to=TensorProto.FLOAT)
    factors = {"root": add("Sqrt", [root], "root"), "constant": "number"}
    query, key = (add("Mul", [name, factors[factor]], f"{name}_scaled") for name in (query, key))
    scores = add("Softmax", [add("MatMul", [query, key], "products")], "scores", axis=-1)
    turned = add("Transpose", [add("MatMul", [scores, value], "sums")], "back", perm=[0, 2, 1, 3])
    add("Reshape", [turned, add("Concat", ["batch", "rest", "all"], "flat", axis=0)], "y")
    ends = ["y", add("Identity", [scores], "seen")] if keep_scores else ["y"]
    graph = helper.make_graph(
        nodes,
        "attention",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in SHAPES.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    return model


def run(model: onnx.ModelProto) -> np.ndarray:
    random = np.random.default_rng(0)
    feeds = {name: random.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    session = ort.InferenceSession(
        model.SerializeToString(), session_options(1), providers=["CPUExecutionProvider"]
    )
    made: np.ndarray = session.run(["y"], feeds)[0]
    return made


def kinds(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def test_the_operator_computes_what_the_chain_computes() -> None:
    fused = fuse_attention(chain(), OPSET)
    assert kinds(fused) == {"MultiHeadAttention": 1}
    np.testing.assert_allclose(run(fused), run(chain()), atol=1e-6)


@pytest.mark.parametrize(
    "odd", [{"heads": 2}, {"factor": "constant"}, {"keep_scores": True}], ids=lambda odd: next(iter(odd))
)
def test_any_other_chain_stays(odd: dict[str, Any]) -> None:
    assert kinds(fuse_attention(chain(**odd), OPSET))["MultiHeadAttention"] == 0
