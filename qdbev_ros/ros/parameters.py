# SPDX-License-Identifier: Apache-2.0
"""Node parameters, declared once: default, text and legal values are in the dataclass field that holds the value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.presets import TopicPreset

Value = str | int | float | bool
P = TypeVar("P")


def parameter(
    default: Value,
    text: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    live: bool = False,
) -> Any:
    """A dataclass field that is a ROS parameter. Numbers need `low` and `high`; `live` ones may change any time."""
    metadata = {"text": text, "low": low, "high": high, "choices": choices, "live": live}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DetectorParameters:
    """Parameters of qdbev_detector."""

    model: str = parameter("", "path of the .qdbev package")
    engine: str = parameter(
        "auto",
        "inference engine: auto (TensorRT where there is one, else ONNX Runtime), onnxruntime, openvino, tensorrt",
    )
    preset: str = parameter("nuscenes", "topic and frame names: a preset of config/presets, or a YAML file")
    calibration: str = parameter("", "calibration file; what it holds wins over CameraInfo and transforms")
    fixed_frame: str = parameter("", "frame in which the vehicle moves; empty: the preset's")
    base_frame: str = parameter("", "frame of the vehicle; empty: the preset's")
    model_frame: str = parameter(
        "", "frame of the model and of all outputs: x right, y forward, z up; empty: the preset's"
    )
    ego_motion: str = parameter(
        "", "where the vehicle's motion comes from; empty: as the preset says", choices=("", "tf", "odometry")
    )
    image_reliability: str = parameter(
        "best_effort",
        "QoS of the image subscriptions; reliable needs a publisher that offers it",
        choices=("best_effort", "reliable"),
    )
    max_spread: float = parameter(
        0.06, "seconds between the oldest and newest picture of a set", 0.001, 1.0, live=True
    )
    sync_deadline: float = parameter(
        0.08,
        "seconds that the first picture of a set waits for the others; less than the cameras' period",
        0.01,
        10.0,
        live=True,
    )
    sync_anchor: str = parameter(
        CAMERAS[0], "camera around whose pictures incomplete sets are made", choices=CAMERAS, live=True
    )
    tf_timeout: float = parameter(
        0.5, "seconds that a set waits for transforms and CameraInfo", 0.0, 10.0, live=True
    )
    missing_cameras: str = parameter(
        "mask",
        "what a set without some camera gets: mask, an answer from the others, or skip, none",
        choices=("mask", "skip"),
        live=True,
    )
    min_cameras: int = parameter(3, "cameras without which a set is not answered", 1, len(CAMERAS), live=True)
    queue_size: int = parameter(
        1, "sets that may wait for the engine; the oldest goes first when full", 1, 1000, live=True
    )
    engine_threads: int = parameter(
        0, "threads of an engine on the CPU; 0: one for each core that the node may use", 0, 256
    )
    decode_threads: int = parameter(2, "threads that decode pictures", 1, 64)
    max_gap: float = parameter(
        2.0, "seconds without a set after which the memory is forgotten", 0.01, 60.0, live=True
    )
    max_speed: float = parameter(
        60.0, "m/s; a vehicle that moved faster has jumped: memory is forgotten", 1.0, 1000.0, live=True
    )
    stale_after: float = parameter(
        1.0, "seconds without an answer after which the state is stale", 0.05, 60.0, live=True
    )
    score_threshold: float = parameter(0.0, "lowest score in ~/detections and ~/objects", 0.0, 1.0, live=True)
    max_detections: int = parameter(
        300, "most boxes in ~/detections and ~/objects, best first", 1, 300, live=True
    )
    display_threshold: float = parameter(
        0.3, "lowest score in ~/markers and in the overlay", 0.0, 1.0, live=True
    )
    overlay_rate: float = parameter(
        5.0,
        "most pictures a second on ~/overlay/compressed, drawn only for listeners; 0: none",
        0.0,
        60.0,
        live=True,
    )
    autostart: bool = parameter(
        True, "configure and activate at the start; false: a lifecycle manager does it"
    )

    def with_preset(self, preset: TopicPreset) -> DetectorParameters:
        """The same with the preset's names where these are empty. Raises ConfigError without an odometry topic."""
        names = ("fixed_frame", "base_frame", "model_frame", "ego_motion")
        filled = dataclasses.replace(self, **{n: getattr(self, n) or getattr(preset, n) for n in names})
        if filled.ego_motion == "odometry" and not preset.odometry:
            raise ConfigError(
                f"parameter ego_motion is 'odometry', but preset {preset.name} names no such topic"
            )
        return filled


