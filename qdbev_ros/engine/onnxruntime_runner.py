# SPDX-License-Identifier: Apache-2.0
"""The network on ONNX Runtime's CPU kernels, convolutions in int8.

ONNX Runtime says nothing when it cannot fuse a quantised convolution and runs it in float instead, several times
slower. So the graph that it really runs is read back at start-up, and the runner refuses to start unless all of them
are int8.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.lowering import fuse_linears, lower_u8, quantised_convolutions

# ONNX Runtime's own messages: errors only; its advice on threads and saved graphs is not the user's business.
_LOG_ERRORS = 3


class OnnxRuntimeRunner:
    """A session over the lowered graph: named arrays in, named arrays out."""

    def __init__(self, master: bytes, threads: int | None) -> None:
        lowered = fuse_linears(lower_u8(master))
        options = session_options(threads)
        with tempfile.TemporaryDirectory(prefix="qdbev-") as folder:
            optimised = Path(folder) / "optimised.onnx"
            options.optimized_model_filepath = str(optimised)
            try:
                self._session = ort.InferenceSession(
                    lowered.SerializeToString(), options, providers=["CPUExecutionProvider"]
                )
            except Exception as error:  # ONNX Runtime raises a dozen types of its own, without a common base
                raise EngineError(
                    f"ONNX Runtime cannot load the model: {' '.join(str(error).split())}"
                ) from error
            self.integer_convolutions = check_convolutions(lowered, onnx.load(str(optimised)))
        self._names = {i.name for i in self._session.get_inputs()}
        self._outputs = [o.name for o in self._session.get_outputs()]
        self.description = (
            f"ONNX Runtime {ort.__version__}, CPU, {options.intra_op_num_threads or 'all'} threads, "
            f"{self.integer_convolutions} int8 convolutions"
        )

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One inference. Inputs that the graph does not read are left out."""
        feeds = {name: tensors[name] for name in self._names}
        return dict(zip(self._outputs, self._session.run(self._outputs, feeds), strict=True))


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options of a session; `threads` None leaves the number to ONNX Runtime."""
    options = ort.SessionOptions()
    options.log_severity_level = _LOG_ERRORS
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Threads that wait in a loop would take the cores from the ROS executor and the JPEG decoders.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    return options


def check_convolutions(lowered: onnx.ModelProto, optimised: onnx.ModelProto) -> int:
    """The number of int8 convolutions; raises EngineError, naming them, where quantised ones were left in float."""
    wanted = quantised_convolutions(lowered)
    integer = sum(n.op_type == "QLinearConv" for n in optimised.graph.node)
    if integer < len(wanted):
        # Fused nodes may have lost their names; those that still stand there as float convolutions have not.
        left = [n.name for n in optimised.graph.node if n.op_type in ("Conv", "FusedConv")]
        raise EngineError(
            f"ONNX Runtime {ort.__version__} runs {len(wanted) - integer} of {len(wanted)} quantised convolutions in "
            f"float: {', '.join(left[:5]) or 'names unknown'}"
        )
    return integer
