# SPDX-License-Identifier: Apache-2.0
"""What the devkit would refuse after hours of training is refused before the first step."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdbev_train.cli import main

ROOT = Path(__file__).parents[2]
TOWN = ROOT / "demo" / "town" / "v1.0-mini"
SCORED = {"split": "mini_val", "every": "1 epoch"}


@pytest.mark.parametrize(
    ("command", "file"),
    [("train", "train/nano_town.yaml"), ("compress", "compress/nano_town_ptq.yaml"), ("study", "study/nano_town.yaml")],
)  # fmt: skip
def test_tables_that_the_score_needs_are_missed_at_once(
    command: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(TOWN, tmp_path / "town" / TOWN.name, ignore=shutil.ignore_patterns("map.json"))
    config: dict[str, Any] = yaml.safe_load((ROOT / "config" / file).read_text())
    if command == "study":
        base = yaml.safe_load((ROOT / config["base"]).read_text())
        config |= {"base": str(tmp_path / "base.yaml"), "split": "mini_val", "out": str(tmp_path / "out")}
    else:
        base = config
        base["evaluation"] = SCORED
    base["data"] = {"root": str(tmp_path / "town"), "version": TOWN.name, "split": "mini_val"}
    base["out"] = str(tmp_path / "out")
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(config))
    assert main([command, str(tmp_path / ("study.yaml" if command == "study" else "base.yaml"))]) == 2
    assert "lacks map.json, without which nuscenes-devkit does not score" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
