# SPDX-License-Identifier: Apache-2.0
"""From the fake-quantised model to every engine of this machine: one set of numbers; what is off is found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdbev_ros.core.ego_motion import rotate_bev
from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import read_package
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.parity import Reference, demand, judge, make_reference
from qdbev_ros.engine.reference_runner import ReferenceRunner
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_train.checkpoint import save_model
from qdbev_train.cli import main
from qdbev_train.export.package import export_package
from qdbev_train.quantization import QuantConfig, post_training_quantise
from tests.quantisation_samples import frames, small_model, small_variant

Tensors = dict[str, np.ndarray[Any, Any]]
Change = Callable[[Tensors], Tensors]

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns about constant shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """small.qdbev and the checkpoint that it was made of."""
    folder = tmp_path_factory.mktemp("parity")
    model = small_model()
    student = post_training_quantise(model, frames(model, 3), QuantConfig())
    save_model(folder / "small.safetensors", student, small_variant(), {}, QuantConfig().to_dict())
    export_package(student, small_variant(), QuantConfig(), folder / "small.qdbev", {}, {})
    return folder


@pytest.fixture(scope="module")
def package(folder: Path) -> Package:
    return read_package(folder / "small.qdbev")


def test_pytorch_and_all_engines_that_run_here_agree(folder: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--checkpoint", str(folder / "small.safetensors"), "--threads", "1"]
    report = folder / "new folder" / "parity.json"
    arguments += ["--json", str(report), "--report", str(folder / "parity.md")]
    assert main(["parity", str(folder / "small.qdbev"), *arguments]) == 0
    table = capsys.readouterr().out
    assert "class logits" in table
    head, _, *rows = (folder / "parity.md").read_text().splitlines()
    assert head.startswith("| spread / shift | ")
    assert [row.split(" | ")[0] for row in rows] == [
        f"| {name}" for name in ("limit", "pytorch", "onnxruntime", "openvino", "tensorrt")
    ]
    assert {row.count("|") for row in (head, *rows)} == {head.count("|")}
    engines = json.loads(report.read_text())["engines"]
    assert engines["pytorch"]["passed"]
    assert engines["onnxruntime"]["passed"]
    assert set(engines) == {"pytorch", "onnxruntime", "openvino", "tensorrt"}
    assert "reason" in engines["tensorrt"] or engines["tensorrt"]["passed"]


def test_an_engine_that_was_asked_for_and_is_not_there_is_an_error(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdbev_ros.engine.cuda.DRIVER", "libno-such-driver.so.1")
    assert main(["parity", str(folder / "small.qdbev"), "--backend", "tensorrt"]) == 2
    said = capsys.readouterr()
    assert "no NVIDIA driver" in said.out
    assert "tensorrt must not run this package here" in said.err


def test_an_engine_that_is_there_and_refuses_is_an_error_though_nobody_asked_for_it(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("ONNX Runtime runs 2 of 2 quantised convolutions in float")

    monkeypatch.setattr("qdbev_ros.engine.onnxruntime_runner.OnnxRuntimeRunner.__init__", refuse)
    assert main(["parity", str(folder / "small.qdbev"), "--threads", "1"]) == 2
    said = capsys.readouterr()
    assert "2 of 2 quantised convolutions in float" in said.out
    assert "small.qdbev: onnxruntime must not run this package here" in said.err


def aligned(package: Package) -> ReferenceRunner:
    """The classic mistake of ports: half a pixel at the border, nothing in the middle."""
    model = onnx.load_from_string(with_stage_outputs(package.model))
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        for attribute in node.attribute:
            if attribute.name == "align_corners":
                attribute.i = 1
    return ReferenceRunner(model.SerializeToString(), 1)


def test_sampling_that_aligns_corners_is_refused_where_it_first_shows(package: Package) -> None:
    verdict = judge(package, Engine(package, aligned(package)), make_reference(package, 1))
    assert all(r.spread == 0.0 for r in verdict.results if r.stage == "image features")
    with pytest.raises(EngineError, match="must not run: BEV, frame 0: spread"):
        demand(verdict, "this engine")


class Remembering:
    """The reference as an engine that turns and shifts the memory itself, as `change` has it."""

    turns_memory = True
    stage_outputs = True
    picture_grid = None
    description = "an engine"

    def __init__(self, package: Package, change: Change) -> None:
        self._plain = ReferenceRunner(with_stage_outputs(package.model), 1)
        self._change = change

    def run(self, tensors: Tensors) -> Tensors:
        given = tensors | self._change(tensors)
        return self._plain.run(given | {"prev_bev": rotate_bev(given["memory"], given["sources"][0])[None]})


@pytest.fixture(scope="module")
def demo() -> tuple[Package, Reference]:
    """A trained model: how much a map that is off by a few cells matters is what it learned."""
    package = read_package(Path(__file__).resolve().parents[2] / "demo" / "nano.qdbev")
    return package, make_reference(package, 1)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda given: {}, True),
        (lambda given: {"memory": np.zeros_like(given["memory"])}, False),
        (lambda given: {"sources": np.arange(given["sources"].size)[None]}, False),
        (lambda given: {"sources": given["sources"] % given["sources"].size}, False),
        (lambda given: {"shift": np.zeros_like(given["shift"])}, False),
    ],
    ids=["as it should be", "forgotten", "not turned", "border from the last cell", "not shifted"],
)
def test_a_memory_that_is_moved_wrongly_is_refused(
    demo: tuple[Package, Reference], change: Change, right: bool
) -> None:
    package, reference = demo
    assert judge(package, Engine(package, Remembering(package, change)), reference).passed == right


def test_sampling_that_aligns_corners_is_refused_in_a_trained_model(demo: tuple[Package, Reference]) -> None:
    package, reference = demo
    assert not judge(package, Engine(package, aligned(package)), reference).passed
