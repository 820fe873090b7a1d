# SPDX-License-Identifier: Apache-2.0
"""From the fake-quantised model to every engine of this machine: one set of numbers; sampling that is off is found."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import read_package
from qdbev_ros.engine.engine import Engine
from qdbev_ros.engine.package import Package
from qdbev_ros.engine.parity import demand, judge, reference_outputs, rounding_alone
from qdbev_ros.engine.reference_runner import ReferenceRunner
from qdbev_ros.engine.stage_outputs import with_stage_outputs
from qdbev_train.checkpoint import save_model
from qdbev_train.cli import main
from qdbev_train.export.package import export_package
from qdbev_train.quantization import QuantConfig, post_training_quantise
from tests.quantisation_samples import frames, small_model, small_variant

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
    assert main(["parity", str(folder / "small.qdbev"), *arguments, "--json", str(report)]) == 0
    table = capsys.readouterr().out
    assert "class logits" in table
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


def test_sampling_that_aligns_corners_is_refused_where_it_first_shows(package: Package) -> None:
    """The classic mistake of ports: half a pixel at the border, nothing in the middle."""
    model = onnx.load_from_string(package.model)
    for node in [*model.graph.node, *(n for f in model.functions for n in f.node)]:
        for attribute in node.attribute:
            if attribute.name == "align_corners":
                attribute.i = 1
    reference = reference_outputs(package.model, package, 1)
    runner = ReferenceRunner(with_stage_outputs(model.SerializeToString()), 1)
    verdict = judge(package, Engine(package, runner), reference)
    verdict = verdict.beside(rounding_alone(package, reference, 1))
    assert all(r.spread == 0.0 for r in verdict.results if r.stage == "image features")
    with pytest.raises(EngineError, match="must not run: BEV, frame 0: spread"):
        demand(verdict, "this engine")
