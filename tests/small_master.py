# SPDX-License-Identifier: Apache-2.0
"""A packed master written by hand, with everything that the big ones have: small enough to check number by number.

images (1, 6, 3, 8, 8) -> convolution W4 with ReLU6 -> convolution W4, residual sum with a nearest-neighbour resize ->
linear W4 with bias -> class_logits (4, 10); boxes and bev are made from the same tensor.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qdbev_ros.core.variant import (
    BackboneSpec,
    BevSpec,
    ImageSpec,
    TemporalSpec,
    TransformerSpec,
    Variant,
)
from qdbev_ros.engine.graph import pack_int4
from qdbev_ros.engine.package import write_package

QUERIES = 4
CELLS = 16
CHANNELS = 8


def small_variant() -> Variant:
    """Pictures of 8x8 pixels, a map of 4x4 cells, four queries."""
    return Variant(
        name="small-test",
        image=ImageSpec(8, 8, 1, "rgb", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "full"),
        backbone=BackboneSpec("mobilenet_v2", 0, "pytorch", (2,), (), 1),
        bev=BevSpec(4, 4, (-8.0, -8.0, -5.0, 8.0, 8.0, 3.0), 4),
        transformer=TransformerSpec(CHANNELS, 2, 16, 1, 1, QUERIES, 4, 4, 4, 0.0),
        temporal=TemporalSpec(None, True, "poses", 2),
    )


class _Builder:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[TensorProto] = []
        self.random = np.random.default_rng(7)

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: list[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def grid(self, source: str, name: str, scale: float, low: int, high: int) -> str:
        """QuantizeLinear -> Clip -> DequantizeLinear of an activation."""
        step, zero = self.constant(f"{name}.s", np.float32(scale)), self.constant(f"{name}.z", np.int8(0))
        codes = self.node("QuantizeLinear", [source, step, zero], f"{name}.q")
        if (low, high) != (-128, 127):
            bounds = [
                self.constant(f"{name}.low", np.int8(low)),
                self.constant(f"{name}.high", np.int8(high)),
            ]
            codes = self.node("Clip", [codes, *bounds], f"{name}.c")
        return self.node("DequantizeLinear", [codes, step, zero], f"{name}.d")

    def weight(self, name: str, shape: tuple[int, ...], axis: int, source_scale: float) -> tuple[str, str]:
        """INT4 weight and INT32 bias with scales per output channel; `axis` is that of the output channels."""
        packed = pack_int4(self.random.integers(-8, 8, shape).astype(np.int8))
        packed.name = f"{name}.w"
        self.constants.append(packed)
        scale = self.random.uniform(0.02, 0.05, shape[axis]).astype(np.float32)
        step = self.constant(f"{name}.ws", scale)
        weight = self.node("DequantizeLinear", [packed.name, step], f"{name}.wd", axis=axis)
        codes = self.constant(f"{name}.b", self.random.integers(-200, 200, shape[axis]).astype(np.int32))
        bias_step = self.constant(f"{name}.bs", (scale * np.float32(source_scale)).astype(np.float32))
        return weight, self.node("DequantizeLinear", [codes, bias_step], f"{name}.bd", axis=0)


def small_master() -> bytes:
    """The ONNX bytes of the hand-written master."""
    b = _Builder()
    flat = b.node("Reshape", ["images", b.constant("six", np.array([6, 3, 8, 8]))], "flat")
    picture = b.grid(flat, "picture", 0.02, -128, 127)
    first = b.node("Conv", [picture, *b.weight("first", (CHANNELS, 3, 3, 3), 0, 0.02)], "first", pads=[1] * 4)
    limits = [b.constant("zero", np.float32(0.0)), b.constant("six6", np.float32(6.0))]
    stem = b.grid(b.node("Clip", [first, *limits], "relu6"), "stem", 0.05, 0, 63)
    second = b.weight("second", (CHANNELS, CHANNELS, 3, 3), 0, 0.05)
    conv = b.node("Conv", [stem, *second], "second", pads=[1] * 4, strides=[2, 2])
    half = b.grid(conv, "half", 0.1, -32, 31)
    scales = b.constant("twice", np.array([1, 1, 2, 2], np.float32))
    resize = b.node(
        "Resize",
        [half, "", scales],
        "whole",
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )
    total = b.grid(b.node("Add", [stem, resize], "sum"), "total", 0.12, -32, 31)
    pooled = b.node(
        "ReduceMean", [total, b.constant("axes", np.array([0, 2, 3]))], "pooled", keepdims=0
    )  # (CHANNELS,)
    rows = b.node(
        "Add", [pooled, b.constant("rows", b.random.normal(size=(QUERIES, CHANNELS)).astype(np.float32))], "r"
    )
    linear_in = b.grid(rows, "linear_in", 0.1, -32, 31)
    weight, bias = b.weight("linear", (CHANNELS, 10), 1, 0.1)
    product = b.node("MatMul", [linear_in, weight], "product")
    b.node("Add", [product, bias], "class_logits")
    b.node("Neg", ["class_logits"], "boxes")
    b.node(
        "Add",
        [b.node("Squeeze", ["prev_bev", b.constant("first_axis", np.array([0]))], "old"), pooled],
        "bev",
    )
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 6, 3, 8, 8]),
        helper.make_tensor_value_info("prev_bev", TensorProto.FLOAT, [1, CELLS, CHANNELS]),
    ]
    outputs = [
        helper.make_tensor_value_info("class_logits", TensorProto.FLOAT, [QUERIES, 10]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, [QUERIES, 10]),
        helper.make_tensor_value_info("bev", TensorProto.FLOAT, [CELLS, CHANNELS]),
    ]
    graph = helper.make_graph(b.nodes, "small", inputs, outputs, b.constants)
    model = helper.make_model(graph, producer_name="qdbev", opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString(deterministic=True)


def write_small_package(path: object, variant: Variant | None = None) -> str:
    """Writes a package around the small master, of `small_variant` unless told; returns its SHA-256."""
    grid = {
        "weight_bits": 4,
        "activation_bits": 6,
        "parts": ["backbone"],
        "parameters": 900,
        "float32_bytes": 3600,
        "layers": [],
        "exceptions": [],
        "float_parameters": [],
        "left_out": [],
    }
    return write_package(
        str(path), variant or small_variant(), small_master(), grid, {"steps": 3}, {"nds": 0.5}
    )
