# SPDX-License-Identifier: Apache-2.0
"""A U8 graph in parts: ONNX Runtime's sessions, and our own kernels in between.

ONNX Runtime has no fast kernel for deformable attention, none for convolutions that knows how small our numbers are and
what follows, and its wheels take no new ones from Python. So the graph is cut there: its parts hand each other tensors
without copying, and our kernels run in between. Without a compiler the graph stays whole and samples by GridSample.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import onnxruntime as ort

from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.attention import fuse_attention
from qdbev_ros.engine.convolution import (
    Convolution,
    ConvolutionKernel,
    MaxPool,
    PreparedConvolution,
    PreparedPool,
)
from qdbev_ros.engine.convolution_nodes import Taken, take_convolutions
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.deformable_nodes import Attention, take_attentions
from qdbev_ros.engine.kernel_steps import (
    AttentionStep,
    Buffers,
    ChainStep,
    ConvolutionStep,
    PoolStep,
    SamplingStep,
    Step,
    Values,
    chained,
)
from qdbev_ros.engine.lowering import fuse_linears, picture_codes
from qdbev_ros.engine.master import OPSET
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import Sampling, inline_samplings
from qdbev_ros.engine.sessions import check_convolutions, open_session
from qdbev_ros.engine.stages import cut, split


class CutGraph:
    """The parts of a U8 graph on a dictionary of named tensors. Not for several threads at once.

    codes, picture_grid: the tensor of the pictures' codes, which may be given in place of `images`, and what they stand
    for; "" and None where there is none · artefact: what tells the compiled kernels from others, empty without any ·
    description: what runs by which kernel
    """

    def __init__(self, lowered: onnx.ModelProto, threads: int | None) -> None:
        self._threads, self._integer = threads, 0
        kernels = _Kernels(threads)
        self.artefact = kernels.artefact
        self.codes = ""
        self.picture_grid: PictureGrid | None = None
        self._front: _Part | None = None
        pictures = picture_codes(lowered)
        lowered = kernels.take_nodes(lowered, None if pictures is None else pictures[0])
        if pictures is not None:
            self.codes, self.picture_grid = pictures
            front, lowered = split(lowered, self.codes)
            self._front = self._part(front)
        self._parts = [
            self._part(stage.model, [kernels.step(node) for node in stage.behind]) for stage in cut(lowered)
        ]
        self._buffers, self._read_last = Buffers(), _read_last(self._parts)
        self._let_overwrite()
        self.description = (
            f"{self._integer + kernels.convolutions} int8 convolutions{kernels.share}, {kernels.sampling}"
        )

    def run(self, values: Values) -> None:
        """Adds all tensors that go from part to part, the outputs among them."""
        if self._front is not None and self.codes not in values:
            self._front.run(values)
        for part in self._parts:
            part.run(values)
            for step in part.steps:
                values[step.output] = step(values, self._buffers)
                for name in self._read_last.get(step.output, ()):
                    self._buffers.give(name)

    def _let_overwrite(self) -> None:
        """Tells the convolutions behind which nobody reads their shortcut."""
        for step in (step for part in self._parts for step in part.steps):
            own = step.first if isinstance(step, ChainStep) else step
            if isinstance(own, ConvolutionStep) and own.prepared.convolution.shortcut is not None:
                shortcut = own.prepared.convolution.shortcut.codes
                own.overwrites = shortcut in self._read_last.get(step.output, ())

    def _part(self, model: onnx.ModelProto | None, steps: Sequence[Step] = ()) -> _Part:
        if model is None:
            return _Part(None, steps)
        lowered = fuse_attention(fuse_linears(model), OPSET)
        session, optimised = open_session(lowered, self._threads)
        self._integer += check_convolutions(lowered, optimised)
        return _Part(session, steps)


class _Part:
    """One session, or none, and the kernels behind it, on a dictionary of tensors that all parts share."""

    def __init__(self, session: ort.InferenceSession | None, steps: Sequence[Step]) -> None:
        self._session, self.steps = session, chained(steps)
        self.inputs = [i.name for i in session.get_inputs()] if session else []
        self._outputs = [o.name for o in session.get_outputs()] if session else []

    def run(self, values: dict[str, ort.OrtValue]) -> None:
        """Adds the tensors that the session makes."""
        if self._session is not None:
            feeds = {name: values[name] for name in self.inputs}
            made = self._session.run_with_ort_values(self._outputs, feeds)
            values.update(zip(self._outputs, made, strict=True))


def _read_last(parts: Sequence[_Part]) -> dict[str, list[str]]:
    """Output of a kernel -> the tensors that nobody reads behind it; no session reads these."""
    readers = {name: step.output for part in parts for step in part.steps for name in step.inputs}
    found: dict[str, list[str]] = {}
    for name in set(readers) - {name for part in parts for name in part.inputs}:
        found.setdefault(readers[name], []).append(name)
    return found


class _Kernels:
    """Our own kernels, as far as they can be had here.

    sampling: what the engine says about that
    """

    def __init__(self, threads: int | None) -> None:
        self._sampling: DeformableKernel | None = None
        self._convolution: ConvolutionKernel | None = None
        self._taken: Taken = {}
        self._attentions: dict[str, Attention] = {}
        self._missing = ""  # why there is no kernel for convolutions
        try:
            self._sampling = DeformableKernel(threads)
            self.sampling = "deformable attention by our own kernel"
        except KernelError as error:
            self.sampling = (
                f"deformable attention by GridSample, three times slower or worse, because {error}"
            )
        try:
            self._convolution = ConvolutionKernel(threads)
        except KernelError as error:  # ONNX Runtime has an integer convolution, too
            self._missing = str(error)

    @property
    def artefact(self) -> str:
        """What tells them from others."""
        return "".join(
            kernel.artefact for kernel in (self._sampling, self._convolution) if kernel is not None
        )

    @property
    def convolutions(self) -> int:
        """How many of them run in our kernel."""
        return sum(isinstance(own, Convolution) for own in self._taken.values())

    @property
    def share(self) -> str:
        """What the engine says about convolutions."""
        if self._missing:
            return f" (none by our own kernel, because {self._missing})"
        return f", {self.convolutions} of them by our own kernel" if self.convolutions else ""

    def take_nodes(self, lowered: onnx.ModelProto, pictures: str | None) -> onnx.ModelProto:
        """The graph with nodes of ours where there are kernels for them, and there alone."""
        if self._sampling is None:
            lowered = inline_samplings(lowered)
        if self._convolution is not None:
            lowered, self._taken = take_convolutions(lowered, pictures)
        if self._sampling is not None:
            lowered, self._attentions = take_attentions(lowered)
        return lowered

    def step(self, node: onnx.NodeProto) -> Step:
        """What runs one of the nodes."""
        own = self._taken.get(node.output[0])
        if own is not None:
            assert self._convolution is not None
            if isinstance(own, MaxPool):
                return PoolStep(PreparedPool(own, self._convolution))
            return ConvolutionStep(PreparedConvolution(own, self._convolution))
        assert self._sampling is not None
        if node.output[0] in self._attentions:
            return AttentionStep(self._attentions[node.output[0]], self._sampling)
        return SamplingStep(Sampling.of(node), self._sampling)
