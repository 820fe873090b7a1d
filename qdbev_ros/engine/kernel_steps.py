# SPDX-License-Identifier: Apache-2.0
"""Our own kernels between the parts of a graph, on ONNX Runtime's buffers: nothing is copied."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.convolution import PICTURE_CHANNELS, PreparedConvolution, PreparedPool
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.deformable_nodes import Attention
from qdbev_ros.engine.sampling import Sampling

Values = dict[str, ort.OrtValue]


class Buffers:
    """Memory for results, used again for others once their last reader has run."""

    def __init__(self) -> None:
        self._free: list[NDArray[np.uint8]] = []
        self._used: dict[str, NDArray[np.uint8]] = {}

    def take(self, name: str, shape: Sequence[int], dtype: Any) -> ort.OrtValue:
        """Room for the tensor `name`."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        # From the frame before. Where it does not fit any more it is let go: kept for others, such ones would pile up.
        buffer = self._used.pop(name, None)
        if buffer is None or not size <= buffer.size <= 2 * size:
            fitting = [i for i, kept in enumerate(self._free) if size <= kept.size <= 2 * size]
            best = min(fitting, key=lambda i: self._free[i].size, default=None)
            buffer = np.empty(size, np.uint8) if best is None else self._free.pop(best)
        self._used[name] = buffer
        return ort.OrtValue.ortvalue_from_numpy(buffer[:size].view(dtype).reshape(shape))

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(buffer.size for buffer in (*self._free, *self._used.values()))

    def rename(self, name: str, new: str) -> None:
        """Lets a tensor have the room of another one that nobody reads any more; of one that isn't here, none."""
        if name in self._used:
            self.give(new)
            self._used[new] = self._used.pop(name)

    def give(self, name: str) -> None:
        """Takes the room of the tensor back; of one that isn't here, none."""
        if name in self._used:
            self._free.append(self._used.pop(name))


class SamplingStep:
    """One deformable sampling."""

    def __init__(self, sampling: Sampling, kernel: DeformableKernel) -> None:
        self.output, self._sampling, self._kernel = sampling.output, sampling, kernel
        self.inputs = sampling.value, sampling.locations, sampling.weights

    def __call__(self, values: Values, buffers: Buffers) -> ort.OrtValue:
        """The samples of what the tensors hold."""
        s = self._sampling
        value, locations, weights = values[s.value], values[s.locations], values[s.weights]
        if any(tensor.data_type() != "tensor(float)" for tensor in (value, locations, weights)):
            raise EngineError(f"{s.output}: the kernel samples float32 alone")
        value_shape, weights_shape = value.shape(), weights.shape()
        shape = [*weights_shape[:2], value_shape[2] * value_shape[3]]
        out = buffers.take(s.output, shape, np.float32)
        addresses = value.data_ptr(), locations.data_ptr(), weights.data_ptr(), out.data_ptr()
        self._kernel(addresses, value_shape, locations.shape(), weights_shape, s.sizes)
        return out


class AttentionStep:
    """One deformable attention between its linear layers."""

    def __init__(self, attention: Attention, kernel: DeformableKernel) -> None:
        self.output, self.inputs = attention.output, tuple(attention.inputs)
        self._attention, self._kernel = attention, kernel

    def __call__(self, values: Values, buffers: Buffers) -> ort.OrtValue:
        """(1, outputs, channels), or (B, rows, channels) where rows are outputs."""
        a, s = self._attention, self._attention.sampling
        given = [values[name] for name in self.inputs]
        floats = [values[name] for name in self.inputs if name != a.slots]
        if any(tensor.data_type() != "tensor(float)" for tensor in floats):
            raise EngineError(f"{a.output}: the kernel samples float32 alone")
        value, offsets, logits, references = (list(tensor.shape()) for tensor in given[:4])
        raw, samples = logits[:-1], a.maps * s.heads * len(s.sizes) * s.points
        rows = raw if a.maps == 1 else [*raw[:1], a.maps, *raw[1:]]
        value_shape = [math.prod(rows[:-1]), sum(h * w for h, w in s.sizes), s.heads, s.depth]
        fits = len(raw) == 2 and logits[-1] == samples and offsets == [*raw, 2 * samples]
        fits = fits and references[: len(rows)] == rows and references[len(rows) :][-1:] == [2]
        if not fits or math.prod(value) != math.prod(value_shape):
            raise EngineError(
                f"{a.output}: value {value}, offsets {offsets}, logits {logits} and places {references} do not fit"
            )
        outputs, most, summed = raw, a.maps, (None, None)
        if a.slots:
            slots, shares = given[4:]
            *outputs, most = shares.shape()
            known = slots.data_type() == "tensor(int64)" and math.prod(slots.shape()) == math.prod(
                shares.shape()
            )
            if not known or len(outputs) != 2 or outputs[0] != 1:
                raise EngineError(f"{a.output}: slots {slots.shape()} and shares {shares.shape()} do not fit")
            summed = slots.data_ptr(), shares.data_ptr()
        out = buffers.take(a.output, [*outputs, s.heads * s.depth], np.float32)
        self._kernel.attend(
            (*(tensor.data_ptr() for tensor in given[:4]), *summed, out.data_ptr()),
            value_shape,
            math.prod(raw),
            math.prod(references[:-1]),
            math.prod(outputs),
            most,
            s.points,
            s.sizes,
        )
        return out


