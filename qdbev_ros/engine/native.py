# SPDX-License-Identifier: Apache-2.0
"""The deformable sampling kernel in C: compiled for this very CPU at the first start, kept beside compiled engines.

Compiling takes a fraction of a second. Where nothing can be kept (no home, a read-only one) it is compiled at every
start; where there is no compiler the engine runs without the kernel and says so.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.cache import cache_folder, cpu_name, keep, sha256

SOURCE = Path(__file__).with_name("deformable.c")
MOST_DEPTH = 256  # as in the source
COMPILERS = ("cc", "gcc", "clang")
# Apple's clang for ARM knows -mcpu only; no compiler knows neither.
_TUNINGS = ("-march=native", "-mcpu=native")
_TIMEOUT_S = 60


class KernelError(Exception):
    """The kernel cannot be had on this machine; the text says why."""


class _Shape(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("tokens", "queries", "heads", "depth", "levels", "points")
    ]


class DeformableKernel:
    """Samples on raw float32 buffers, on `threads` threads.

    artefact: SHA-256 of the compiled file
    """

    def __init__(self, threads: int | None = None) -> None:
        library, self.artefact = _load()
        self._function = library.qdbev_deformable
        self._function.argtypes = [ctypes.c_void_p] * 6 + [ctypes.c_int64] * 2
        self._function.restype = None
        self.threads = threads or len(os.sched_getaffinity(0))
        # ctypes lets go of the interpreter while the kernel runs; the calling thread takes a share itself.
        self._pool = ThreadPoolExecutor(self.threads - 1, "sampling") if self.threads > 1 else None

    def __call__(
        self,
        buffers: tuple[int, int, int, int],
        value_shape: Sequence[int],
        locations_shape: Sequence[int],
        weights_shape: Sequence[int],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Samples the first three buffers into the last.

        buffers: addresses of contiguous float32 arrays: value, locations, weights, and the result (B, Q, heads * depth)
        value_shape (B, S, heads, depth) · locations_shape (B, Q, heads, levels, points, 2) · weights_shape (B, Q,
        heads, levels, points) · sizes (height, width) of the levels.
        Raises EngineError where these do not fit each other.
        """
        batch, queries, heads, levels, points = weights_shape
        tokens, depth = value_shape[1], value_shape[3]
        fits = (value_shape[0], value_shape[2], levels) == (batch, heads, len(sizes))
        fits = fits and list(locations_shape) == [*weights_shape, 2] and depth <= MOST_DEPTH
        # Sizes below one could make up for others that are too large.
        if not fits or min(map(min, sizes)) < 1 or tokens != sum(h * w for h, w in sizes):
            raise EngineError(
                f"value {list(value_shape)}, locations {list(locations_shape)}, weights {list(weights_shape)} and maps "
                f"{list(sizes)} do not fit"
            )
        shape = _Shape(tokens, queries, heads, depth, levels, points)
        flat = (ctypes.c_int32 * (2 * levels))(*(side for size in sizes for side in size))
        arguments = ctypes.byref(shape), flat, *buffers
        rows = batch * queries
        bounds = [rows * i // self.threads for i in range(self.threads + 1)]
        own, *shares = pairwise(bounds)
        others = [self._pool.submit(self._function, *arguments, *share) for share in shares if self._pool]
        self._function(*arguments, *own)
        for other in others:
            other.result()


def _load() -> tuple[ctypes.CDLL, str]:
    """The compiled kernel and its SHA-256, built unless this CPU, compiler and source have been seen before.

    The name of a kept file ends with its SHA-256: one that a power cut left half written would be loaded all the same,
    and end the process where the missing part is first touched.
    """
    folder, said = cache_folder(), []
    for compiler in _compilers():
        try:
            seen = sha256("\0".join((SOURCE.read_text(), *compiler, cpu_name())).encode())[:16]
            for kept in folder.glob(f"deformable-{seen}-*.so") if folder else ():
                with suppress(OSError):  # also where nothing in the folder may be run
                    digest = sha256(kept.read_bytes())
                    if kept.stem.endswith(digest):
                        return ctypes.CDLL(str(kept)), digest
                    kept.unlink()
            return _build(compiler, folder, seen)
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


def _build(compiler: Sequence[str], folder: Path | None, seen: str) -> tuple[ctypes.CDLL, str]:
    """Compiles, keeps and loads, from the kept file if that can be."""
    with tempfile.TemporaryDirectory(prefix="qdbev-") as own:
        made = Path(own) / "deformable.so"
        _compile(compiler, made)
        content = made.read_bytes()
        digest = sha256(content)
        if folder is not None:
            kept = folder / f"deformable-{seen}-{digest}.so"
            keep(kept, content)
            with suppress(OSError):
                return ctypes.CDLL(str(kept)), digest
        return ctypes.CDLL(str(made)), digest


def _compile(compiler: Sequence[str], made: Path) -> None:
    said = ""
    for tuning in _TUNINGS:
        command = [*compiler, "-O3", tuning, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            raise KernelError(f"{compiler[0]} took more than {_TIMEOUT_S} s") from None
        if done.returncode == 0:
            return
        said = " ".join(done.stderr.split())[:200]
    raise KernelError(f"{compiler[0]} cannot build it: {said}")
