# SPDX-License-Identifier: Apache-2.0
"""Embeddings lie on the grid, one step for each row: in calibration, in training, in checkpoints of any age."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from qdbev_ros.engine.graph import unpack_int4
from qdbev_ros.engine.lowering import lower_u8
from qdbev_train.checkpoint import load_model, save_model
from qdbev_train.export.graph import export_master
from qdbev_train.model import BEVFormer
from qdbev_train.quantization import (
    EXCEPTIONS,
    STRICT,
    Override,
    QuantConfig,
    post_training_quantise,
    settle_scales,
)
from qdbev_train.quantization.calibrate import run_batch
from qdbev_train.quantization.report import describe
from qdbev_train.quantization.tables import tables
from tests.quantisation_samples import frames, small_model, small_variant

FLOAT_TABLES = Override("*embed*", 32, 32, "as it was once")
QUERIES = "pts_bbox_head.query_embedding"


def made(config: QuantConfig) -> BEVFormer:
    model = small_model()
    return post_training_quantise(model, frames(model, 2), config)


@pytest.fixture(scope="module")
def student() -> BEVFormer:
    return made(QuantConfig(weight_rounding="nearest", bias_correction=False))


def test_every_row_is_on_a_grid_of_its_own(student: BEVFormer) -> None:
    found = tables(student)
    assert [t.name.rpartition(".")[2] for t in found] == [
        "bev_embedding",
        "row_embed",
        "col_embed",
        "cams_embeds",
        "level_embeds",
        "query_embedding",
    ]
    for table in found:
        assert table.quantiser is not None
        codes = table.quantiser(table.values) / table.quantiser.scale[:, None]
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
        limit = 2 ** (table.quantiser.bits - 1)
        assert -limit <= codes.round().min() < codes.round().max() <= limit - 1
        assert table.quantiser.bits == (8 if table.name == QUERIES else 4)
    head = student.pts_bbox_head
    assert len(head.bev_embedding.weight[3].unique()) <= 16
    assert len(head.transformer.cams_embeds[3].unique()) <= 16


def test_strict_has_queries_on_four_bits_and_a_list_decides_for_itself() -> None:
    assert QuantConfig(overrides=STRICT).bits(QUERIES)[0] == 4
    assert QuantConfig(overrides=EXCEPTIONS).bits(QUERIES)[0] == 8
    mine = (Override("*.cams_embeds", 32, 32, "six rows"), Override("*.bev_embedding", 6, 6, "why not"))
    report = describe(
        made(QuantConfig(overrides=mine, weight_rounding="nearest")), QuantConfig(overrides=mine)
    )
    bits = {layer["name"]: layer["weight_bits"] for layer in report["layers"] if layer["kind"] == "embedding"}
    assert bits["pts_bbox_head.bev_embedding"] == 6
    assert "pts_bbox_head.transformer.cams_embeds" not in bits
    named = {e["name"]: e["reason"] for e in report["exceptions"]}
    assert named["pts_bbox_head.transformer.cams_embeds"] == "six rows"
    assert named["pts_bbox_head.bev_embedding"] == "why not"


def test_tables_train_behind_the_grid_and_learned_steps_with_them(student: BEVFormer) -> None:
    model = copy.deepcopy(student).train()
    found = {t.name: t for t in tables(model)}
    for table in found.values():
        assert table.quantiser is not None
        table.quantiser.learn_scale()
    out = run_batch(model, frames(model, 1)[0], None)
    (out.boxes.square().mean() + out.class_logits.square().mean()).backward()
    for name, table in found.items():
        assert table.quantiser is not None
        assert table.values.grad is not None, name
        assert table.values.grad.abs().sum() > 0, name
        assert table.quantiser.scale.grad is not None, name
    bev = found["pts_bbox_head.bev_embedding"].quantiser
    assert bev is not None
    with torch.no_grad():
        bev.scale.fill_(-1.0)
    settle_scales(model)
    assert bev.scale.min() > 0


def test_a_table_is_packed_row_by_row_and_engines_get_its_values(student: BEVFormer) -> None:
    master = export_master(student, small_variant())
    table = tables(student)[0]
    assert table.quantiser is not None
    wanted = table.quantiser(table.values).detach().numpy()
    codes = np.rint(wanted / table.quantiser.scale.numpy()[:, None])
    constants = onnx.load_from_string(master).graph.initializer
    packed = [unpack_int4(t) for t in constants if t.data_type == TensorProto.INT4]
    assert any(p.shape == codes.shape and np.array_equal(p, codes) for p in packed)
    plain = [onnx.numpy_helper.to_array(t) for t in lower_u8(master).graph.initializer]
    assert any(p.shape == wanted.shape and np.array_equal(p, wanted) for p in plain)


def test_a_checkpoint_gives_back_the_same_tables(student: BEVFormer, tmp_path: Path) -> None:
    path, config = tmp_path / "model.safetensors", QuantConfig()
    save_model(path, student, small_variant(), {}, config.to_dict())
    loaded, _, metadata = load_model(path)
    for a, b in zip(tables(loaded), tables(student), strict=True):
        assert a.quantiser is not None
        assert b.quantiser is not None
        assert torch.equal(a.quantiser(a.values), b.quantiser(b.values))
    assert QuantConfig.from_dict(metadata["quantisation"]) == config


def test_a_checkpoint_from_before_keeps_its_tables_in_float_and_says_so(tmp_path: Path) -> None:
    """Such a file's settings say nothing of embeddings; its keys do."""
    config = QuantConfig(weight_rounding="nearest", overrides=(FLOAT_TABLES, *EXCEPTIONS[:-1]))
    old = made(config)
    path = tmp_path / "model.safetensors"
    save_model(path, old, small_variant(), {}, replace(config, overrides=EXCEPTIONS[:-1]).to_dict())
    loaded, _, metadata = load_model(path)
    assert all(t.quantiser is None for t in tables(loaded))
    assert torch.equal(loaded.pts_bbox_head.bev_embedding.weight, old.pts_bbox_head.bev_embedding.weight)
    report = describe(loaded, QuantConfig.from_dict(metadata["quantisation"]))
    reasons = {e["name"]: e["reason"] for e in report["exceptions"]}
    assert reasons[QUERIES] == "trained before embeddings were on the grid"
