# SPDX-License-Identifier: Apache-2.0
"""A package gives back the fake-quantised model that it was made of."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import cycle
from pathlib import Path

import pytest
import torch

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.package import Package, read_package
from qdbev_ros.engine.parity import steps_moved
from qdbev_train.export.graph import export_master
from qdbev_train.export.package import export_package
from qdbev_train.export.restore import Restorer
from qdbev_train.model import BEVFormer
from qdbev_train.quantization import QuantConfig, post_training_quantise
from qdbev_train.quantization.calibrate import run_batch
from tests.quantisation_samples import frames, small_model, small_variant

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter warns about constant shapes


@pytest.fixture(scope="module")
def student() -> BEVFormer:
    model = small_model()
    return post_training_quantise(model, frames(model, 2), QuantConfig()).eval()


@pytest.fixture(scope="module")
def package(student: BEVFormer, tmp_path_factory: pytest.TempPathFactory) -> Package:
    path = tmp_path_factory.mktemp("restore") / "small.qdbev"
    export_package(student, small_variant(), QuantConfig(), path, {}, {})
    return read_package(path)


@torch.no_grad()
def test_the_restored_model_computes_what_the_exported_one_computes_to_the_bit(
    student: BEVFormer, package: Package
) -> None:
    restored = Restorer(package).model
    history: list[torch.Tensor | None] = [None, None]
    for batch in frames(student, 2):
        out, wanted = (run_batch(m, batch, h) for m, h in zip((restored, student), history, strict=True))
        assert torch.equal(out.class_logits[-1], wanted.class_logits[-1])
        assert torch.equal(out.boxes, wanted.boxes)
        assert torch.equal(out.bev, wanted.bev)
        history = [out.bev, wanted.bev]


def test_the_demos_model_exports_to_the_same_bytes_again() -> None:
    demo = read_package(Path(__file__).resolve().parents[2] / "demo" / "nano.qdbev")
    assert export_master(Restorer(demo).model, demo.variant) == demo.model


def test_steps_that_moved_move_in_pytorch_and_weights_do_not(package: Package) -> None:
    restorer = Restorer(package)
    before = copy.deepcopy(restorer.model.state_dict())
    restorer.load(steps_moved(package.model, cycle((1, -1))))
    left_out = tuple(package.quantisation["left_out"])
    directions = set()
    for name, tensor in restorer.model.state_dict().items():
        change = tensor - before[name]
        if name.startswith(left_out) or name.endswith(".bias"):  # biases are in units of the steps
            continue
        if name.endswith(".scale") and tensor.ndim == 0:
            assert float(change.abs() / tensor) == pytest.approx(1e-6, rel=0.1)
            directions.add(bool(change > 0))
        else:
            assert not change.any(), name
    assert directions == {True, False}


def test_a_package_whose_manifest_does_not_fit_its_graph_is_refused(package: Package) -> None:
    grid = copy.deepcopy(package.quantisation)
    codes = next(layer["activation_codes"] for layer in grid["layers"] if layer["activation_codes"][0] < 0)
    codes[0] = 0
    with pytest.raises(PackageError, match="exports to another master"):
        Restorer(replace(package, quantisation=grid))


def test_a_float_package_is_refused(tmp_path: Path) -> None:
    export_package(small_model(), small_variant(), None, tmp_path / "float.qdbev", {}, {})
    with pytest.raises(PackageError, match="only quantised ones"):
        Restorer(read_package(tmp_path / "float.qdbev"))
