# SPDX-License-Identifier: Apache-2.0
"""MCAP files of Foxglove's schemas (protobuf or JSON) as ROS 2 messages, as foxglove/nuscenes2mcap writes them.

`ros2 bag play` cannot publish such files. Topics and frames keep their names.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from mcap.reader import make_reader
from rosbags.typesys import Stores, get_typestore
from tqdm import tqdm

from qdbev_ros.core.errors import DataError, one_line
from qdbev_ros.core.mcap_file import McapFile

STORE = get_typestore(Stores.ROS2_JAZZY)
TYPES = STORE.types
TRANSFORMS = ("foxglove.FrameTransform", "foxglove.FrameTransforms")
PICTURES = ("foxglove.CompressedImage", "foxglove.RawImage")
STILL = 1e-9  # metres, and units of a quaternion: a transform that moves less in a whole file is a static one


@dataclass(frozen=True)
class Imported:
    """Messages written by topic, and those left out by "topic (schema)"."""

    written: Counter[str]
    left_out: Counter[str]


@dataclass(frozen=True)
class _Message:
    """One of ROS 2, as it is written."""

    msgtype: str
    data: bytes


@dataclass(frozen=True)
class _Transform:
    parent: str
    child: str
    message: Any  # geometry_msgs/TransformStamped
    numbers: tuple[float, ...]


def import_foxglove(source: Path, out: Path) -> Imported:
    """Writes `source`'s pictures, calibrations and transforms to the ROS 2 bag `out` (.mcap).

    Raises DataError that names the file and what in it cannot be read.
    """
    total, found = _summary(source)
    still = _still_transforms(source)
    written: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    bag = McapFile(out)
    try:
        declared: set[str] = set()

        def write(topic: str, stamp_ns: int, message: _Message) -> None:
            if topic not in declared:
                bag.add_topic(topic, message.msgtype, STORE, latched=topic == "/tf_static")
                declared.add(topic)
            bag.write(topic, stamp_ns, message.data)
            written[topic] += 1

        if still:
            write("/tf_static", found, _tf(still.values()))
        for topic, schema, log_ns, content in tqdm(
            _messages(source), desc="import", total=total, unit=" messages", disable=None
        ):
            if schema in TRANSFORMS:
                moving = [transform for transform in content if transform.child not in still]
                if moving:
                    write("/tf", log_ns, _tf(moving))
            elif schema in _CONVERT:
                write(topic, log_ns, content)
            else:
                left_out[f"{topic} ({schema or 'no schema'})"] += 1
        bag.close()
    except BaseException:
        bag.discard()
        raise
    return Imported(written, left_out)


def _summary(source: Path) -> tuple[int | None, int]:
    """(number of messages where the file says it, time of the first one). Refuses files that this is not for."""
    try:
        with source.open("rb") as stream:
            summary = make_reader(stream).get_summary()
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}") from error
    except Exception as error:  # mcap's own, struct's, the decompressors': whatever damaged bytes lead to
        raise DataError(f"{source} is no MCAP file that can be read: {one_line(error)}") from error
    if summary is None or summary.statistics is None:
        raise DataError(f"{source} has no summary, it was not closed: mcap recover {source} -o whole.mcap")
    schemas = {schema.name for schema in summary.schemas.values()}
    if any(schema.encoding == "ros2msg" for schema in summary.schemas.values()):
        raise DataError(f"{source} holds ROS 2 messages already: play it as it is")
    if not schemas & set(PICTURES):
        raise DataError(
            f"{source} holds no {' or '.join(PICTURES)}; its schemas: {', '.join(sorted(schemas)) or 'none'}"
        )
    return summary.statistics.message_count, summary.statistics.message_start_time


def _messages(source: Path, schemas: tuple[str, ...] = ()) -> Iterator[tuple[str, str, int, Any]]:
    """(topic, schema, log time, content) in the order of time; content as of _Decoder, or None."""
    decode = _Decoder(source)
    with source.open("rb") as stream:
        reader = make_reader(stream)
        topics = None
        if schemas:
            summary = reader.get_summary()
            assert summary is not None
            wanted = {number for number, schema in summary.schemas.items() if schema.name in schemas}
            topics = [channel.topic for channel in summary.channels.values() if channel.schema_id in wanted]
            if not topics:
                return
        try:
            for schema, channel, message in reader.iter_messages(topics):
                name = schema.name if schema else ""
                known = name in TRANSFORMS or name in _CONVERT
                yield (
                    channel.topic,
                    name,
                    message.log_time,
                    decode(schema, channel, message) if known else None,
                )
        except DataError:
            raise
        except Exception as error:  # as in _summary
            raise DataError(f"{source} is damaged: {one_line(error)}") from error


class _Decoder:
    """Reads a message by the schema that the file carries along: a list of _Transform, or what becomes of a picture
    or calibration. Raises DataError that names the topic.
    """

    def __init__(self, source: Path) -> None:
        self._source = source
        self._classes: dict[int, Any] = {}

    def __call__(self, schema: Any, channel: Any, message: Any) -> list[_Transform] | _Message:
        if channel.message_encoding not in ("json", "protobuf"):
            raise DataError(
                f"{self._source}: {channel.topic} is encoded as {channel.message_encoding!r}; protobuf and json can "
                f"be read"
            )
        try:
            if channel.message_encoding == "json":
                content = json.loads(message.data)
            else:
                if schema.id not in self._classes:
                    self._classes[schema.id] = _protobuf_class(schema)
                content = self._classes[schema.id].FromString(message.data)
            if schema.name not in TRANSFORMS:
                return _serialised(_CONVERT[schema.name](content))
            transforms = _transforms(content)
            _tf(transforms)  # fails here where it would later
            return transforms
        except Exception as error:  # JSON may hold anything, and so may damaged bytes
            raise DataError(
                f"{self._source}: a message on {channel.topic} is no {schema.name}: {one_line(error)}"
            ) from error


def _protobuf_class(schema: Any) -> Any:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(schema.data).file:  # dependencies come first
        pool.Add(file)
    return GetMessageClass(pool.FindMessageTypeByName(schema.name))


def _get(content: Any, name: str, default: Any = None) -> Any:
    return content.get(name, default) if isinstance(content, dict) else getattr(content, name)


def _stamp(content: Any) -> Any:
    """builtin_interfaces/Time of a google.protobuf.Timestamp, or of JSON's sec and nsec."""
    time = _get(content, "timestamp", {})
    if isinstance(time, dict):
        seconds, nanoseconds = int(time.get("sec", 0)), int(time.get("nsec", 0))
    else:
        seconds, nanoseconds = time.seconds, time.nanos
    return TYPES["builtin_interfaces/msg/Time"](sec=seconds, nanosec=nanoseconds)


