# SPDX-License-Identifier: Apache-2.0
"""The network as it is written: ONNX Runtime on the master itself, all optimisations off. Slow, and the measure."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.sessions import session_options


class ReferenceRunner:
    """What every other engine has to agree with."""

    turns_memory = False
    stage_outputs = True
    picture_grid: PictureGrid | None = None

    def __init__(self, master: bytes, threads: int | None) -> None:
        options = session_options(threads)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            self._session = ort.InferenceSession(master, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a dozen types of its own, without a common base
            raise EngineError(
                f"ONNX Runtime cannot load the master: {' '.join(str(error).split())}"
            ) from error
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.description = f"ONNX Runtime {ort.__version__}, unoptimised"

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        answer = self._session.run(self._outputs, {name: tensors[name] for name in self._inputs})
        return dict(zip(self._outputs, answer, strict=True))
