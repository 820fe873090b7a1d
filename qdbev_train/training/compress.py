# SPDX-License-Identifier: Apache-2.0
"""Runs a compression: calibrates, trains stage by stage, leaves a model file. It goes on where it was stopped.

A stage is a training run of its own in a folder of its own, `out/2_neck`: `last.safetensors` there is the stage's
state, and a finished stage has a model file with all its steps. So the folders say where a compression stands.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.files import write_json
from qdbev_ros.core.variant import Variant
from qdbev_train.checkpoint import load_model, read_tensors, save_model
from qdbev_train.data.dataset import Batch, StreamDataset
from qdbev_train.data.tables import load_scenes
from qdbev_train.distillation import Distillation, Teacher
from qdbev_train.model import BEVFormer
from qdbev_train.quantization import QuantConfig, post_training_quantise, quantise_model
from qdbev_train.training.command import official_scores, training_data
from qdbev_train.training.compression import CompressConfig
from qdbev_train.training.config import Span, TrainConfig
from qdbev_train.training.loop import UNSCORED, TrainingData, train
from qdbev_train.training.schedule import Plan, learning_rate_at
from qdbev_train.training.stages import FINAL, Stage, plan_stages
from qdbev_train.training.student import StudentLoss

SETTINGS = "settings.json"
TEACHER = "teacher_sha256"  # its file may have been trained on under the same name
FURTHER = "further_teachers_sha256"  # likewise
SHORTEST = 10  # warm-ups in a stage, at least
# What may change when a compression goes on; and what may differ from another one whose stages are taken over.
_FREE = {"evaluation", "stages_from"}
_FREE_OF_OTHER = _FREE | {"method", "out", "distillation", FURTHER}


@dataclass(frozen=True)
class _Job:
    """What all stages share."""

    config: CompressConfig
    variant: Variant
    origin: dict[str, Any]  # provenance of the teacher
    data: TrainingData
    training: TrainConfig
    steps: int
    processes: int


class CalibrationFrames:
    """The first `count` batches of a stream, with a progress bar; read anew each time."""

    def __init__(self, stream: StreamDataset, count: int) -> None:
        self._stream, self._count = stream, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        first = os.environ.get("RANK", "0") == "0"
        batches = islice(self._stream, self._count)
        return iter(tqdm(batches, total=self._count, desc="calibrate", unit="step", disable=not first))


def compress(config: CompressConfig) -> Path:
    """Runs or goes on with a compression; the path of its model file."""
    _, variant, metadata = load_model(config.teacher)
    if "quantisation" in metadata:
        raise ConfigError(f"{config.teacher}: quantised already; compress starts from a float model")
    out = Path(config.out)
    for path in config.further_teachers:
        _require_kin(path, variant, config.teacher)
    settings = config.to_dict() | teacher_hashes(config)
    _require_equal(settings, out / SETTINGS, _FREE)
    if config.stages_from:
        _require_equal(settings, Path(config.stages_from) / SETTINGS, _FREE_OF_OTHER)
    origin = metadata.get("provenance", {})
    result = out / "model.safetensors"
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if config.method == "ptq":
        if processes > 1:
            raise ConfigError("method ptq is calibration alone; run it without torchrun")
        model, _, _ = load_model(config.teacher)
        frames = calibration_frames(config, variant)
        _leave_settings(settings, out / SETTINGS)
        model = post_training_quantise(model.to(_device()), frames, config.quantisation)
        made = {"teacher": origin, "compression": config.to_dict()}
        save_model(result, model, variant, made, config.quantisation.to_dict())
        return result
    assert config.training is not None
    training = replace(config.training, variant=variant.name)
    data = training_data(training, variant)
    steps = training.length.steps(-(-data.samples // (training.batch * processes)))
    job = _Job(config, variant, origin, data, training, steps, processes)
    stages = plan_stages(config.method, config.stages, config.quantisation.parts, steps)
    _leave_settings(settings, out / SETTINGS)
    model_file = Path(config.teacher)
    for number, stage in enumerate(stages, start=1):
        _say(f"stage {number} of {len(stages)}, {stage.name}: {stage.steps} of {steps} steps")
        model_file = _stage(job, number, stage, model_file)
        _wait()
    if os.environ.get("RANK", "0") == "0":
        _finish(job, stages, model_file, result)
    return result


def calibration_frames(config: CompressConfig, variant: Variant) -> CalibrationFrames:
    """Frames of the training data as they are, in temporal order."""
    scenes = load_scenes(Path(config.data.root), config.data.version, config.data.split)
    stream = StreamDataset(scenes, variant, config.calibration.batch, config.seed)
    return CalibrationFrames(stream, config.calibration.steps)


def teacher_hashes(config: CompressConfig) -> dict[str, Any]:
    """SHA-256 of the teachers' files, of a missing one ""; those of further ones where there are any."""
    files = [Path(path) for path in (config.teacher, *config.further_teachers)]
    own, *further = [hashlib.sha256(f.read_bytes()).hexdigest() if f.is_file() else "" for f in files]
    return {TEACHER: own} | ({FURTHER: further} if further else {})


