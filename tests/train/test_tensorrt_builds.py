# SPDX-License-Identifier: Apache-2.0
"""Every variant's S8 graph, random weights, is taken and compiled by TensorRT's own parser and builder, without a GPU.

Pictures and map are small and each stack of equal layers is one layer deep: what a builder has to get through is the
kinds of nodes, and those are all there.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_ros.engine.tensorrt_build import TableShapes, build_engine, device_graph
from qdbev_train.export.graph import export_master
from qdbev_train.model import build_model
from qdbev_train.quantization import QuantConfig, quantise_model
from qdbev_train.quantization.layers import ActivationQuantiser, QuantisedLayer
from qdbev_train.quantization.tables import TableQuantiser

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx isn't installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns about constant shapes


def shallow(name: str) -> Variant:
    """The variant with 64x96 pictures, 8x8 cells, 16 queries, one encoder and one decoder layer, ResNet-50 for 101."""
    variant = load_variant(name)
    return replace(
        variant,
        backbone=replace(variant.backbone, depth=min(variant.backbone.depth, 50)),
        image=replace(variant.image, height=64, width=96),
        bev=replace(variant.bev, height=8, width=8),
        transformer=replace(variant.transformer, encoder_layers=1, decoder_layers=1, queries=16),
    )


def random_master(variant: Variant) -> bytes:
    """Quantised with scales that were made up: it need not detect anything."""
    torch.manual_seed(0)
    model = quantise_model(build_model(variant), QuantConfig()).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (ActivationQuantiser, TableQuantiser)):
                module.scale.fill_(0.05)
        for module in model.modules():
            if isinstance(module, QuantisedLayer):
                module.fit_scale("minmax")
    return export_master(model, variant)


@pytest.mark.parametrize("name", ["nano", "tiny", "small", "base"])
def test_tensorrt_compiles_the_variant(name: str) -> None:
    variant = shallow(name)
    graph = device_graph(with_stage_outputs(random_master(variant)))
    kinds = {node.op_type for node in graph.graph.node}
    assert "GridSample" not in kinds
    assert {i.name for i in graph.graph.input} >= {"images", "memory", "sources", "points", "slots"}
    levels = [o.name for o in graph.graph.output if o.name.startswith("image_features_")]
    assert len(levels) == variant.backbone.neck_levels
    engine, _ = build_engine(trt, graph, TableShapes.of(variant), target="SM86")
    assert len(engine) > 1 << 20
