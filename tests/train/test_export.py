# SPDX-License-Identifier: Apache-2.0
"""Exported and run by ONNX Runtime, the network computes what the fake-quantised model computes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.engine import cut_graph, load_package, read_package
from qdbev_ros.engine.attention import fuse_attention
from qdbev_ros.engine.deformable_nodes import take_attentions
from qdbev_ros.engine.graph import Graph, unpack_int4
from qdbev_ros.engine.lowering import fuse_linears, lower_u8
from qdbev_ros.engine.master import OPSET
from qdbev_ros.engine.native import KernelError
from qdbev_ros.engine.sampling import inline_samplings, samplings
from qdbev_train.checkpoint import save_model
from qdbev_train.cli import main
from qdbev_train.export.graph import INPUTS, export_master
from qdbev_train.export.package import export_package
from qdbev_train.model import BEVFormer
from qdbev_train.quantization import QuantConfig, post_training_quantise, quantise_model
from qdbev_train.quantization.calibrate import run_batch
from qdbev_train.quantization.layers import QuantisedConv2d
from tests.model_samples import can_bus, rig
from tests.quantisation_samples import frames, small_model, small_variant
from tests.unit.test_lowering import plain_session
from tests.unit.test_sampling import needs_compiler

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # the exporter warns about shapes that are constants on purpose


@pytest.fixture(scope="module")
def student() -> BEVFormer:
    model = small_model()
    return post_training_quantise(model, frames(model, 3), QuantConfig())


@pytest.fixture(scope="module")
def master(student: BEVFormer) -> bytes:
    return export_master(student, small_variant())


@pytest.fixture(scope="module")
def package(student: BEVFormer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("package") / "small.qdbev"
    export_package(student, small_variant(), QuantConfig(), path, {}, {})
    return path


def tensors(model: BEVFormer, cameras: int) -> tuple[torch.Tensor, ...]:
    matrices = rig(model.variant, turn_degrees=20.0)[None].clone()
    matrices[:, cameras:] = 0.0
    tables = model.camera_tables(matrices)
    bus = can_bus(12.0, 3.0)[None]
    transformer, bev = model.variant.transformer, model.variant.bev
    generator = torch.Generator().manual_seed(cameras)
    previous = torch.randn(1, bev.cells, transformer.channels, generator=generator)
    turned, shift, use = model.align_history(bus, previous, None)
    pictures = frames(model, cameras)[-1].images
    return pictures, tables.points, tables.cells, tables.slots, tables.weights, bus, turned, shift, use


def closeness(got: np.ndarray, wanted: np.ndarray) -> float:
    """Share of values that agree to float rounding; a code that falls the other way at a tie moves a few."""
    return float(np.isclose(got, wanted, rtol=1e-3, atol=1e-3).mean())


@pytest.mark.parametrize("cameras", [6, 2])
@torch.no_grad()
def test_every_form_computes_what_the_fake_quantised_model_computes(
    student: BEVFormer, master: bytes, cameras: int
) -> None:
    """With two cameras the tables have other sizes than in the export."""
    inputs = tensors(student, cameras)
    out = student.forward_tensors(*inputs)
    wanted = [out.class_logits[-1, 0].numpy(), out.boxes[-1, 0].numpy(), out.bev[0].numpy()]
    u8 = lower_u8(master)
    for form in (master, *(m.SerializeToString() for m in (u8, inline_samplings(u8), fuse_linears(u8)))):
        session = plain_session(form)
        names = {i.name for i in session.get_inputs()}
        feeds = {n: t.numpy() for n, t in zip(INPUTS, inputs, strict=True) if n in names}
        for got, value in zip(session.run(None, feeds), wanted, strict=True):
            assert closeness(got, value) > 0.97
            assert np.abs(got - value).max() < 0.2 * value.std()


def test_the_engine_agrees_with_the_model_over_a_drive(student: BEVFormer, package: Path) -> None:
    """Geometry, memory and fused kernels included: three frames, each with its own history."""
    engine = load_package(package, threads=1)
    convolutions = sum(isinstance(m, QuantisedConv2d) for m in student.modules())
    assert f"{convolutions} int8 convolutions" in engine.description
    ours, theirs = None, None
    for batch in frames(student, 3):
        with torch.no_grad():
            out = run_batch(student, batch, theirs)
        arrays = (batch.images[0].numpy(), batch.lidar2img[0].numpy(), batch.can_bus[0].numpy())
        result = engine.infer(*arrays, ours)
        ours, theirs = result.bev, out.bev
        for got, wanted in (
            (result.bev, out.bev[0]),
            (result.boxes, out.boxes[-1, 0]),
            (result.class_logits, out.class_logits[-1, 0]),
        ):
            error = np.sqrt(np.square(got - wanted.numpy()).mean())
            assert error < 0.15 * float(wanted.std())


@needs_compiler
def test_every_deformable_attention_is_taken_into_the_kernel(student: BEVFormer, master: bytes) -> None:
    """Two encoder layers on two levels of maps."""
    spec = student.variant.transformer
    _, attentions = take_attentions(lower_u8(master))
    kinds = [(attention.maps, bool(attention.slots)) for attention in attentions.values()]
    assert kinds == [(2, False), (1, True)] * spec.encoder_layers + [(1, False)] * spec.decoder_layers


@needs_compiler
@pytest.mark.parametrize("cameras", [6, 2])
@torch.no_grad()
def test_in_float_the_graph_in_parts_computes_what_the_whole_one_computes(cameras: int) -> None:
    model = small_model()
    whole, inputs = lower_u8(export_master(model, small_variant())), tensors(model, cameras)
    session = plain_session(whole.SerializeToString())
    names = {i.name for i in session.get_inputs()}
    feeds = {n: t.numpy() for n, t in zip(INPUTS, inputs, strict=True) if n in names}
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    graph = cut_graph.CutGraph(whole, 2)
    graph.run(values)
    for output, wanted in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        np.testing.assert_allclose(values[output.name].numpy(), wanted, atol=2e-4 * np.abs(wanted).max())


def test_without_a_compiler_the_engine_samples_by_grid_sample_and_says_so(
    student: BEVFormer, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (batch,) = frames(student, 1)
    arrays = (batch.images[0].numpy(), batch.lidar2img[0].numpy(), batch.can_bus[0].numpy())
    with_kernel = load_package(package, threads=1)

    def missing(threads: int | None) -> None:
        raise KernelError("there is no C compiler")

    monkeypatch.setattr(cut_graph, "DeformableKernel", missing)
    without = load_package(package, threads=1)
    assert "GridSample" in without.description
    assert "no C compiler" in without.description
    results = [engine.infer(*arrays, None) for engine in (with_kernel, without)]
    assert closeness(*(result.bev for result in results)) > 0.97
    assert closeness(*(result.class_logits for result in results)) > 0.97


def test_weights_are_packed_at_their_bits(student: BEVFormer, master: bytes) -> None:
    graph = onnx.load_from_string(master).graph
    kinds = Counter(t.data_type for t in graph.initializer)
    assert kinds[TensorProto.INT4] > 40
    convolution = student.img_backbone.get_submodule("features.1.conv.0.0")
    codes = (convolution.weight / convolution.weight_scale[:, None, None, None]).round().clamp(-8, 7)
    packed = [unpack_int4(t) for t in graph.initializer if t.data_type == TensorProto.INT4]
    assert any(p.shape == codes.shape and np.array_equal(p, codes.detach().numpy()) for p in packed)
    assert {n.op_type for n in graph.node if n.domain} == {f.name for f in graph_functions(master)}


def graph_functions(master: bytes) -> list[onnx.FunctionProto]:
    return list(onnx.load_from_string(master).functions)


def test_every_deformable_attention_is_one_node_of_standard_operators(
    student: BEVFormer, master: bytes
) -> None:
    spec = student.variant.transformer
    graph = Graph(onnx.load_from_string(master))
    marked = samplings(graph)
    assert len(marked) == 2 * spec.encoder_layers + spec.decoder_layers
    assert {(s.heads, s.depth) for _, s in marked} == {(spec.heads, spec.channels // spec.heads)}
    assert not graph.nodes("GridSample")
    for function in graph_functions(master):
        assert {n.domain for n in function.node} == {""}
    plain = inline_samplings(onnx.load_from_string(master))
    assert not plain.functions
    assert {n.domain for n in plain.graph.node} == {""}


def test_every_attention_between_queries_is_left_to_the_runtimes_own_operator(
    student: BEVFormer, master: bytes
) -> None:
    fused = fuse_attention(lower_u8(master), OPSET)
    kinds = Counter(node.op_type for node in fused.graph.node)
    assert kinds["MultiHeadAttention"] == student.variant.transformer.decoder_layers


def test_every_float_weight_that_is_left_is_named(student: BEVFormer, master: bytes) -> None:
    """Nothing large stays in float by accident: what is left are LayerNorms and the named exceptions."""
    graph = onnx.load_from_string(master).graph
    floats = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == TensorProto.FLOAT)
    from qdbev_train.quantization.report import describe

    report = describe(student, QuantConfig())
    named = sum(int(np.prod(p["shape"])) for p in report["float_parameters"])
    scales = sum(layer["shape"][0] for layer in report["layers"])
    assert floats <= named + 2 * scales + 1000


def test_the_file_holds_the_layers_of_the_report_and_none_that_only_training_needs(
    student: BEVFormer, package: Path
) -> None:
    read = read_package(package)
    graph = onnx.load_from_string(read.model).graph
    packed = sum(int(np.prod(t.dims)) for t in graph.initializer if t.data_type == TensorProto.INT4)
    listed = [layer for layer in read.quantisation["layers"] if layer["weight_bits"] == 4]
    assert packed == sum(int(np.prod(layer["shape"])) for layer in listed)
    assert "pts_bbox_head.cls_branches.0" in read.quantisation["left_out"]


def test_two_exports_are_the_same_bytes(master: bytes, package: Path) -> None:
    assert read_package(package).model == master


def test_a_model_that_was_never_calibrated_is_refused() -> None:
    model = quantise_model(small_model(), QuantConfig())
    with pytest.raises(ConfigError, match="calibrated"):
        export_master(model, small_variant())


def test_export_and_inspect_as_commands(
    student: BEVFormer, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint, package, scores = (tmp_path / n for n in ("model.safetensors", "small.qdbev", "score.json"))
    save_model(checkpoint, student, small_variant(), {"steps": 12}, QuantConfig().to_dict())
    scores.write_text(json.dumps({"nds": 0.31}))
    assert main(["export", str(checkpoint), str(package), "--scores", str(scores)]) == 0
    assert main(["inspect", str(package), "--json", str(tmp_path / "inspect.json")]) == 0
    text = capsys.readouterr().out
    for expected in ("W4A6", "img_backbone.features.0.0", "first convolution", "  nds: 0.31", "  steps: 12"):
        assert expected in text
    summary = json.loads((tmp_path / "inspect.json").read_text())
    assert summary["bytes"] == package.stat().st_size
    assert summary["variant"]["name"] == "sample"


def test_bad_input_of_the_commands_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        ["inspect", str(tmp_path / "no.qdbev")],
        ["export", str(tmp_path / "no.safetensors"), str(tmp_path / "out.qdbev")],
        ["export", "x", "y", "--scores", str(tmp_path / "no.json")],
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("qdbev: error: ")
        assert error.count("\n") == 1
