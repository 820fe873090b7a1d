# SPDX-License-Identifier: Apache-2.0
"""Which engine a package gets, and one clear line where it gets none."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.errors import EngineError
from qdbev_ros.engine import BACKENDS, cuda, load_package
from qdbev_ros.engine.master import OUTPUTS
from tests.small_master import write_small_package
from tests.unit.test_engine import frame


@pytest.fixture
def package(tmp_path: Path) -> Path:
    write_small_package(tmp_path / "small.qdbev")
    return tmp_path / "small.qdbev"


def without(monkeypatch: pytest.MonkeyPatch, *missing: str) -> None:
    """Lets imports of some packages fail, as on a machine that has none."""
    real = builtins.__import__

    def import_(name: str, *rest: Any) -> Any:
        if name.split(".")[0] in missing:
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", import_)


def test_the_names_are_those_of_the_documentation() -> None:
    assert BACKENDS == ("auto", "onnxruntime", "openvino", "tensorrt")


def test_auto_takes_onnx_runtime_where_there_is_no_gpu_and_says_why(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libno-such-driver.so.1")
    description = load_package(package, threads=1).description
    assert "ONNX Runtime" in description
    assert "because TensorRT is out: no NVIDIA driver (libno-such-driver.so.1)" in description


def test_tensorrt_without_a_driver_is_refused_in_one_line(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libno-such-driver.so.1")
    with pytest.raises(EngineError, match="the tensorrt engine cannot run here: no NVIDIA driver"):
        load_package(package, backend="tensorrt")


def test_what_tensorrt_lacks_is_named_in_the_order_in_which_one_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "DRIVER", "libc.so.6")  # there everywhere
    monkeypatch.setattr(cuda, "_installed", lambda name: name != "cuda.bindings")
    assert "no cuda-bindings (pip install -r requirements/tensorrt.txt)" in str(cuda.missing())
    monkeypatch.setattr(cuda, "_installed", lambda name: name == "cuda.bindings")
    assert "neither tensorrt nor tensorrt_rtx is installed" in str(cuda.missing())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_feature_maps_are_fetched_for_the_gate_alone(package: Path, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino", reason="openvino isn't installed")
    engine = load_package(package, backend=backend, threads=1)
    tensors = engine.tensors(*frame(), None)
    frames = engine.runner.run(tensors)
    engine.runner.stage_outputs = True
    gates = engine.runner.run(tensors)
    assert (set(frames), set(gates) - set(frames)) == (set(OUTPUTS), {"image_features_0"})
    np.testing.assert_array_equal(frames["bev"], gates["bev"])


def test_openvino_that_is_not_installed_is_refused_in_one_line(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(monkeypatch, "openvino")
    with pytest.raises(EngineError, match=r"pip install -r requirements/openvino\.txt") as caught:
        load_package(package, backend="openvino")
    assert "\n" not in str(caught.value)


def test_openvino_runs_all_convolutions_on_integers_and_twice_the_same(package: Path) -> None:
    pytest.importorskip("openvino", reason="openvino isn't installed")
    engine = load_package(package, backend="openvino", threads=1)
    assert "2 int8 convolutions" in engine.description
    first, second = engine.infer(*frame(), None), engine.infer(*frame(), None)
    np.testing.assert_array_equal(first.bev, second.bev)
    np.testing.assert_array_equal(first.class_logits, second.class_logits)
    assert not np.shares_memory(first.bev, second.bev)


def test_a_convolution_that_openvino_leaves_in_float_stops_the_engine(package: Path) -> None:
    ov = pytest.importorskip("openvino", reason="openvino isn't installed")
    from qdbev_ros.engine.openvino_runner import check_convolutions

    data = ov.opset13.parameter([1, 1, 4, 4], np.float32)
    kernel = ov.opset13.constant(np.ones((1, 1, 3, 3), np.float32))
    sides = ([1, 1], [0, 0], [0, 0], [1, 1])
    model = ov.Model([ov.opset13.convolution(data, kernel, *sides)], [data])
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with pytest.raises(EngineError, match="1 of 1 quantised convolutions in float"):
        check_convolutions(["first"], compiled.get_runtime_model())
