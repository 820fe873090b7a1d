# SPDX-License-Identifier: Apache-2.0
"""From a fake-quantised model to the packed ONNX master: torch's exporter, then our own deterministic pass.

The exporter leaves one node `qdbev::DeformableSampling` for every deformable attention, which becomes a function of the
model, and one node `qdbev::FakeQuantise` for every rounding. The pass turns those of weights into INT4 or
INT8 initialisers with DequantizeLinear, those of biases into INT32 ones, and those of activations into
QuantizeLinear -> Clip -> DequantizeLinear with the Clip on the integers.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.projection import visible_cells
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_ros.engine.graph import Graph, pack_int4
from qdbev_ros.engine.master import INPUTS, OPSET, OUTPUTS, PRODUCER
from qdbev_ros.engine.sampling import define_functions
from qdbev_train.export.biases import derive_bias_steps

# M and K depend on the rig, everything else on the variant.
_DYNAMIC = {"points": {2: "M"}, "cells": {2: "M"}, "slots": {2: "K"}, "weights": {2: "K"}}


class _Inference(nn.Module):
    """One frame (B = 1) as engines run it: only the last decoder layer's answer, without the batch axis."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The tensors of INPUTS -> class_logits (Q, 10), boxes (Q, 10), bev (cells, C)."""
        out = self.model.forward_tensors(*tensors)  # type: ignore[operator]
        return out.class_logits[-1, 0], out.boxes[-1, 0], out.bev[0]


def export_master(model: nn.Module, variant: Variant) -> bytes:
    """The packed master of a quantised (or float) model in eval mode, as bytes; equal weights give equal bytes."""
    if any(not torch.isfinite(t).all() for t in model.state_dict().values()):
        raise ConfigError("the model holds values that are not finite; was it calibrated?")
    traced = onnx.load_from_string(_trace(model, variant))
    _shape_outputs(traced, variant)
    graph = Graph(traced)
    _pick_without_stacking(graph)
    define_functions(graph)
    _pack(graph)
    graph.merge_duplicates()
    _drop_requantisation(graph)
    derive_bias_steps(graph)
    master = graph.finish(PRODUCER, OPSET, short_names=True)
    onnx.checker.check_model(master, full_check=True)
    return master.SerializeToString(deterministic=True)


def example_inputs(variant: Variant) -> tuple[Tensor, ...]:
    """Tensors of the shapes that the graph takes, in the order of INPUTS."""
    image, bev = variant.image, variant.bev
    # A camera that looks down from above sees something of any map.
    camera = np.array([[10, 0, 0, 5], [0, 10, 0, 5], [0, 0, -1, 30], [0, 0, 0, 1]], np.float32)
    tables = visible_cells(np.stack([camera] * len(CAMERAS)), bev, image)
    return (
        torch.zeros(1, len(CAMERAS), 3, image.padded_height, image.padded_width),
        *(torch.from_numpy(t)[None] for t in (tables.points, tables.cells, tables.slots, tables.weights)),
        torch.zeros(1, 18),
        torch.zeros(1, bev.cells, variant.transformer.channels),
        torch.zeros(1, 2),
        torch.ones(1),
    )


def _trace(model: nn.Module, variant: Variant) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about every shape that it takes for a constant; here they are constants.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Inference(model).eval(),
            example_inputs(variant),
            buffer,  # type: ignore[arg-type]
            input_names=list(INPUTS),
            output_names=list(OUTPUTS),
            dynamic_axes=_DYNAMIC,
            opset_version=20,
            custom_opsets={"qdbev": 1},
            dynamo=False,
        )
    return buffer.getvalue()


def _shape_outputs(model: onnx.ModelProto, variant: Variant) -> None:
    """Says what shapes come out: torch does not know, where it does not know an operator on the way."""
    spec, bev = variant.transformer, variant.bev
    shapes = ((spec.queries, len(variant.classes)), (spec.queries, 10), (bev.cells, spec.channels))
    del model.graph.output[:]
    for name, shape in zip(OUTPUTS, shapes, strict=True):
        model.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def _pick_without_stacking(graph: Graph) -> None:
    """Takes the last decoder layer's answer as it is; out of a stack it would keep every layer's class branch."""
    for gather in graph.nodes("Gather"):
        stack = graph.producer(gather.input[0])
        if stack is None or stack.op_type != "Concat" or not graph.is_constant(gather.input[1]):
            continue
        layers = [graph.producer(name) for name in stack.input]
        index = graph.constant(gather.input[1])
        axes = {helper.get_node_attr_value(node, "axis") for node in (gather, stack)}
        if (
            index.ndim == 0
            and axes == {0}
            and all(n is not None and n.op_type == "Unsqueeze" for n in layers)
        ):
            picked = layers[int(index)]
            assert picked is not None
            graph.redirect(gather.output[0], picked.input[0])


