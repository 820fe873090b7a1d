# SPDX-License-Identifier: Apache-2.0
"""Files that are written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import DataError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name with the same suffix to write to, which becomes `path` at the end; folders above it are made.

    After an exception `path` is as it was, after a power cut the old or the new one. Of several writers, threads or
    processes, the last one wins. Raises DataError where nothing can be written.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # renamed, never made, or its folder is none
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """Writes a text whole or not at all. Raises DataError."""
    with whole_file(path) as temporary:
        temporary.write_text(text)


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Writes JSON whole or not at all; with `indent` None it is one line. Raises DataError."""
    write_text(path, json.dumps(content, indent=indent) + "\n")
