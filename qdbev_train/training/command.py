# SPDX-License-Identifier: Apache-2.0
"""`qdbev train`: the float teacher from a YAML configuration."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qdbev_ros.core.variant import Variant
    from qdbev_train.data.dataset import Batch
    from qdbev_train.training.config import TrainConfig
    from qdbev_train.training.loop import TrainingData

EXAMPLE = """example:
  qdbev synth data/town --split train --scenes 300 --seed 1
  qdbev train config/train/nano_town.yaml
On several GPUs (batch is that of each):
  torchrun --nproc_per_node 8 -m qdbev_train.cli train config/train/base_nuscenes.yaml
A run that was stopped (Ctrl-C and SIGTERM save first) goes on where its `out` folder stands. Watch it with
`tensorboard --logdir out/train`, draw its loss with `qdbev plot`."""


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
    from functools import partial

    from qdbev_train.training.config import TrainConfig, read_config
    from qdbev_train.training.initial import starting_model
    from qdbev_train.training.loop import train

    config = read_config(args.config, TrainConfig)
    if config.evaluation is not None:
        from qdbev_train.evaluation.metrics import require_devkit, require_tables

        require_devkit(config.data.version, config.evaluation.split)
        require_tables(Path(config.data.root) / config.data.version)
    data = training_data(config)
    model, variant, quantisation = starting_model(config, data)
    evaluate = partial(official_scores, config) if config.evaluation is not None else None
    path = train(model, variant, config, data, quantisation, evaluate=evaluate)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one speaks
        print(f"wrote {path}")


def training_data(config: TrainConfig, variant: Variant | None = None) -> TrainingData:
    """The training frames of a configuration, in its order and with its augmentation, for its variant by default."""
    from qdbev_ros.core.variant import load_variant
    from qdbev_train.data.augment import Augmentation
    from qdbev_train.data.dataset import StreamDataset
    from qdbev_train.data.queues import QueueDataset
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.training.loop import TrainingData

    augmentation = Augmentation(
        mirror=config.mirror,
        turn=config.turn,
        light=config.light,
        photometric=config.photometric,
        grid_mask=config.grid_mask,
    )
    scenes = load_scenes(Path(config.data.root), config.data.version, config.data.split)
    variant = variant or load_variant(config.variant)

    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    workers = max(2, min(8, (os.cpu_count() or 2) // local))

    def open_at(step: int, rank: int, processes: int) -> Iterable[Sequence[Batch]]:
        place = {"start_step": step, "rank": rank, "processes": processes, "workers": workers}
        if config.history == "queue":
            return QueueDataset(
                scenes, variant, config.batch, config.seed, augmentation=augmentation, **place
            )
        stream = StreamDataset(scenes, variant, config.batch, config.seed, augmentation=augmentation, **place)
        return ((batch,) for batch in stream)

    return TrainingData(sum(map(len, scenes.values())), open_at)


def official_scores(config: TrainConfig, model_file: Path) -> dict[str, float]:
    """NDS and mAP of a model file on the split that `config` evaluates on."""
    from qdbev_train.data.tables import load_scenes
    from qdbev_train.evaluation.inference import detect
    from qdbev_train.evaluation.metrics import official_score
    from qdbev_train.evaluation.torch_engine import TorchEngine

    assert config.evaluation is not None
    root, version, split = Path(config.data.root), config.data.version, config.evaluation.split
    results = detect(TorchEngine(model_file), load_scenes(root, version, split))
    score = official_score(root, version, split, results)
    return {"NDS": score.nds, "mAP": score.mAP}
