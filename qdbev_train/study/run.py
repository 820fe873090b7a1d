# SPDX-License-Identifier: Apache-2.0
"""Runs a study: every row is compressed, scored on unseen scenes and weighed, once.

A row's folder holds its trainings and, when it is finished, `row.json` with the settings that it came from. Several
processes may run one study: each takes the next row that no other works on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import CAMERAS, Variant
from qdbev_train.checkpoint import load_model
from qdbev_train.data.frames import Frame
from qdbev_train.data.tables import load_scenes
from qdbev_train.evaluation.finished import FinishedScenes
from qdbev_train.evaluation.inference import detect
from qdbev_train.evaluation.metrics import Score, official_score
from qdbev_train.evaluation.torch_engine import TorchEngine
from qdbev_train.quantization import QuantConfig
from qdbev_train.study.config import FLOAT, Job, StudyConfig
from qdbev_train.study.cost import bit_operations, layer_products, package_bytes
from qdbev_train.training.compress import FURTHER, compress, teacher_hashes

PAUSE = 5.0  # seconds between two looks for a row that has become free
ROW = "row.json"


@dataclass(frozen=True)
class Study:
    """A study and what its rows share."""

    config: StudyConfig

    @cached_property
    def teacher(self) -> tuple[Any, Variant, dict[str, Any]]:
        """The float model, its variant, its metadata."""
        return load_model(self.config.teacher)

    @cached_property
    def teacher_sha256(self) -> str:
        return hashlib.sha256(self.config.teacher.read_bytes()).hexdigest()

    @cached_property
    def scenes(self) -> Mapping[str, Sequence[Frame]]:
        data = self.config.base["data"]
        return load_scenes(Path(data["root"]), data["version"], self.config.split)

    @cached_property
    def products(self) -> dict[str, int]:
        """Multiplications by layer, with the rig of the first unseen frame."""
        frame = next(iter(self.scenes.values()))[0]
        _, variant, _ = self.teacher
        return layer_products(variant, _input_matrices(frame, variant))

    def settings(self, job: Job) -> dict[str, Any]:
        """What a row's numbers depend on."""
        frames = sum(map(len, self.scenes.values()))
        shared: dict[str, Any] = {
            "teacher": self.teacher_sha256,
            "split": self.config.split,
            "frames": frames,
        }
        if job.row.name == FLOAT:
            return shared | {"compression": None}
        compression = self.config.compression(job)
        if compression.further_teachers:
            shared[FURTHER] = teacher_hashes(compression)[FURTHER]
        return dict(json.loads(json.dumps(shared | {"compression": compression.to_dict()})))

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The numbers of a row that was finished with the present settings."""
        path = self.config.folder(job) / ROW
        if not path.is_file():
            return None
        kept = json.loads(path.read_text())
        return dict(kept["row"]) if kept["settings"] == self.settings(job) else None


def run_study(config: StudyConfig) -> None:
    """Runs what is missing of a study. Ctrl-C and SIGTERM save; the same command goes on from there."""
    study = Study(config)
    left = [job for job in config.jobs() if study.finished(job) is None]
    total = len(config.jobs())
    while left:
        for job in left:
            if _waits_for_another(study, job):
                continue
            with _alone(config.folder(job)) as mine:
                if not mine:
                    continue
                print(f"row {total - len(left) + 1} of {total}: {job.name}, {job.row.text}", flush=True)
                if study.finished(job) is None:
                    _run(study, job)
                break
        else:
            time.sleep(PAUSE)
        left = [job for job in left if study.finished(job) is None]


def _waits_for_another(study: Study, job: Job) -> bool:
    """A row whose stages it takes over, or whose model is among its teachers, isn't finished."""
    config = study.config
    further = () if job.row.name == FLOAT else config.compression(job).further_teachers
    needed = {Path(path).parent for path in further}
    before = [
        j
        for j in config.jobs()
        if (j.row.name == job.row.stages_of and j.seed == job.seed) or config.folder(j) in needed
    ]
    return any(study.finished(other) is None for other in before)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Whether this process may work in a folder; nobody else may until it leaves, or dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def _run(study: Study, job: Job) -> None:
    config, folder = study.config, study.config.folder(job)
    settings = study.settings(job)
    is_float = job.row.name == FLOAT
    model_file = config.teacher if is_float else compress(config.compression(job))
    score = _score(study, model_file, folder)
    model, variant, metadata = load_model(model_file)
    grid = metadata.get("quantisation")
    quantisation = None if grid is None else QuantConfig.from_dict(grid)
    row = {
        "method": job.row.name,
        "table": job.row.table,
        "text": job.row.text,
        "seed": job.seed,
        "nds": score.nds,
        "map": score.mAP,
        **{name: value for name, value in score.to_dict().items() if name in score.errors},
        "frames": score.frames,
        "weight_bits": 32 if quantisation is None else quantisation.weight_bits,
        "activation_bits": 32 if quantisation is None else quantisation.activation_bits,
        "parts": [] if quantisation is None else list(quantisation.parts),
        "samples": 0 if is_float else int(metadata["provenance"].get("samples", 0)),
        "size_bytes": package_bytes(model, quantisation, variant),
        "bops": bit_operations(model, quantisation, study.products),
    }
    write_json(folder / ROW, {"settings": settings, "row": row})
    print(f"  NDS {score.nds:.4f}, mAP {score.mAP:.4f}", flush=True)


def _score(study: Study, model_file: Path, folder: Path) -> Score:
    """The official score of a model file; an interrupted one goes on with the next scene."""
    data = study.config.base["data"]
    results = folder / "results.json"
    digest = hashlib.sha256(model_file.read_bytes()).hexdigest()
    kept = FinishedScenes(results, {"model": digest})
    found = detect(TorchEngine(model_file), study.scenes, kept)
    score = official_score(Path(data["root"]), data["version"], study.config.split, found)
    kept.remove()
    return score


def _input_matrices(frame: Frame, variant: Variant) -> torch.Tensor:
    """(6, 4, 4) from the LIDAR_TOP frame to pixels of the network's input."""
    from qdbev_ros.core.projection import scale_to_input, stack_lidar2img

    cameras = {camera.calibration.name: camera for camera in frame.cameras}
    matrices = [
        scale_to_input(frame.lidar2img(cameras[name]), cameras[name].calibration, variant.image)
        for name in CAMERAS
    ]
    return torch.from_numpy(stack_lidar2img(matrices))
