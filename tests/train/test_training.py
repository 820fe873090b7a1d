# SPDX-License-Identifier: Apache-2.0
"""The training loop on a made-up micro model: it learns, and refuses what doesn't fit."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from torch import Tensor

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.variant import load_variant
from qdbev_train.checkpoint import load_model, read_tensors, write_tensors
from qdbev_train.cli import main
from qdbev_train.data.dataset import Batch
from qdbev_train.model import BEVFormer, CheckpointError, Output, build_model
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.command import training_data
from qdbev_train.training.config import DataConfig, EvaluationConfig, Span, TrainConfig, read_config
from qdbev_train.training.initial import starting_model
from qdbev_train.training.loop import TrainingData, train, train_step
from qdbev_train.training.losses import Targets, detection_loss
from qdbev_train.training.objective import Objective
from qdbev_train.training.plot_command import read_scalar
from qdbev_train.training.schedule import learning_rate_at, make_plan
from tests.training_samples import CONFIG, data_of, micro_config, micro_variant, random_batch, run


def test_the_loss_of_a_repeated_batch_falls(tmp_path: Path) -> None:
    variant = micro_variant()
    weights = {"angle_weight": 1.0, "velocity_weight": 0.2}
    config = micro_config(tmp_path, length=Span(25, "steps"), learning_rate=2e-3, save_every=25, **weights)
    batch = random_batch(0, variant)
    torch.manual_seed(0)
    model = build_model(variant)

    def loss() -> float:
        weights = model.pts_bbox_head.code_weights
        with torch.no_grad():
            out = model(batch.images, batch.lidar2img, batch.can_bus)
        targets = [Targets(k, c) for k, c in zip(batch.labels, batch.codes, strict=True)]
        losses = detection_loss(out.class_logits, out.boxes, targets, torch.tensor(6.0), weights)
        return float(sum(losses.values()))

    before = loss()
    train(model, variant, config, data_of(lambda _: [batch] * 25))
    assert loss() < 0.8 * before


def test_a_finished_model_loads_by_its_own_description(tmp_path: Path) -> None:
    path = run(tmp_path)
    model, variant, metadata = load_model(path)
    assert variant == micro_variant()
    assert metadata["provenance"]["samples"] == 12
    assert not model.training


def test_a_model_file_that_lacks_a_key_is_refused_by_file_and_key(tmp_path: Path) -> None:
    path = run(tmp_path)
    tensors, metadata = read_tensors(path)
    gone = tensors.pop("pts_bbox_head.query_embedding.weight")
    write_tensors(path, tensors | {"stray": gone}, metadata)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors.*missing: .*query_embedding.*unexpected: stray"
    ):
        load_model(path)


def test_a_diverged_loss_ends_the_run(tmp_path: Path) -> None:
    variant, config = micro_variant(), micro_config(tmp_path)
    batch = replace(
        random_batch(0, variant), images=torch.full_like(random_batch(0, variant).images, float("nan"))
    )
    with pytest.raises(ConfigError, match="learning_rate"):
        train(build_model(variant), variant, config, data_of(lambda _: [batch]))


def test_learning_rate_warms_up_from_a_third_and_ends_at_a_thousandth(tmp_path: Path) -> None:
    config = micro_config(tmp_path, length=Span(100, "steps"), warmup_steps=10, learning_rate=3.0)
    plan = make_plan(config, samples=12, processes=1)
    assert learning_rate_at(0, config, plan) == pytest.approx(1.0)
    assert learning_rate_at(10, config, plan) == pytest.approx(3.0)
    assert learning_rate_at(100, config, plan) == pytest.approx(0.003)


def test_in_epochs_the_learning_rate_falls_from_epoch_to_epoch(tmp_path: Path) -> None:
    """BEVFormer's: 28 130 frames on 8 processes, 24 epochs, 500 steps of warm-up on top of the first epoch's rate."""
    config = micro_config(tmp_path, length=Span(24, "epochs"), batch=1, warmup_steps=500, learning_rate=2e-4)
    plan = make_plan(config, samples=28130, processes=8)
    assert (plan.steps_per_epoch, plan.steps) == (3517, 24 * 3517)
    assert learning_rate_at(0, config, plan) == pytest.approx(2e-4 / 3)
    assert learning_rate_at(250, config, plan) == pytest.approx(2e-4 * 2 / 3)
    assert learning_rate_at(500, config, plan) == learning_rate_at(3516, config, plan) == 2e-4
    for epoch in (1, 12, 23):
        wanted = 2e-7 + (2e-4 - 2e-7) * (1 + math.cos(math.pi * epoch / 24)) / 2
        assert learning_rate_at(epoch * 3517, config, plan) == pytest.approx(wanted)
        assert learning_rate_at(epoch * 3517 + 3516, config, plan) == pytest.approx(wanted)


def test_query_groups_cannot_see_each_other() -> None:
    variant = micro_variant()
    helps = TrainingHelps(variant, query_groups=2, denoising_groups=1, dense_heads=True)
    targets = [Targets(torch.tensor([1, 2]), torch.zeros(2, 10))]
    extra, layout = helps.extra_queries(targets)
    forbidden = ~extra.may_attend
    q = variant.transformer.queries
    assert forbidden.shape == (3 * q + 2, 3 * q + 2)
    assert not forbidden[:q, :q].any()
    assert forbidden[:q, q:].all()
    assert forbidden[q : 2 * q, 2 * q :].all()
    assert layout.padded == 2


def test_denoising_queries_start_near_the_true_boxes() -> None:
    variant = micro_variant()
    helps = TrainingHelps(variant, query_groups=0, denoising_groups=4, dense_heads=False)
    code = torch.tensor([[10.0, -20.0, 0.7, 1.5, -1.0, 0.5, 0.0, 1.0, 3.0, 0.0]])
    extra, _ = helps.extra_queries([Targets(torch.tensor([0]), code)])
    low, high = torch.tensor(variant.bev.pc_range).split(3)
    centers = extra.reference[0] * (high - low) + low
    assert float((centers[:, :2] - code[0, :2]).abs().max().detach()) <= 6.0 * 0.5 + 1e-4


def test_a_batch_without_boxes_has_the_same_losses_and_reaches_the_same_parameters(tmp_path: Path) -> None:
    """Processes add up their losses and gradients by place: one whose frames are empty must have all of them."""
    variant, batch = micro_variant(), random_batch(0, micro_variant())
    empty = replace(batch, codes=[code[:0] for code in batch.codes], labels=[k[:0] for k in batch.labels])
    for groups in (0, 1):
        config = micro_config(tmp_path, query_groups=groups, denoising_groups=2)
        found = []
        for seen in (batch, empty):
            helps = TrainingHelps(variant, groups, 2, config.dense_heads)
            objective = Objective(build_model(variant), helps, config, None)
            losses, _, _ = train_step(Fabric(accelerator="cpu"), objective, seen, None)
            torch.stack(list(losses.values())).sum().backward()
            assert all(torch.isfinite(loss) for loss in losses.values())
            found.append((list(losses), {n for n, p in objective.named_parameters() if p.grad is not None}))
        assert found[0] == found[1]
        assert float(losses["denoising"].detach()) < 1e-6


def test_an_out_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(DataError, match=rf"{out}: cannot be written: "):
            run(out)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("batch: many", "batch is 'many', expected int"),
        ("stepz: 5", "unknown keys \\['stepz'\\]"),
        ("turn: 1", "turn is 1, expected bool"),
        ("length: 5", 'length is 5, expected "24 epochs"'),
        ("length: 0 steps", "length is '0 steps'"),
        ("evaluation: {split: val}", "evaluation: unknown keys \\[\\], missing keys \\['every'\\]"),
        ("history: deque", "config.yaml: history is 'deque'; use 'stream' or 'queue'"),
        ("precision: fp16", "use 'float32' or 'bf16'"),
        ("grid_mask: 0.7", "grid_mask: a stream's frames are all remembered"),
        ("init: $NO_SUCH_VARIABLE", "init is .*NO_SUCH_VARIABLE isn't set"),
    ],
)
def test_a_wrong_key_or_type_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    key = line.split(":")[0]
    lines = [x for x in CONFIG.read_text().splitlines() if not x.startswith(key + ":")]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(ConfigError, match=complaint):
        read_config(path, TrainConfig)


def test_a_queue_of_a_data_set_trains_from_its_configuration(tmp_path: Path, small_root: Path) -> None:
    """From tables and pictures to a model file, with all of BEVFormer's recipe."""
    recipe = {"history": "queue", "photometric": True, "grid_mask": 1.0, "init": "random", "turn": False}
    recipe |= {"data": DataConfig(str(small_root), "v1.0-mini", "mini_val"), "length": Span(1, "epochs")}
    path = tmp_path / "variant.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(micro_variant().to_dict()))))
    config = micro_config(tmp_path / "out", variant=str(path), batch=4, **recipe)
    data = training_data(config)
    model, variant, _ = starting_model(config, data)
    assert data.samples == 8
    assert load_model(train(model, variant, config, data))[2]["provenance"]["samples"] == 8


