# SPDX-License-Identifier: Apache-2.0
"""The few calls of CUDA that the TensorRT runner needs, through NVIDIA's own cuda-bindings."""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError

TENSORRT = ("tensorrt", "tensorrt_rtx")  # Python modules that will do, the first one wins
DRIVER = "libcuda.so.1"


def missing() -> str | None:
    """What TensorRT lacks on this machine, in a few words; None where nothing is missing. Costs next to nothing."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver ({DRIVER})"
    if not _installed("cuda.bindings"):
        return "no cuda-bindings (pip install -r requirements/tensorrt.txt)"
    if not any(_installed(name) for name in TENSORRT):
        return f"neither {' nor '.join(TENSORRT)} is installed for Python"
    try:
        Cuda()
    except EngineError as error:
        return str(error)
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


class Cuda:
    """Device 0: memory, copies, one stream, graphs. Raises EngineError with CUDA's own word for what went wrong."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self._runtime = runtime
        if self._call("cudaGetDeviceCount") < 1:
            raise EngineError("CUDA finds no GPU")
        self._call("cudaSetDevice", 0)
        properties = self._call("cudaGetDeviceProperties", 0)
        self.name = f"{properties.name.decode()} SM{properties.major}{properties.minor}"
        self.stream: int = int(self._call("cudaStreamCreate"))
        weakref.finalize(self, runtime.cudaStreamDestroy, self.stream).atexit = False
        kind = runtime.cudaMemcpyKind
        self._up, self._down = kind.cudaMemcpyHostToDevice, kind.cudaMemcpyDeviceToHost
        self._across = kind.cudaMemcpyDeviceToDevice

    def _call(self, name: str, *arguments: Any) -> Any:
        error, *answer = getattr(self._runtime, name)(*arguments)
        if int(error) != 0:
            raise EngineError(f"{name}: {getattr(error, 'name', error)}")
        return answer[0] if answer else None

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the device."""
        return int(self._call("cudaMalloc", max(size, 1)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> NDArray[Any]:
        """An array that the device can copy from and to without the CPU. It lives until `free_pinned`."""
        count = int(np.prod(shape))
        address = int(self._call("cudaHostAlloc", max(count * kind.itemsize, 1), 0))
        content: Any = (ctypes.c_char * (count * kind.itemsize)).from_address(address)
        return np.frombuffer(content, kind, count).reshape(shape)

    def free_pinned(self, array: NDArray[Any]) -> None:
        self._call("cudaFreeHost", array.ctypes.data)

    def upload(self, device: int, host: NDArray[Any]) -> None:
        """Starts a copy to the device; `host` must stay as it is until `wait`."""
        self._call("cudaMemcpyAsync", device, host.ctypes.data, host.nbytes, self._up, self.stream)

    def download(self, host: NDArray[Any], device: int) -> None:
        self._call("cudaMemcpyAsync", host.ctypes.data, device, host.nbytes, self._down, self.stream)

    def move(self, target: int, source: int, size: int) -> None:
        """Starts a copy on the device."""
        self._call("cudaMemcpyAsync", target, source, size, self._across, self.stream)

    def wait(self) -> None:
        """Until everything that was started is done."""
        self._call("cudaStreamSynchronize", self.stream)

    def begin_capture(self) -> None:
        """What is started from now on is recorded instead of done."""
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self._call("cudaStreamBeginCapture", self.stream, mode)

    def end_capture(self) -> Any:
        """The recorded work, ready to launch."""
        graph = self._call("cudaStreamEndCapture", self.stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def launch(self, graph: Any) -> None:
        self._call("cudaGraphLaunch", graph, self.stream)

    def release(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)