def _header(content: Any, frame: str) -> Any:
    return TYPES["std_msgs/msg/Header"](stamp=_stamp(content), frame_id=frame)


def _bytes(content: Any) -> np.ndarray[Any, np.dtype[np.uint8]]:
    data = _get(content, "data", b"")
    return np.frombuffer(base64.b64decode(data) if isinstance(data, str) else data, np.uint8)


def _compressed(content: Any) -> Any:
    return TYPES["sensor_msgs/msg/CompressedImage"](
        header=_header(content, _get(content, "frame_id", "")),
        format=_get(content, "format", ""),
        data=_bytes(content),
    )


def _raw(content: Any) -> Any:
    return TYPES["sensor_msgs/msg/Image"](
        header=_header(content, _get(content, "frame_id", "")),
        height=int(_get(content, "height", 0)),
        width=int(_get(content, "width", 0)),
        encoding=_get(content, "encoding", ""),
        is_bigendian=0,
        step=int(_get(content, "step", 0)),
        data=_bytes(content),
    )


def _camera_info(content: Any) -> Any:
    def numbers(name: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Zeros where the file leaves it out, which the node takes as unset."""
        values = np.array(_get(content, name, []), np.float64)
        return values if len(values) == count else np.zeros(count)

    roi = TYPES["sensor_msgs/msg/RegionOfInterest"](
        x_offset=0, y_offset=0, height=0, width=0, do_rectify=False
    )
    return TYPES["sensor_msgs/msg/CameraInfo"](
        header=_header(content, _get(content, "frame_id", "")),
        height=int(_get(content, "height", 0)),
        width=int(_get(content, "width", 0)),
        distortion_model=_get(content, "distortion_model", ""),
        d=np.array(_get(content, "D", []), np.float64),
        k=numbers("K", 9),
        r=numbers("R", 9),
        p=numbers("P", 12),
        binning_x=0,
        binning_y=0,
        roi=roi,
    )


_CONVERT: dict[str, Callable[[Any], Any]] = {
    "foxglove.CompressedImage": _compressed,
    "foxglove.RawImage": _raw,
    "foxglove.CameraCalibration": _camera_info,
}


def _transforms(content: Any) -> list[_Transform]:
    """Those of a FrameTransform or FrameTransforms."""
    several = content.get("transforms") if isinstance(content, dict) else getattr(content, "transforms", None)
    return [_transform(item) for item in ([content] if several is None else several)]


def _transform(content: Any) -> _Transform:
    translation, rotation = _get(content, "translation", {}), _get(content, "rotation", {})
    parent, child = _get(content, "parent_frame_id", ""), _get(content, "child_frame_id", "")
    moved = {axis: float(_get(translation, axis, 0.0)) for axis in "xyz"}
    turned = {axis: float(_get(rotation, axis, 0.0)) for axis in "xyzw"}
    message = TYPES["geometry_msgs/msg/TransformStamped"](
        header=_header(content, parent),
        child_frame_id=child,
        transform=TYPES["geometry_msgs/msg/Transform"](
            translation=TYPES["geometry_msgs/msg/Vector3"](**moved),
            rotation=TYPES["geometry_msgs/msg/Quaternion"](**turned),
        ),
    )
    return _Transform(parent, child, message, (*moved.values(), *turned.values()))


def _still_transforms(source: Path) -> dict[str, _Transform]:
    """child -> transform, of those that never move; sensors' are sent again and again on /tf."""
    first: dict[str, _Transform] = {}
    moving: set[str] = set()
    for _, _, _, content in _messages(source, TRANSFORMS):
        for transform in content:
            known = first.setdefault(transform.child, transform)
            same = np.allclose(known.numbers, transform.numbers, rtol=0, atol=STILL)
            if known.parent != transform.parent or not same:
                moving.add(transform.child)
    return {child: transform for child, transform in first.items() if child not in moving}


def _tf(transforms: Iterable[_Transform]) -> _Message:
    return _serialised(TYPES["tf2_msgs/msg/TFMessage"](transforms=[t.message for t in transforms]))


def _serialised(message: Any) -> _Message:
    return _Message(message.__msgtype__, bytes(STORE.serialize_cdr(message, message.__msgtype__)))