@pytest.mark.parametrize("name", [p.stem for p in sorted(CONFIG.parent.glob("*.yaml"))])
def test_every_shipped_configuration_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDBEV_NUSCENES", "data")
    monkeypatch.setenv("QDBEV_BACKBONE", "backbone.pth")
    config = read_config(CONFIG.with_stem(name), TrainConfig)
    load_variant(config.variant)


@pytest.mark.parametrize("variant", ["tiny", "small", "base"])
def test_the_shipped_recipe_is_bevformers(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDBEV_NUSCENES", "data")
    monkeypatch.setenv("QDBEV_BACKBONE", "backbone.pth")
    config = read_config(CONFIG.with_stem(f"{variant}_nuscenes"), TrainConfig)
    recipe = (config.learning_rate, config.weight_decay, config.backbone_factor, config.clip_norm)
    assert recipe == (2e-4, 0.01, 0.1, 35.0)
    assert (config.length, config.warmup_steps, config.batch) == (Span(24, "epochs"), 500, 1)
    assert (config.history, config.photometric, config.grid_mask) == ("queue", True, 0.7)
    assert (config.query_groups, config.denoising_groups, config.dense_heads) == (0, 0, False)
    assert (config.angle_weight, config.velocity_weight) == (1.0, 0.2)
    assert load_variant(variant).transformer.dropout == 0.1


def one_step_loss(out: Path, model: BEVFormer, batch: Batch, **changes: object) -> float:
    config = micro_config(out, length=Span(1, "steps"), **changes)
    train(model, model.variant, config, data_of(lambda _: [batch]))
    return read_scalar(out, "loss/total")[1][0]


def test_the_first_loss_in_bf16_is_that_in_float32_to_a_percent(tmp_path: Path) -> None:
    variant = micro_variant()
    plain = {"query_groups": 0, "denoising_groups": 0, "dense_heads": False}
    losses = {}
    for precision in ("float32", "bf16"):
        torch.manual_seed(0)
        model = build_model(replace(variant, transformer=replace(variant.transformer, dropout=0.0)))
        batch = random_batch(0, variant)
        losses[precision] = one_step_loss(tmp_path / precision, model, batch, precision=precision, **plain)
    assert losses["bf16"] != losses["float32"]
    assert losses["bf16"] == pytest.approx(losses["float32"], rel=0.01)


def test_in_bf16_positions_and_outputs_are_float32() -> None:
    """A reference point in bf16 would be off by up to 0.2 m."""
    variant = micro_variant()
    torch.manual_seed(0)
    model, batch = build_model(variant).eval(), random_batch(0, variant)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(batch.images, batch.lidar2img, batch.can_bus)
    assert {out.bev.dtype, out.boxes.dtype, out.class_logits.dtype} == {torch.float32}
    # The first layer's centres: logits of the references plus an offset, none of them on bf16's coarse grid.
    centres = out.boxes[0, 0, :, :2] / 102.4 + 0.5
    assert (centres.bfloat16().float() != centres).float().mean() > 0.9


class Pull:
    """A further loss that pulls the map towards zero, weakening with every call."""

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.calls = torch.tensor(0.0)

    def remember(self, history: Sequence[Batch], device: torch.device) -> None:
        self.seen.append(len(history))

    def __call__(
        self, out: Output, images: Tensor, *_: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self.seen.append(images.shape[0])
        self.calls = self.calls + 1
        return {"pull": out.bev.square().mean() / self.calls}, {"calls": self.calls}

    def state(self) -> dict[str, Tensor]:
        return {"calls": self.calls}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.calls = state["calls"]


def test_a_further_loss_is_added_logged_and_resumed(tmp_path: Path) -> None:
    variant, batch = micro_variant(), random_batch(0, micro_variant())
    torch.manual_seed(0)
    model, seen = build_model(variant), []
    for steps in (2, 3):  # the second run goes on with the third step
        pull = Pull()
        data = TrainingData(1, lambda *_: iter([(batch, batch, batch)] * 2))
        train(model, variant, micro_config(tmp_path, length=Span(steps, "steps")), data, extra_loss=pull)
        seen.append(pull.seen)
    assert seen == [[2, 2, 2, 2], [2, 2]]  # two frames remembered, then two rows, each step
    assert read_scalar(tmp_path, "calls")[1] == [1, 2, 3]
    named = [
        read_scalar(tmp_path, f"loss/{name}")[1] for name in ("class", "box", "denoising", "pull", "group")
    ]
    heads = ("bev_dense", "image_dense", "bev_heading", "image_heading", "bev_speed")
    dense = [read_scalar(tmp_path, f"loss/{name}")[1] for name in heads]
    total = read_scalar(tmp_path, "loss/total")[1]
    assert total == pytest.approx([sum(values) for values in zip(*named, *dense)])


def test_scores_are_logged_where_evaluation_is_asked_for(tmp_path: Path) -> None:
    """Every epoch (6 steps of 2 of 12 frames) and at the end; training goes on as if there had been none."""
    variant = micro_variant()
    evaluation = EvaluationConfig("val", Span(1, "epochs"))

    def evaluate(path: Path) -> dict[str, float]:
        torch.rand(7)
        return {"NDS": load_model(path)[2]["provenance"]["steps"] / 10}

    length = Span(8, "steps")
    weights = []
    for name, asked in (("with", evaluation), ("without", None)):
        torch.manual_seed(0)
        config = micro_config(tmp_path / name, length=length, evaluation=asked, warmup_steps=2)
        data = data_of(lambda step: (random_batch(i, variant) for i in range(step, 8)))
        path = train(build_model(variant), variant, config, data, evaluate=evaluate)
        weights.append(read_tensors(path)[0])
    assert read_scalar(tmp_path / "with", "score/NDS") == ([6, 8], [pytest.approx(0.6), pytest.approx(0.8)])
    assert all(torch.equal(v, weights[1][k]) for k, v in weights[0].items())


def test_a_score_that_a_kill_cut_off_is_made_up_for(tmp_path: Path) -> None:
    """In the middle and after the last step, once each; one that is no longer asked for is not."""
    variant, scored = micro_variant(), []

    def go_on(steps: int, killed: bool = False, asked: bool = True) -> None:
        def evaluate(path: Path) -> dict[str, float]:
            if killed:
                raise KeyboardInterrupt
            scored.append(load_model(path)[2]["provenance"]["steps"])
            return {"NDS": 0.5}

        evaluation = EvaluationConfig("val", Span(1, "steps")) if asked else None
        config = micro_config(tmp_path, length=Span(steps, "steps"), evaluation=evaluation)
        data = data_of(lambda step: (random_batch(i, variant) for i in range(step, steps)))
        with pytest.raises(KeyboardInterrupt) if killed else nullcontext():
            train(build_model(variant), variant, config, data, evaluate=evaluate if asked else None)

    go_on(2, killed=True)  # in the score of step 1
    go_on(2, killed=True)  # in the same
    go_on(2)
    assert scored == [1, 2]
    assert read_scalar(tmp_path, "score/NDS")[0] == [1, 2]
    go_on(2)
    assert scored == [1, 2]
    go_on(3, killed=True)
    go_on(3, asked=False)
    go_on(3)
    assert scored == [1, 2, 3]


def test_a_plot_of_no_run_is_refused_and_one_of_a_run_is_drawn(tmp_path: Path) -> None:
    run(tmp_path / "run")
    command = ["plot", str(tmp_path / "run"), "--out", str(tmp_path / "loss.png")]
    assert main(command) == 0
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert main([*command, "--scalar", "loss/nothing"]) == 2
    assert main(["plot", str(tmp_path), "--out", str(tmp_path / "none.png")]) == 2
