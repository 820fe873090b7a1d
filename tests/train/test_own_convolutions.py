# SPDX-License-Identifier: Apache-2.0
"""Whole packages of ResNets through our own kernels: BEVFormer's three variants, small.

Deformable convolutions, several feature maps and their sums lie between the convolutions of small and base, and their
attention looks at several levels of maps.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.packages import TOWN, pack, unsettle
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine import convolution_nodes, load_package, read_package
from qdbev_ros.engine.convolution import ConvolutionKernel
from qdbev_ros.engine.convolution_nodes import take_convolutions
from qdbev_ros.engine.deformable_nodes import take_attentions
from qdbev_ros.engine.lowering import lower_u8
from qdbev_ros.engine.native import KernelError
from qdbev_train.data.queues import QueueDataset
from qdbev_train.data.tables import load_scenes
from qdbev_train.model import build_model

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns about constant shapes


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    try:
        ConvolutionKernel(1)
    except KernelError as error:
        pytest.skip(str(error))
    monkeypatch.setattr(convolution_nodes, "LEAST_PRODUCTS", 1)
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "cache"))


def shallow(name: str) -> Variant:
    """160x96 pixels, odd maps, 10x10 cells, 30 queries, one encoder and one decoder layer, ResNet-50 for 101."""
    variant = load_variant(name)
    return replace(
        variant,
        backbone=replace(variant.backbone, depth=50),
        image=replace(variant.image, height=96, width=160),
        bev=replace(variant.bev, height=10, width=10),
        transformer=replace(variant.transformer, encoder_layers=1, decoder_layers=1, queries=30),
    )


@pytest.mark.parametrize(("name", "convolutions"), [("tiny", 55), ("small", 55), ("base", 60)])
def test_a_package_passes_the_gate(name: str, convolutions: int, tmp_path: Path) -> None:
    variant = shallow(name)
    torch.manual_seed(0)
    model = build_model(variant).eval().requires_grad_(False)
    unsettle(model)
    *_, batch = next(iter(QueueDataset(load_scenes(*TOWN), variant, batch=1, seed=0)))
    pack(model, variant, batch, tmp_path / "w4a6.qdbev")
    engine = load_package(tmp_path / "w4a6.qdbev", backend="onnxruntime", threads=1)
    assert f"{convolutions} of them by our own kernel" in engine.description
    lowered = lower_u8(read_package(tmp_path / "w4a6.qdbev").model)
    _, attentions = take_attentions(take_convolutions(lowered, None)[0])
    assert [(a.maps, bool(a.slots)) for a in attentions.values()] == [(2, False), (1, True), (1, False)]
