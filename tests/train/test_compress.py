# SPDX-License-Identifier: Apache-2.0
"""`qdbev compress` for real, on pictures of the demo's drive and a very small model: stages, resuming, refusals."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_train.checkpoint import load_model, read_tensors, save_model
from qdbev_train.cli import main
from qdbev_train.model import build_model
from qdbev_train.quantization import PARTS
from qdbev_train.quantization.layers import QuantisedLayer
from qdbev_train.training import compress as compress_module
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.compress import compress
from qdbev_train.training.compression import CompressConfig, read_compression
from qdbev_train.training.config import EvaluationConfig, Span, TrainConfig
from qdbev_train.training.loop import TrainingData
from qdbev_train.training.objective import Objective
from qdbev_train.training.plot_command import read_scalar
from qdbev_train.training.stages import StageLengths
from qdbev_train.training.state import STEP_FACTOR, TrainingState
from tests.quantisation_samples import small_model, small_variant

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "config" / "compress").glob("*.yaml"))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("teacher") / "model.safetensors"
    save_model(path, small_model(), small_variant(), {"steps": 0}, None)
    return path


def settings(teacher: Path, out: Path, method: str, **changes: object) -> CompressConfig:
    """The vgd settings of nano, for a moment's training."""
    config = read_compression(ROOT / "config" / "compress" / "nano_town_vgd.yaml")
    assert config.training is not None
    training = replace(
        config.training, length=Span(8, "steps"), batch=1, save_every=100, mirror=0.0, light=0.0, turn=False,
        query_groups=0, denoising_groups=1, dense_heads=False, out=str(out), warmup_steps=1,
    )  # fmt: skip
    data = replace(config.data, root=str(ROOT / "demo" / "town"), version="v1.0-mini", split="mini_val")
    config = replace(
        config,
        method=method,
        teacher=str(teacher),
        data=data,
        out=str(out),
        training=None if method == "ptq" else replace(training, data=data),
        calibration=replace(config.calibration, steps=2, batch=1),
        stages_from="",
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def curve(out: Path, stage: str, name: str) -> tuple[list[int], list[float]]:
    return read_scalar(out / stage, name)


def test_every_method_leaves_a_model_that_runs_and_knows_where_it_comes_from(
    teacher: Path, tmp_path: Path
) -> None:
    for method, on_grid in (("ptq", PARTS), ("qat", PARTS), ("float_control", None)):
        config = settings(teacher, tmp_path / method, method)
        if config.training is not None:
            config = replace(config, training=replace(config.training, length=Span(2, "steps")))
        path = compress(config)
        model, variant, metadata = load_model(path)
        assert variant == small_variant()
        assert metadata["provenance"]["compression"]["method"] == method
        assert metadata["provenance"]["teacher"] == {"steps": 0}
        assert metadata.get("quantisation", {}).get("parts") == (None if on_grid is None else list(on_grid))
        assert any(isinstance(m, QuantisedLayer) for m in model.modules()) == (on_grid is not None)
        assert all(torch.isfinite(t).all() for t in model.state_dict().values())


@pytest.fixture(scope="module")
def whole(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `out` of a view-guided compression that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole")
    compress(settings(teacher, out, "vgd"))
    return out


DISTILLED_CURVES = ["loss/distillation", "distillation/image", "distillation/bev", "distillation/weight"]
STAGES = ("1_backbone", "2_neck", "3_encoder", "4_decoder", "5_final")


def test_the_parts_on_the_grid_are_those_of_the_stage_and_only_the_last_is_distilled(whole: Path) -> None:
    for count, stage in enumerate(STAGES, start=1):
        _, metadata = read_tensors(whole / stage / "model.safetensors")
        assert metadata["quantisation"]["parts"] == list(PARTS[:count])
        for name in DISTILLED_CURVES:
            if stage == "5_final":
                assert len(curve(whole, stage, name)[1]) == 2
            else:
                with pytest.raises(DataError, match="no scalar"):
                    curve(whole, stage, name)
    steps = [read_tensors(whole / s / "model.safetensors")[1]["provenance"]["steps"] for s in STAGES]
    assert steps == [2, 1, 2, 1, 2]
    _, metadata = read_tensors(whole / "model.safetensors")
    assert [s["steps"] for s in metadata["provenance"]["stages"]] == steps
    assert metadata["provenance"]["samples"] == 8


def test_each_stage_warms_up_anew_or_all_share_one_curve(whole: Path, teacher: Path, tmp_path: Path) -> None:
    restarted = [curve(whole, stage, "lr")[1][0] for stage in STAGES]
    assert restarted == pytest.approx([restarted[0]] * 5)
    two = StageLengths(backbone=0, neck=0, encoder=0, decoder=1, final=1)
    compress(settings(teacher, tmp_path, "progressive", restart=False, stages=two))
    rates = [rate for stage in ("1_decoder", "2_final") for rate in curve(tmp_path, stage, "lr")[1]]
    assert len(rates) == 8
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_a_stage_that_is_shorter_than_the_warm_up_still_anneals(teacher: Path, tmp_path: Path) -> None:
    config = settings(teacher, tmp_path, "progressive", stages=StageLengths(0, 0, 0, 1, 1))
    assert config.training is not None
    training = replace(config.training, length=Span(20, "steps"), warmup_steps=15)
    compress(replace(config, training=training))
    for stage in ("1_decoder", "2_final"):
        rates = curve(tmp_path, stage, "lr")[1]
        assert max(rates) > 0.9 * training.learning_rate
        assert rates[-1] < 0.1 * training.learning_rate


class Interrupted:
    """Training data that press Ctrl-C at a step, counted over all stages."""

    def __init__(self, data: TrainingData, at: int) -> None:
        self.samples, self._data, self._at = data.samples, data, at

    def open(self, step: int, rank: int, processes: int) -> Iterator[object]:
        for frames in self._data.open(step, rank, processes):
            if step == self._at:
                signal.raise_signal(signal.SIGINT)
            yield frames
            step += 1


def test_a_stopped_compression_goes_on_as_if_it_had_never_stopped(
    whole: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped inside the encoder's stage, and again inside the distillation; same weights, same curves, to the bit."""
    config, original = settings(teacher, tmp_path, "vgd"), compress_module.training_data
    for stop_at in (3, 6):
        with monkeypatch.context() as patched:
            patched.setattr(
                compress_module, "training_data", lambda *a, at=stop_at: Interrupted(original(*a), at)
            )
            with pytest.raises(KeyboardInterrupt, match="stopped at step 1 of 2"):
                compress(config)
    assert not (tmp_path / "model.safetensors").exists()
    wanted, _ = read_tensors(whole / "model.safetensors")
    got, _ = read_tensors(compress(config))
    assert all(torch.equal(got[key], value) for key, value in wanted.items())
    for stage in STAGES:
        assert curve(tmp_path, stage, "loss/total") == curve(whole, stage, "loss/total")
    assert curve(tmp_path, "5_final", "distillation/bev") == curve(whole, "5_final", "distillation/bev")


def kin(path: Path, seed: int) -> str:
    """The file of a float model of the same variant."""
    save_model(path, small_model(seed), small_variant(), {"steps": seed}, None)
    return str(path)


def ensemble(teacher: Path, out: Path, *further: str) -> CompressConfig:
    """Everything on the grid at once and distilled all along, for four steps, by several teachers."""
    config = settings(teacher, out, "vgd", stages=StageLengths(0, 0, 0, 0, 1))
    assert config.training is not None
    assert config.distillation is not None
    return replace(
        config,
        training=replace(config.training, length=Span(4, "steps")),
        distillation=replace(config.distillation, further_teachers=further),
    )


def test_a_stopped_distillation_by_several_teachers_goes_on_to_the_same_bits(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = kin(tmp_path / "other.safetensors", 1)
    wanted, _ = read_tensors(compress(ensemble(teacher, tmp_path / "whole", other)))
    original = compress_module.training_data
    with monkeypatch.context() as patched:
        patched.setattr(compress_module, "training_data", lambda *a: Interrupted(original(*a), 1))
        with pytest.raises(KeyboardInterrupt, match="stopped at step 2 of 4"):
            compress(ensemble(teacher, tmp_path / "stopped", other))
    got, _ = read_tensors(compress(ensemble(teacher, tmp_path / "stopped", other)))
    assert all(torch.equal(got[key], value) for key, value in wanted.items())
    alone, _ = read_tensors(compress(ensemble(teacher, tmp_path / "alone")))
    assert any(not torch.equal(alone[key], value) for key, value in wanted.items())


def test_further_teachers_are_float_models_of_the_same_variant(teacher: Path, tmp_path: Path) -> None:
    own, out = small_variant(), tmp_path / "out"
    more = replace(own, transformer=replace(own.transformer, queries=own.transformer.queries + 1))
    save_model(tmp_path / "more.safetensors", build_model(more), more, {}, None)
    student = compress(settings(teacher, tmp_path / "ptq", "ptq"))
    for file, complaint in (
        (tmp_path / "more.safetensors", "more.safetensors: holds another variant than"),
        (student, "model.safetensors: quantised"),
        (tmp_path / "none.safetensors", "no checkpoint at .*none.safetensors"),
    ):
        with pytest.raises((ConfigError, DataError), match=complaint) as refused:
            compress(ensemble(teacher, out, str(file)))
        assert "\n" not in str(refused.value)
    assert not out.exists()


def test_a_compression_is_held_to_its_further_teachers_too(teacher: Path, tmp_path: Path) -> None:
    other = kin(tmp_path / "other.safetensors", 1)
    config = ensemble(teacher, tmp_path / "out", other)
    compress(config)
    kin(tmp_path / "other.safetensors", 2)
    with pytest.raises(ConfigError, match=r"other settings \(further_teachers_sha256\)"):
        compress(config)
    with pytest.raises(ConfigError, match=r"other settings \(distillation\)"):
        compress(ensemble(teacher, tmp_path / "out"))


def test_a_score_that_a_kill_cut_off_is_made_up_for(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All steps of the stage are there, and still it isn't over."""
    evaluation = EvaluationConfig("val", Span(1, "epochs"))
    config = settings(teacher, tmp_path, "qat", evaluation=evaluation)
    assert config.training is not None
    config = replace(config, training=replace(config.training, evaluation=evaluation))
    scored: list[Path] = []

    def killed(_: TrainConfig, __: Path) -> dict[str, float]:
        raise KeyboardInterrupt

    def score(_: TrainConfig, model_file: Path) -> dict[str, float]:
        scored.append(model_file)
        return {"NDS": 0.5}

    monkeypatch.setattr(compress_module, "official_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        compress(config)
    monkeypatch.setattr(compress_module, "official_scores", score)
    for _ in range(2):
        compress(config)
        assert scored == [tmp_path / "1_qat" / "model.safetensors"]


def test_stages_of_another_compression_are_taken_over(whole: Path, teacher: Path, tmp_path: Path) -> None:
    """The four before the distillation, which are the same; the last one is this compression's own."""
    config = settings(teacher, tmp_path, "cwd_bev", stages_from=str(whole))
    path = compress(config)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["5_final"]
    ours, theirs = read_tensors(path)[0], read_tensors(whole / "model.safetensors")[0]
    assert any(not torch.equal(ours[k], theirs[k]) for k in ours)
    other = replace(config, calibration=replace(config.calibration, steps=3), out=str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="calibration"):
        compress(other)


def test_going_on_with_other_settings_is_refused_by_name(whole: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"other settings \(seed\)"):
        compress(settings(teacher, whole, "vgd", seed=8))


def test_students_of_another_teacher_under_the_same_name_are_not_taken_over(tmp_path: Path) -> None:
    file, config = (
        tmp_path / "model.safetensors",
        settings(tmp_path / "model.safetensors", tmp_path / "out", "ptq"),
    )
    save_model(file, small_model(), small_variant(), {"steps": 0}, None)
    compress(config)
    trained_on = small_model()
    with torch.no_grad():
        next(trained_on.parameters()).add_(0.01)
    save_model(file, trained_on, small_variant(), {"steps": 1}, None)
    with pytest.raises(ConfigError, match="teacher_sha256"):
        compress(config)
    other = settings(file, tmp_path / "other", "vgd", stages_from=str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="teacher_sha256"):
        compress(other)


def test_a_wrong_data_root_leaves_nothing_that_a_later_call_is_held_to(teacher: Path, tmp_path: Path) -> None:
    config = settings(teacher, tmp_path / "out", "qat")
    data = replace(config.data, root=str(tmp_path / "nowhere"))
    assert config.training is not None
    for wrong in (
        replace(config, data=data, training=replace(config.training, data=data)),
        replace(config, data=data, training=None, method="ptq"),
    ):
        with pytest.raises(DataError):
            compress(wrong)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["ptq", "qat"])
def test_an_out_that_cannot_be_written_is_named(teacher: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/out.*: cannot be written: "):
        compress(settings(teacher, tmp_path / "file" / "out", method))


def test_learned_steps_move_and_helps_are_handed_on(whole: Path) -> None:
    first, _ = read_tensors(whole / "1_backbone" / "model.safetensors")
    last, _ = read_tensors(whole / "model.safetensors")
    scales = [k for k in first if k.startswith("img_backbone.") and k.endswith("scale")]
    assert any(not torch.equal(first[k], last[k]) for k in scales)
    assert all((last[k] > 0).all() for k in last if k.endswith("scale"))
    states = [read_tensors(whole / s / "last.safetensors")[0] for s in STAGES[:2]]
    key = "helps.denoising_content.0.weight"
    moved: Tensor = states[1][key] - states[0][key]
    assert 0 < float(moved.abs().max()) < 0.01


def test_learned_steps_train_slowly_and_without_weight_decay(whole: Path, teacher: Path) -> None:
    config = settings(teacher, whole, "vgd").training
    assert config is not None
    model, variant, _ = load_model(whole / "model.safetensors")
    state = TrainingState(Objective(model, TrainingHelps(variant, 0, 0, False), config, None), config)
    group = next(g for g in state.optimizer.param_groups if g["weight_decay"] == 0.0)
    learned = {id(p) for n, p in model.named_parameters() if n.endswith("scale")}
    assert {id(p) for p in group["params"]} == learned
    state.set_learning_rate(1.0)
    assert group["lr"] == STEP_FACTOR


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_the_configurations_that_come_along_can_be_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDBEV_NUSCENES", "/data/nuscenes")
    config = read_compression(path)
    assert json.loads(json.dumps(config.to_dict()))["method"] == config.method
    if config.training is not None:
        assert config.training.out == config.out


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"method": "magic"}, "method is 'magic'"),
        ({"colour": 3}, "unknown keys ['colour']"),
        ({"training": None}, "needs training"),
        ({"stages": None}, "needs stages"),
        ({"distillation": None}, "needs distillation"),
        ({"freeze_ranges": 0.0}, "freeze_ranges"),
        ({"calibration": {"steps": 0, "batch": 1}}, "at least 1"),
        ({"quantisation": {"weight_bits": 4}}, "missing keys"),
        ({"stages": {"backbone": 1.0}}, "missing keys"),
        ({"training": {"out": "x"}}, "stand at the top"),
        ({"distillation": {"further_teachers": "a"}}, "further_teachers is 'a', expected a list"),
        ({"distillation": {"further_teachers": [3]}}, "further_teachers is 3, expected str"),
    ],
)
def test_bad_settings_are_one_line_with_file_and_key(
    change: dict[str, object], complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((ROOT / "config" / "compress" / "nano_town_vgd.yaml").read_text())
    if "distillation" in change and change["distillation"] is not None:
        change = {"distillation": data["distillation"] | change["distillation"]}
    refused(data | change, complaint, tmp_path / "config.yaml", capsys)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            "overrides: [standard]",
            "overrides: 'standard' is no mapping of pattern, weight, activation, reason",
        ),
        ("overrides: standards", "overrides 'standards'; use one of ['standard', 'strict'], or a list"),
        ("overrides: 3", "overrides is 3, expected a list"),
        ("overrides: [{pattern: a, weight: 8}]", "overrides: {'pattern': 'a', 'weight': 8} is no mapping of"),
        ("overrides: [{pattern: 3, weight: 8, activation: 8, reason: ''}]", "pattern is 3, expected str"),
        ("overrides: [{pattern: a, weight: 8.0, activation: 8, reason: ''}]", "weight is 8.0, expected int"),
        ("momentum: 0,95", "quantisation: momentum is '0,95', expected float"),
        ("percentile:", "quantisation: percentile is None, expected float"),
        ("weight_bits: 4.0", "quantisation: weight_bits is 4.0, expected int"),
        ("activation_bits: true", "quantisation: activation_bits is True, expected int"),
        ("bias_correction: 1", "quantisation: bias_correction is 1, expected bool"),
        ("scales: [learned]", "quantisation: scales is ['learned'], expected str"),
        ("parts:", "quantisation: parts is None, expected a list"),
        ("parts: neck", "quantisation: parts is 'neck', expected a list"),
        ("parts: []", "quantisation: parts is empty, method vgd needs some of"),
    ],
)
def test_bad_settings_of_the_grid_are_named(
    line: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = yaml.safe_load((ROOT / "config" / "compress" / "nano_town_vgd.yaml").read_text())
    data["quantisation"] |= yaml.safe_load(line)
    refused(data, complaint, tmp_path / "config.yaml", capsys)


def refused(data: dict[str, object], complaint: str, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with file and key, and status 2."""
    places = {"teacher": str(path.with_name("none.safetensors")), "out": str(path.with_name("out"))}
    path.write_text(yaml.safe_dump(data | places))
    assert main(["compress", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qdbev: error: {path}")
    assert complaint in error
    assert error.count("\n") == 1


def test_overrides_by_name_or_one_by_one(tmp_path: Path) -> None:
    data = yaml.safe_load((ROOT / "config" / "compress" / "nano_town_vgd.yaml").read_text())
    path = tmp_path / "config.yaml"
    own = [{"pattern": "*.sampling_offsets", "weight": 8, "activation": 8, "reason": "positions"}]
    for overrides, name, bits in (
        ("standard", "img_backbone.features.0.0", (7, 8)),
        ("strict", "img_backbone.features.0.0", (4, 6)),
        (own, "pts_bbox_head.transformer.encoder.layers.0.attentions.0.sampling_offsets", (8, 8)),
    ):
        changed = data["quantisation"] | {"overrides": overrides}
        path.write_text(yaml.safe_dump(data | {"quantisation": changed}))
        assert read_compression(path).quantisation.bits(name) == bits
    path.write_text(yaml.safe_dump(data | {"quantisation": data["quantisation"] | {"overrides": "loose"}}))
    with pytest.raises(ConfigError, match="overrides 'loose'"):
        read_compression(path)
