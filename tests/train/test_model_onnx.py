# SPDX-License-Identifier: Apache-2.0
"""The tensor graph goes through torch's exporter with standard operators only, and ONNX Runtime computes the same."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.sampling import define_functions, inline_samplings
from qdbev_train.model import BEVFormer, build_model
from tests.model_samples import can_bus, rig, unsettle

INPUTS = ("images", "points", "cells", "slots", "weights", "can_bus", "prev_bev", "shift", "use_prev")


class TensorGraph(nn.Module):
    def __init__(self, model: BEVFormer) -> None:
        super().__init__()
        self.model = model

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        out = self.model.forward_tensors(*tensors)
        return out.image_features[0], out.bev, out.class_logits, out.boxes


def graph_inputs(model: BEVFormer, rigs: Tensor, seed: int, use_prev: bool) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tables = model.camera_tables(rigs)
    bus = can_bus(12.0, 3.0)[None]
    previous, shift, use = model.align_history(bus, torch.randn(1, 1600, 96, generator=generator), None)
    pictures = torch.randn(1, 6, 3, 144, 256, generator=generator)
    numbers = tables.points, tables.cells, tables.slots, tables.weights
    return pictures, *numbers, bus, previous, shift, use * float(use_prev)


@pytest.fixture(scope="module")
def model() -> BEVFormer:
    torch.manual_seed(0)
    model = build_model("nano").eval()
    unsettle(model)
    return model


@pytest.fixture(scope="module")
def exported(model: BEVFormer) -> bytes:
    buffer = io.BytesIO()
    dynamic = {"points": {2: "M"}, "cells": {2: "M"}, "slots": {2: "K"}, "weights": {2: "K"}}
    torch.onnx.export(
        TensorGraph(model),
        graph_inputs(model, rig(model.variant)[None], 1, use_prev=True),
        buffer,
        input_names=list(INPUTS),
        output_names=["features", "bev", "class_logits", "boxes"],
        dynamic_axes=dynamic,
        opset_version=20,
        custom_opsets={"qdbev": 1},
        dynamo=False,
    )
    graph = Graph(onnx.load_from_string(buffer.getvalue()))
    define_functions(graph)
    return inline_samplings(graph.finish("test", 20)).SerializeToString()


@pytest.fixture(scope="module")
def session(exported: bytes) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(exported, options, providers=["CPUExecutionProvider"])


@pytest.mark.filterwarnings("ignore")  # the exporter warns about shapes that are constants on purpose
@pytest.mark.parametrize(("cameras", "use_prev"), [(6, True), (6, False), (2, True)])
@torch.no_grad()
def test_onnx_runtime_computes_what_torch_computes(
    model: BEVFormer, session: Any, cameras: int, use_prev: bool
) -> None:
    rigs = rig(model.variant, turn_degrees=15.0)[None].clone()
    rigs[:, cameras:] = 0.0  # with two cameras M and K differ from those of the export
    inputs = graph_inputs(model, rigs, 2, use_prev)
    results = session.run(None, {name: tensor.numpy() for name, tensor in zip(INPUTS, inputs)})
    for expected, result in zip(TensorGraph(model)(*inputs), results):
        scale = max(1.0, float(expected.abs().max()))
        np.testing.assert_allclose(result, expected.numpy(), atol=1e-4 * scale, rtol=0)


def test_the_graph_is_gathers_and_gridsamples_without_scatter(model: BEVFormer, exported: bytes) -> None:
    graph = onnx.load_from_string(exported).graph
    operators = Counter(node.op_type for node in graph.node)
    assert {node.domain for node in graph.node} == {""}
    assert not {op for op in operators if "Scatter" in op or op in ("Loop", "If", "NonZero")}
    spec = model.variant.transformer
    # One level: temporal and spatial attention per encoder layer, one cross-attention per decoder layer.
    assert operators["GridSample"] == 2 * spec.encoder_layers + spec.decoder_layers
    # BatchNorms are part of the convolutions: every weight is an initialiser that holds them.
    assert operators["BatchNormalization"] == 0
    constants = {i.name for i in graph.initializer}
    assert all(node.input[1] in constants for node in graph.node if node.op_type == "Conv")
