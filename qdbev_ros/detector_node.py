# SPDX-License-Identifier: Apache-2.0
"""The node qdbev_detector: six cameras in, 3D boxes out. A lifecycle node; the work is in `core` and `ros`.

Example: ros2 run qdbev_ros detector_node --ros-args -p model:=demo/nano.qdbev
"""

from __future__ import annotations

import dataclasses
import sys
import time
import traceback

from diagnostic_msgs.msg import DiagnosticArray
from rcl_interfaces.msg import SetParametersResult
from rclpy.lifecycle import LifecycleNode, TransitionCallbackReturn
from rclpy.lifecycle import State as LifecycleState
from rclpy.parameter import Parameter
from rclpy.qos import QoSProfile
from std_srvs.srv import Trigger

from qdbev_ros.core.errors import ConfigError, EngineError, QdbevError, one_line
from qdbev_ros.core.health import Health, HealthMonitor, HealthPolicy, State
from qdbev_ros.ros.detector import Detector
from qdbev_ros.ros.diagnostics import camera_status, diagnostic_array, pipeline_status, with_input_problems
from qdbev_ros.ros.parameters import DetectorParameters, changed, declare
from qdbev_ros.ros.process import NodeLog, run
from qdbev_ros.ros.timers import every

NODE_NAME = "qdbev_detector"
DIAGNOSE_S = 0.5
LOOK_S = 0.1  # a change of state is told at once