class ConvolutionStep:
    """One convolution on codes, channels last, or on planes of pictures; with the shortcut behind it.

    overwrites: the result may lie where the shortcut was, whose pixels are read before; less memory moves then
    """

    def __init__(self, prepared: PreparedConvolution) -> None:
        c = prepared.convolution
        self.output, self.prepared, self.overwrites = c.output, prepared, False
        self.inputs = (c.codes,) if c.shortcut is None else (c.codes, c.shortcut.codes)

    def __call__(self, values: Values, buffers: Buffers) -> ort.OrtValue:
        """The codes of the result, (images, height, width, outputs)."""
        source, sides, shortcut, out = self.tensors(values, buffers)
        self.prepared(source, sides, out.data_ptr(), shortcut)
        return out

    def tensors(
        self, values: Values, buffers: Buffers
    ) -> tuple[int, tuple[int, int, int, int], int | None, ort.OrtValue]:
        """(address and sides of the codes, address of the shortcut's, room for the result)."""
        c = self.prepared.convolution
        codes = values[c.codes]
        _require_bytes(self.output, codes)
        images, height, width, inputs = codes.shape()
        if c.weights.shape[1] == PICTURE_CHANNELS:
            height, width, inputs = width, inputs, height
        sides = images, height, width, inputs
        made, shortcut = self.prepared.sides(sides), None
        if c.shortcut is not None:
            other = values[c.shortcut.codes]
            _require_bytes(self.output, other)
            if other.shape() != list(made):
                raise EngineError(f"{self.output}: a shortcut of {other.shape()} for {list(made)}")
            shortcut = other.data_ptr()
            if self.overwrites:
                buffers.rename(c.shortcut.codes, self.output)
        out = buffers.take(self.output, made, np.uint8)
        return codes.data_ptr(), sides, shortcut, out


class ChainStep:
    """Two convolutions, the second one of the first one's pixels, block by block. Its own result is the second's."""

    def __init__(self, first: ConvolutionStep, second: ConvolutionStep) -> None:
        self.output, self.inputs = second.output, (*first.inputs, *second.inputs)
        self.first, self._second = first, second

    def __call__(self, values: Values, buffers: Buffers) -> ort.OrtValue:
        """The codes of the second one's result; the first one's are put among the values."""
        source, sides, shortcut, between = self.first.tensors(values, buffers)
        values[self.first.output] = between
        *_, out = self._second.tensors(values, buffers)
        before, other = self.first.prepared, self._second.prepared
        before.before(other, source, sides, between.data_ptr(), shortcut, out.data_ptr())
        return out


def chained(steps: Sequence[Step]) -> list[Step]:
    """The steps, with pairs of convolutions in one where that can be."""
    made: list[Step] = []
    for step in steps:
        last = made[-1] if made else None
        if (
            isinstance(last, ConvolutionStep)
            and isinstance(step, ConvolutionStep)
            and last.prepared.followed_by(step.prepared)
        ):
            made[-1] = ChainStep(last, step)
        else:
            made.append(step)
    return made


class PoolStep:
    """One pool of codes, channels last."""

    def __init__(self, prepared: PreparedPool) -> None:
        self.output, self._prepared = prepared.pool.output, prepared
        self.inputs = (prepared.pool.codes,)

    def __call__(self, values: Values, buffers: Buffers) -> ort.OrtValue:
        """The codes of the result, (images, height, width, channels)."""
        codes = values[self._prepared.pool.codes]
        _require_bytes(self.output, codes)
        images, height, width, channels = codes.shape()
        sides = images, height, width, channels
        out = buffers.take(self.output, self._prepared.sides(sides), np.uint8)
        self._prepared(codes.data_ptr(), sides, out.data_ptr())
        return out


def _require_bytes(output: str, codes: ort.OrtValue) -> None:
    if codes.data_type() != "tensor(uint8)" or len(codes.shape()) != 4:
        raise EngineError(f"{output}: the kernel reads maps of bytes alone, not {codes.data_type()}")


Step = SamplingStep | AttentionStep | ConvolutionStep | ChainStep | PoolStep
