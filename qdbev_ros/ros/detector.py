# SPDX-License-Identifier: Apache-2.0
"""The detector as it is configured: an engine with its memory, and while it is active the inputs and their worker."""

from __future__ import annotations

import dataclasses
import math
import time
import traceback
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from rclpy.node import Node

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.health import HealthMonitor
from qdbev_ros.core.latency import StageLatencies
from qdbev_ros.core.memory import CalibrationWatch, MemoryPolicy
from qdbev_ros.core.pipeline import CameraFrame, Frame, PictureError, Pipeline
from qdbev_ros.core.preprocess import RawPicture
from qdbev_ros.core.synchroniser import SyncCounters
from qdbev_ros.engine import load_package
from qdbev_ros.ros.assembly import Job
from qdbev_ros.ros.calibration_file import calibration_for
from qdbev_ros.ros.camera_state import CameraState
from qdbev_ros.ros.diagnostics import PERCENTILES, PipelineReport, pipeline_values
from qdbev_ros.ros.inputs import Inputs, picture_of
from qdbev_ros.ros.messages import Answer
from qdbev_ros.ros.outputs import Outputs
from qdbev_ros.ros.overlay import Overlay
from qdbev_ros.ros.parameters import DetectorParameters
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.throttle import Throttled
from qdbev_ros.ros.worker import Worker

MOST_WISHES = 100  # to forget the past; more than come between two sets


class TooFewCameras(DataError):
    """What is left of a set is not to be answered."""


