# SPDX-License-Identifier: Apache-2.0
"""Kernels in C: compiled for this very CPU at the first start, kept beside compiled engines.

Compiling takes a fraction of a second. Where nothing can be kept (no home, a read-only one) they are compiled at every
start; where there is no compiler the engine runs without them and says so.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from qdbev_ros.engine.cache import cache_folder, cpu_name, keep, sha256

COMPILERS = ("cc", "gcc", "clang")
# Apple's clang for ARM knows -mcpu only; no compiler knows neither.
_TUNINGS = ("-march=native", "-mcpu=native")
# Nobody asks for traps or errno; compilers that must keep them leave loops with conditions in them as they are.
_FLAGS = ("-O3", "-fno-trapping-math", "-fno-math-errno")
_TIMEOUT_S = 60
_BLOCK, _GRAIN = 48, 24  # rows that kernels work on at a time, and that a part has at least


class KernelError(Exception):
    """The kernel cannot be had on this machine; the text says why."""


class Team:
    """Threads that share the rows of a job; None: one for each core that this process may use."""

    def __init__(self, threads: int | None, name: str) -> None:
        self.threads = threads or len(os.sched_getaffinity(0))
        # ctypes lets go of the interpreter while a kernel runs; the calling thread takes a share itself.
        self._pool = ThreadPoolExecutor(self.threads - 1, name) if self.threads > 1 else None

    def share(self, rows: int, work: Callable[[int, int, int], object]) -> None:
        """work(thread, first, last) for parts of the rows first <= row < last, each thread's one after the other."""
        parts = iter(_parts(rows, self.threads))

        def run(thread: int) -> None:
            for first, last in parts:  # what one thread takes no other one does
                work(thread, first, last)

        others = [self._pool.submit(run, i) for i in range(1, self.threads) if self._pool]
        run(0)
        for other in others:
            other.result()


def _parts(rows: int, threads: int) -> list[tuple[int, int]]:
    """Large parts first, so that there are few; small ones at last, so that nobody waits long for another thread."""
    found, first = list[tuple[int, int]](), 0
    while first < rows:
        fair = (rows - first) // (2 * threads) if threads > 1 else rows
        unit = _BLOCK if fair >= _BLOCK else _GRAIN
        size = max(_GRAIN, fair // unit * unit)
        found.append((first, min(first + size, rows)))
        first += size
    return found


def load(name: str) -> tuple[ctypes.CDLL, str]:
    """The kernel of `name`.c, compiled, and its SHA-256; built unless this CPU, compiler and source were seen before.

    The name of a kept file ends with its SHA-256: one that a power cut left half written would be loaded all the same,
    and end the process where the missing part is first touched. Raises KernelError.
    """
    source = Path(__file__).with_name(f"{name}.c")
    folder, said = cache_folder(), []
    for compiler in _compilers():
        try:
            seen = sha256("\0".join((source.read_text(), *compiler, *_FLAGS, cpu_name())).encode())[:16]
            for kept in folder.glob(f"{name}-{seen}-*.so") if folder else ():
                with suppress(OSError):  # also where nothing in the folder may be run
                    digest = sha256(kept.read_bytes())
                    if kept.stem.endswith(digest):
                        return ctypes.CDLL(str(kept)), digest
                    kept.unlink()
            return _build(compiler, source, folder, seen)
        except (KernelError, OSError) as error:
            said.append(str(error))
    raise KernelError(said[0] if said else f"there is no C compiler ({', '.join(COMPILERS)})")


def _compilers() -> list[list[str]]:
    """The commands that there are, $CC with its arguments first."""
    try:
        own = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation mark without its other half
        own = []
    return [command for command in (own, *([c] for c in COMPILERS)) if command and shutil.which(command[0])]


def _build(compiler: Sequence[str], source: Path, folder: Path | None, seen: str) -> tuple[ctypes.CDLL, str]:
    """Compiles, keeps and loads, from the kept file if that can be."""
    with tempfile.TemporaryDirectory(prefix="qdbev-") as own:
        made = Path(own) / f"{source.stem}.so"
        _compile(compiler, source, made)
        content = made.read_bytes()
        digest = sha256(content)
        if folder is not None:
            kept = folder / f"{source.stem}-{seen}-{digest}.so"
            keep(kept, content)
            with suppress(OSError):
                return ctypes.CDLL(str(kept)), digest
        return ctypes.CDLL(str(made)), digest


def _compile(compiler: Sequence[str], source: Path, made: Path) -> None:
    said = ""
    for tuning in _TUNINGS:
        command = [*compiler, *_FLAGS, tuning, "-shared", "-fPIC", str(source), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise KernelError(f"{compiler[0]} took more than {_TIMEOUT_S} s") from None
        if done.returncode == 0:
            return
        said = " ".join(done.stderr.split())[:200]
    raise KernelError(f"{compiler[0]} cannot build it: {said}")
