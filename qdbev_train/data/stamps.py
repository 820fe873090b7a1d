# SPDX-License-Identifier: Apache-2.0
"""SHA-256 of files, read again only where a file may have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from qdbev_ros.core.errors import DataError
from qdbev_train.data.json_tables import Progress

NAME = "stamps.json"
BLOCK = 4 << 20
# A file that was changed a moment ago could be changed again within the same tick of the file system's clock.
SETTLED_NS = 2_000_000_000


class Stamps:
    """Hashes of the files below `root`, each with size, mtime and ctime at the time of hashing.

    The three together catch every edit: ctime changes with each, and no program can set it back. A copied data root
    has other times, so its files are hashed once.
    """

    def __init__(self, root: Path, known: dict[str, list[object]]) -> None:
        self._root, self._known = root, known
        self._hashes: dict[str, str] = {}  # of this process, whether settled or not

    @staticmethod
    def read(root: Path, places: Sequence[Path]) -> Stamps:
        """The stamps kept in any of `places`; a damaged file counts as none."""
        known: dict[str, list[object]] = {}
        for place in reversed(places):
            with contextlib.suppress(OSError, ValueError):
                content = json.loads((place / NAME).read_bytes())
                if isinstance(content, dict):
                    known |= content
        return Stamps(root, known)

    def knows(self, path: Path) -> bool:
        """Whether the file is as it was when it was hashed."""
        key = self._key(path)
        entry = self._known.get(key)
        if isinstance(entry, list) and entry[:3] == _stamp(path) and len(entry) == 4:
            self._hashes[key] = str(entry[3])
        return key in self._hashes

    def sha256(self, path: Path) -> str:
        """The hash of a file that `knows` or `hash` was asked about."""
        return self._hashes[self._key(path)]

    def hash(self, path: Path, progress: Progress) -> None:
        """Reads a file and keeps its hash. Raises DataError where it cannot be read or changes meanwhile."""
        before, digest = _stamp(path), hashlib.sha256()
        try:
            with path.open("rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    progress(len(block))
        except OSError as error:
            raise DataError(f"{path}: table cannot be read: {error.strerror}") from error
        if _stamp(path) != before:
            raise DataError(f"{path}: changed while it was read; try again when it is complete")
        key = self._key(path)
        self._hashes[key] = digest.hexdigest()
        if time.time_ns() - max(before[1:]) > SETTLED_NS:
            self._known[key] = [*before, digest.hexdigest()]
        else:
            self._known.pop(key, None)

    def write(self, places: Sequence[Path]) -> None:
        """Keeps the stamps in the first place that can be written to; without any, files are hashed every time."""
        for place in places:
            temporary = place / f"{NAME}.{socket.gethostname()}.{os.getpid()}.tmp"
            with contextlib.suppress(OSError):
                place.mkdir(parents=True, exist_ok=True)
                temporary.write_text(json.dumps(self._known, indent=0))
                os.replace(temporary, place / NAME)
                return

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def _stamp(path: Path) -> list[int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: table cannot be read: {error.strerror}") from error
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
