# SPDX-License-Identifier: Apache-2.0
"""`qdbev train`: the float teacher from a YAML configuration."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdbev_train.data.dataset import Batch
    from qdbev_train.training.config import TrainConfig

EXAMPLE = """example:
  qdbev synth data/town --split train --scenes 300 --seed 1
  qdbev train config/train/nano_town.yaml
A run that was stopped goes on where its `out` folder stands; watch it with `tensorboard --logdir out/train`."""


def add_parser(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "train",
        help="train a float model; resumable",
        description=__doc__,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="training configuration, e.g. config/train/nano_town.yaml")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from qdbev_ros.core.errors import ConfigError
    from qdbev_ros.core.variant import load_variant
    from qdbev_train.checkpoint import load_model
    from qdbev_train.model import build_model, load_imagenet_backbone, spread_references
    from qdbev_train.training.config import TrainConfig, read_config
    from qdbev_train.training.loop import train

    config = read_config(args.config, TrainConfig)
    variant = load_variant(config.variant)
    quantisation = None
    if config.init == "imagenet":
        model = build_model(variant)
        load_imagenet_backbone(model)
        spread_references(model)
    else:
        model, loaded, metadata = load_model(config.init)
        quantisation = metadata.get("quantisation")
        if loaded != variant:
            raise ConfigError(f"{config.init}: holds another variant than {config.variant}")
    if quantisation is None:
        model.freeze_backbone(1)
    path = train(model, variant, config, data_opener(config), quantisation)
    print(f"wrote {path}")


def data_opener(config: TrainConfig) -> Callable[[int], Iterable[Sequence[Batch]]]:
    """The training frames of a configuration: a function from the step to start at to the frames of each step."""
    from qdbev_ros.core.errors import ConfigError
    from qdbev_ros.core.variant import load_variant
    from qdbev_train.data.dataset import Augmentation, StreamDataset
    from qdbev_train.data.queues import QueueDataset
    from qdbev_train.data.tables import load_scenes

    augmentation = Augmentation(mirror=config.mirror, turn=config.turn, light=config.light)
    if config.history not in ("stream", "queue"):
        raise ConfigError(f"history is {config.history!r}; use 'stream' or 'queue'")
    if config.history == "queue" and augmentation != Augmentation():
        raise ConfigError(
            "history: queue takes the data as they are; set mirror: 0.0, turn: false, light: 0.0"
        )
    scenes = load_scenes(Path(config.data.root), config.data.version, config.data.split)
    variant = load_variant(config.variant)

    def open_at(step: int) -> Iterable[Sequence[Batch]]:
        if config.history == "queue":
            return QueueDataset(scenes, variant, config.batch, config.seed, start_step=step)
        stream = StreamDataset(
            scenes, variant, config.batch, config.seed, start_step=step, augmentation=augmentation
        )
        return ((batch,) for batch in stream)

    return open_at
