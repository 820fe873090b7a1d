# SPDX-License-Identifier: Apache-2.0
"""`qdbev bench`: every stage of every engine, in turn, on pictures of nuScenes' size."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros import bench
from qdbev_ros.core.made_drive import HEIGHT, WIDTH, made_frame
from qdbev_ros.core.pipeline import STAGES
from qdbev_ros.core.variant import CAMERAS
from qdbev_train.cli import main
from tests.small_master import CELLS, CHANNELS, QUERIES, small_variant, write_small_package


class Counting:
    """An engine that says in which order it was asked, and with what."""

    def __init__(self, name: str, asked: list[str]) -> None:
        self.variant, self._name, self._asked = small_variant(), name, asked
        self.histories = 0

    def infer(self, images: Any, lidar2img: Any, can_bus: Any, prev_bev: Any) -> Any:
        self._asked.append(self._name)
        self.histories += prev_bev is not None
        assert np.abs(lidar2img).sum() > 0
        answer = np.zeros((QUERIES, 10), np.float32)
        return SimpleNamespace(class_logits=answer, boxes=answer, bev=np.zeros((CELLS, CHANNELS), np.float32))


def test_engines_take_turns_and_have_a_history() -> None:
    asked: list[str] = []
    engines = {name: Counting(name, asked) for name in ("one", "other")}
    rows = bench.measure(engines, 3)
    total = bench.WARM_UP + 3
    assert asked == ["one", "other"] * total
    assert engines["one"].histories == total - 1
    assert [(r.engine, r.stage) for r in rows] == [(e, s) for e in engines for s in (*STAGES, bench.TOTAL)]
    assert all(0 <= r.ms_min <= r.ms_median for r in rows)


def test_the_made_pictures_have_the_size_and_weight_of_nuscenes() -> None:
    frame = made_frame(0)
    assert list(frame.cameras) == list(CAMERAS)
    for camera in frame.cameras.values():
        assert isinstance(camera.picture, bytes)
        assert 120_000 < len(camera.picture) < 180_000
    data = np.frombuffer(frame.cameras["CAM_BACK"].picture, np.uint8)
    assert cv2.imdecode(data, cv2.IMREAD_COLOR).shape == (HEIGHT, WIDTH, 3)


def test_the_command_prints_and_writes_every_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "cache"))
    package, file = tmp_path / "small.qdbev", tmp_path / "deeper" / "bench.json"
    write_small_package(package)
    options = ["--backend", "onnxruntime", "--frames", "2", "--threads", "1"]
    assert main(["bench", str(package), *options, "--json", str(file)]) == 0
    said, told = capsys.readouterr()
    assert "qdbev: checking ONNX Runtime" in told
    assert all(stage in said for stage in (*STAGES, "end to end", "frames/s", "onnxruntime: ONNX Runtime"))
    written = json.loads(file.read_text())
    assert written["package"] == "small.qdbev"
    assert [row["stage"] for row in written["rows"]] == [*STAGES, "end to end"]
    parts = [row["ms_min"] for row in written["rows"]]
    assert parts[-1] >= max(parts[:-1])
    assert main(["bench", str(package), *options]) == 0
    assert "checking" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.qdbev"], "missing.qdbev"),
        (["missing.qdbev", "--frames", "0"], "--frames is 0"),
        (["missing.qdbev", "--backend", "abacus"], "unknown engine 'abacus'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