def _pack(graph: Graph) -> None:
    """Replaces every FakeQuantise; what its input is decides what it becomes."""
    for node in graph.nodes("FakeQuantise"):
        source, scale, low, high = node.input
        bounds = (int(graph.constant(low)), int(graph.constant(high)))
        if graph.is_constant(source):
            _pack_constant(graph, node, bounds)
        else:
            _quantise_activation(graph, node, float(graph.constant(scale)), bounds)


def _pack_constant(graph: Graph, node: onnx.NodeProto, bounds: tuple[int, int]) -> None:
    """A weight or bias: integer codes as an initialiser, DequantizeLinear in place of the node."""
    values, scale = graph.constant(node.input[0]), graph.constant(node.input[1])
    codes = np.clip(np.rint(values / scale), *bounds)
    axis = int(np.argmax(scale.shape)) if scale.ndim else 0
    target, users = node.output[0], graph.users(node.output[0])
    if len(users) == 1 and users[0].op_type == "Transpose" and values.ndim == 2:
        # MatMul wants (in, out): turning the codes now spares every engine the Transpose.
        codes, axis, target = codes.T, 1 - axis, users[0].output[0]
        graph.remove(users[0])
    if bounds[0] >= -8 and bounds[1] <= 7:
        packed = pack_int4(np.ascontiguousarray(codes).astype(np.int8))
    else:
        kind = np.int8 if bounds[0] >= -128 else np.int32
        packed = numpy_helper.from_array(np.ascontiguousarray(codes).astype(kind))
    inputs = [graph.add_initializer(packed), graph.add_constant(scale.reshape(-1).astype(np.float32))]
    graph.replace(node, [helper.make_node("DequantizeLinear", inputs, [target], axis=axis)])


def _quantise_activation(graph: Graph, node: onnx.NodeProto, scale: float, bounds: tuple[int, int]) -> None:
    kind = np.int8 if bounds[1] <= 127 else np.uint8
    whole = (np.iinfo(kind).min, np.iinfo(kind).max) == bounds
    step, zero = graph.add_constant(np.float32(scale)), graph.add_constant(kind(0))
    name = node.output[0]
    nodes = [helper.make_node("QuantizeLinear", [node.input[0], step, zero], [name + "_codes"])]
    codes = name + "_codes"
    if not whole:
        limits = [graph.add_constant(kind(bound)) for bound in bounds]
        nodes.append(helper.make_node("Clip", [codes, *limits], [name + "_clipped"]))
        codes = name + "_clipped"
    nodes.append(helper.make_node("DequantizeLinear", [codes, step, zero], [name]))
    graph.replace(node, nodes)


def _drop_requantisation(graph: Graph) -> None:
    """Leaves out the second time where a tensor that lies on a grid is put on the very same grid again."""
    for last in graph.nodes("DequantizeLinear"):
        chain = _grid_of(graph, last)
        first = graph.producer(chain[0]) if chain else None
        if chain and first is not None and first.op_type == "DequantizeLinear":
            before = _grid_of(graph, first)
            if before is not None and before[1:] == chain[1:]:
                graph.redirect(last.output[0], first.output[0])


def _grid_of(graph: Graph, dequantise: onnx.NodeProto) -> tuple[str, ...] | None:
    """(tensor that is quantised, scale, zero-point, bounds ...) of an activation's DequantizeLinear."""
    bounds: tuple[str, ...] = ()
    node = graph.producer(dequantise.input[0])
    if node is not None and node.op_type == "Clip":
        bounds = tuple(node.input[1:])
        node = graph.producer(node.input[0])
    if node is None or node.op_type != "QuantizeLinear":
        return None
    # Constants are named by their content: equal names are equal values.
    return (*node.input, *bounds)
