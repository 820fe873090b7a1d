# SPDX-License-Identifier: Apache-2.0
"""Where compiled engines and the gate's verdicts are kept, and what tells one from another.

$QDBEV_CACHE, or qdbev/engines below $XDG_CACHE_HOME (~/.cache). Compiled engines are programs: a folder that others can
write to is not used. Everything in it can be made again, so deleting it is always safe.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import whole_file

LOG = logging.getLogger(__name__)
PLAN, SEAL = "engine.plan", "engine.json"  # a compiled engine and its SHA-256


@dataclass(frozen=True)
class EngineKey:
    """What a compiled engine and its verdict hold for: one package, one backend in one version, one device.

    package: SHA-256 of the file · backend: name · version: of the runtime · device: name and capability ·
    settings: whatever else changes the compiled engine, such as the number of threads
    """

    package: str
    backend: str
    version: str
    device: str
    settings: str = ""

    @property
    def digest(self) -> str:
        """Changes with every field and with the code that lowers, runs and checks."""
        fields = json.dumps([*asdict(self).values(), code_digest()])
        return hashlib.sha256(fields.encode()).hexdigest()[:24]


@cache
def code_digest() -> str:
    """SHA-256 of this package's sources: what was checked is checked again when the code changes."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.[pc]*")):
        if path.suffix in (".py", ".c"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def cache_folder() -> Path | None:
    """The folder of all engines; None, with the reason in the log, where this user alone cannot write to one."""
    own, base = os.environ.get("QDBEV_CACHE"), os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        folder = Path(own) if own else Path(base).expanduser() / "qdbev" / "engines"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        _warn_unused(str(error))
        return None
    if state.st_uid != os.getuid():
        _warn_unused(f"{folder} belongs to another user (number {state.st_uid})")
    elif state.st_mode & 0o022:
        _warn_unused(f"others can write to {folder} (chmod go-w {folder})")
    elif not os.access(folder, os.W_OK):
        _warn_unused(f"{folder} cannot be written to")
    else:
        return folder
    return None


@cache
def _warn_unused(reason: str) -> None:
    """Once for each reason."""
    LOG.warning("engines are built and checked anew at every start, because %s", reason)


def engine_folder(key: EngineKey) -> Path | None:
    """The folder of one engine, with the key in words beside it; None where nothing can be kept."""
    root = cache_folder()
    if root is None:
        return None
    folder = root / f"{key.backend}-{key.digest}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        _warn_unused(str(error))
        return None
    if not (folder / "key.json").exists():
        keep(folder / "key.json", json.dumps(asdict(key), indent=1).encode())
    return folder


def timing_file(folder: Path, key: EngineKey) -> Path:
    """How long TensorRT's kernels took on this device, for all engines on it."""
    words = (key.version, key.device, "timing.cache")
    return folder.parent / "-".join("".join(c if c.isalnum() or c == "." else "_" for c in w) for w in words)


def discard(key: EngineKey) -> str:
    """Deletes a compiled engine that is no good and the timings that it was built by; words for the message on it."""
    folder = engine_folder(key)
    if folder is None or not (folder / PLAN).exists():
        return ""
    shutil.rmtree(folder, ignore_errors=True)
    timing_file(folder, key).unlink(missing_ok=True)
    return f" ({folder} is deleted, the next start builds the engine again)"


def keep(path: Path, content: bytes) -> None:
    """Writes a file whole, or says why not: what cannot be kept is made again."""
    try:
        with whole_file(path) as temporary:
            temporary.write_bytes(content)
    except DataError as error:
        LOG.warning("%s; it will be made again at the next start", error)


def sha256(content: bytes) -> str:
    """What tells the bytes of a kept engine from others."""
    return hashlib.sha256(content).hexdigest()


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON mapping; None where there is no whole one, which is as good as not being there."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


@cache
def cpu_name() -> str:
    """What the CPU calls itself and a digest of what it can do: kernels are chosen by that."""
    source = Path("/proc/cpuinfo")
    lines = source.read_text().splitlines() if source.exists() else []
    first = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in reversed(lines)}
    able = first.get("flags") or first.get("Features") or ""
    name = first.get("model name") or first.get("CPU part") or platform.processor()
    return f"{platform.machine()} {name} {hashlib.sha256(able.encode()).hexdigest()[:8]}"
