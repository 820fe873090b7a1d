# SPDX-License-Identifier: Apache-2.0
"""The network on ONNX Runtime's CPU kernels, convolutions in int8, with two kernels of our own in between.

ONNX Runtime says nothing when it cannot fuse a quantised convolution and runs it in float instead, several times
slower. So the graph that it really runs is read back at start-up, and the runner refuses to start unless all of them
are int8. It has no fast kernel for deformable attention, none for 3x3 convolutions that knows how small our numbers
are, and its wheels take no new ones from Python. So the graph is cut there: its parts hand each other tensors without
copying, and our kernels run in between. Without a compiler the graph stays whole and samples by GridSample.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.kernel_steps import ConvolutionStep, SamplingStep
from qdbev_ros.engine.lowering import fuse_linears, lower_u8, picture_codes, quantised_convolutions
from qdbev_ros.engine.master import OUTPUTS
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import Sampling, inline_samplings
from qdbev_ros.engine.stages import cut, split
from qdbev_ros.engine.winograd import Convolution, PreparedConvolution, WinogradKernel, take_convolutions

# ONNX Runtime's own messages: errors only; its advice on threads and saved graphs is not the user's business.
_LOG_ERRORS = 3
Step = SamplingStep | ConvolutionStep


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
        kernels = _Kernels(threads)
        self.artefact = kernels.artefact
        lowered = kernels.take_nodes(lowered)
        codes = picture_codes(lowered)
        if codes is not None:
            self._codes, self.picture_grid = codes
            front, lowered = split(lowered, self._codes)
            self._front = self._part(front, threads)
        self._parts = [
            self._part(stage.model, threads, [kernels.step(node) for node in stage.behind])
            for stage in cut(lowered)
        ]
        own = len(kernels.convolutions)
        self.integer_convolutions += own
        self.description = (
            f"ONNX Runtime {ort.__version__}, CPU, {threads or 'all'} threads, {self.integer_convolutions} int8 "
            f"convolutions{f', {own} of them by our own kernel' if own else ''}, {kernels.said}"
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

    def _part(self, model: onnx.ModelProto, threads: int | None, steps: Sequence[Step] = ()) -> _Part:
        lowered = fuse_linears(model)
        session, optimised = _session(lowered, threads)
        self.integer_convolutions += check_convolutions(lowered, optimised)
        return _Part(session, steps)


class _Part:
    """One session and the kernels behind it, on a dictionary of tensors that all parts share."""

    def __init__(self, session: ort.InferenceSession, steps: Sequence[Step]) -> None:
        self._session = session
        self._inputs = [i.name for i in session.get_inputs()]
        self._outputs = [o.name for o in session.get_outputs()]
        self._steps = steps

    def run(self, values: dict[str, ort.OrtValue]) -> None:
        """Adds the tensors that this part makes."""
        feeds = {name: values[name] for name in self._inputs}
        values.update(
            zip(self._outputs, self._session.run_with_ort_values(self._outputs, feeds), strict=True)
        )
        for step in self._steps:
            values[step.output] = step(values)


class _Kernels:
    """Our own kernels, as far as they can be had here.

    convolutions: those that run in our kernel, by their output · said: what the engine says about the sampling
    """

    def __init__(self, threads: int | None) -> None:
        self._sampling: DeformableKernel | None = None
        self._convolution: WinogradKernel | None = None
        self.convolutions: dict[str, Convolution] = {}
        try:
            self._sampling = DeformableKernel(threads)
            self.said = "deformable attention by our own kernel"
        except KernelError as error:
            self.said = f"deformable attention by GridSample, three times slower or worse, because {error}"
        with suppress(KernelError):  # ONNX Runtime has an integer convolution, too
            self._convolution = WinogradKernel(threads)

    @property
    def artefact(self) -> str:
        """What tells them from others."""
        return "".join(
            kernel.artefact for kernel in (self._sampling, self._convolution) if kernel is not None
        )

    def take_nodes(self, lowered: onnx.ModelProto) -> onnx.ModelProto:
        """The graph with nodes of ours where there are kernels for them, and there alone."""
        if self._sampling is None:
            lowered = inline_samplings(lowered)
        if self._convolution is not None:
            lowered, self.convolutions = take_convolutions(lowered)
        return lowered

    def step(self, node: onnx.NodeProto) -> Step:
        """What runs one of the nodes."""
        if node.output[0] in self.convolutions:
            assert self._convolution is not None
            prepared = PreparedConvolution(self.convolutions[node.output[0]], self._convolution)
            return ConvolutionStep(prepared)
        assert self._sampling is not None
        return SamplingStep(Sampling.of(node), self._sampling)


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
