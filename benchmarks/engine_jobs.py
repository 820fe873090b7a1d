# SPDX-License-Identifier: Apache-2.0
"""What runs in the processes of the engines' benchmark: an engine with its pipeline, or a large matrix product.

Every engine sits in the same pipeline, behind the same geometry. A turn is as many frames as fit into TURN_S: for each
the backbone and neck alone, then the whole frame from JPEG bytes to boxes. The first one finds the caches full of what
others did and does not count, so there are two or more, but of engines that take longer than LONG_S for one.
"""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from benchmarks.packages import FLOAT_MODEL
from benchmarks.turns import Parts, Turns, cores
from qdbev_ros.core.made_drive import made_frame
from qdbev_ros.core.pipeline import Pipeline
from qdbev_ros.engine import load_package, read_package
from qdbev_ros.engine.cut_graph import CutGraph
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.graph import Graph
from qdbev_ros.engine.lowering import lower_u8
from qdbev_ros.engine.master import FEATURES, INPUTS, OPSET, OUTPUTS
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.sampling import inline_samplings
from qdbev_ros.engine.sessions import session_options
from qdbev_ros.engine.stage_outputs import with_stage_outputs

OURS = "ours W4A6"
# PyTorch's own memory layout, which BEVFormer runs in; our model takes the faster one.
PLAIN_TORCH = "torch eager, NCHW"
# Engine -> whether it runs the W4A6 package; the others run the float model.
ENGINES = {
    PLAIN_TORCH: False,
    "torch eager": False,
    "torch.compile": False,
    "ONNX Runtime float": False,
    "OpenVINO float": False,
    "OpenVINO W4A6": True,
    OURS: True,
}
PRODUCTS = ("torch float32", "ONNX Runtime float32", "ONNX Runtime int8")
GEMM = 2048  # rows and columns of the matrix product
TURN_S, LONG_S = 2.0, 20.0
COMPILING = 4  # frames
Backbone = Callable[[], Any]


def missing(engine: str) -> str | None:
    """Why an engine cannot run here."""
    if engine.startswith("OpenVINO") and importlib.util.find_spec("openvino") is None:
        return "openvino is not installed (requirements/openvino.txt)"
    if engine == "torch.compile" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return "torch.compile needs a C++ compiler"
    return None


def run_engine(name: str, package: Path, models: Path, turns: Turns) -> None:
    """Serves the turns of an engine. `models`: folder of the float model in PyTorch."""
    engine, backbone = open_engine(name, package, models)
    pipeline = Pipeline(engine)  # type: ignore[arg-type]
    # Compiles anew when it sees that the number of visible cells changes.
    number = COMPILING if name == "torch.compile" else 0
    for early in range(number):
        pipeline.run(made_frame(early))
    for parts in turns:
        begin, frames, spent = time.perf_counter(), 0, 0.0
        while frames == 0 or spent < (LONG_S if frames == 1 else TURN_S * frames / (frames + 1)):
            _timed("backbone", backbone, parts)
            busy = time.process_time()
            result = pipeline.run(made_frame(number))
            parts.setdefault("end to end cpu", []).append(time.process_time() - busy)
            stages = {stage: ms / 1e3 for stage, ms in result.milliseconds.items()}
            for stage, seconds in (*stages.items(), ("end to end", sum(stages.values()))):
                parts.setdefault(stage, []).append(seconds)
            number, frames, spent = number + 1, frames + 1, time.perf_counter() - begin
        if frames > 1:
            for seconds_of in parts.values():
                del seconds_of[0]


def _timed(stage: str, work: Backbone, parts: Parts) -> None:
    begin, busy = time.perf_counter(), time.process_time()
    work()
    parts.setdefault(f"{stage} cpu", []).append(time.process_time() - busy)
    parts.setdefault(stage, []).append(time.perf_counter() - begin)


def open_engine(name: str, package: Path, models: Path) -> tuple[Engine, Backbone]:
    """The engine, and its backbone and neck alone on pictures of its input's size."""
    content = read_package(package)
    if name == OURS:
        return load_package(package, "onnxruntime", cores()), _own_backbone(content)
    if name == "OpenVINO W4A6":
        return load_package(package, "openvino", cores()), _openvino_backbone(content)
    if name == "OpenVINO float":
        from qdbev_ros.engine.openvino_runner import OpenVinoRunner

        runner = OpenVinoRunner(with_stage_outputs(content.model), cores())
        return Engine(content, runner), _openvino_backbone(content)
    if name == "ONNX Runtime float":
        return Engine(content, PlainRunner(content.model)), _plain_backbone(content)
    torch_runner = TorchRunner(models / FLOAT_MODEL, name)
    return Engine(content, torch_runner), torch_runner.backbone


class TorchRunner:
    """The float model in PyTorch, its backbone, encoder and decoder compiled one by one if asked."""

    turns_memory, stage_outputs, picture_grid = False, False, None

    def __init__(self, path: Path, name: str) -> None:
        import torch

        from qdbev_train.checkpoint import load_model

        self._torch = torch
        self._model, variant, _ = load_model(path)
        self._model.requires_grad_(False)
        if name == PLAIN_TORCH:
            self._model.image_features = self._plain_features
        elif name == "torch.compile":
            self._model.image_features = torch.compile(self._model.image_features)
            head = self._model.pts_bbox_head
            head.encode, head.decode = torch.compile(head.encode), torch.compile(head.decode)
        self._pictures = torch.from_numpy(_pictures(variant)[None])
        self.description = f"PyTorch {torch.__version__}"

    def run(self, tensors: dict[str, Any]) -> dict[str, Any]:
        with self._torch.inference_mode():
            out = self._model.forward_tensors(*(self._torch.from_numpy(tensors[name]) for name in INPUTS))
        answer = (out.class_logits[-1, 0], out.boxes[-1, 0], out.bev[0])
        return {name: tensor.numpy() for name, tensor in zip(OUTPUTS, answer, strict=True)}

    def backbone(self) -> None:
        with self._torch.inference_mode():
            self._model.image_features(self._pictures)

    def _plain_features(self, images: Any) -> list[Any]:
        """As BEVFormer.image_features, channels outermost."""
        flat = images.flatten(0, 1)
        features = self._model.img_neck(self._model.img_backbone(flat))
        return [f.reshape(*images.shape[:2], *f.shape[1:]) for f in features]


