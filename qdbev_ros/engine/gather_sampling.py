# SPDX-License-Identifier: Apache-2.0
"""Bilinear sampling out of gathers and arithmetic, for runtimes whose GridSample cannot be trusted.

A sample is the weighted sum of four rows of a (rows, channels) matrix; corners outside the map weigh nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.sampling import Constant, Sampling


class _Nodes:
    """Nodes in the making; every name starts with that of the tensor they are for."""

    def __init__(self, prefix: str, constant: Constant) -> None:
        self.prefix, self.constant = prefix, constant
        self.made: list[onnx.NodeProto] = []

    def add(self, op: str, inputs: list[str], output: str | None = None, **attributes: Any) -> str:
        name = output or f"{self.prefix}_{len(self.made)}"
        self.made.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def floats(self, *values: float) -> str:
        return self.constant(np.array(values, np.float32))

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))


def _corners(n: _Nodes, pixel: str, size: str) -> list[tuple[str, str]]:
    """[(row, weight)] of the four pixels around each point, by name.

    pixel (..., 2): (x, y), the centre of the first pixel is (0, 0) · size (2,) float: width, height of the map
    row (...) int32: y * width + x, always inside the map · weight (...): 0 where the pixel lies outside
    """
    last = n.add("Sub", [size, n.floats(1.0)])
    # Everything beyond the border's neighbours is as far out as they are; this also keeps infinities out of the sums.
    near = n.add("Min", [n.add("Max", [pixel, n.floats(-1.0)]), size])
    low = n.add("Floor", [near])
    fraction = n.add("Sub", [near, low])
    sides = []
    for position, share in (
        (low, n.add("Sub", [n.floats(1.0), fraction])),
        (n.add("Add", [low, n.floats(1.0)]), fraction),
    ):
        inside = n.add("Min", [n.add("Max", [position, n.floats(0.0)]), last])
        seen = n.add("Cast", [n.add("Equal", [inside, position])], to=onnx.TensorProto.FLOAT)
        weight = n.add("Mul", [share, seen])
        # Float32 counts every pixel of a map exactly, up to 16 million of them.
        sides.append([_pick(n, tensor, axis) for tensor in (inside, weight) for axis in (0, 1)])
    width = n.add("Gather", [size, n.constant(np.int64(0))])
    corners = []
    for _, y, _, weight_y in sides:
        row = n.add("Mul", [y, width])
        for x, _, weight_x, _ in sides:
            index = n.add("Cast", [n.add("Add", [row, x])], to=onnx.TensorProto.INT32)
            corners.append((index, n.add("Mul", [weight_x, weight_y])))
    return corners


def _pick(n: _Nodes, tensor: str, index: int) -> str:
    return n.add("Gather", [tensor, n.constant(np.int64(index))], axis=-1)


def _batch_offsets(n: _Nodes, tensor: str, stride: str, dims: int) -> str:
    """(B, 1, ...) int32 with `dims` axes: b * stride for every element of the batch of `tensor`."""
    batch = n.add("Gather", [n.add("Shape", [tensor]), n.constant(np.int64(0))])
    numbers = n.add("Range", [n.constant(np.int64(0)), batch, n.constant(np.int64(1))])
    offsets = n.add("Cast", [n.add("Mul", [numbers, stride])], to=onnx.TensorProto.INT32)
    return n.add("Reshape", [offsets, n.integers(-1, *[1] * (dims - 1))])


def gather_form(sampling: Sampling, constant: Constant) -> list[onnx.NodeProto]:
    """Deformable sampling, level by level and corner by corner, so that no tensor holds all samples at once."""
    s, n = sampling, _Nodes(sampling.output, constant)
    rows = n.add("Reshape", [s.value, n.integers(-1, s.depth)])  # (B * S * heads, depth)
    cells = sum(height * width for height, width in s.sizes)
    batch = _batch_offsets(n, s.value, n.constant(np.int64(cells * s.heads)), 4)
    total, start = "", 0
    for level, (height, width) in enumerate(s.sizes):
        own = n.add("Gather", [s.locations, constant(np.int64(level))], axis=3)  # (B, Q, heads, points, 2)
        share = n.add("Gather", [s.weights, constant(np.int64(level))], axis=3)  # (B, Q, heads, points)
        size = n.floats(width, height)
        pixel = n.add("Sub", [n.add("Mul", [own, size]), n.floats(0.5)])
        first = (np.arange(s.heads, dtype=np.int32) + start * s.heads)[:, None]
        offsets = n.add("Add", [batch, constant(first)])
        for index, weight in _corners(n, pixel, size):
            row = n.add("Add", [n.add("Mul", [index, constant(np.int32(s.heads))]), offsets])
            samples = n.add("Gather", [rows, row], axis=0)  # (B, Q, heads, points, depth)
            weight = n.add("Unsqueeze", [n.add("Mul", [weight, share]), n.integers(-1)])
            part = n.add("ReduceSum", [n.add("Mul", [samples, weight]), n.integers(3)], keepdims=0)
            total = n.add("Add", [total, part]) if total else part
        start += height * width
    n.add("Reshape", [total, n.integers(0, 0, s.heads * s.depth)], output=s.output)
    return n.made


def gather_grid_samples(graph: Graph) -> None:
    """Puts gathers in the place of every GridSample (deformable convolutions have one each)."""
    for node in graph.nodes("GridSample"):
        graph.replace(node, _gather_grid_sample(node, graph.add_constant))


def _gather_grid_sample(node: onnx.NodeProto, constant: Constant) -> list[onnx.NodeProto]:
    """x (B, C, H, W), grid (B, h, w, 2) in -1..1 over the map -> (B, C, h, w)."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    mode = (found.get("mode", b"linear"), found.get("padding_mode", b"zeros"), found.get("align_corners", 0))
    if mode not in ((b"linear", b"zeros", 0), (b"bilinear", b"zeros", 0)):
        raise PackageError(f"node {node.name!r}: GridSample with {mode}; we know linear, zeros, 0")
    (x, grid), n = node.input, _Nodes(node.output[0], constant)
    shape = n.add("Shape", [x])
    size = n.add("Cast", [n.add("Gather", [shape, n.integers(3, 2)])], to=onnx.TensorProto.FLOAT)
    half = n.add("Mul", [n.add("Add", [grid, n.floats(1.0)]), n.add("Mul", [size, n.floats(0.5)])])
    pixel = n.add("Sub", [half, n.floats(0.5)])
    rows = n.add("Flatten", [n.add("Transpose", [x], perm=[0, 2, 3, 1])], axis=3)  # (B * H * W, C)
    cells = n.add("ReduceProd", [n.add("Gather", [shape, n.integers(2, 3)])], keepdims=0)
    offsets = _batch_offsets(n, x, cells, 3)
    total = ""
    for index, weight in _corners(n, pixel, size):
        samples = n.add("Gather", [rows, n.add("Add", [index, offsets])], axis=0)  # (B, h, w, C)
        part = n.add("Mul", [samples, n.add("Unsqueeze", [weight, n.integers(-1)])])
        total = n.add("Add", [total, part]) if total else part
    n.add("Transpose", [total], output=node.output[0], perm=[0, 3, 1, 2])
    return n.made
