# SPDX-License-Identifier: Apache-2.0
"""The parity gate: honest engines pass, wrong kernels don't start, and the verdict is asked for once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import load_package, parity, read_package, stage_outputs
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.graph import pack_int4, unpack_int4
from qdbev_ros.engine.master import OUTPUTS
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.parity import LEAST, MOST, Figures, compare, demand, judge, limits, make_reference
from qdbev_ros.engine.parity_frames import gate_frames
from qdbev_ros.engine.reference_runner import ReferenceRunner
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from tests.small_master import small_master, small_variant, write_small_package

Edit = Callable[[onnx.ModelProto], None]


@pytest.fixture
def package(tmp_path: Path) -> Package:
    write_small_package(tmp_path / "small.qdbev")
    return read_package(tmp_path / "small.qdbev")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def initializer(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(t for t in model.graph.initializer if t.name == name)


def one_weight(model: onnx.ModelProto) -> None:
    tensor = initializer(model, "second.w")
    codes = unpack_int4(tensor).copy()
    codes[0, 0, 0, 0] = -8 if codes[0, 0, 0, 0] >= 0 else 7
    tensor.raw_data = pack_int4(codes).raw_data


def other_sign(model: onnx.ModelProto) -> None:
    step = initializer(model, "second.ws")
    step.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(step), step.name))


def other_step(model: onnx.ModelProto) -> None:
    step = initializer(model, "linear.ws")
    step.CopyFrom(numpy_helper.from_array(np.float32(2.0) * numpy_helper.to_array(step), step.name))


def lost_bias(model: onnx.ModelProto) -> None:
    bias = initializer(model, "first.b")
    bias.CopyFrom(numpy_helper.from_array(0 * numpy_helper.to_array(bias), bias.name))


def not_a_number(model: onnx.ModelProto) -> None:
    scale = initializer(model, "rows")
    scale.CopyFrom(numpy_helper.from_array(np.nan * numpy_helper.to_array(scale), scale.name))


def verdict_of(package: Package, edit: Edit | None) -> parity.Verdict:
    model = onnx.load_from_string(package.model)
    if edit is not None:
        edit(model)
    runner = ReferenceRunner(with_stage_outputs(model.SerializeToString()), 1)
    return judge(package, Engine(package, runner), make_reference(package, 1))


def test_the_reference_agrees_with_itself_to_the_bit(package: Package) -> None:
    verdict = verdict_of(package, None)
    assert verdict.passed
    assert all((r.spread, r.shift) == (0.0, 0.0) for r in verdict.results)
    stages = {r.stage for r in verdict.results}
    assert stages == {"image features", "BEV", "class logits", "boxes"}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_every_engine_that_runs_here_passes(package: Package, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino isn't installed")
    engine = load_package(package.path, backend=backend, threads=1)
    assert "checked: differs by at most" in engine.description


@pytest.mark.parametrize(
    ("edit", "stage"),
    [
        (other_sign, "image features"),
        (lost_bias, "image features"),
        (other_step, "class logits"),
        (not_a_number, "class logits"),
    ],
)
def test_a_wrong_kernel_is_refused_and_its_stage_named(package: Package, edit: Edit, stage: str) -> None:
    verdict = verdict_of(package, edit)
    assert not verdict.passed
    with pytest.raises(EngineError, match=f"must not run: {stage}, frame 0: spread"):
        demand(verdict, "this engine")


def test_one_wrong_weight_in_a_small_network_moves_the_figures(package: Package) -> None:
    """In one with millions its effect drowns in rounding: the package's hash guards single weights."""
    verdict = verdict_of(package, one_weight)
    assert verdict.results[0].stage == "image features"
    assert verdict.results[0].spread > 0.02


def test_nothing_compared_is_no_pass() -> None:
    with pytest.raises(EngineError, match="nothing was compared"):
        demand(parity.Verdict(()), "this engine")


def test_an_answer_of_another_shape_is_no_pass() -> None:
    wanted = {"bev": np.ones((4, 2), np.float32), "class_logits": np.ones((4, 2), np.float32)}
    wanted["boxes"] = wanted["bev"]
    got = wanted | {"bev": np.ones((2, 4), np.float32)}
    most = dict.fromkeys(("BEV", "class logits", "boxes"), MOST)
    verdict = parity.Reference((wanted,), most).verdict([got])
    assert [r.passed for r in verdict.results] == [False, True, True]


def test_limits_are_twice_what_rounding_does_within_bounds() -> None:
    assert limits(Figures(0.0, 0.0)) == LEAST
    assert limits(Figures(0.15, 0.25)) == Figures(0.30, 0.50)
    assert limits(Figures(0.15, 0.0)) == Figures(0.30, LEAST.shift)
    assert limits(Figures(9.0, 9.0)) == MOST


