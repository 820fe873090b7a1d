# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import DataError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to, which becomes `path` at the end; folders above it are made, a link's target is replaced.

    After an exception `path` is as it was, after a power cut the old or the new one. Of several writers, threads or
    processes, the last one wins. What is there and no file (/dev/stdout, a pipe) is written to as it stands. Raises
    DataError where nothing can be written.
    """
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if path.exists() and not path.is_file():
            yield path
            return
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        # Nobody who looks for files of the target's kind finds this one.
        temporary = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all. Raises DataError."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Writes JSON whole or not at all; with `indent` None it is one line. Raises DataError."""
    write_text(path, json.dumps(content, indent=indent) + "\n")