class Detector:
    """Inputs -> worker -> pipeline -> outputs. Raises QdbevError where it cannot be configured."""

    def __init__(self, node: Node, parameters: DetectorParameters, monitor: HealthMonitor) -> None:
        self._node = node
        self.preset = load_preset(parameters.preset)
        self._parameters = parameters.with_preset(self.preset)
        self._calibration = calibration_for(self.preset, parameters.calibration)
        self._monitor = monitor
        self.engine = load_package(
            Path(parameters.model), parameters.engine, parameters.engine_threads or None
        )
        self._pipeline = Pipeline(self.engine, _memory_policy(parameters), parameters.decode_threads)
        # Pipeline and memory are the worker's alone: the executor waits for no inference, it leaves its wish here.
        self._to_forget: deque[str] = deque(maxlen=MOST_WISHES)
        self._watch = CalibrationWatch()
        self._ego_known = True
        self._report = PipelineReport()
        self._latencies = StageLatencies()
        self._error = Throttled(node.get_logger(), error=True)
        self._warn = Throttled(node.get_logger())
        self._bug = Throttled(node.get_logger(), error=True, interval_s=math.inf)
        self._outputs = Outputs(node, self._parameters, self.engine.name)
        self._overlay = Overlay(node, self._parameters, self.engine.name)
        self._inputs: Inputs | None = None
        self._worker: Worker[Job] | None = None

    @property
    def cameras(self) -> Mapping[str, CameraState]:
        """What is known of each camera; empty while inactive."""
        return {} if self._inputs is None else self._inputs.cameras

    @property
    def memory_resets(self) -> dict[str, int]:
        return self._pipeline.memory.resets.copy()

    def take_over(self, memory_resets: Mapping[str, int], other_model: bool) -> None:
        """Goes on with the counters of the detector before; with `other_model` its memory is not to be used."""
        self._pipeline.memory.resets = dict(memory_resets)
        if other_model:
            self._pipeline.memory.reset("model_change")

    def activate(self) -> None:
        """Listens to the cameras."""
        self._worker = Worker(self._process, self._parameters.queue_size, self._worker_failed)
        self._inputs = Inputs(
            self._node, self._parameters, self.preset, self._calibration, self._worker.submit, self._refuse,
            self._input_failed,
        )  # fmt: skip
        self._inputs.listen()

    def deactivate(self) -> None:
        """Hears nothing more; the set that is worked on is still answered. Also after an activation that failed."""
        if self._inputs is not None:
            self._inputs.close()
        if self._worker is not None:
            self._worker.close()
        self._inputs = self._worker = None

    def finish(self) -> None:
        """Lets the set that is worked on be answered, and works on no other; inputs and counters stay."""
        if self._worker is not None:
            self._worker.close()

    def close(self) -> None:
        self.deactivate()
        self._outputs.close()
        self._overlay.close()
        self._pipeline.close()
        self.engine.close()

    def idle(self) -> bool:
        """Whether no set waits for anything."""
        if self._inputs is None or self._worker is None:
            return True
        return self._inputs.pending == 0 and self._worker.idle()

    def change(self, parameters: DetectorParameters) -> None:
        """Takes changed parameters, of which only live ones may differ."""
        self._parameters = parameters.with_preset(self.preset)
        self._outputs.parameters = self._overlay.parameters = self._parameters
        self._pipeline.memory.policy = _memory_policy(parameters)
        if self._inputs is not None and self._worker is not None:
            self._inputs.configure(self._parameters)
            self._worker.resize(parameters.queue_size)

    def reset_memory(self) -> None:
        """The next set is answered as without a past; one that is worked on is not waited for and leaves no map."""
        self._to_forget.append("service")

    def values(self) -> dict[str, object]:
        """All counters, for diagnostics."""
        report = dataclasses.replace(self._report, dropped=self._report.dropped.copy())
        if self._worker is not None and self._worker.dropped:
            report.dropped["queue"] = self._worker.dropped
        if self._inputs is not None:
            report.refused = self._inputs.refused
        sync = self._inputs.sync.counters if self._inputs is not None else SyncCounters()
        latencies = self._latencies.percentiles(*PERCENTILES)
        package = {"engine": self.engine.description, "package": self.engine.name}
        package["package_sha256"] = self.engine.sha256
        values = pipeline_values(report, sync, self.memory_resets, latencies, time.monotonic())
        return {**package, **values}

    def _refuse(self, kind: str, text: str) -> None:
        self._report.dropped[kind] += 1
        self._monitor.refused(text)

    def _worker_failed(self, error: Exception) -> None:
        """The worker's thread goes on after an error of what surrounds the answers; without answers it is a fault."""
        self._monitor.failed(f"{type(error).__name__}: {error}")
        self._survived("inference", error)

    def _input_failed(self, place: str, error: Exception) -> None:
        """The executor goes on after an error in what takes messages; what it built up is gone, so is the past."""
        self._to_forget.append("failure")
        self._monitor.refused(f"{place}: {type(error).__name__}: {error}")
        self._survived(place, error)

    def _survived(self, place: str, error: Exception) -> None:
        """Counts an error that nothing should have raised, and logs it in full the first time."""
        self._report.failures[place] += 1
        text = "".join(traceback.format_exception(error))
        self._bug(f"{place} {type(error).__name__}", f"an error in this program, {place}:\n{text}")

    def _process(self, job: Job) -> None:
        """One set, in the worker's thread. Whatever goes wrong costs this set and is told."""
        started = time.monotonic()
        try:
            answer, milliseconds = self._answer(job)
            computed = time.monotonic()
            self._outputs.publish(answer)
        except TooFewCameras as error:
            self._refuse("cameras", str(error))
            self._warn("cameras", f"set dropped: {error}")
            return
        except Exception as error:  # the thread must go on, whatever an engine raises
            self._report.dropped["failure"] += 1
            self._monitor.failed(f"{type(error).__name__}: {error}")
            self._pipeline.memory.reset("failure")
            self._error("failure", f"set dropped:\n{traceback.format_exc()}")
            return
        now = time.monotonic()
        stages = {"wait": started - job.arrived, "publish": now - computed, "total": now - job.arrived}
        self._latencies.add(milliseconds | {stage: seconds * 1e3 for stage, seconds in stages.items()})
        self._tell(answer, now)
        self._overlay.show(job, answer)

    def _answer(self, job: Job) -> tuple[Answer, dict[str, float]]:
        """The boxes of the cameras whose pictures can be used, and each stage's milliseconds."""
        cameras, missing = dict(job.cameras), dict(job.missing)
        self._forget_if_needed(job)
        while True:
            self._require_enough(len(cameras), missing)
            try:
                frames = {
                    name: CameraFrame(
                        self._picture(name, camera.message), camera.calibration, camera.ego2global
                    )
                    for name, camera in cameras.items()
                }
                result = self._pipeline.run(Frame(job.stamp_ns, frames, job.ego2global, job.lidar2ego))
            except PictureError as error:  # the others are decoded again, which costs less than a set
                del cameras[error.camera]
                missing[error.camera] = str(error)
                self._picture_failed(error)
                continue
            answer = Answer(
                job.stamp_ns, job.spread_s, result.boxes, tuple(cameras), missing, job.ego_problem, result.memory
            )  # fmt: skip
            return answer, result.milliseconds

    def _forget_if_needed(self, job: Job) -> None:
        """Drops the memory where that was asked for, or it does not fit this set for reasons it cannot see itself."""
        memory, known = self._pipeline.memory, job.ego_problem is None
        while self._to_forget:
            memory.reset(self._to_forget.popleft())
        calibrations = {name: camera.calibration for name, camera in job.cameras.items()}
        different = self._watch.changed(calibrations, job.lidar2ego)
        if different is not None:
            memory.reset("calibration_change")
            self._warn("calibration", f"the calibration of {different} changed: memory forgotten")
        if not known or not self._ego_known:
            memory.reset("no_ego_motion")
        self._ego_known = known

    def _require_enough(self, count: int, missing: Mapping[str, str]) -> None:
        """Raises TooFewCameras where the parameters forbid an answer from `count` cameras."""
        without = "; ".join(f"{camera}: {reason}" for camera, reason in missing.items())
        if missing and self._parameters.missing_cameras == "skip":
            raise TooFewCameras(f"missing_cameras is skip, and there is no {without}")
        if count < self._parameters.min_cameras:
            raise TooFewCameras(
                f"{count} usable cameras, min_cameras is {self._parameters.min_cameras}: {without}"
            )

    def _picture(self, camera: str, message: object) -> memoryview | RawPicture:
        try:
            return picture_of(message)
        except DataError as error:
            raise PictureError(camera, str(error)) from error

    def _picture_failed(self, error: PictureError) -> None:
        state = self.cameras.get(error.camera)
        if state is not None:
            state.picture_failed(str(error))
            self._warn(f"picture {error.camera}", f"camera is left out: {state.image_topic}: {error}")

    def _tell(self, answer: Answer, now: float) -> None:
        """Notes an answer for diagnostics."""
        for name, state in self.cameras.items():
            state.answered(answer.missing.get(name))
        report, lacking = self._report, answer.lacking()
        report.sets_answered += 1
        report.answers.note(now)
        report.sets_degraded += bool(lacking)
        report.spread_s = answer.spread_s
        report.memory_age, report.memory_gap_s = answer.memory.age, answer.memory.gap_s
        self._monitor.answered(now, lacking)


def _memory_policy(parameters: DetectorParameters) -> MemoryPolicy:
    return MemoryPolicy(parameters.max_gap, parameters.max_speed)