def _require_kin(path: str, variant: Variant, teacher: str) -> None:
    """Refuses a further teacher that is not a float model of the teacher's variant."""
    _, own, metadata = load_model(path)
    if own != variant:
        raise ConfigError(
            f"{path}: holds another variant than {teacher}; an ensemble's teachers share theirs"
        )
    if "quantisation" in metadata:
        raise ConfigError(f"{path}: quantised; the teachers of a distillation are float models")


def _stage(job: _Job, number: int, stage: Stage, before: Path) -> Path:
    """Runs one stage from the model file `before`, unless it is finished; its model file."""
    config, name = job.config, f"{number}_{stage.name}"
    # The final stage is each compression's own.
    others = [config.stages_from] if config.stages_from and stage.name != FINAL else []
    for out in (config.out, *others):
        done = Path(out) / name / "model.safetensors"
        owed = out == config.out and done.with_name(UNSCORED).exists()
        if not owed and _finished(done, stage.steps):
            _say(f"  {done} is finished already")
            return done
    folder = Path(config.out) / name
    quantisation = replace(config.quantisation, parts=stage.parts) if stage.parts else None
    resumed = (folder / "last.safetensors").exists()
    model, variant = _start(job, stage, before, quantisation, resumed), job.variant
    training = replace(
        job.training,
        out=str(folder),
        init=str(before),
        length=Span(stage.steps, "steps"),
        # A short stage would be over before it is warm, and would hand over a network that never annealed.
        warmup_steps=min(job.training.warmup_steps, stage.steps // SHORTEST),
        seed=config.seed + number,
    )
    helps = before.with_name("last.safetensors")
    return train(
        model,
        variant,
        training,
        TrainingData(
            job.data.samples,
            lambda step, rank, processes: job.data.open(stage.first + step, rank, processes),
        ),
        None if quantisation is None else quantisation.to_dict(),
        _student_loss(job, stage, model),
        partial(official_scores, training) if config.evaluation is not None else None,
        helps_from=helps if helps.exists() else None,
        rate_at=None if config.restart else _one_curve(job, stage),
    )


def _start(
    job: _Job, stage: Stage, before: Path, quantisation: QuantConfig | None, resumed: bool
) -> BEVFormer:
    """The model that a stage begins with; of a resumed one only the shape, its state has the rest."""
    model: BEVFormer
    model, _, metadata = load_model(before)
    on_grid = metadata.get("quantisation", {}).get("parts", [])
    if quantisation is None or set(on_grid) == set(stage.parts):
        return model
    if resumed:
        return quantise_model(model, quantisation)
    frames = calibration_frames(job.config, job.variant)
    return post_training_quantise(model.to(_device()), frames, quantisation)


def _student_loss(job: _Job, stage: Stage, model: BEVFormer) -> StudentLoss | None:
    config = job.config
    if not stage.parts:
        return None
    distillation = None
    if stage.distilled:
        assert config.distillation is not None
        files = (config.teacher, *config.further_teachers)
        teachers = [Teacher(load_model(path)[0]) for path in files]
        distillation = Distillation(teachers, config.method, config.distillation)
    freeze_after = max(1, round(config.freeze_ranges * stage.steps))
    return StudentLoss(model, distillation, freeze_after)


def _one_curve(job: _Job, stage: Stage) -> Callable[[int], float]:
    """The learning rate of a stage's steps on a curve over all stages."""
    whole = replace(job.training, length=Span(job.steps, "steps"))
    plan = Plan(job.steps, job.steps, None)
    return lambda step: learning_rate_at(stage.first + step, whole, plan)


def _finish(job: _Job, stages: list[Stage], model_file: Path, result: Path) -> None:
    """The last stage's model as the compression's, with what made it."""
    model, variant, metadata = load_model(model_file)
    made = {
        "teacher": job.origin,
        "compression": job.config.to_dict(),
        "stages": [{"name": s.name, "parts": list(s.parts), "steps": s.steps} for s in stages],
        "samples": job.steps * job.training.batch * job.processes,
    }
    save_model(result, model, variant, made, metadata.get("quantisation"))


def _finished(model_file: Path, steps: int) -> bool:
    if not model_file.is_file():
        return False
    _, metadata = read_tensors(model_file)
    return bool(metadata.get("provenance", {}).get("steps") == steps)


def _leave_settings(settings: dict[str, Any], path: Path) -> None:
    """What a later call is held to. Left once the data are found: an error before must not bind anyone."""
    if os.environ.get("RANK", "0") == "0":
        write_json(path, settings)


def _require_equal(settings: dict[str, Any], path: Path, free: set[str]) -> None:
    """Refuses to go on where other settings were left, but for the `free` ones."""
    if not path.exists():
        return
    before = json.loads(path.read_text())
    now = json.loads(json.dumps(settings))
    # The folder and how often to score stand in the training settings as well, for the loop.
    for kept in (before, now):
        for key in (*free, "save_every"):
            (kept.get("training") or {}).pop(key, None)
    changed = [k for k in now if k not in free and before.get(k) != now[k]]
    if changed:
        raise ConfigError(
            f"{path.parent} was compressed with other settings ({', '.join(changed)}); choose another `out`"
        )


def _device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def _wait() -> None:
    """Until the first process has written what the others will read."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