@pytest.mark.parametrize("seed", [0, 1])
def test_however_much_rounding_does_zeros_and_anything_are_refused(seed: int) -> None:
    random = np.random.default_rng(seed)
    wanted = {name: random.normal(size=(400, 8)).astype(np.float32) for name in OUTPUTS}
    zeros = {name: np.zeros_like(array) for name, array in wanted.items()}
    anything = {name: random.permutation(array) for name, array in wanted.items()}
    wild = limits(Figures(9.0, 9.0))
    reference = parity.Reference((wanted,), dict.fromkeys(("BEV", "class logits", "boxes"), wild))
    for answer in (zeros, anything):
        assert not any(result.passed for result in reference.verdict([answer]).results)


def test_what_is_wrong_in_one_area_shows_where_flips_everywhere_do_not() -> None:
    """Two differences of one spread: one falls to both sides alike, the other one is where the memory was shifted."""
    random = np.random.default_rng(0)
    wanted = {name: random.normal(size=(1600, 8)).astype(np.float32) for name in OUTPUTS}
    flips, area = np.zeros((2, 1600, 8), np.float32)
    flips[::16] = random.choice([-1.0, 1.0], size=(100, 8))
    area[:100] = 1.0
    got = [{name: array + change for name, array in wanted.items()} for change in (flips, area)]
    scattered, gathered = (compare(wanted, answer)["BEV"] for answer in got)
    assert scattered.spread == pytest.approx(gathered.spread, rel=0.01)
    assert gathered.shift > 2 * scattered.shift


def test_the_verdict_is_kept_and_found_again(package: Package, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_package(package.path, backend="onnxruntime", threads=1).description
    monkeypatch.setattr(parity, "judge", lambda *_: pytest.fail("judged again"))
    assert load_package(package.path, backend="onnxruntime", threads=1).description == first


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: "{",
        lambda whole: "{}",
        lambda whole: json.dumps(whole | {"results": []}),
        lambda whole: json.dumps(whole | {"results": [{"stage": "BEV"}]}),
        lambda whole: json.dumps(whole | {"results": [whole["results"][0] | {"spread": None}]}),
        lambda whole: json.dumps({"results": whole["results"]}),
    ],
)
def test_a_damaged_verdict_is_worth_nothing(
    package: Package, own_cache: Path, damage: Callable[[Any], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    load_package(package.path, backend="onnxruntime", threads=1)
    (kept,) = own_cache.glob("*/parity.json")
    kept.write_text(damage(json.loads(kept.read_bytes())))
    judged = []
    real = parity.judge
    monkeypatch.setattr(parity, "judge", lambda *a: judged.append(1) or real(*a))
    load_package(package.path, backend="onnxruntime", threads=1)
    assert judged
    assert json.loads(kept.read_bytes())["results"]


def test_a_refusal_is_not_kept_as_a_pass(
    package: Package, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load_from_string(package.model)
    lost_bias(model)
    wrong = with_stage_outputs(model.SerializeToString())
    monkeypatch.setattr(stage_outputs, "with_stage_outputs", lambda _: wrong)
    for _ in range(2):
        with pytest.raises(EngineError, match="does not compute what the package says"):
            load_package(package.path, backend="onnxruntime", threads=1)
    assert not list(own_cache.glob("*/parity.json"))


def test_the_frames_are_the_same_every_time_and_look_like_pictures() -> None:
    one, two = gate_frames(small_variant()), gate_frames(small_variant())
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.images, b.images)
    assert one[0].first
    assert not one[1].first
    assert np.std(one[0].images) > 0.1


def test_feature_maps_become_outputs_behind_the_last_convolutions_quantiser() -> None:
    model = onnx.load_from_string(with_stage_outputs(small_master()))
    assert [o.name for o in model.graph.output][3:] == ["image_features_0"]
    identity = next(n for n in model.graph.node if n.output[0] == "image_features_0")
    assert identity.input[0] == "half.d"


def test_a_map_that_becomes_tokens_is_an_output_even_if_a_coarser_one_is_made_from_it() -> None:
    model = onnx.load_from_string(small_master())
    model.graph.node.append(onnx.helper.make_node("Flatten", ["stem.d"], ["tokens"], name="tokens"))
    model = onnx.load_from_string(with_stage_outputs(model.SerializeToString()))
    made = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity"}
    assert made == {"image_features_0": "stem.d", "image_features_1": "half.d"}
