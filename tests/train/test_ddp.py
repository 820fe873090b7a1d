# SPDX-License-Identifier: Apache-2.0
"""Two real processes under torchrun, on CPUs (gloo): they train as one does with twice the batch, also when stopped."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from qdbev_ros.core.variant import load_variant
from qdbev_train.checkpoint import read_tensors, save_model, write_tensors
from qdbev_train.cli import main
from qdbev_train.model import build_model
from qdbev_train.training.plot_command import read_scalar
from tests.model_samples import small_model, small_variant

ROOT = Path(__file__).parents[2]
STEPS = 8
WIDTH = small_variant().transformer.channels
CONFIG = """
variant: {variant}
data: {{root: {root}, version: v1.0-mini, split: mini_val}}
evaluation: null
out: {out}
init: {start}
precision: float32
history: {history}
length: 8 steps
batch: {batch}
learning_rate: 1.0e-3
backbone_factor: 0.1
weight_decay: 0.01
warmup_steps: 2
clip_norm: 35.0
query_groups: 0
denoising_groups: 0
dense_heads: false
angle_weight: 1.0
velocity_weight: 0.2
mirror: 0.0
turn: false
light: 0.0
photometric: true
grid_mask: 0.0
seed: 3
save_every: 2
"""


def write_config(folder: Path, root: Path, name: str, batch: int, history: str) -> Path:
    """Without dropout: two processes cannot draw the random numbers of one. The map is so short that some frames have
    one box and some two: what a process has to learn is not what the other has."""
    variant = small_variant()
    variant = replace(
        variant,
        transformer=replace(variant.transformer, dropout=0.0),
        bev=replace(variant.bev, pc_range=(-20.0, -10.0, -5.0, 20.0, 10.0, 3.0)),
    )
    (folder / "variant.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(variant.to_dict()))))
    start = folder / "start.safetensors"
    torch.manual_seed(0)
    save_model(start, build_model(variant), load_variant(folder / "variant.yaml"), {}, None)
    config = folder / f"{name}.yaml"
    place = {"variant": folder / "variant.yaml", "root": root, "out": folder / name, "start": start}
    config.write_text(CONFIG.format(batch=batch, history=history, **place))
    return config


def run_two_processes(*arguments: str) -> str:
    """What a script (or `-m` a module) prints under torchrun; nothing of it is left running, whatever happens."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [*torchrun, *arguments],
        cwd=ROOT,
        env=os.environ | paths,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=180)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, said
    return said


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_train_as_one_with_twice_the_batch(
    tmp_path: Path, small_root: Path
) -> None:
    """A SIGTERM to one of them stops both at the same step; both go on where they were."""
    config = write_config(tmp_path, small_root, "two", batch=1, history="stream")
    said = run_two_processes(str(ROOT / "tests" / "ddp_worker.py"), str(config))
    stops = re.findall(r"qdbev: stopped at step (\d+) of 8; the same command goes on from there", said)
    assert len(stops) == 1
    assert 2 <= int(stops[0]) < STEPS
    assert all(f"process {rank} was stopped" in said for rank in range(2))
    assert said.count("wrote") == 1

    assert main(["train", str(write_config(tmp_path, small_root, "one", batch=2, history="stream"))]) == 0
    one, two = (read_tensors(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one[1]["provenance"]["samples"] == two[1]["provenance"]["samples"] == 2 * STEPS
    curves = [read_scalar(tmp_path / name, "loss/total") for name in ("one", "two")]
    assert curves[0][0] == curves[1][0] == list(range(1, STEPS + 1))
    assert curves[1][1] == pytest.approx(curves[0][1], rel=1e-5)
    for key, value in one[0].items():
        other = two[0][key]
        if key.endswith("attn.in_proj_bias"):
            # Softmax ignores the keys' bias: its gradient is rounding alone, which AdamW blows up to full steps.
            value, other = (torch.cat([x[:WIDTH], x[2 * WIDTH :]]) for x in (value, other))
        torch.testing.assert_close(other, value, rtol=1e-5, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


def test_another_number_of_processes_is_refused(
    tmp_path: Path, small_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One process begins; the file is made to say that there were two."""
    config = write_config(tmp_path, small_root, "run", batch=2, history="stream")
    assert main(["train", str(config)]) == 0
    last = tmp_path / "run" / "last.safetensors"
    tensors, metadata = read_tensors(last)
    write_tensors(last, tensors, metadata | {"processes": 2})
    assert main(["train", str(config)]) == 2
    assert "is of a run on 2 processes, this one has 1" in capsys.readouterr().err


def write_compression(folder: Path, root: Path, name: str, batch: int) -> Path:
    """Two steps in which every range moves half of the way, and weights hardly."""
    start = folder / "start.safetensors"
    save_model(start, small_model(), replace(small_variant(), name="sample"), {}, None)
    data = yaml.safe_load((ROOT / "config" / "compress" / "nano_town_qat.yaml").read_text())
    data |= {"teacher": str(start), "out": str(folder / name), "calibration": {"steps": 2, "batch": 1}}
    data["data"] = {"root": str(root), "version": "v1.0-mini", "split": "mini_val"}
    data["quantisation"] |= {"weight_bits": 8, "activation_bits": 8, "scales": "running", "momentum": 0.5}
    data["quantisation"] |= {"weight_range": "minmax", "activation_range": "minmax"}
    data["training"] |= {"precision": "float32", "length": "2 steps", "batch": batch, "learning_rate": 1.0e-6}
    data["training"] |= {"query_groups": 0, "denoising_groups": 0, "dense_heads": False}
    data["training"] |= {"turn": False, "light": 0.0, "photometric": True}
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(data))
    return config


@pytest.mark.slow
def test_ranges_that_run_on_two_processes_see_what_both_see(tmp_path: Path, small_root: Path) -> None:
    config = write_compression(tmp_path, small_root, "two", batch=1)
    run_two_processes("-m", "qdbev_train.cli", "compress", str(config))
    assert main(["compress", str(write_compression(tmp_path, small_root, "one", batch=2))]) == 0
    one, two = (read_tensors(tmp_path / name / "model.safetensors")[0] for name in ("one", "two"))
    scales = [key for key in one if key.endswith(".scale") and one[key].ndim == 0]
    assert len(scales) > 30
    apart = {key: float(two[key] / one[key]) for key in scales}
    # One code more or less in between moves a range by less than a hundredth, another picture by up to a third.
    assert apart == pytest.approx(dict.fromkeys(scales, 1.0), abs=0.01)
