# SPDX-License-Identifier: Apache-2.0
"""A training that is stopped, killed or started again goes on as if it had never stopped, or says why it can't."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qdbev_ros.core.errors import ConfigError
from qdbev_train.checkpoint import load_model, read_tensors, write_tensors
from qdbev_train.model import build_model
from qdbev_train.training.config import Span
from qdbev_train.training.loop import train
from qdbev_train.training.plot_command import read_scalar
from tests.training_samples import data_of, micro_config, micro_variant, random_batch, run


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Stopped by a signal and not at a multiple of save_every; same weights, same loss curve, to the bit."""
    whole, _ = read_tensors(run(tmp_path / "whole", learning_rate=1e-3))
    with pytest.raises(KeyboardInterrupt, match="stopped at step 5 of 6"):
        run(tmp_path / "parts", stop_at=4, learning_rate=1e-3)
    resumed, _ = read_tensors(run(tmp_path / "parts", learning_rate=1e-3))
    for key, value in whole.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0, msg=key)
    curves = [read_scalar(tmp_path / name, "loss/total") for name in ("whole", "parts")]
    assert curves[0][0] == [1, 2, 3, 4, 5, 6]
    assert curves[0] == curves[1]


def test_a_stop_in_the_last_step_is_a_stop_and_the_model_is_there(tmp_path: Path) -> None:
    """Else a compression would go on with the next stage."""
    with pytest.raises(KeyboardInterrupt, match="stopped at step 6 of 6"):
        run(tmp_path, stop_at=5)
    model_file = run(tmp_path)
    assert load_model(model_file)[2]["provenance"]["steps"] == 6


def test_what_is_remembered_matters_to_the_curve(tmp_path: Path) -> None:
    """Else the test above would not show that the memory is kept."""
    run(tmp_path, learning_rate=1e-3)
    state, metadata = read_tensors(tmp_path / "last.safetensors")
    assert state["prev_bev"].shape == (1, 2, 64, 24)
    forgotten = {k: v for k, v in state.items() if k != "prev_bev"}
    config = micro_config(tmp_path, learning_rate=1e-3, length=Span(8, "steps"))
    losses = []
    for tensors in (state, forgotten):
        write_tensors(tmp_path / "last.safetensors", tensors, metadata)
        batch = replace(random_batch(0, micro_variant()), is_first=torch.tensor([False, False]))
        data = data_of(lambda _, batch=batch: [batch, batch])
        train(build_model(micro_variant()), micro_variant(), config, data)
        losses.append(read_scalar(tmp_path, "loss/total")[1][6])
    assert losses[0] != losses[1]


def test_resuming_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    run(tmp_path)
    with pytest.raises(ConfigError, match="learning_rate"):
        run(tmp_path, learning_rate=1.0)


@pytest.mark.parametrize("left", ["none", "of an earlier save"])
def test_a_model_file_that_the_last_save_did_not_reach_is_written_again(tmp_path: Path, left: str) -> None:
    """As a kill or a full disk between the last save's two files leaves it."""
    model_file = run(tmp_path)
    whole = model_file.read_bytes()
    if left == "none":
        model_file.unlink()
    else:
        tensors, metadata = read_tensors(model_file)
        zeros = {key: torch.zeros_like(value) for key, value in tensors.items()}
        metadata["provenance"]["steps"] = 3
        write_tensors(model_file, zeros, metadata)
    assert run(tmp_path) == model_file
    assert model_file.read_bytes() == whole


def test_a_length_that_the_run_is_past_is_refused(tmp_path: Path) -> None:
    """And nothing is written: with the former length the run goes on."""
    model_file = run(tmp_path)
    before = model_file.read_bytes()
    with pytest.raises(
        ConfigError, match=r"last\.safetensors is at step 6 already, length is 5 steps"
    ) as refusal:
        run(tmp_path, length=Span(5, "steps"))
    assert "\n" not in str(refusal.value)
    assert model_file.read_bytes() == before
