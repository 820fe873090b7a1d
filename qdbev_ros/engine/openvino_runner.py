# SPDX-License-Identifier: Apache-2.0
"""The network on OpenVINO's CPU kernels, from the U8 form that ONNX Runtime takes too.

Like ONNX Runtime, OpenVINO says nothing when it runs a quantised convolution in float: the compiled model is read back
at start-up, and the runner refuses to start unless all of them compute on integers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from qdbev_ros.core.errors import EngineError
from qdbev_ros.core.preprocess import PictureGrid
from qdbev_ros.engine.lowering import lower_u8, quantised_convolutions
from qdbev_ros.engine.master import OUTPUTS
from qdbev_ros.engine.sampling import inline_samplings

_INTEGERS = ("i8", "u8")


class OpenVinoRunner:
    """One compiled model: named arrays in, named arrays out."""

    turns_memory = False
    stage_outputs = False
    picture_grid: PictureGrid | None = None

    def __init__(self, master: bytes, threads: int | None) -> None:
        lowered = inline_samplings(lower_u8(master))
        # Float parts in float32, in the order of the graph: bfloat16 would move the samples.
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        core = ov.Core()
        try:
            model = core.read_model(lowered.SerializeToString(), b"")
            compiled = core.compile_model(model, "CPU", settings)
        except RuntimeError as error:
            raise EngineError(
                f"OpenVINO cannot load the model: {' '.join(str(error).split())[:500]}"
            ) from error
        self.integer_convolutions = check_convolutions(
            quantised_convolutions(lowered), compiled.get_runtime_model()
        )
        self._request = compiled.create_infer_request()
        self._inputs = [i.get_any_name() for i in compiled.inputs]
        self._outputs = [o.name for o in lowered.graph.output]
        version = ov.get_version().split("-")[0]
        count = f"{self.integer_convolutions} int8 convolutions"
        self.description = f"OpenVINO {version}, CPU, {threads or 'all'} threads, {count}"

    def run(self, tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[np.float32]]:
        """One inference. Inputs that the graph does not read are left out."""
        self._request.infer({name: tensors[name] for name in self._inputs}, share_inputs=True)
        wanted = [name for name in self._outputs if self.stage_outputs or name in OUTPUTS]
        # Copies: the next inference writes into the same buffers.
        return {name: self._request.get_tensor(name).data.copy() for name in wanted}


def check_convolutions(wanted: list[str], runtime: Any) -> int:
    """The number of int8 convolutions of a compiled model; raises EngineError where quantised ones are float."""
    kinds = []
    for node in runtime.get_ops():
        info = node.get_rt_info()
        if str(info["layerType"].value) in ("Convolution", "GroupConvolution"):
            kinds.append((node.get_friendly_name(), str(info["runtimePrecision"].value).lower()))
    integer = sum(kind in _INTEGERS for _, kind in kinds)
    if integer < len(wanted):
        left = [f"{name} ({kind})" for name, kind in kinds if kind not in _INTEGERS]
        raise EngineError(
            f"OpenVINO {ov.get_version().split('-')[0]} runs {len(wanted) - integer} of {len(wanted)} quantised "
            f"convolutions in float: {', '.join(left[:5]) or 'names unknown'}"
        )
    return integer
