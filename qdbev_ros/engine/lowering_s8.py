# SPDX-License-Identifier: Apache-2.0
"""From the packed master to the form that TensorRT takes: S8, zero-point 0, strongly typed explicit Q/DQ.

Weights become int8, the limits of the codes a float Clip in front of QuantizeLinear (TensorRT clips no integers),
biases float tensors that hold the rounded values. Eight unsigned bits have no place in int8: such tensors, a few small
ones, are rounded in float. Sampling becomes gathers (`gather_sampling`): TensorRT 10.14 and 11.1 are said to compute
deformable attention by GridSample wrongly, without a word. None of this changes a number.
"""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.gather_sampling import gather_form, gather_grid_samples
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import clip_behind
from qdbev_ros.engine.master import OPSET, open_master
from qdbev_ros.engine.sampling import replace_samplings


def lower_s8(master: bytes) -> onnx.ModelProto:
    """The S8 form of a packed master. Deterministic; raises PackageError where the master is not one."""
    graph = open_master(master)
    replace_samplings(graph, gather_form)
    gather_grid_samples(graph)
    for quantise in graph.nodes("QuantizeLinear"):
        _clip_in_float(graph, quantise)
    for dequantise in graph.nodes("DequantizeLinear"):
        _float_bias(graph, dequantise)
    return graph.finish("qdbev-s8", OPSET)


def _clip_in_float(graph: Graph, quantise: onnx.NodeProto) -> None:
    """Clip between low * step and high * step, then QuantizeLinear to int8; in float altogether for uint8 codes."""
    step = np.float32(graph.constant(quantise.input[1]))
    kind = graph.constant(quantise.input[2]).dtype
    clip = clip_behind(graph, quantise)
    codes = quantise.output[0]
    low, high = int(np.iinfo(kind).min), int(np.iinfo(kind).max)
    if clip is not None:
        low, high = (int(graph.constant(name)) for name in clip.input[1:])
        codes = clip.output[0]
    if np.any(graph.constant(quantise.input[2])):
        raise PackageError(f"the codes {codes!r} have a zero-point; a packed master has none")
    if high > 127:
        _round_in_float(graph, quantise, codes, step, (low, high))
        return
    if clip is None:
        return
    value = quantise.output[0]
    limits = [graph.add_constant(np.float32(bound * step)) for bound in (low, high)]
    limited = helper.make_node("Clip", [quantise.input[0], *limits], [value + "_limited"])
    graph.remove(clip)
    graph.redirect(codes, value)
    graph.add(limited)
    graph.set_input(quantise, 0, limited.output[0])


def _round_in_float(
    graph: Graph, quantise: onnx.NodeProto, codes: str, step: np.float32, bounds: tuple[int, int]
) -> None:
    """The value that the codes stand for, made of float operators; readers of the codes read it instead."""
    name, source = quantise.output[0], quantise.input[0]
    scale = graph.add_constant(step)
    limits = [graph.add_constant(np.float32(bound)) for bound in bounds]
    users = graph.users(codes)
    if any(user.op_type != "DequantizeLinear" for user in users):
        raise PackageError(f"the codes {codes!r} are read by something else than DequantizeLinear")
    for node in (
        helper.make_node("Div", [source, scale], [name + "_steps"]),
        helper.make_node("Round", [name + "_steps"], [name + "_rounded"]),
        helper.make_node("Clip", [name + "_rounded", *limits], [name + "_limited"]),
        helper.make_node("Mul", [name + "_limited", scale], [name + "_value"]),
    ):
        graph.add(node)
    for user in users:
        graph.redirect(user.output[0], name + "_value")
        graph.remove(user)


def _float_bias(graph: Graph, dequantise: onnx.NodeProto) -> None:
    """Turns an int32 bias into the float numbers that it stands for."""
    tensor = graph.initializers.get(dequantise.input[0])
    if tensor is None or tensor.data_type != TensorProto.INT32:
        return
    codes, scale = (graph.constant(name) for name in dequantise.input[:2])
    values: NDArray[np.float32] = (codes.astype(np.float32) * scale).astype(np.float32)
    graph.redirect(dequantise.output[0], graph.add_constant(values))
    graph.remove(dequantise)