@dataclass(frozen=True)
class PlayerParameters:
    """Parameters of qdbev_bag_player."""

    bag: str = parameter("", "bag to play: an .mcap or .db3 file, or a bag folder")
    preset: str = parameter("nuscenes", "preset or YAML file: the bag must hold its cameras")
    rate: float = parameter(1.0, "speed; 2 is twice as fast as recorded", 0.01, 100.0)
    loop: bool = parameter(False, "start again at the end, with the original stamps")
    endless: bool = parameter(
        False, "with loop: stamps and the vehicle's motion go on where the last pass ended"
    )
    clock: bool = parameter(False, "publish /clock")
    wait: float = parameter(
        60.0, "seconds to wait for a subscription on every topic of wait_for", 0.0, 3600.0
    )
    wait_for: str = parameter("", "bag's topics, or answers, to wait for; empty: the preset's images")
    linger: float = parameter(2.0, "seconds to stay after the last message or the last answer", 0.0, 600.0)
    answers: str = parameter(
        "", "the detector's output topic: when it has answered the last set, linger no longer"
    )
    max_ahead: int = parameter(
        0, "sets that may be without an answer; more and playing holds; 0: never", 0, 1000
    )


@dataclass(frozen=True)
class RecorderParameters:
    """Parameters of qdbev_recorder."""

    output: str = parameter("", "file to write, OUT.mcap; an existing one is replaced at the end")
    topics: str = parameter("", "topics to record, blanks between")


def declare(node: Any, kind: type[P]) -> P:
    """Declares every parameter of `kind` on a rclpy node and returns the values.

    They are read-only where none is live; else whoever declares them must answer changes, with `changed`.
    Raises ConfigError that names the parameter.
    """
    from rcl_interfaces.msg import FloatingPointRange, IntegerRange, ParameterDescriptor
    from rclpy.exceptions import ParameterException
    from rclpy.parameter import Parameter

    types = {
        str: Parameter.Type.STRING,
        bool: Parameter.Type.BOOL,
        int: Parameter.Type.INTEGER,
        float: Parameter.Type.DOUBLE,
    }
    values = {}
    read_only = not any(item.metadata["live"] for item in dataclasses.fields(kind))  # type: ignore[arg-type]
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        default = getattr(kind(), item.name)
        meta = item.metadata
        descriptor = ParameterDescriptor(
            description=meta["text"], read_only=read_only, type=types[type(default)].value
        )
        if isinstance(default, float):
            descriptor.floating_point_range = [
                FloatingPointRange(from_value=meta["low"], to_value=meta["high"])
            ]
        elif isinstance(default, int) and not isinstance(default, bool):
            descriptor.integer_range = [IntegerRange(from_value=meta["low"], to_value=meta["high"], step=1)]
        try:
            values[item.name] = node.declare_parameter(item.name, default, descriptor).value
        except ParameterException as error:
            raise ConfigError(
                f"parameter {item.name} ({meta['text']}): {' '.join(str(error).split())}"
            ) from error
        _check_choice(item, values[item.name])
    return kind(**values)


def changed(
    current: DetectorParameters, changes: Mapping[str, Value], configured: bool
) -> DetectorParameters:
    """`current` with `changes`, whose types and ranges ROS has checked. Raises ConfigError where one is not legal, or
    cannot change while the node is `configured`.
    """
    for item in dataclasses.fields(current):
        if item.name not in changes or changes[item.name] == getattr(current, item.name):
            continue
        if configured and not item.metadata["live"]:
            raise ConfigError(
                f"parameter {item.name} cannot change while the node is configured: clean it up, set it, configure "
                "again (ros2 lifecycle set NODE deactivate, cleanup; ros2 param set; configure, activate)"
            )
        _check_choice(item, changes[item.name])
    return DetectorParameters(**{**dataclasses.asdict(current), **changes})


def _check_choice(item: Any, value: Value) -> None:
    choices = item.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(f"parameter {item.name} is {value!r}; use one of {', '.join(choices)}")
