# SPDX-License-Identifier: Apache-2.0
"""The training loop on a made-up micro model: it learns, resumes exactly, and refuses what doesn't fit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_train.checkpoint import load_model, read_tensors, write_tensors
from qdbev_train.data.dataset import Batch
from qdbev_train.model import CheckpointError, build_model
from qdbev_train.training.auxiliary import TrainingHelps
from qdbev_train.training.command import data_opener
from qdbev_train.training.config import DataConfig, TrainConfig, read_config
from qdbev_train.training.loop import learning_rate_at, train
from qdbev_train.training.losses import Targets

CONFIG = Path(__file__).parents[2] / "config" / "train" / "nano_town.yaml"


def micro_variant() -> Variant:
    nano = load_variant("nano")
    return replace(
        nano,
        image=replace(nano.image, height=32, width=64),
        bev=replace(nano.bev, height=8, width=8),
        transformer=replace(nano.transformer, channels=24, heads=2, ffn_channels=24, queries=12),
    )


def micro_config(out: Path, **changes: object) -> TrainConfig:
    config = replace(
        read_config(CONFIG, TrainConfig), out=str(out), steps=6, batch=2, warmup_steps=2, save_every=3
    )
    return replace(config, **changes)  # type: ignore[arg-type]


def random_batch(step: int, variant: Variant) -> Batch:
    """The same batch for the same step: two samples with three boxes each, a plausible camera matrix."""
    generator = torch.Generator().manual_seed(step)
    height, width = variant.image.padded_height, variant.image.padded_width
    matrix = torch.tensor([[30.0, 32, 0, 0], [0.0, 16, -30, 0], [0.0, 1, 0, 0], [0.0, 0, 0, 1]])
    codes = [torch.randn(3, 10, generator=generator) for _ in range(2)]
    for code in codes:
        code[:, :2] *= 10
    return Batch(
        images=torch.randn(2, 6, 3, height, width, generator=generator),
        lidar2img=matrix.expand(2, 6, 4, 4).contiguous(),
        can_bus=torch.zeros(2, 18),
        is_first=torch.tensor([True, True]),
        codes=codes,
        labels=[torch.randint(10, (3,), generator=generator) for _ in range(2)],
        tokens=["a", "b"],
    )


def run(out: Path, **changes: object) -> Path:
    variant, config = micro_variant(), micro_config(out, **changes)

    def stream(step: int) -> Iterable[tuple[Batch]]:
        while True:
            yield (random_batch(step, variant),)
            step += 1

    torch.manual_seed(0)
    return train(build_model(variant), variant, config, stream)


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole, _ = read_tensors(run(tmp_path / "whole", learning_rate=1e-3))
    # The schedule depends on the length of the run, so the stop comes from the stream, not from the settings.
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path / "parts", stop_at=4)
    resumed, _ = read_tensors(run(tmp_path / "parts", learning_rate=1e-3))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)


def interrupted(out: Path, stop_at: int) -> None:
    variant, config = micro_variant(), micro_config(out, learning_rate=1e-3)

    def stream(step: int) -> Iterable[tuple[Batch]]:
        while step < stop_at:
            yield (random_batch(step, variant),)
            step += 1
        raise KeyboardInterrupt

    torch.manual_seed(0)
    train(build_model(variant), variant, config, stream)


def test_the_loss_of_a_repeated_batch_falls(tmp_path: Path) -> None:
    variant = micro_variant()
    config = micro_config(tmp_path, steps=25, learning_rate=2e-3, save_every=25)
    batch = random_batch(0, variant)
    torch.manual_seed(0)
    model = build_model(variant)

    def loss() -> float:
        from qdbev_train.training.losses import detection_loss

        with torch.no_grad():
            out = model(batch.images, batch.lidar2img, batch.can_bus)
        targets = [Targets(k, c) for k, c in zip(batch.labels, batch.codes, strict=True)]
        return float(sum(detection_loss(out.class_logits, out.boxes, targets, torch.tensor(6.0)).values()))

    before = loss()
    train(model, variant, config, lambda _: iter([(batch,)] * 25))
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


def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match="learning_rate"):
        run(tmp_path, learning_rate=1.0)


def test_a_diverged_loss_ends_the_run(tmp_path: Path) -> None:
    variant, config = micro_variant(), micro_config(tmp_path)
    batch = replace(
        random_batch(0, variant), images=torch.full_like(random_batch(0, variant).images, float("nan"))
    )
    with pytest.raises(ConfigError, match="learning_rate"):
        train(build_model(variant), variant, config, lambda _: iter([(batch,)]))


def test_learning_rate_warms_up_from_a_third_and_ends_at_a_thousandth(tmp_path: Path) -> None:
    config = micro_config(tmp_path, steps=100, warmup_steps=10, learning_rate=3.0)
    assert learning_rate_at(0, config) == pytest.approx(1.0)
    assert learning_rate_at(10, config) == pytest.approx(3.0)
    assert learning_rate_at(100, config) == pytest.approx(0.003)


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


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("steps: many", "steps is 'many', expected int"),
        ("stepz: 5", "unknown keys \\['stepz'\\]"),
        ("turn: 1", "turn is 1, expected bool"),
    ],
)
def test_a_wrong_key_or_type_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    key = line.split(":")[0]
    lines = [x for x in CONFIG.read_text().splitlines() if not x.startswith(key + ":")]
    path = tmp_path / "config.yaml"
    path.write_text("\n".join([*lines, line]))
    with pytest.raises(ConfigError, match=complaint):
        read_config(path, TrainConfig)


def test_queues_of_a_data_set_train(tmp_path: Path) -> None:
    """From a configuration, over real tables and pictures, with BEVFormer's queues."""
    town = Path(__file__).parents[2] / "demo" / "town"
    data = DataConfig(str(town), "v1.0-mini", "mini_val")
    plain = {"history": "queue", "mirror": 0.0, "turn": False, "light": 0.0}
    config = micro_config(tmp_path, data=data, steps=2, batch=1, save_every=2, **plain)
    path = train(build_model("nano"), load_variant("nano"), config, data_opener(config))
    assert load_model(path)[2]["provenance"]["steps"] == 2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [({"history": "deque"}, "use 'stream' or 'queue'"), ({"history": "queue"}, "as they are")],
)
def test_a_history_that_cannot_be_is_refused(tmp_path: Path, changes: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        data_opener(micro_config(tmp_path, **changes))