class DetectorNode(LifecycleNode):
    """Configured: the model is loaded. Active: pictures are answered. Diagnostics come in every state."""

    def __init__(self) -> None:
        super().__init__(NODE_NAME)
        self.parameters = declare(self, DetectorParameters)
        self.detector: Detector | None = None
        self.problem: QdbevError | None = None  # why configuring or activating failed
        self._active = False
        self._last_model = ""  # hash of the package that was configured before
        self._memory_resets: dict[str, int] = {}
        self._monitor = HealthMonitor(self._health_policy())
        self._told: tuple[object, float] = (None, 0.0)  # news, and when
        self._diagnostics = self.create_publisher(DiagnosticArray, "/diagnostics", QoSProfile(depth=10))
        every(self, LOOK_S, self._look)
        self.create_service(Trigger, "~/reset_memory", self._on_reset)
        self.add_on_set_parameters_callback(self._on_parameters)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Loads the model; a failure is told in diagnostics and leaves the node unconfigured."""
        try:
            self._configure()
        except QdbevError as error:
            self.problem = error.with_traceback(None)  # which would keep a refused engine's memory
        except Exception as error:  # an engine's own
            self.get_logger().error(traceback.format_exc())
            self.problem = EngineError(f"{self.parameters.model}: {type(error).__name__}: {error}")
        else:
            self.problem = None
        return self._outcome("configured")

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        """Listens to the cameras; a failure is told in diagnostics and leaves the node configured."""
        if self.detector is None:
            return TransitionCallbackReturn.FAILURE
        self._monitor.restart()
        preset, engine = self.detector.preset.name, self.detector.engine
        try:
            self.detector.activate()
        except Exception as error:  # rclpy's own, for a topic; it would drop it without a word
            self.get_logger().error(traceback.format_exc())
            self.detector.deactivate()
            self.problem = ConfigError(f"preset {preset}: cannot listen to its topics: {one_line(error)}")
            return self._outcome("activated")
        self.problem, self._active = None, True
        self.get_logger().info(f"ready: {engine.name} on {engine.description}, preset {preset}")
        return self._outcome("activated")

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        """A transition raised, of which rclpy tells no more than that: everything is closed and can be tried again."""
        self._active = False
        self.problem = EngineError(f"a lifecycle transition from {state.label} failed")
        self._outcome("in order")
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._active = False
        if self.detector is not None:
            self.detector.deactivate()
        self._monitor.restart()
        return super().on_deactivate(state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        self._active = False
        self.close()
        return TransitionCallbackReturn.SUCCESS

    def close(self) -> None:
        """Ends what is configured."""
        detector, self.detector = self.detector, None
        if detector is not None:
            self._memory_resets = detector.memory_resets
            detector.close()

    def diagnose(self) -> None:
        """Publishes the status of the whole and of each camera."""
        now = time.monotonic()
        health = self._monitor.check(now)
        self._told = (_news(health), now)
        cameras = {} if self.detector is None else self.detector.cameras
        if not self._active and health.state != State.FAULT:
            health = dataclasses.replace(health, text="the node is not active")
        else:
            health = with_input_problems(health, cameras.values(), now)
        values = {} if self.detector is None else self.detector.values()
        statuses = [
            pipeline_status(health, values),
            *(camera_status(state, now) for state in cameras.values()),
        ]
        self._diagnostics.publish(diagnostic_array(self.get_clock().now().to_msg(), statuses))

    def _configure(self) -> None:
        if not self.parameters.model:
            raise ConfigError(
                "parameter model is empty: give a package, e.g. --ros-args -p model:=demo/nano.qdbev"
            )
        self.close()
        self.detector = Detector(self, self.parameters, self._monitor)
        model = self.detector.engine.sha256
        self.detector.take_over(self._memory_resets, self._last_model not in ("", model))
        self._last_model = model

    def _outcome(self, wanted: str) -> TransitionCallbackReturn:
        """What a transition ends with: tells the problem, or takes the fault of an earlier one back."""
        self._monitor.declare_fault(None if self.problem is None else str(self.problem))
        if self.problem is None:
            return TransitionCallbackReturn.SUCCESS
        self.get_logger().error(f"not {wanted}: {self.problem}")
        return TransitionCallbackReturn.FAILURE

    def _look(self) -> None:
        """Every 0.1 s: diagnostics when they are due, or there is news."""
        news, told = self._told
        now = time.monotonic()
        if now - told >= DIAGNOSE_S or _news(self._monitor.check(now)) != news:
            self.diagnose()

    def _on_reset(self, _: Trigger.Request, response: Trigger.Response) -> Trigger.Response:
        if self.detector is None:
            response.success, response.message = False, "the node is not configured: there is no memory"
        else:
            self.detector.reset_memory()
            response.success = True
            response.message = "the next set is answered as without a past; one that is being computed is not"
        return response

    def _on_parameters(self, parameters: list[Parameter]) -> SetParametersResult:
        """Takes live changes, refuses the others with the reason."""
        names = {item.name for item in dataclasses.fields(DetectorParameters)}
        changes = {item.name: item.value for item in parameters if item.name in names}
        try:
            wanted = changed(self.parameters, changes, configured=self.detector is not None)
        except ConfigError as error:
            return SetParametersResult(successful=False, reason=str(error))
        self.parameters = wanted
        self._monitor.policy = self._health_policy()
        if self.detector is not None:
            self.detector.change(wanted)
        return SetParametersResult(successful=True)

    def _health_policy(self) -> HealthPolicy:
        return HealthPolicy(stale_after_s=self.parameters.stale_after)


def _news(health: Health) -> tuple[State, str]:
    """What is told at once: another state, and at the start another reason why nothing is answered."""
    return health.state, health.text if health.state == State.WAITING else ""


class DetectorProcess:
    """The node as a process: starts itself unless a lifecycle manager is to, ends in order."""

    grace_s = 5.0

    def __init__(self) -> None:
        self.node = DetectorNode()
        NodeLog(self.node)
        if not self.node.parameters.autostart:
            return
        for start in (self.node.trigger_configure, self.node.trigger_activate):
            if start() != TransitionCallbackReturn.SUCCESS:
                raise self.node.problem or EngineError("the node cannot be started")

    def finished(self) -> bool:
        return False

    def idle(self) -> bool:
        """Sets that are there are answered before the node goes."""
        return self.node.detector is None or self.node.detector.idle()

    def close(self) -> None:
        if self.node.detector is not None:
            self.node.detector.finish()
        self.node.diagnose()
        self.node.close()


def main() -> int:
    return run("detector_node", DetectorProcess)


if __name__ == "__main__":
    sys.exit(main())
