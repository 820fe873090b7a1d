# SPDX-License-Identifier: Apache-2.0
"""Where compiled engines and the gate's verdicts are kept, and what tells one from another.

$QDBEV_CACHE, or qdbev/engines below $XDG_CACHE_HOME (~/.cache). Compiled engines are programs: a folder that others can
write to is not used. Everything in it can be made again, so deleting it is always safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any


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
    """The folder of all engines; None where there is none that this user alone can write to."""
    try:
        own = os.environ.get("QDBEV_CACHE")
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = Path(own) if own else base / "qdbev" / "engines"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = folder.stat()
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    private = state.st_uid == os.getuid() and not state.st_mode & 0o022
    return folder if private and os.access(folder, os.W_OK) else None


def engine_folder(key: EngineKey) -> Path | None:
    """The folder of one engine, with the key in words beside it; None where nothing can be kept."""
    root = cache_folder()
    if root is None:
        return None
    folder = root / f"{key.backend}-{key.digest}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        if not (folder / "key.json").exists():
            write_atomically(folder / "key.json", json.dumps(asdict(key), indent=1).encode())
    except OSError:
        return None
    return folder


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also with two processes at once."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
