# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints as mmcv writes them, of a small model, and commands to try on them."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from qdbev_ros.core.variant import CLASSES
from qdbev_train import cli
from tests.model_samples import small_variant

CONFIG = Path(cli.__file__).resolve().parents[1] / "config"
TRAIN, COMPRESS = CONFIG / "train" / "nano_town.yaml", CONFIG / "compress" / "nano_town_ptq.yaml"

META = {
    "env_info": "sys.platform: linux",
    "config": "model = dict(type='BEVFormer')",
    "CLASSES": CLASSES,
    "PALETTE": None,
    "epoch": 24,
    "iter": 84408,
    "exp_name": "bevformer_tiny.py",
    "mmcv_version": "1.4.0",
    "time": "Sat Jun 11 06:12:10 2022",
}


def write_sample_variant(folder: Path) -> Path:
    """The variant of the small model as a file."""
    path = folder / "sample.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(small_variant().to_dict()))))
    return path


def mmcv_content(state: dict[str, Tensor], **meta: Any) -> dict[str, Any]:
    """What mmcv saves at the end of a training."""
    optimizer = {"state": {0: {"step": 84408, "exp_avg": torch.zeros(1000)}}, "param_groups": [{"lr": 2e-7}]}
    return {"meta": META | meta, "state_dict": OrderedDict(state), "optimizer": optimizer}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, list[str]]:
    """(exit code, standard output, lines of standard error) of a qdbev command."""
    capsys.readouterr()
    code = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return code, out, err.splitlines()


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses its input."""
    code, out, lines = run(capsys, *arguments)
    assert (code, out, len(lines)) == (2, "", 1), lines
    return lines[0]


def write_config(path: Path, config: Path, root: Path, **changes: Any) -> Path:
    """The settings of `config` with `changes`, on the small data set in `root`."""
    data = {"data": {"root": str(root), "version": "v1.0-mini", "split": "mini_val"}}
    path.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | data | changes))
    return path
