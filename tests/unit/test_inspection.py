# SPDX-License-Identifier: Apache-2.0
"""`qdbev inspect`: a package as tables for people and as JSON for programs, without torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from qdbev_ros.engine.package import read_package, write_package
from qdbev_train.cli import main
from qdbev_train.export.inspection import as_text, part_of, summarise
from tests.small_master import small_master, small_variant


def layer(name: str, kind: str, shape: list[int], bits: int, activation: int | None = 6) -> dict[str, Any]:
    codes, scale = ([0, 63], 0.05) if activation is not None else (None, None)
    return {
        "name": name,
        "kind": kind,
        "shape": shape,
        "weight_bits": bits,
        "activation_bits": activation,
        "activation_codes": codes,
        "activation_scale": scale,
    }


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "model.qdbev"
    grid = {
        "weight_bits": 4,
        "activation_bits": 6,
        "parts": ["backbone", "neck", "encoder", "decoder"],
        "parameters": 221,
        "float32_bytes": 100_000,
        "layers": [
            layer("img_backbone.conv1", "convolution", [8, 3], 7, 8),
            layer("pts_bbox_head.reg_branches.0.0", "linear", [3, 5], 4),
            layer("pts_bbox_head.bev_embedding", "embedding", [16, 8], 4, None),
        ],
        "exceptions": [
            {
                "name": "img_backbone.conv1",
                "weight_bits": 7,
                "activation_bits": 8,
                "reason": "it sees the picture",
            },
            {
                "name": "can_bus_mlp.0",
                "weight_bits": 32,
                "activation_bits": 32,
                "reason": "metres and degrees",
            },
        ],
        "float_parameters": [{"name": "pts_bbox_head.transformer.can_bus_mlp.0.weight", "shape": [9, 6]}],
        "left_out": ["pts_bbox_head.code_weights"],
    }
    training = {"samples": 12, "data": {"root": "data/town"}}
    write_package(path, small_variant(), small_master(), grid, training, {"nds": 0.2512345, "split": "val"})
    return path


def test_the_table_has_a_line_for_every_layer(package: Path) -> None:
    lines = [line.split() for line in as_text(summarise(read_package(package))).splitlines()]
    assert ["img_backbone.conv1", "convolution", "8x3", "7", "8", "0..63", "0.05", "24"] in lines
    assert ["pts_bbox_head.reg_branches.0.0", "linear", "3x5", "4", "6", "0..63", "0.05", "8"] in lines
    assert ["pts_bbox_head.bev_embedding", "embedding", "16x8", "4", "64"] in lines


def test_totals_are_by_part_and_by_bits(package: Path) -> None:
    summary = summarise(read_package(package))
    assert summary["by_bits"] == {
        "7 bits": {"parameters": 24, "bytes": 24},
        "4 bits": {"parameters": 143, "bytes": 72},
        "32 bits": {"parameters": 54, "bytes": 216},
    }
    assert {part: total["parameters"] for part, total in summary["by_part"].items()} == {
        "backbone": 24,
        "decoder": 15,
        "encoder": 128 + 54,
    }
    model = summary["members"]["model.onnx"]
    assert sum(summary["contents"].values()) == model["bytes"] == len(small_master())
    assert summary["ratio"] == 100_000 / package.stat().st_size


def test_exceptions_left_out_provenance_scores_and_hashes_are_told(package: Path) -> None:
    summary = summarise(read_package(package))
    text = as_text(summary)
    for expected in (
        "W7A8, it sees the picture:\n    img_backbone.conv1",
        "float, metres and degrees:\n    can_bus_mlp.0",
        "left out, only training needs it:\n    pts_bbox_head.code_weights",
        'training:\n  data:\n    root: "data/town"\n  samples: 12',
        "nds: 0.2512",
        summary["sha256"],
        summary["members"]["model.onnx"]["sha256"],
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("img_backbone.layer1.0.conv1", "backbone"),
        ("img_neck.lateral_convs.0.conv", "neck"),
        ("pts_bbox_head.transformer.encoder.layers.0.norms.0.weight", "encoder"),
        ("pts_bbox_head.transformer.cams_embeds", "encoder"),
        ("pts_bbox_head.positional_encoding.row_embed", "encoder"),
        ("pts_bbox_head.query_embedding", "decoder"),
        ("pts_bbox_head.transformer.reference_points.bias", "decoder"),
    ],
)
def test_every_layer_belongs_to_one_of_the_four_parts(name: str, part: str) -> None:
    assert part_of(name) == part


def test_the_command_prints_and_writes_json_without_torch(
    package: Path, capsys: pytest.CaptureFixture
) -> None:
    had_torch = "torch" in sys.modules
    target = package.parent / "new folder" / "small.json"
    assert main(["inspect", str(package), "--json", str(target)]) == 0
    assert "small-test, W4A6" in capsys.readouterr().out
    summary = json.loads(target.read_text())
    assert summary["sha256"] == read_package(package).sha256
    assert had_torch or "torch" not in sys.modules


def test_a_file_that_cannot_be_written_is_one_line_and_exit_code_2(
    package: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["inspect", str(package), "--json", str(package / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qdbev: error: {package}/x.json: cannot be written")
    assert error.count("\n") == 1


def test_a_damaged_package_is_one_line_and_exit_code_2(package: Path, capsys: pytest.CaptureFixture) -> None:
    package.write_bytes(package.read_bytes()[:-1])
    assert main(["inspect", str(package)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qdbev: error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("section", "culprit"),
    [
        ({}, "layers"),
        ({"layers": [{"name": "first"}]}, "weight_bits"),
        ({"layers": [7], "exceptions": 3}, "int"),
        ({"layers": [], "float_parameters": [], "float32_bytes": 9}, "parts"),
    ],
)
def test_a_manifest_with_holes_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture, section: dict[str, Any], culprit: str
) -> None:
    path = tmp_path / "model.qdbev"
    write_package(path, small_variant(), small_master(), section, {}, {})
    assert main(["inspect", str(path), "--json", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"qdbev: error: {path}: manifest.json: quantisation is not what `qdbev export`")
    assert culprit in error
    assert error.count("\n") == 1
    assert not (tmp_path / "x.json").exists()
