# SPDX-License-Identifier: Apache-2.0
"""Opens the packed master: is the graph one of ours, and what every lowering starts from."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

from qdbev_ros.core.errors import PackageError
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_ros.engine.graph import Graph, unpack_int4
from qdbev_ros.engine.sampling import Sampling, function_of, is_sampling

OPSET = 21
PRODUCER = "qdbev"
INPUTS = ("images", "points", "cells", "slots", "weights", "can_bus", "prev_bev", "shift", "use_prev")
OUTPUTS = ("class_logits", "boxes", "bev")
FEATURES = "image_features_"  # outputs that `stage_outputs` adds, numbered


def open_master(master: bytes) -> Graph:
    """The master as a graph in which every constant is plain: int8 weights, steps and embeddings in float32.

    Raises PackageError where it is no master.
    """
    graph = Graph(parse_master(master))
    for name, tensor in list(graph.initializers.items()):
        if tensor.data_type == TensorProto.INT4:
            graph.initializers[name] = onnx.numpy_helper.from_array(unpack_int4(tensor), name)
    for node in graph.nodes("DequantizeLinear"):
        if node.input[0] in graph.initializers:
            if node.input[1] not in graph.initializers:  # a bias's: the product of two others in the file
                graph.set_input(node, 1, graph.add_constant(graph.constant(node.input[1])))
            _plain_table(graph, node)
    return graph


def check_master(master: bytes, variant: Variant) -> None:
    """Raises PackageError with one line where a graph is not one that `qdbev export` makes of such a variant."""
    model = parse_master(master)
    image, bev, spec = variant.image, variant.bev, variant.transformer
    wanted = {
        "images": (1, len(CAMERAS), 3, image.padded_height, image.padded_width),
        "prev_bev": (1, bev.cells, spec.channels),
        "class_logits": (spec.queries, len(variant.classes)),
        "boxes": (spec.queries, 10),
        "bev": (bev.cells, spec.channels),
    }
    for value in (*model.graph.input, *model.graph.output):
        shape = tuple(d.dim_value for d in value.type.tensor_type.shape.dim)
        if wanted.get(value.name, shape) != shape:
            raise PackageError(
                f"the graph's {value.name!r} has shape {shape}, the variant says {wanted[value.name]}"
            )


def parse_master(master: bytes) -> onnx.ModelProto:
    """The graph of a master; PackageError where it is none."""
    try:
        model = onnx.load_from_string(master)
    except Exception as error:  # protobuf raises its own type, which differs between its implementations
        raise PackageError(f"the model is no ONNX file: {' '.join(str(error).split())}") from error
    graph, domains = model.graph, {o.domain: o.version for o in model.opset_import}
    if model.producer_name != PRODUCER or domains.get("") != OPSET:
        made = f"{model.producer_name!r}, opset {domains.get('')}"
        raise PackageError(f"the ONNX graph was not made by `qdbev export`: it is {made}")
    for node in graph.node:
        # Nothing that a runtime would look up elsewhere, and no graphs inside of nodes.
        known = node.domain == "" or (is_sampling(node) and Sampling.of(node).op_type == node.op_type)
        if not known or any(a.HasField("g") or a.graphs for a in node.attribute):
            raise PackageError(
                f"the ONNX graph holds an operator that no package has: {node.domain}:{node.op_type}"
            )
    _check_functions(model)
    inputs = [i.name for i in graph.input]
    answers = tuple(o.name for o in graph.output if not o.name.startswith(FEATURES))
    if set(inputs) - set(INPUTS) or answers != OUTPUTS:
        outputs = [o.name for o in graph.output]
        raise PackageError(f"the ONNX graph maps {inputs} to {outputs}, not a frame to {list(OUTPUTS)}")
    attributes = [a for node in graph.node for a in node.attribute]
    tensors = [*graph.initializer, *(t for a in attributes for t in (a.t, *a.tensors))]
    if any(t.data_location == TensorProto.EXTERNAL or t.external_data for t in tensors):
        raise PackageError("the ONNX graph refers to data outside its own file")
    if graph.sparse_initializer or any(a.HasField("sparse_tensor") or a.sparse_tensors for a in attributes):
        raise PackageError("the ONNX graph holds sparse tensors, which no package has")
    return model


def _check_functions(model: onnx.ModelProto) -> None:
    """Raises PackageError where the functions are not those of the graph's samplings, to the bit."""
    found = (Sampling.of(node) for node in model.graph.node if is_sampling(node))
    made = {sampling.op_type: sampling for sampling in found}
    given = [function.name for function in model.functions]
    if given != sorted(made) or any(function_of(made[f.name]) != f for f in model.functions):
        raise PackageError(
            f"the ONNX graph's functions {given} are not those that `qdbev export` makes of it"
        )


def _plain_table(graph: Graph, node: onnx.NodeProto) -> None:
    """Turns the codes of an embedding into numbers: nothing multiplies by them, so no engine wants codes."""
    kind = graph.initializers[node.input[0]].data_type
    if kind != TensorProto.INT8 or _is_factor(graph, node.output[0]):
        return
    codes, steps = graph.constant(node.input[0]), graph.constant(node.input[1])
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    shape = [len(steps) if i == axis else 1 for i in range(codes.ndim)]
    values = codes.astype(np.float32) * steps.reshape(shape)
    graph.redirect(node.output[0], graph.add_constant(values.astype(np.float32)))
    graph.remove(node)


def _is_factor(graph: Graph, name: str) -> bool:
    """Something multiplies by the tensor: it is the weight of a layer."""
    users = graph.users(name)
    if any(u.op_type in ("Conv", "MatMul", "Gemm", "Einsum") for u in users):
        return True
    return any(u.op_type in ("Reshape", "Transpose") and _is_factor(graph, u.output[0]) for u in users)
