# SPDX-License-Identifier: Apache-2.0
"""Where a training run starts from: random weights, or a backbone out of a file."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from qdbev_ros.core.variant import BackboneSpec, Variant, load_variant
from qdbev_train.model import CheckpointError, build_model
from qdbev_train.model.layers import conv_bn
from qdbev_train.training.config import Span
from qdbev_train.training.initial import load_backbone, starting_model
from tests.training_samples import data_of, micro_config, micro_variant, random_batch


def test_a_random_backbone_gets_batchnorms_that_normalise(tmp_path: Path) -> None:
    """Frozen at unit statistics they would let the signal of a random network grow or die from layer to layer."""
    variant = micro_variant()
    resnet = BackboneSpec("resnet", 50, "pytorch", (3,), (3,), 1)
    path = tmp_path / "variant.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(replace(variant, backbone=resnet).to_dict()))))
    images = random_batch(0, variant)
    config = micro_config(tmp_path, variant=str(path), init="random", length=Span(1, "steps"))
    model, _, _ = starting_model(config, data_of(lambda _: [images]))
    entering: list[Tensor] = []
    last = model.img_backbone.get_submodule("layer3.5")
    last.register_forward_pre_hook(lambda _, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        flat = images.images.flatten(0, 1)
        model.img_backbone(flat)
        stem = conv_bn(flat, model.img_backbone.conv1, model.img_backbone.bn1)
        deep = conv_bn(entering[0], last.conv1, last.bn1)
    for out in (stem, deep):
        torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(out.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(out.std((0, 2, 3)), torch.ones(out.shape[1]), atol=1e-2, rtol=0)
    frozen = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad and "conv" in n}
    assert frozen == {"conv1", "layer1"}


@pytest.mark.parametrize("prefix", ["", "backbone.", "img_backbone."])
def test_a_backbone_loads_by_itself_or_out_of_a_detector(tmp_path: Path, prefix: str) -> None:
    torch.manual_seed(1)
    weights = build_model("nano").img_backbone.state_dict()
    state = {prefix + key: value for key, value in weights.items() if "num_batches" not in key}
    torch.save({"state_dict": state | {"neck.conv.weight": torch.zeros(1)}}, tmp_path / "detector.pth")
    torch.manual_seed(2)
    model = build_model("nano")
    said = load_backbone(model, tmp_path / "detector.pth")
    assert all(torch.equal(v, weights[k]) for k, v in model.img_backbone.state_dict().items())
    assert said.endswith("left out: neck.conv.weight")


def test_a_backbone_that_does_not_fit_is_refused_by_file_and_key(tmp_path: Path) -> None:
    state = {f"backbone.{k}": v for k, v in build_model("nano").img_backbone.state_dict().items()}
    state.popitem()
    torch.save(state, tmp_path / "half.pth")
    with pytest.raises(CheckpointError, match=r"half\.pth: no backbone of variant tiny: .* missing"):
        load_backbone(build_model(tiny_shapes()), tmp_path / "half.pth")


def tiny_shapes() -> Variant:
    tiny = load_variant("tiny")
    small = replace(tiny.transformer, encoder_layers=1, decoder_layers=1, queries=10)
    return replace(tiny, transformer=small)
