# SPDX-License-Identifier: Apache-2.0
"""benchmarks/float_model.py: both engines compute one graph, a turn of training is a real step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from benchmarks import float_model
from benchmarks.float_model import GEMM, worker
from benchmarks.turns import Row
from qdbev_ros.core.errors import DataError
from tests.model_samples import small_variant


@pytest.fixture
def variant(tmp_path: Path) -> str:
    path = tmp_path / "sample.yaml"
    path.write_text(yaml.safe_dump(plain(small_variant().to_dict())))
    return str(path)


def plain(data: object) -> object:
    """Tuples as lists, which YAML has."""
    if isinstance(data, dict):
        return {key: plain(value) for key, value in data.items()}
    return [plain(value) for value in data] if isinstance(data, list | tuple) else data


def turns(count: int) -> Iterator[None]:
    return iter([None] * count)


def test_both_engines_run_the_same_graph_on_the_same_frame(variant: str, tmp_path: Path) -> None:
    float_model.export(variant, tmp_path, turns(1))
    float_model.torch_forward(variant, tmp_path, turns(2))
    float_model.onnxruntime_forward(variant, tmp_path, turns(2))
    said = [float((tmp_path / name).read_text()) for name in ("torch.txt", "onnxruntime.txt")]
    assert said[0] > 0.1
    assert said[1] == pytest.approx(said[0], rel=1e-4)


def test_a_turn_of_training_is_a_step_of_the_real_loop(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorBoard's file of the loop has a loss for every turn."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name, value in float_model.UNUSED.items():
        monkeypatch.setenv(name, value)
    float_model.train_step(variant, tmp_path, turns(2))
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2]


def test_a_process_measures_time_operations_and_memory(tmp_path: Path) -> None:
    row = Row("any", "torch", "gemm")
    with worker(row, tmp_path) as process:
        process.turn()
        process.turn()
    assert len(row.seconds) == 2
    assert row.flops == 2 * GEMM**3
    assert row.peak_mb > 3 * 4 * GEMM**2 / 2**20
    numbers = row.to_dict(peak_rate=row.flops / min(row.seconds))
    assert 0 < numbers["fraction_of_peak"] <= 1
    assert numbers["ms_min"] <= numbers["ms_median"]


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(DataError, match=r"sample onnxruntime forward ended: .*model\.onnx"),
        worker(Row("sample", "onnxruntime", "forward"), tmp_path),
    ):
        pass


def test_an_unknown_variant_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert float_model.main(["--variants", "tiny", "huge"]) == 2
    error = capsys.readouterr().err
    assert "no variant 'huge'" in error
    assert error.count("\n") == 1
