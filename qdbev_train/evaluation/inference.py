# SPDX-License-Identifier: Apache-2.0
"""Runs a package or a checkpoint over frames through the node's own pipeline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.pipeline import CameraFrame, Engine, PictureError, Pipeline
from qdbev_ros.core.pipeline import Frame as PipelineFrame
from qdbev_train.data.frames import Frame
from qdbev_train.evaluation.finished import FinishedScenes
from qdbev_train.evaluation.results import Entry, result_entries


def open_engine(model: Path, backend: str = "auto") -> Engine:
    """A .qdbev package in an inference engine, or a .safetensors checkpoint in PyTorch, which knows no backends."""
    if not model.is_file():
        raise DataError(f"{model}: no such file; give a .qdbev package or a .safetensors checkpoint")
    if model.suffix == ".qdbev":
        from qdbev_ros.engine import load_package

        return load_package(model, backend)
    if model.suffix in (".safetensors", ".pth", ".pt", ".ckpt"):  # the last three are refused with advice
        from qdbev_train.evaluation.torch_engine import TorchEngine

        return TorchEngine(model)
    raise DataError(f"{model}: give a .qdbev package or a .safetensors checkpoint")


def detect(
    engine: Engine,
    scenes: Mapping[str, Sequence[Frame]],
    finished: FinishedScenes | None = None,
    without: Collection[str] = (),
) -> dict[str, list[Entry]]:
    """Result entries of every frame by sample token; each scene begins without memory. Cameras in `without` are lost.

    Scenes that are in `finished` are taken from there, the others are added to it. Raises DataError that names the
    file where a picture cannot be used.
    """
    by_scene = {} if finished is None else dict(finished.scenes)
    done = sum(len(scene) for name, scene in scenes.items() if name in by_scene)
    frames = sum(len(scene) for scene in scenes.values())
    pipeline = Pipeline(engine)
    bar = tqdm(total=frames, initial=done, desc="eval", unit=" frames", disable=None, leave=None)
    with closing(pipeline), bar:
        for name in [name for name in scenes if name not in by_scene]:
            entries = by_scene[name] = {}
            for frame in scenes[name]:
                try:
                    boxes = pipeline.run(pipeline_frame(frame, without)).boxes
                except PictureError as error:
                    files = {c.calibration.name: c.image for c in frame.cameras}
                    raise DataError(f"{files[error.camera]}: {error}") from error
                entries[frame.sample_token] = result_entries(
                    frame.sample_token, boxes, frame.lidar2ego, frame.ego2global
                )
                bar.update()
            if finished is not None:
                finished.add(name, entries)
    return {token: entries for name in scenes for token, entries in by_scene[name].items()}


def pipeline_frame(frame: Frame, without: Collection[str] = ()) -> PipelineFrame:
    """The frame as the pipeline takes it, with the bytes of its pictures; cameras in `without` are left out."""
    used = [c for c in frame.cameras if c.calibration.name not in without]
    cameras = {c.calibration.name: CameraFrame(c.read(), c.calibration, c.ego2global) for c in used}
    return PipelineFrame(
        frame.stamp_ns, cameras, frame.ego2global, frame.lidar2ego, frame.scene, frame.can_dynamics
    )
