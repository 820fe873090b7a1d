# SPDX-License-Identifier: Apache-2.0
"""Bags without rosbag2: read through `rosbags`, and one MCAP file written from raw messages."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rosbags.highlevel import AnyReader
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from qdbev_ros.core.errors import DataError, one_line
from qdbev_ros.core.mcap_file import McapFile
from qdbev_ros.ros.presets import TopicPreset


class BagReader:
    """A ROS 2 bag: an .mcap or .db3 file, or a bag folder. A context manager; raises DataError that names the bag."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise DataError(f"bag {self.path} doesn't exist")
        try:
            self._reader = AnyReader([self.path], default_typestore=get_typestore(Stores.ROS2_JAZZY))
            self._reader.open()
        except Exception as error:  # rosbags' own, sqlite's, struct's: whatever damaged bytes lead to
            text = one_line(error)
            hint = ""
            if "Profile" in text:
                hint = "; if Foxglove's tools wrote it: qdbev import-foxglove"
            elif "end magic" in text:
                hint = f"; if its recording was cut off: mcap recover {self.path} -o whole.mcap"
            raise DataError(f"bag {self.path} cannot be read: {text}{hint}") from error
        if not self._reader.is2:
            self.close()
            raise DataError(
                f"{self.path} is a ROS 1 bag: rosbags-convert --src {self.path} --dst {self.path.with_suffix('')}"
            )

    def __enter__(self) -> BagReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._reader.close()

    @property
    def types(self) -> dict[str, str]:
        """topic -> message type, of topics that hold a message."""
        return {c.topic: c.msgtype for c in self._reader.connections if c.msgcount}

    @property
    def counts(self) -> dict[str, int]:
        """topic -> number of messages, of topics that hold one."""
        counts: dict[str, int] = {}
        for connection in self._reader.connections:
            if connection.msgcount:
                counts[connection.topic] = counts.get(connection.topic, 0) + connection.msgcount
        return counts

    @property
    def duration_s(self) -> float:
        return self._reader.duration * 1e-9

    def missing_topics(self, preset: TopicPreset) -> list[str]:
        """The pictures' and CameraInfos' topics of `preset` that the bag lacks."""
        held = self.types
        return [topic for topic in (*preset.image_topics(), *preset.info_topics()) if topic not in held]

    def require_cameras(self, preset: TopicPreset) -> None:
        """Raises DataError that names the camera topics of `preset` that the bag lacks."""
        missing = self.missing_topics(preset)
        if missing:
            raise DataError(
                f"bag {self.path} lacks {', '.join(missing)} (preset {preset.name}); it holds "
                f"{', '.join(sorted(self.types)) or 'no message at all'}"
            )

    def raw(self, topics: Sequence[str] | None = None) -> Iterator[tuple[str, int, bytes]]:
        """(topic, log time in ns, CDR bytes) in order of time, of all topics or of those in `topics`."""
        chosen = [c for c in self._reader.connections if topics is None or c.topic in topics]
        messages = iter(self._reader.messages(chosen) if chosen else ())
        while True:
            try:
                connection, stamp, data = next(messages)
            except StopIteration:
                return
            except Exception as error:  # as in __init__
                raise DataError(f"bag {self.path} is damaged: {one_line(error)}") from error
            yield connection.topic, stamp, bytes(data)

    def first_topic(self, topics: Sequence[str]) -> str:
        """That of `topics` on which the bag's first message is; the first of them where there is none."""
        return next((topic for topic, _, _ in self.raw(topics)), topics[0])

    def messages(self, topics: Sequence[str]) -> Iterator[tuple[str, int, Any]]:
        """(topic, log time in ns, message) as plain objects of `rosbags`, fields as in ROS, arrays as numpy."""
        types = self.types
        for topic, stamp, data in self.raw(topics):
            try:
                message = self._reader.deserialize(data, types[topic])
            except Exception as error:  # as in __init__
                raise DataError(
                    f"bag {self.path} is damaged: a message on {topic} is no {types[topic]}: {one_line(error)}"
                ) from error
            yield topic, stamp, message


class BagWriter:
    """An MCAP file of raw messages whose definitions come from the installed ROS packages."""

    def __init__(self, path: str | Path) -> None:
        self._file = McapFile(path)
        self._types = get_typestore(Stores.EMPTY)
        self.write = self._file.write
        self.close = self._file.close

    @property
    def path(self) -> Path:
        return self._file.path

    def add_topic(self, topic: str, msgtype: str, latched: bool = False) -> None:
        """Declares a topic. Raises DataError where no installed package has the message type."""
        register_installed_type(self._types, msgtype)
        self._file.add_topic(topic, msgtype, self._types, latched)


def register_installed_type(types: Any, msgtype: str) -> None:
    """Adds `msgtype` (PACKAGE/msg/NAME) and all that it holds to a rosbags typestore, from the packages' .msg files."""
    if msgtype in types.fielddefs:
        return
    text = installed_definition(msgtype)
    package = msgtype.split("/")[0]
    for name in re.findall(r"^\s*([A-Za-z][\w/]*)(?:\[.*?\])?\s+[a-z]\w*", text, re.MULTILINE):
        if name[0].isupper() or "/" in name:
            parts = name.split("/")
            register_installed_type(types, f"{parts[0] if len(parts) > 1 else package}/msg/{parts[-1]}")
    own = f"{package}/msg/{msgtype.split('/')[-1]}"
    types.register({own: get_types_from_msg(text, own)[own]})


def installed_definition(msgtype: str) -> str:
    """The .msg text of an installed message type. Raises DataError that names the type."""
    from ament_index_python.packages import PackageNotFoundError, get_package_share_directory

    package, _, name = msgtype.split("/")
    try:
        return (Path(get_package_share_directory(package)) / "msg" / f"{name}.msg").read_text()
    except (PackageNotFoundError, OSError) as error:
        raise DataError(
            f"no definition of message type {msgtype}: source the workspace that has it"
        ) from error
