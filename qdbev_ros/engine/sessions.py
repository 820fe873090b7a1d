# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's sessions: their threads and memory, and whether quantised convolutions really run in int8."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import onnx
import onnxruntime as ort

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine.lowering import quantised_convolutions

# ONNX Runtime's own messages: errors only; its advice on threads and saved graphs is not the user's business.
_LOG_ERRORS = 3
# Its sum and LayerNormalization in one take three times as long as one after the other.
_SLOWER = ["SkipLayerNormFusion"]


def open_session(model: onnx.ModelProto, threads: int | None) -> tuple[ort.InferenceSession, onnx.ModelProto]:
    """A session, and the graph as ONNX Runtime made it faster."""
    options = session_options(threads)
    with tempfile.TemporaryDirectory(prefix="qdbev-") as folder:
        optimised = Path(folder) / "optimised.onnx"
        options.optimized_model_filepath = str(optimised)
        try:
            session = ort.InferenceSession(
                model.SerializeToString(),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_SLOWER,
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
