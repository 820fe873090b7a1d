# SPDX-License-Identifier: Apache-2.0
"""benchmarks/engines.py: engines run one network in one pipeline; tables and plots follow from the numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import deformable, engine_jobs, engines, packages
from benchmarks.attention_graph import attention_graph
from benchmarks.engine_jobs import ENGINES, OURS, missing, open_engine, run_engine
from benchmarks.engines_report import BEGIN, END, numbers, table, write_docs
from benchmarks.packages import ABOUT, FLOAT_MODEL, FLOAT_PACKAGE, PACKAGE
from benchmarks.turns import Row
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import Variant, load_variant
from qdbev_ros.engine import read_package
from qdbev_ros.engine.parity_frames import gate_frames
from tests.quantisation_samples import small_variant
from tests.unit.test_sampling import needs_compiler

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # the exporter warns about shapes that are constants on purpose
FLOAT = [name for name in ENGINES if not ENGINES[name] and name != "torch.compile"]


def variant() -> Variant:
    """Small, with pictures decoded whole sizes smaller, as nano's."""
    return replace(small_variant(), name="sample")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    packages.make(variant(), folder)
    return folder


def test_the_models_of_a_variant_are_a_checkpoint_a_graph_and_a_package(models: Path) -> None:
    about = json.loads((models / ABOUT).read_text())
    assert (models / PACKAGE).stat().st_size < (models / FLOAT_MODEL).stat().st_size
    assert 0 < about["operations"]["backbone"] < about["operations"]["network"]
    assert read_package(models / PACKAGE).quantisation["weight_bits"] == 4
    assert (models / FLOAT_MODEL).stat().st_size > 4 * about["parameters"]


def test_float_engines_compute_the_same(models: Path) -> None:
    (frame, _) = gate_frames(variant())
    answers = {}
    for name in FLOAT:
        if missing(name) is None:
            engine, backbone = open_engine(name, models / FLOAT_PACKAGE, models)
            backbone()
            answers[name] = engine.infer(frame.images, frame.lidar2img, frame.can_bus, None)
    wanted = answers.pop("torch eager")
    assert answers
    for name, answer in answers.items():
        np.testing.assert_allclose(answer.class_logits, wanted.class_logits, atol=1e-3, err_msg=name)
        np.testing.assert_allclose(answer.bev, wanted.bev, atol=1e-3, err_msg=name)


@pytest.mark.parametrize("name", ["torch eager", OURS])
def test_a_turn_times_every_stage(name: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_jobs, "TURN_S", 0.0)  # one frame a turn
    turns: list[dict[str, list[float]]] = [{}, {}]
    run_engine(name, models / (PACKAGE if ENGINES[name] else FLOAT_PACKAGE), models, iter(turns))
    for parts in turns:
        whole = sum(parts[stage][0] for stage in ("decode", "preprocess", "engine", "postprocess"))
        assert parts["end to end"] == pytest.approx([whole])
        assert parts["backbone"][0] > 0


def test_larger_relatives_of_nano_differ_in_one_thing_each() -> None:
    nano = load_variant("nano")
    for one in packages.grown(nano):
        assert sum(getattr(one, part) != getattr(nano, part) for part in ("image", "bev", "transformer")) == 1
    folders = {packages.folder_of(v, Path()) for v in (nano, *packages.grown(nano))}
    assert len(folders) == 7


def measured() -> dict[str, Any]:
    """Numbers of a run in which torch took 100 ms a frame and ours 10, at a peak of 1000 GOP/s."""
    rows = []
    for engine, factor in (("torch eager", 10.0), (OURS, 1.0)):
        row = Row("sample", engine, "engine", peak_mb=100)
        stages = {
            "decode": 2,
            "preprocess": 1,
            "engine": 6,
            "postprocess": 1,
            "backbone": 4,
            "end to end": 10,
        }
        row.parts = {stage: [factor * ms / 1e3] * 3 for stage, ms in stages.items()}
        rows.append(row)
    operations = 2.0 * engine_jobs.GEMM**3
    rows += [Row("sample", name, "product") for name in engine_jobs.PRODUCTS]
    for row, gops in zip(rows[2:], (50, 100, 1000), strict=True):
        row.parts = {"product": [operations / (gops * 1e9)]}
    about = {"operations": {"backbone": 2_000_000_000, "network": 3_000_000_000}, "side_by_side": True}
    machine = {"cpu": "abacus", "threads": 2}
    size = {"height": 144, "width": 256, "cells": 1600, "queries": 200, "work": 10**9}
    growth = ([rows[1], rows[0]], [size, size | {"queries": 900}])
    data = numbers(rows, {"sample": about}, machine, growth)
    kinds = (("grid_sample", 8.0, 1.0), ("own_kernel", 2.0, 4.0))
    sampling = [
        {
            "variant": "sample",
            "stage": "spatial",
            "engine": e,
            "samples": 9,
            "ms_median": ms,
            "ms_min": ms,
            "gain": gain,
        }
        for e, ms, gain in kinds
    ]
    return data | {"left_out": {"sample": {"torch.compile": "no compiler"}}, "sampling": sampling}


def test_rows_are_fractions_of_the_limit_that_applies() -> None:
    data = measured()
    assert data["machine"]["peak_gops"] == {"float32": 100.0, "int8": 1000.0}
    rows = {(row["engine"], row["stage"]): row for row in data["rows"]}
    assert rows["torch eager", "backbone"]["fraction_of_peak"] == pytest.approx(0.5)
    assert rows[OURS, "backbone"]["fraction_of_peak"] == pytest.approx(0.5)
    assert rows[OURS, "network"]["ms_median"] == rows[OURS, "network"]["ms_min"] == 6.0
    assert rows[OURS, "decode"]["fraction_of_peak"] is None


def test_the_table_tells_gain_work_split_growth_and_what_did_not_run() -> None:
    text = table(measured())
    assert "| ours W4A6 | 4.0 [4.0] | 0.50 | 6.0 [6.0] | 0.50 | 10.0 [10.0] | 10.0 | 100.0 | 100 |" in text
    assert "**sample**: 3.0 GOP a frame, 2.0 of them in the backbone." in text
    assert "decoding and preprocessing are 30% of a frame" in text
    assert "| 256x144 | 1600 | 900 | 1.0 | 60.0 [60.0] | 10.00 |" in text
    assert "| sample | spatial | 9 | 8.0 [8.0] | 2.0 [2.0] | 4.0 |" in text
    assert "torch.compile: not run, no compiler." in text


def test_the_page_gets_table_and_plot_between_its_marks_and_keeps_the_rest(tmp_path: Path) -> None:
    page = tmp_path / "performance.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_docs(measured(), tmp_path, "the command")
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "`the command`" in text
    assert (tmp_path / "pictures" / "performance.png").stat().st_size > 5000
    page.write_text("no marks")
    with pytest.raises(DataError, match="marks"):
        write_docs(measured(), tmp_path, "the command")


@needs_compiler
def test_both_ways_of_deformable_attention_compute_the_same_on_places_of_a_real_frame() -> None:
    for stage, (shape, arrays) in deformable.attentions(load_variant("nano")).items():
        model = attention_graph(shape)
        (wanted,) = deformable.grid_sample(model, arrays, 1)()
        own = deformable.own_kernel(model, arrays, 1)
        np.testing.assert_allclose(own().numpy().reshape(wanted.shape), wanted, atol=1e-4, err_msg=stage)


def test_bad_input_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert engines.main(["--variants", "tiny", "huge"]) == 2
    error = capsys.readouterr().err
    assert "no variant 'huge'" in error
    assert error.count("\n") == 1