class PlainRunner:
    """ONNX Runtime with all its own optimisations on the graph as torch exports it."""

    turns_memory, stage_outputs, picture_grid = False, False, None

    def __init__(self, master: bytes) -> None:
        self._session = _session(master)
        self._inputs = [i.name for i in self._session.get_inputs()]
        self.description = "ONNX Runtime, float"

    def run(self, tensors: dict[str, Any]) -> dict[str, Any]:
        answer = self._session.run(list(OUTPUTS), {name: tensors[name] for name in self._inputs})
        return dict(zip(OUTPUTS, answer, strict=True))


def _session(model: bytes) -> Any:
    return ort.InferenceSession(model, session_options(cores()), providers=["CPUExecutionProvider"])


def _pictures(variant: Any) -> Any:
    """(6, 3, H, W) float32, normalised."""
    shape = (6, 3, variant.image.padded_height, variant.image.padded_width)
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def backbone_alone(model: onnx.ModelProto) -> onnx.ModelProto:
    """What makes the feature maps, of a graph that has them among its outputs."""
    outputs = [output for output in model.graph.output if output.name.startswith(FEATURES)]
    del model.graph.output[:]
    model.graph.output.extend(outputs)
    alone = Graph(model).finish(model.producer_name, OPSET)
    inputs = [value for value in alone.graph.input if value.name == "images"]
    del alone.graph.input[:]
    alone.graph.input.extend(inputs)
    return alone


def _plain_backbone(package: Package) -> Backbone:
    model = backbone_alone(onnx.load_from_string(with_stage_outputs(package.model)))
    session, feeds = _session(model.SerializeToString()), {"images": _pictures(package.variant)[None]}
    return lambda: session.run(None, feeds)


def _own_backbone(package: Package) -> Backbone:
    """From the codes of the pictures, as the pipeline hands them over, where the package has any."""
    graph = CutGraph(backbone_alone(lower_u8(with_stage_outputs(package.model))), cores())
    pictures = _pictures(package.variant)
    if graph.picture_grid is None:
        feeds = {"images": pictures[None]}
    else:
        grid = graph.picture_grid
        numbers = np.rint(pictures / np.float32(grid.step)) + grid.zero
        feeds = {graph.codes: np.clip(numbers, grid.low, grid.high).astype(np.uint8)}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    return lambda: graph.run(dict(values))


def _openvino_backbone(package: Package) -> Backbone:
    import openvino as ov

    model = backbone_alone(inline_samplings(lower_u8(with_stage_outputs(package.model))))
    core = ov.Core()
    settings = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    settings["INFERENCE_NUM_THREADS"] = str(cores())
    compiled = core.compile_model(core.read_model(model.SerializeToString(), b""), "CPU", settings)
    request, feeds = compiled.create_infer_request(), {"images": _pictures(package.variant)[None]}
    return lambda: request.infer(feeds, share_inputs=True)


# The machine's limits.


def run_product(name: str, turns: Turns) -> None:
    """Square matrix products, as many as fit into a turn; the seconds of each."""
    product = _torch_product() if name.startswith("torch") else _onnxruntime_product(name.endswith("int8"))
    for parts in turns:
        begin = time.perf_counter()
        while time.perf_counter() - begin < TURN_S or not parts:
            _timed("product", product, parts)


def _torch_product() -> Callable[[], Any]:
    import torch

    a, b = torch.randn(GEMM, GEMM), torch.randn(GEMM, GEMM)
    out = torch.empty(GEMM, GEMM)
    return lambda: torch.mm(a, b, out=out)


def _onnxruntime_product(integer: bool) -> Callable[[], Any]:
    """A product with constant weights. In int8 MatMulInteger: the kernel of QLinearConv without rounding to 8 bits.

    QLinearConv of the same shape adds rounding of its sums, which is work of the network and not the machine's limit.
    """
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    if integer:
        a = random.integers(0, 64, (GEMM, GEMM)).astype(np.uint8)
        b = random.integers(-8, 8, (GEMM, GEMM)).astype(np.int8)
        kind, kinds = "MatMulInteger", (TensorProto.UINT8, TensorProto.INT32)
    else:
        a, b = (random.standard_normal((GEMM, GEMM), np.float32) for _ in range(2))
        kind, kinds = "MatMul", (TensorProto.FLOAT, TensorProto.FLOAT)
    shape = [GEMM, GEMM]
    ends = [helper.make_tensor_value_info(n, k, shape) for n, k in zip("ay", kinds, strict=True)]
    weight = numpy_helper.from_array(b, "b")
    graph = helper.make_graph(
        [helper.make_node(kind, ["a", "b"], ["y"])], "product", *([e] for e in ends), [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = 10
    session = _session(model.SerializeToString())
    return lambda: session.run(None, {"a": a})
