# SPDX-License-Identifier: Apache-2.0
"""A made-up micro model, random batches, and a training of them that someone may stop."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from qdbev_ros.core.variant import Variant, load_variant
from qdbev_train.data.dataset import Batch
from qdbev_train.model import build_model
from qdbev_train.training.config import Span, TrainConfig, read_config
from qdbev_train.training.loop import TrainingData, train

CONFIG = Path(__file__).parents[1] / "config" / "train" / "nano_town.yaml"


def micro_variant() -> Variant:
    nano = load_variant("nano")
    return replace(
        nano,
        image=replace(nano.image, height=32, width=64),
        bev=replace(nano.bev, height=8, width=8),
        backbone=replace(nano.backbone, out_stages=(2,), neck_levels=1),
        transformer=replace(
            nano.transformer,
            channels=24,
            heads=2,
            ffn_channels=24,
            queries=12,
            encoder_layers=1,
            decoder_layers=2,
        ),
    )


def micro_config(out: Path, **changes: object) -> TrainConfig:
    config = replace(
        read_config(CONFIG, TrainConfig),
        out=str(out),
        precision="float32",
        length=Span(6, "steps"),
        batch=2,
        warmup_steps=2,
        save_every=3,
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


def data_of(batches: Callable[[int], Iterable[Batch]]) -> TrainingData:
    return TrainingData(samples=12, open=lambda step, rank, processes: ((b,) for b in batches(step)))


def run(out: Path, stop_at: int | None = None, **changes: object) -> Path:
    """A run of random batches; at step `stop_at` someone presses Ctrl-C."""
    variant, config = micro_variant(), micro_config(out, **changes)

    def batches(step: int) -> Iterator[Batch]:
        while True:
            if step == stop_at:
                signal.raise_signal(signal.SIGINT)
            # Rows go on with what was before, so that what is remembered matters.
            yield replace(random_batch(step, variant), is_first=torch.tensor([step % 4 == 0, False]))
            step += 1

    torch.manual_seed(0)
    return train(build_model(variant), variant, config, data_of(batches))
