# SPDX-License-Identifier: Apache-2.0
"""Runs a package or a checkpoint over frames through the node's own pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.pipeline import CameraFrame, Engine, Pipeline
from qdbev_ros.core.pipeline import Frame as PipelineFrame
from qdbev_train.data.frames import Frame
from qdbev_train.evaluation.results import Entry, result_entries


def open_engine(model: Path) -> Engine:
    """A .qdbev package in its inference engine, or a .safetensors checkpoint in PyTorch."""
    if not model.is_file():
        raise DataError(f"{model}: no such file; give a .qdbev package or a .safetensors checkpoint")
    if model.suffix == ".qdbev":
        from qdbev_ros.engine import load_package

        return load_package(model)
    if model.suffix in (".safetensors", ".pth", ".pt", ".ckpt"):  # the last three are refused with advice
        from qdbev_train.evaluation.torch_engine import TorchEngine

        return TorchEngine(model)
    raise DataError(f"{model}: give a .qdbev package or a .safetensors checkpoint")


def detect(engine: Engine, frames: Sequence[Frame]) -> dict[str, list[Entry]]:
    """Result entries of every frame by sample token. Frames must be in time order scene by scene."""
    pipeline = Pipeline(engine)
    results = {}
    try:
        for frame in tqdm(frames, desc="eval", unit=" frames", disable=None):
            boxes = pipeline.run(pipeline_frame(frame)).boxes
            results[frame.sample_token] = result_entries(
                frame.sample_token, boxes, frame.lidar2ego, frame.ego2global
            )
    finally:
        pipeline.close()
    return results


def pipeline_frame(frame: Frame) -> PipelineFrame:
    """The frame as the pipeline takes it, with the bytes of its pictures."""
    cameras = {c.calibration.name: CameraFrame(c.read(), c.calibration, c.ego2global) for c in frame.cameras}
    return PipelineFrame(
        frame.stamp_ns, cameras, frame.ego2global, frame.lidar2ego, frame.scene, frame.can_dynamics
    )
