# SPDX-License-Identifier: Apache-2.0
"""The network on ONNX Runtime's CPU kernels, convolutions in int8, deformable attention in our own kernel.

ONNX Runtime says nothing when it cannot fuse a quantised convolution and runs it in float instead, several times
slower. So the graph that it really runs is read back at start-up, and the runner refuses to start unless all of them
are int8. It has no fast kernel for deformable attention and its wheels take no new ones from Python, so the graph is
cut there: its parts hand each other tensors without copying, and the kernel runs in between. Without a compiler for
the kernel the graph stays whole and samples by GridSample.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.lowering import fuse_linears, lower_u8, picture_codes, quantised_convolutions
from qdbev_ros.engine.master import OUTPUTS
from qdbev_ros.engine.native import DeformableKernel, KernelError
from qdbev_ros.engine.sampling import Sampling, inline_samplings
from qdbev_ros.engine.stages import Stage, cut, split

# ONNX Runtime's own messages: errors only; its advice on threads and saved graphs is not the user's business.
_LOG_ERRORS = 3


class OnnxRuntimeRunner:
    """Sessions over the lowered graph: named arrays in, named arrays out. Not for several threads at once.

    picture_grid: what the codes of the pictures stand for where `images` may be given as codes, (1, 6, 3, H, W) uint8 ·
    artefact: what tells the compiled kernel from another one, empty without one
    """

    picture_grid: PictureGrid | None = None
    turns_memory = False
    stage_outputs = False

    def __init__(self, master: bytes, threads: int | None) -> None:
        lowered = lower_u8(master)
        self._outputs = [o.name for o in lowered.graph.output]
        self.integer_convolutions = 0
        self._front: _Part | None = None
        self._codes = ""
        kernel, sampling = _kernel(threads)
        self.artefact = "" if kernel is None else kernel.artefact
        if kernel is None:
            lowered = inline_samplings(lowered)
        codes = picture_codes(lowered)
        if codes is not None:
            self._codes, self.picture_grid = codes
            front, lowered = split(lowered, self._codes)
            self._front = self._part(Stage(front, ()), threads, None)
        self._parts = [self._part(stage, threads, kernel) for stage in cut(lowered)]
        self.description = (
            f"ONNX Runtime {ort.__version__}, CPU, {threads or 'all'} threads, "
            f"{self.integer_convolutions} int8 convolutions, {sampling}"
        )

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One inference. Inputs that the graph does not read are left out."""
        given = dict(tensors)
        if self._codes and given["images"].dtype == np.uint8:
            pictures = given.pop("images")
            given[self._codes] = pictures.reshape(-1, *pictures.shape[2:])
        # On the CPU an OrtValue is a view of the array: nothing is copied.
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        if self._front is not None and self._codes not in values:
            self._front.run(values)
        for part in self._parts:
            part.run(values)
        return {name: values[name].numpy() for name in self._outputs if self.stage_outputs or name in OUTPUTS}

    def _part(self, stage: Stage, threads: int | None, kernel: DeformableKernel | None) -> _Part:
        lowered = fuse_linears(stage.model)
        session, optimised = _session(lowered, threads)
        self.integer_convolutions += check_convolutions(lowered, optimised)
        return _Part(session, stage.samplings, kernel)


class _Part:
    """One session and the samplings behind it, on a dictionary of tensors that all parts share."""

    def __init__(
        self, session: ort.InferenceSession, samplings: tuple[Sampling, ...], kernel: DeformableKernel | None
    ) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]
        self._samplings = samplings
        self._kernel = kernel
        self._buffers: dict[str, ort.OrtValue] = {}

    def run(self, values: dict[str, ort.OrtValue]) -> None:
        """Adds the tensors that this part makes."""
        feeds = {name: values[name] for name in self._inputs}
        values.update(
            zip(self._outputs, self._session.run_with_ort_values(self._outputs, feeds), strict=True)
        )
        for sampling in self._samplings:
            values[sampling.output] = self._sample(sampling, values)

    def _sample(self, s: Sampling, values: dict[str, ort.OrtValue]) -> ort.OrtValue:
        assert self._kernel is not None
        value, locations, weights = values[s.value], values[s.locations], values[s.weights]
        if any(tensor.data_type() != "tensor(float)" for tensor in (value, locations, weights)):
            raise EngineError(f"{s.output}: the kernel samples float32 alone")
        value_shape, weights_shape = value.shape(), weights.shape()
        shape = [*weights_shape[:2], value_shape[2] * value_shape[3]]
        out = self._buffers.get(s.output)
        if out is None or out.shape() != shape:  # another rig sees another number of cells
            out = ort.OrtValue.ortvalue_from_numpy(np.empty(shape, np.float32))
            self._buffers[s.output] = out
        buffers = value.data_ptr(), locations.data_ptr(), weights.data_ptr(), out.data_ptr()
        self._kernel(buffers, value_shape, locations.shape(), weights_shape, s.sizes)
        return out


def _kernel(threads: int | None) -> tuple[DeformableKernel | None, str]:
    """The kernel where it can be had, and what the engine says about it."""
    try:
        return DeformableKernel(threads), "deformable attention by our own kernel"
    except KernelError as error:
        return None, f"deformable attention by GridSample, three times slower or worse, because {error}"


def _session(model: onnx.ModelProto, threads: int | None) -> tuple[ort.InferenceSession, onnx.ModelProto]:
    """A session, and the graph as ONNX Runtime made it faster."""
    options = session_options(threads)
    with tempfile.TemporaryDirectory(prefix="qdbev-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        try:
            session = ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, without a common base
            raise EngineError(
                f"ONNX Runtime cannot load the model: {' '.join(str(error).split())}"
            ) from error
        return session, onnx.load(str(optimised))


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options of a session; with `threads` None one for each core that this process may use."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that wait in a loop would take the cores from the ROS executor and the JPEG decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    _register_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")
    if threads is None and len(os.sched_getaffinity(0)) < (os.cpu_count() or 1):
        # ONNX Runtime counts the machine's cores, not those that are ours. With a thread too many, whoever waits for it
        # does so in a loop, spinning off or not: milliseconds lost, and under a real-time scheduler everything.
        threads = len(os.sched_getaffinity(0))
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


@cache
def _register_arena() -> None:
    """One arena of memory for all sessions of the process: parts run one after the other, and none keeps its own."""
    memory = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # No limit, growth and chunks as ONNX Runtime has them by itself.
    ort.create_and_register_allocator(memory, ort.OrtArenaCfg(0, -1, -1, -1))


def check_convolutions(lowered: onnx.ModelProto, optimised: onnx.ModelProto) -> int:
    """The number of int8 convolutions; raises EngineError, naming them, where quantised ones were left in float."""
    wanted = quantised_convolutions(lowered)
    kinds = Counter(n.op_type for n in optimised.graph.node)
    integer = kinds["QLinearConv"]
    if integer < len(wanted):
        # Fused nodes may have lost their names; those that still stand there as float convolutions have not.
        left = [n.name for n in optimised.graph.node if n.op_type in ("Conv", "FusedConv")]
        raise EngineError(
            f"ONNX Runtime {ort.__version__} runs {len(wanted) - integer} of {len(wanted)} quantised convolutions in "
            f"float: {', '.join(left[:5]) or 'names unknown'}"
        )
    return integer + kinds["ConvInteger"]
