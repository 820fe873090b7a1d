# SPDX-License-Identifier: Apache-2.0
"""One bag as one MCAP file, as `ros2 bag play`, Foxglove and rosbags read it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from rosbags.interfaces import (
    Connection,
    Qos,
    QosDurability,
    QosHistory,
    QosLiveliness,
    QosReliability,
    QosTime,
)
from rosbags.rosbag2 import StoragePlugin, Writer

from qdbev_ros.core.errors import DataError

_FOREVER = QosTime(2147483647, 4294967295)


class McapFile:
    """Takes CDR messages of declared topics. The file appears under its name when closed whole.

    Raises DataError where `path` does not end in .mcap or cannot be written.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix != ".mcap":
            raise DataError(f"{self.path}: a bag is one MCAP file, give a name that ends in .mcap")
        # Version 8 spells the offered QoS in numbers, which Humble and everything after it understands. rosbags writes
        # a folder around its file; the file alone is complete, and names itself as the folder.
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f".{self.path.stem}-", dir=self.path.parent))
            self._writer = Writer(self._written.parent, version=8, storage_plugin=StoragePlugin.MCAP)
            self._writer.open()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error
        self._connections: dict[str, Connection] = {}
        self._failure: OSError | None = None  # of a write

    def add_topic(self, topic: str, msgtype: str, types: Any, latched: bool) -> None:
        """Declares a topic; `types` is the rosbags typestore that holds `msgtype`."""
        durability = QosDurability.TRANSIENT_LOCAL if latched else QosDurability.VOLATILE
        qos = Qos(
            QosHistory.KEEP_LAST, 10, QosReliability.RELIABLE, durability, _FOREVER, _FOREVER,
            QosLiveliness.AUTOMATIC, _FOREVER, False,
        )  # fmt: skip
        self._connections[topic] = self._writer.add_connection(
            topic, msgtype, typestore=types, offered_qos_profiles=[qos]
        )

    def set_metadata(self, key: str, text: str) -> None:
        """Keeps a text beside the messages."""
        self._writer.set_custom_data(key, text)

    def write(self, topic: str, stamp_ns: int, data: bytes) -> None:
        """Appends one CDR message of a declared topic, received at `stamp_ns`."""
        try:
            self._writer.write(self._connections[topic], stamp_ns, data)
        except OSError as error:
            self._failure = error
            raise DataError(f"{self.path}: cannot be written: {error.strerror}") from error

    def close(self) -> None:
        """Ends the file and gives it its name; the DataError where that fails names what is left and how to read it."""
        try:
            if self._failure is not None:
                raise self._failure  # even if there is room again: nobody reads on behind what is cut off
            self._writer.close()
            os.replace(self._written, self.path)
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written: {error.strerror}; {self._keep()}") from error
        shutil.rmtree(self._folder, ignore_errors=True)

    def discard(self) -> None:
        """Throws away what was written."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def _written(self) -> Path:
        return self._folder / self.path.stem / self.path.name

    def _keep(self) -> str:
        """Gives the file as far as it was written a plain name; says which."""
        kept = self.path.with_suffix(".partial.mcap")
        try:
            os.replace(self._written, kept)
        except OSError:
            kept = self._written
        else:
            shutil.rmtree(self._folder, ignore_errors=True)
        return f"what was written is kept, read it with: mcap recover {kept} -o whole.mcap"
