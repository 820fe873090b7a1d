# SPDX-License-Identifier: Apache-2.0
"""The model is released BEVFormer to the key name, and says everything that is wrong with a checkpoint at once."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest
import torch

from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_train.model import (
    BEVFormer,
    build_model,
    load_bevformer_checkpoint,
    load_imagenet_backbone,
    spread_references,
)
from tests.model_samples import small_model

PARAMETERS = {"tiny": 33_521_157, "small": 59_463_619, "base": 69_034_947}
# parameters and buffers of a checkpoint: tensors, and how many numbers they hold together
ENTRIES = {"tiny": (643, 33_574_330), "small": (1001, 59_569_067), "base": (1089, 69_140_395)}


def shape_only(variant: str) -> BEVFormer:
    with torch.device("meta"):
        return build_model(variant)


def listed_entries() -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """variant -> key -> ("p" or "b", shape) of the reference list, which is not part of the repository."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "reference"
    path = Path(os.environ.get("QDBEV_REFERENCE", beside)) / "bevformer_state_dict_shapes.txt"
    if not path.is_file():
        pytest.skip(f"no list of released keys at {path}; set QDBEV_REFERENCE to its folder")
    entries: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    variant = ""
    for line in path.read_text().splitlines():
        if line.startswith("== "):
            variant = line.split()[1]
            entries[variant] = {}
        elif line.startswith(("p ", "b ")):
            kind, key, shape = line.split(maxsplit=2)
            entries[variant][key] = (kind, ast.literal_eval(shape))
    return entries


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_keys_kinds_and_shapes_are_those_of_released_checkpoints(variant: str) -> None:
    listed = listed_entries()[variant]
    model = shape_only(variant)
    parameters = {key for key, _ in model.named_parameters()}
    own = {key: ("p" if key in parameters else "b", tuple(t.shape)) for key, t in model.state_dict().items()}
    assert own == listed


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_sizes_are_those_of_released_checkpoints(variant: str) -> None:
    model = shape_only(variant)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[variant]
    state = model.state_dict()
    assert (len(state), sum(t.numel() for t in state.values())) == ENTRIES[variant]


def test_a_checkpoint_goes_in_and_changes_every_tensor() -> None:
    source, target = small_model(seed=1), small_model(seed=2)
    load_bevformer_checkpoint(target, source.state_dict())
    for key, tensor in target.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[key]), key


def test_one_error_names_every_missing_unexpected_and_misshaped_key() -> None:
    model = small_model()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state = {key: tensor + 1 for key, tensor in before.items()}
    del state["pts_bbox_head.code_weights"], state["img_neck.fpn_convs.0.conv.bias"]
    state["pts_bbox_head.extra"] = torch.zeros(1)
    state["pts_bbox_head.query_embedding.weight"] = torch.zeros(900, 512)
    with pytest.raises(QdbevError) as caught:
        load_bevformer_checkpoint(model, state)
    message = str(caught.value)
    assert "\n" not in message
    for part in (
        "2 missing: ",
        "pts_bbox_head.code_weights",
        "img_neck.fpn_convs.0.conv.bias",
        "1 unexpected: pts_bbox_head.extra",
        "pts_bbox_head.query_embedding.weight is (900, 512) but must be (7, 32)",
    ):
        assert part in message
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_imagenet_weights_fit_the_nano_backbone() -> None:
    model = build_model("nano")
    try:
        load_imagenet_backbone(model)
    except DataError as error:
        pytest.skip(str(error))
    statistics = {k: t for k, t in model.img_backbone.state_dict().items() if k.endswith("running_mean")}
    assert len(statistics) == 51  # every BatchNorm of MobileNetV2 but the last convolution's
    assert all(mean.any() for mean in statistics.values())  # a fresh one has zeros


def test_spread_references_cover_the_map_evenly() -> None:
    model = build_model("nano")
    spread_references(model)
    head = model.pts_bbox_head
    position = head.query_embedding.weight[:, :96]
    reference = head.transformer.reference_points(position).sigmoid()
    counts, _ = torch.histogramdd(reference[:, :2].detach(), bins=[4, 4], range=[0.0, 1.0, 0.0, 1.0])
    # 200 queries on 16 equal squares: 12.5 each, and much more even than chance, whose deviation is 3.4.
    assert counts.std() < 2.0
    torch.testing.assert_close(reference[:, 2], torch.full((200,), 0.5))


def test_freezing_stops_stem_and_first_stages_only() -> None:
    model = small_model()
    model.freeze_backbone(1)
    trained = {
        key.split(".")[2] for key, p in model.img_backbone.named_parameters(prefix="b") if p.requires_grad
    }
    assert trained == {str(i) for i in range(4, 14)}  # features 0 to 3 are the stem and stage 1
    assert model.img_neck.lateral_convs[0].conv.weight.requires_grad


def test_batchnorm_and_code_weights_are_never_trained() -> None:
    model = shape_only("tiny")
    for key, parameter in model.named_parameters():
        never = ".bn" in key or "downsample.1" in key or "code_weights" in key
        assert parameter.requires_grad == (not never), key
