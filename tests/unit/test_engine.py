# SPDX-License-Identifier: Apache-2.0
"""The engine: a package in, numbers out, the same ones every time, and clear words when it cannot."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from qdbev_ros.core.errors import DataError, EngineError, PackageError
from qdbev_ros.engine import engine as engine_module
from qdbev_ros.engine import load_package, read_package, write_package
from tests.small_master import CELLS, CHANNELS, QUERIES, small_master, small_variant, write_small_package

CAMERA = np.array([[4, 0, 0, 4], [0, 4, 0, 4], [0, 0, -1, 20], [0, 0, 0, 1]], np.float32)


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "small.qdbev"
    write_small_package(path)
    return path


def frame(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.normal(size=(6, 3, 8, 8)).astype(np.float32)
    can_bus = np.zeros(18, np.float32)
    can_bus[17] = 4.0
    return images, np.stack([CAMERA] * 6), can_bus


def test_a_package_runs_with_and_without_history(package: Path) -> None:
    engine = load_package(package, threads=1)
    first = engine.infer(*frame(), None)
    assert first.class_logits.shape == (QUERIES, 10)
    assert first.boxes.shape == (QUERIES, 10)
    assert first.bev.shape == (CELLS, CHANNELS)
    second = engine.infer(*frame(), first.bev)
    assert np.isfinite(second.bev).all()
    assert not np.array_equal(second.bev, first.bev)


def test_the_rotation_centre_of_the_packages_variant_is_what_the_node_turns_about(tmp_path: Path) -> None:
    previous = np.random.default_rng(5).normal(size=(CELLS, CHANNELS)).astype(np.float32)
    maps = []
    for name, center in (("own", None), ("same", (2.0, 2.0)), ("released", (100.0, 100.0))):
        variant = small_variant()
        variant = replace(variant, temporal=replace(variant.temporal, rotate_center=center))
        write_small_package(tmp_path / f"{name}.qdbev", variant)
        maps.append(load_package(tmp_path / f"{name}.qdbev", threads=1).infer(*frame(), previous).bev)
    np.testing.assert_array_equal(maps[0], maps[1])  # (2, 2) is the middle of 4 x 4 cells
    assert not np.array_equal(maps[0], maps[2])


def test_the_engine_says_what_it_is(package: Path) -> None:
    engine = load_package(package, backend="onnxruntime", threads=1)
    assert engine.variant == small_variant()
    assert "small-test" in engine.name
    assert "ONNX Runtime" in engine.description
    assert "2 int8 convolutions" in engine.description
    assert len(engine.sha256) == 64


def test_twice_the_same_input_gives_twice_the_same_bits(package: Path) -> None:
    one, two = load_package(package, threads=2), load_package(package, threads=2)
    for a, b in ((one, one), (one, two)):
        first, second = a.infer(*frame(), None), b.infer(*frame(), None)
        np.testing.assert_array_equal(first.class_logits, second.class_logits)
        np.testing.assert_array_equal(first.bev, second.bev)


def test_the_fused_engine_stays_within_a_few_steps_of_the_plain_graph(package: Path) -> None:
    from tests.unit.test_lowering import plain_session

    images, lidar2img, can_bus = frame(3)
    feeds = {"images": images[None], "prev_bev": np.zeros((1, CELLS, CHANNELS), np.float32)}
    logits, _, bev = plain_session(small_master()).run(None, feeds)
    got = load_package(package, threads=1).infer(images, lidar2img, can_bus, None)
    assert np.abs(got.bev - bev).max() < 0.02  # a mean of codes 0.12 apart
    assert np.abs(got.class_logits - logits).max() < 3 * 0.1 * 0.05 * 8  # steps of input times weights


def test_pictures_given_as_codes_give_the_same_bits_as_in_float(package: Path) -> None:
    engine = load_package(package, threads=1)
    grid = engine.picture_grid
    assert grid is not None
    images, lidar2img, can_bus = frame(2)
    codes = np.clip(np.rint(images / np.float32(grid.step)) + grid.zero, grid.low, grid.high).astype(np.uint8)
    wanted, got = (
        engine.infer(images, lidar2img, can_bus, None),
        engine.infer(codes, lidar2img, can_bus, None),
    )
    np.testing.assert_array_equal(got.class_logits, wanted.class_logits)
    np.testing.assert_array_equal(got.bev, wanted.bev)


def test_an_engine_that_takes_no_codes_says_so(package: Path) -> None:
    runner = SimpleNamespace(description="float only", run=lambda tensors: tensors)
    engine = engine_module.Engine(read_package(package), runner)
    images, lidar2img, can_bus = frame()
    with pytest.raises(DataError, match="images are bytes"):
        engine.infer(images.astype(np.uint8), lidar2img, can_bus, None)


def test_the_previous_map_is_left_as_it_was(package: Path) -> None:
    history = np.random.default_rng(1).normal(size=(CELLS, CHANNELS)).astype(np.float32)
    before = history.copy()
    load_package(package, threads=1).infer(*frame(), history)
    np.testing.assert_array_equal(history, before)


def test_visible_cells_are_computed_again_only_when_the_calibration_changes(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = engine_module.visible_cells
    monkeypatch.setattr(engine_module, "visible_cells", lambda *a: calls.append(1) or real(*a))
    engine = load_package(package, threads=1)
    images, lidar2img, can_bus = frame()
    engine.infer(images, lidar2img, can_bus, None)
    engine.infer(images, lidar2img.copy(), can_bus, None)
    assert len(calls) == 1
    lidar2img[2] = 0.0  # in place, as a caller with one buffer does it
    engine.infer(images, lidar2img, can_bus, None)
    assert len(calls) == 2


@pytest.mark.parametrize("name", ["images", "lidar2img", "can_bus", "prev_bev"])
def test_an_input_of_the_wrong_shape_is_named(package: Path, name: str) -> None:
    images, lidar2img, can_bus = frame()
    arrays = {
        "images": images,
        "lidar2img": lidar2img,
        "can_bus": can_bus,
        "prev_bev": np.zeros((CELLS, CHANNELS)),
    }
    arrays[name] = arrays[name][:-1]
    with pytest.raises(DataError, match=f"{name} has shape"):
        load_package(package, threads=1).infer(**arrays)


def test_unknown_backends_and_thread_counts_are_refused(package: Path) -> None:
    with pytest.raises(EngineError, match="unknown engine 'cuda'; use one of auto, onnxruntime"):
        load_package(package, backend="cuda")
    with pytest.raises(EngineError, match="0 threads"):
        load_package(package, threads=0)


def test_a_model_with_a_whole_hash_but_no_graph_inside_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "odd.qdbev"
    write_package(path, small_variant(), b"\xff\xff\xff", {}, {}, {})
    with pytest.raises(PackageError, match="no ONNX file"):
        load_package(path)


def test_a_convolution_that_cannot_run_in_int8_stops_the_engine(tmp_path: Path) -> None:
    """A rectifier that signed codes do not repeat keeps ONNX Runtime from fusing the convolution with its quantiser."""
    model = onnx.load_from_string(small_master())
    conv = next(n for n in model.graph.node if n.name == "second")
    conv.output[0] = "second_alone"
    at = list(model.graph.node).index(conv) + 1
    model.graph.node.insert(at, onnx.helper.make_node("Relu", ["second_alone"], ["second"]))
    path = tmp_path / "slow.qdbev"
    write_package(path, small_variant(), model.SerializeToString(), {}, {}, {})
    with pytest.raises(EngineError, match="1 of 2 quantised convolutions in float: second"):
        load_package(path)


def test_no_torch_is_loaded_by_the_engine(package: Path) -> None:
    load = "from qdbev_ros.engine import load_package; load_package(sys.argv[1])"
    code = f"import sys; {load}; print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(package)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"
