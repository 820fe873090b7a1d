# SPDX-License-Identifier: Apache-2.0
"""CUDA and a TensorRT engine played by this machine's memory and ONNX Runtime, for the runner's logic without a GPU.

Work that is started is done at once, or recorded while a capture is on, as CUDA does it. The numbers are real.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort


class HostCuda:
    """The same calls as engine.cuda.Cuda; `said` lists what was asked for, in order, `held` what was not given back."""

    name = "Host SM0"
    stream = 7

    def __init__(self) -> None:
        self.said: list[str] = []
        self.held: dict[int, Any] = {}  # arrays by address, graphs by id
        self._recording: list[Callable[[], None]] | None = None

    def allocate(self, size: int) -> int:
        return self._hold(np.zeros(max(size, 1), np.uint8))

    def pinned(self, shape: tuple[int, ...], kind: np.dtype[Any]) -> np.ndarray:
        array = np.zeros(shape, kind)
        self._hold(array)
        return array

    def _hold(self, array: np.ndarray) -> int:
        self.held[array.ctypes.data] = array
        return array.ctypes.data

    def free(self, address: int) -> None:
        del self.held[address]

    def free_pinned(self, array: np.ndarray) -> None:
        del self.held[array.ctypes.data]

    def release(self, graph: object) -> None:
        del self.held[id(graph)]

    def start(self, what: str, work: Callable[[], None]) -> None:
        if self._recording is not None:
            self._recording.append(work)
            return
        self.said.append(what)
        work()

    def upload(self, device: int, host: np.ndarray) -> None:
        self.start("upload", lambda: _copy(device, host.ctypes.data, host.nbytes))

    def download(self, host: np.ndarray, device: int) -> None:
        self.start("download", lambda: _copy(host.ctypes.data, device, host.nbytes))

    def move(self, target: int, source: int, size: int) -> None:
        self.start("move", lambda: _copy(target, source, size))

    def wait(self) -> None:
        self.said.append("wait")

    def begin_capture(self) -> None:
        self._recording = []

    def end_capture(self) -> list[Callable[[], None]]:
        recorded, self._recording = self._recording, None
        assert recorded is not None
        self.held[id(recorded)] = recorded
        return recorded

    def launch(self, graph: list[Callable[[], None]]) -> None:
        self.said.append("launch")
        for work in graph:
            work()


def _copy(target: int, source: int, size: int) -> None:
    ctypes.memmove(target, source, size)


class HostEngine:
    """What the runner asks of a TensorRT engine and its contexts, over a graph in ONNX Runtime."""

    def __init__(self, model: onnx.ModelProto, cuda: HostCuda, most_rows: int) -> None:
        self.session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        self.cuda, self.most_rows = cuda, most_rows
        self.tensors = {i.name: i for i in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = [i.name for i in self.session.get_inputs()]
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self.tensors)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.inputs else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return str(self.tensors[name].type)

    def create_execution_context(self) -> HostContext:
        return HostContext(self)


class HostContext:
    def __init__(self, engine: HostEngine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name != "cells" or shape[2] <= self.engine.most_rows

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes.get(name) or tuple(self.engine.tensors[name].shape)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.engine.cuda.stream
        self.engine.cuda.start("execute", self._execute)
        return True

    def _execute(self) -> None:
        feeds = {name: self._array(name).copy() for name in self.engine.inputs}
        outputs = [name for name in self.engine.tensors if name not in self.engine.inputs]
        for name, value in zip(outputs, self.engine.session.run(outputs, feeds), strict=True):
            self._array(name)[...] = value

    def _array(self, name: str) -> np.ndarray:
        kind = np.dtype(nptype(self.engine.get_tensor_dtype(name)))
        shape = self.get_tensor_shape(name)
        size = int(np.prod(shape)) * kind.itemsize
        content = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(content, kind).reshape(shape)


def nptype(kind: str) -> type:
    return {"tensor(float)": np.float32, "tensor(int64)": np.int64}[kind]


# The names of TensorRT's module that the runner uses.
HOST_TRT = SimpleNamespace(
    __name__="tensorrt", __version__="10.0.0", TensorIOMode=SimpleNamespace(INPUT="input"), nptype=nptype
)
