# SPDX-License-Identifier: Apache-2.0
"""Our own kernels between the parts of a graph, on ONNX Runtime's buffers: nothing is copied."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.deformable import DeformableKernel
from qdbev_ros.engine.sampling import Sampling
from qdbev_ros.engine.winograd import PreparedConvolution


class SamplingStep:
    """One deformable sampling."""

    def __init__(self, sampling: Sampling, kernel: DeformableKernel) -> None:
        self.output, self._sampling, self._kernel = sampling.output, sampling, kernel
        self._result = _Result(np.float32)

    def __call__(self, values: dict[str, ort.OrtValue]) -> ort.OrtValue:
        """The samples of what the tensors hold."""
        s = self._sampling
        value, locations, weights = values[s.value], values[s.locations], values[s.weights]
        if any(tensor.data_type() != "tensor(float)" for tensor in (value, locations, weights)):
            raise EngineError(f"{s.output}: the kernel samples float32 alone")
        value_shape, weights_shape = value.shape(), weights.shape()
        out = self._result.of([*weights_shape[:2], value_shape[2] * value_shape[3]])
        buffers = value.data_ptr(), locations.data_ptr(), weights.data_ptr(), out.data_ptr()
        self._kernel(buffers, value_shape, locations.shape(), weights_shape, s.sizes)
        return out


class ConvolutionStep:
    """One 3x3 convolution on codes, channels last."""

    def __init__(self, convolution: PreparedConvolution) -> None:
        self.output, self._convolution = convolution.convolution.output, convolution
        self._result = _Result(np.uint8)

    def __call__(self, values: dict[str, ort.OrtValue]) -> ort.OrtValue:
        """The codes of the result, (images, height, width, outputs)."""
        codes = values[self._convolution.convolution.codes]
        images, height, width, inputs = codes.shape()
        out = self._result.of([images, height, width, self._convolution.outputs])
        self._convolution(codes.data_ptr(), (images, height, width, inputs), out.data_ptr())
        return out


class _Result:
    """A buffer that is kept from frame to frame, for as long as it has the right shape."""

    def __init__(self, dtype: Any) -> None:
        self._dtype = dtype
        self._buffer: ort.OrtValue | None = None

    def of(self, shape: list[int]) -> ort.OrtValue:
        if self._buffer is None or self._buffer.shape() != shape:  # another rig sees another number of cells
            self._buffer = ort.OrtValue.ortvalue_from_numpy(np.empty(shape, self._dtype))
        return self._buffer
