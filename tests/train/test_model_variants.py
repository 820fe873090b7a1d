# SPDX-License-Identifier: Apache-2.0
"""A variant is data: any sensible mix in a YAML file is a network, and what cannot be one is refused in one line."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_train.model import build_model
from tests.model_samples import can_bus, rig, small_variant

few = st.integers(1, 3)
STAGES = st.lists(st.integers(1, 4), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def backbones(draw: st.DrawFn) -> dict[str, Any]:
    stages = draw(STAGES)
    levels = draw(st.integers(1, 4))
    if draw(st.booleans()):
        style = {"kind": "mobilenet_v2", "depth": 0, "style": "pytorch", "dcn_stages": []}
    else:
        dcn = draw(st.lists(st.integers(1, stages[-1]), max_size=2, unique=True))
        kinds = st.sampled_from(["pytorch", "caffe"])
        style = {
            "kind": "resnet",
            "depth": draw(st.sampled_from([50, 101])),
            "style": draw(kinds),
            "dcn_stages": dcn,
        }
    return {**style, "out_stages": stages, "neck_levels": levels}


@st.composite
def variants(draw: st.DrawFn) -> dict[str, Any]:
    """A small variant as the plain data of a YAML file."""
    data: dict[str, Any] = small_variant().to_dict()
    heads, pillar = draw(few), draw(few)
    data["image"]["height"] = draw(st.integers(33, 64))
    data["image"]["pad_divisor"] = 32
    data["backbone"] = draw(backbones())
    bev = {"height": draw(st.integers(1, 7)), "width": draw(st.integers(1, 7)), "pillar_points": pillar}
    data["bev"] = {**bev, "pc_range": [-20, -24.5, -5, 30.5, 24, 3]}
    data["transformer"] = {
        "channels": 2 * heads * draw(few),
        "heads": heads,
        "ffn_channels": draw(st.integers(1, 9)),
        "encoder_layers": draw(st.integers(1, 2)),
        "decoder_layers": draw(few),
        "queries": draw(st.integers(1, 9)),
        "tsa_points": draw(few),
        "sca_points": pillar * draw(few),
        "decoder_points": draw(few),
        "dropout": 0.1,
    }
    centers = st.sampled_from([None, [100, 100], [2.5, 3]])
    data["temporal"] |= {"rotate_center": draw(centers), "wrap_yaw_delta": draw(st.booleans())}
    return data


@given(variants())
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@torch.no_grad()
def test_any_mix_of_a_yaml_runs_over_two_frames(tmp_path: Path, data: dict[str, Any]) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text(yaml.safe_dump(_with_lists(data)))
    variant = load_variant(file)
    model = build_model(file).eval()
    pictures = torch.randn(1, 6, 3, variant.image.padded_height, variant.image.padded_width)
    first = model(pictures, rig(variant)[None], can_bus(0.0, 0.0)[None])
    second = model(pictures, rig(variant)[None], can_bus(4.0, 3.0)[None], first.bev)
    spec = variant.transformer
    for out in (first, second):
        assert len(out.image_features) == variant.backbone.neck_levels
        assert out.bev.shape == (1, variant.bev.cells, spec.channels)
        assert out.class_logits.shape == out.boxes.shape == (spec.decoder_layers, 1, spec.queries, 10)
        assert all(t.isfinite().all() for t in (out.bev, out.class_logits, out.boxes))


def _with_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_lists(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": {"kind": "vovnet"}}, "'vovnet'; use 'resnet' or 'mobilenet_v2'"),
        ({"backbone": {"kind": "resnet", "depth": 34}}, "depth 34; use 50 or 101"),
        ({"backbone": {"style": "detectron"}}, "'detectron'; use 'pytorch' or 'caffe'"),
        ({"backbone": {"dcn_stages": [2]}}, "mobilenet_v2 has depth 0, style 'pytorch' and no dcn_stages"),
        ({"backbone": {"out_stages": []}}, "list some of 1 to 4, ascending"),
        ({"backbone": {"out_stages": [4, 3]}}, "list some of 1 to 4, ascending"),
        ({"backbone": {"kind": "resnet", "depth": 50, "dcn_stages": [4]}}, "stages 1 to 3 are built"),
        ({"backbone": {"neck_levels": 5}}, "neck_levels is 5; use 1 to 4"),
        ({"bev": {"height": 0}}, "height, width and pillar_points must be positive"),
        ({"bev": {"pc_range": [20, -24, -5, -20, 24, 3]}}, "x0 < x1"),
        ({"bev": {"pc_range": [0, 1]}}, "bev.pc_range is .0, 1.; it must be tuple"),
        ({"bev": {"pillar_points": 3}}, "sca_points .4. must be a multiple of bev.pillar_points .3."),
        ({"transformer": {"queries": 0}}, "transformer.queries is 0"),
        ({"transformer": {"queries": 7.5}}, "transformer.queries is 7.5; it must be int"),
        ({"transformer": {"channels": 15}}, "even and a multiple of heads .2."),
        ({"transformer": {"heads": 3}}, "even and a multiple of heads .3."),
        ({"transformer": {"dropout": 1.0}}, "transformer.dropout is 1.0"),
        ({"temporal": {"rotate_center": [100]}}, "temporal.rotate_center is .100.; it must be"),
        ({"temporal": {"wrap_yaw_delta": "no"}}, "temporal.wrap_yaw_delta is 'no'; it must be bool"),
        ({"temporal": {"dynamics": "imu"}}, "'imu'; use 'can' or 'poses'"),
        ({"image": {"height": "tall"}}, "image.height is 'tall'; it must be int"),
        ({"image": {"std": [1, 0, 1]}}, "std must be positive"),
        ({"classes": []}, "no classes"),
        ({"bev": {"depth": 3}}, "unknown keys .'bev.depth'."),
    ],
)
def test_what_cannot_be_a_network_is_refused_in_one_line_naming_the_file(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    data = _with_lists(copy.deepcopy(small_variant().to_dict()))
    for part, values in change.items():
        data[part] = {**data[part], **values} if isinstance(values, dict) else values
    file = tmp_path / "broken.yaml"
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=words) as caught:
        load_variant(file)
    assert str(caught.value).startswith(str(file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tiny", "small", "base"])
def test_released_variants_keep_the_reference_where_it_is_wrong(name: str) -> None:
    temporal = load_variant(name).temporal
    assert (temporal.rotate_center, temporal.wrap_yaw_delta) == ((100.0, 100.0), False)


def test_four_level_embeddings_exist_whatever_number_of_levels_is_in_use() -> None:
    sample = small_variant()
    for levels in (1, 4):
        with torch.device("meta"):
            model = build_model(replace(sample, backbone=replace(sample.backbone, neck_levels=levels)))
        assert model.pts_bbox_head.transformer.level_embeds.shape == (4, 16)


@torch.no_grad()
def test_the_rotation_centre_is_a_setting_of_the_variant() -> None:
    sample = small_variant()
    previous = torch.arange(30.0).reshape(1, 30, 1).expand(1, 30, 16)
    bus = can_bus(20.0, 0.0)[None]

    def turned(variant: Variant) -> torch.Tensor:
        with torch.device("meta"):
            model = build_model(variant)
        return model.align_history(bus, previous, None)[0][0, :, 0]

    def about(center: tuple[float, float] | None) -> torch.Tensor:
        return turned(replace(sample, temporal=replace(sample.temporal, rotate_center=center)))

    assert torch.equal(about(None), about((2.5, 3.0)))  # the middle of 5 columns and 6 rows
    assert not torch.equal(about(None), about((100.0, 100.0)))
