# SPDX-License-Identifier: Apache-2.0
"""The network on the CPU: ONNX Runtime's kernels, and our own where it has none that are fast.

ONNX Runtime says nothing when it cannot fuse a quantised convolution and runs it in float instead, several times
slower. So the graphs that it really runs are read back at start-up, and the runner refuses to start unless all that is
left to it of them is int8.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.engine.cut_graph import CutGraph
from qdbev_ros.engine.lowering import lower_u8
from qdbev_ros.engine.master import OUTPUTS


class OnnxRuntimeRunner:
    """Named arrays in, named arrays out. Not for several threads at once.

    picture_grid: what the codes of the pictures stand for where `images` may be given as codes, (1, 6, 3, H, W) uint8 ·
    artefact: what tells the compiled kernels from others, empty without any
    """

    turns_memory = False
    stage_outputs = False

    def __init__(self, master: bytes, threads: int | None) -> None:
        lowered = lower_u8(master)
        self._outputs = [o.name for o in lowered.graph.output]
        self._graph = CutGraph(lowered, threads)
        self.picture_grid, self.artefact = self._graph.picture_grid, self._graph.artefact
        self.description = (
            f"ONNX Runtime {ort.__version__}, CPU, {threads or 'all'} threads, {self._graph.description}"
        )

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One inference. Inputs that the graph does not read are left out."""
        given = dict(tensors)
        if self._graph.codes and given["images"].dtype == np.uint8:
            pictures = given.pop("images")
            given[self._graph.codes] = pictures.reshape(-1, *pictures.shape[2:])
        # On the CPU an OrtValue is a view of the array: nothing is copied.
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in given.items()}
        self._graph.run(values)
        return {name: values[name].numpy() for name in self._outputs if self.stage_outputs or name in OUTPUTS}
