# SPDX-License-Identifier: Apache-2.0
"""The node qdbev_detector: six cameras in, 3D boxes out. Wiring only; the work is in `core` and `ros`.

Example: ros2 run qdbev_ros detector_node --ros-args -p model:=demo/nano.qdbev
"""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
import traceback
from pathlib import Path

from diagnostic_msgs.msg import DiagnosticArray
from rclpy.node import Node
from rclpy.qos import QoSProfile
from std_srvs.srv import Trigger

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.latency import StageLatencies
from qdbev_ros.core.memory import MemoryPolicy
from qdbev_ros.core.pipeline import CameraFrame, Frame, PictureError, Pipeline
from qdbev_ros.engine import load_package
from qdbev_ros.ros.calibration_file import calibration_for
from qdbev_ros.ros.diagnostics import PipelineReport, camera_status, diagnostic_array, pipeline_status
from qdbev_ros.ros.inputs import Inputs, Job, picture_of
from qdbev_ros.ros.outputs import Outputs
from qdbev_ros.ros.parameters import DetectorParameters, declare
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.process import run
from qdbev_ros.ros.throttle import Throttled
from qdbev_ros.ros.worker import Worker

NODE_NAME = "qdbev_detector"


class Detector:
    """Inputs -> worker -> pipeline -> outputs, with diagnostics beside them."""

    grace_s = 5.0

    def __init__(self) -> None:
        self.node = Node(NODE_NAME)
        parameters = declare(self.node, DetectorParameters)
        if not parameters.model:
            raise ConfigError(
                "parameter model is empty: give a package, e.g. --ros-args -p model:=demo/nano.qdbev"
            )
        preset = load_preset(parameters.preset)
        parameters = parameters.with_preset(preset)
        calibration = calibration_for(preset, parameters.calibration)
        engine = load_package(Path(parameters.model), backend=parameters.engine)
        policy = MemoryPolicy(parameters.max_gap, parameters.max_speed)
        self._pipeline = Pipeline(engine, policy, parameters.decode_threads)
        self._lock = threading.Lock()  # the pipeline and its memory
        self._bridge = None
        if preset.image_type == "raw":
            from cv_bridge import CvBridge

            self._bridge = CvBridge()
        self._report = PipelineReport(engine.description, engine.name, engine.sha256)
        self._latencies = StageLatencies()
        self._error = Throttled(self.node.get_logger().error)
        self._outputs = Outputs(self.node, parameters, engine.name)
        self._worker: Worker[Job] = Worker(self._process, parameters.queue_size)
        self._inputs = Inputs(self.node, parameters, preset, calibration, self._worker.submit)
        self._diagnostics = self.node.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        self.node.create_timer(1.0, self._diagnose)
        self.node.create_service(Trigger, "~/reset_memory", self._on_reset)
        self.node.get_logger().info(f"ready: {engine.name} on {engine.description}, preset {preset.name}")

    def finished(self) -> bool:
        return False

    def idle(self) -> bool:
        """Sets that are complete are answered before the node goes."""
        return self._inputs.pending == 0 and self._worker.idle()

    def close(self) -> None:
        self._worker.close()
        self._diagnose()
        self._pipeline.close()

    def _process(self, job: Job) -> None:
        """One set, in the worker's thread. Whatever goes wrong costs this set and is told."""
        started = time.monotonic()
        try:
            frame = self._frame(job)
            with self._lock:
                result = self._pipeline.run(frame)
            computed = time.monotonic()
            self._outputs.publish(job.stamp_ns, result.boxes, list(job.cameras), result.memory)
        except PictureError as error:
            state = self._inputs.cameras[error.camera]
            state.picture_failed(str(error))
            self._report.dropped["picture"] += 1
            self._error(f"picture {error.camera}", f"set dropped: {state.image_topic}: {error}")
            return
        except Exception as error:  # the thread must go on, whatever an engine raises
            self._report.dropped["failure"] += 1
            self._report.last_error = f"{type(error).__name__}: {error}"
            self._error("failure", f"set dropped:\n{traceback.format_exc()}")
            return
        now = time.monotonic()
        stages = {"wait": started - job.arrived, "publish": now - computed, "total": now - job.arrived}
        self._latencies.add(result.milliseconds | {stage: seconds * 1e3 for stage, seconds in stages.items()})
        for name in job.cameras:
            self._inputs.cameras[name].picture_error = None
        report = self._report
        report.last_error, report.spread_s = None, job.spread_s
        report.memory_age, report.memory_gap_s = result.memory.age, result.memory.gap_s
        report.sets_answered += 1

    def _frame(self, job: Job) -> Frame:
        cameras = {}
        for name, camera in job.cameras.items():
            try:
                picture = picture_of(camera.message, self._bridge)
            except DataError as error:
                raise PictureError(name, str(error)) from error
            cameras[name] = CameraFrame(picture, camera.calibration, camera.ego2global)
        return Frame(job.stamp_ns, cameras, job.ego2global, job.lidar2ego)

    def _diagnose(self) -> None:
        now = time.monotonic()
        cameras = self._inputs.cameras
        statuses = [
            pipeline_status(
                self._full_report(), cameras, self._inputs.sync.counters, self._pipeline.memory.resets.copy(),
                self._latencies.percentiles(50, 99), now,
            ),
            *(camera_status(state, now) for state in cameras.values()),
        ]  # fmt: skip
        self._diagnostics.publish(diagnostic_array(self.node.get_clock().now().to_msg(), statuses))

    def _full_report(self) -> PipelineReport:
        """The report with the sets that never reached the pipeline."""
        dropped = self._report.dropped + self._inputs.dropped
        if self._worker.dropped:
            dropped["queue"] = self._worker.dropped
        return dataclasses.replace(self._report, dropped=dropped)

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        with self._lock:
            self._pipeline.memory.reset("service")
        response.success, response.message = True, "the memory is empty"
        return response


def main() -> int:
    return run("detector_node", Detector)


if __name__ == "__main__":
    sys.exit(main())
