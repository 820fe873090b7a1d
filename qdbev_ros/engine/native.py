# SPDX-License-Identifier: Apache-2.0
"""The deformable sampling kernel in C: compiled for this very CPU at the first start, kept beside compiled engines.

Compiling takes a fraction of a second. Where nothing can be kept (no home, a read-only one) it is compiled at every
start; where there is no compiler the engine runs without the kernel and says so.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from secrets import token_hex

from qdbev_ros.engine.cache import cache_folder, cpu_name

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

    artefact: SHA-256 of the compiled file; of one that could not be kept something that never comes again
    """

    def __init__(self, threads: int | None = None) -> None:
        library = _load()
        file = Path(library._name)
        self.artefact = hashlib.sha256(file.read_bytes()).hexdigest() if file.exists() else token_hex()
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
        weights_shape: Sequence[int],
        sizes: Sequence[tuple[int, int]],
    ) -> None:
        """Samples the first three buffers into the last.

        buffers: addresses of contiguous float32 arrays: value, locations, weights, and the result (B, Q, heads * depth)
        value_shape (B, S, heads, depth) · weights_shape (B, Q, heads, levels, points) · sizes (height, width) of the
        levels. Raises ValueError where these do not fit each other.
        """
        batch, queries, heads, levels, points = weights_shape
        tokens, depth = value_shape[1], value_shape[3]
        fits = (value_shape[0], value_shape[2], levels) == (batch, heads, len(sizes))
        if not fits or tokens != sum(h * w for h, w in sizes) or depth > MOST_DEPTH:
            raise ValueError(
                f"value {list(value_shape)}, weights {list(weights_shape)} and maps {sizes} do not fit"
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


def _load() -> ctypes.CDLL:
    """The compiled kernel, built unless this CPU, compiler and source have been seen before."""
    compiler = os.environ.get("CC") or next((c for c in COMPILERS if shutil.which(c)), None)
    if compiler is None:
        raise KernelError(f"there is no C compiler ({', '.join(COMPILERS)})")
    try:
        key = hashlib.sha256("\0".join((SOURCE.read_text(), compiler, cpu_name())).encode()).hexdigest()[:16]
        folder = cache_folder()
        if folder is None:
            with tempfile.TemporaryDirectory(prefix="qdbev-") as own:
                return ctypes.CDLL(str(_build(compiler, Path(own) / "deformable.so")))
        library = folder / f"deformable-{key}.so"
        if not library.is_file():
            _build(compiler, library)
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelError(f"it cannot be built or loaded: {error}") from error


def _build(compiler: str, library: Path) -> Path:
    """Compiles under another name and renames: whole or not at all, also with two processes at once."""
    said = ""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        for tuning in _TUNINGS:
            command = [compiler, "-O3", tuning, "-shared", "-fPIC", str(SOURCE), "-o", str(made), "-lm"]
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
                )
            except subprocess.TimeoutExpired:
                raise KernelError(f"{compiler} took more than {_TIMEOUT_S} s") from None
            if done.returncode == 0:
                os.replace(made, library)
                return library
            said = " ".join(done.stderr.split())[:200]
    raise KernelError(f"{compiler} cannot build it: {said}")
