# SPDX-License-Identifier: Apache-2.0
"""`qdbev study` for real, with a very small model on the demo's drive: rows, resuming, what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from qdbev_ros.core.errors import ConfigError
from qdbev_train.checkpoint import save_model
from qdbev_train.cli import main
from qdbev_train.quantization import Override, QuantConfig
from qdbev_train.quantization.model import quantise_model
from qdbev_train.study import run as run_module
from qdbev_train.study.config import read_study
from qdbev_train.study.cost import bit_operations, layer_products
from qdbev_train.study.report import _over_seeds, tables
from tests.quantisation_samples import small_model, small_variant

ROOT = Path(__file__).parents[2]
ROWS: list[dict[str, Any]] = [
    {"name": "float", "table": "methods", "text": "the teacher"},
    {"name": "ptq", "table": "methods", "text": "calibrated", "change": {"method": "ptq"}},
    {"name": "progressive", "table": "methods", "text": "parts", "seeds": [3, 4], "change": {"method": "progressive"}},
    {"name": "vgd", "table": "methods", "text": "distilled", "stages_of": "progressive", "seeds": [3]},
    {
        "name": "ptq_neck",
        "table": "parts",
        "text": "the neck alone",
        "change": {"method": "ptq", "quantisation": {"parts": ["neck"]}},
    },
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _one_scene_is_enough() -> Any:
    """Fewer frames to score: the drive's first five."""
    load = run_module.load_scenes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "load_scenes", lambda *a: {k: v[:5] for k, v in load(*a).items()})
        yield


def write_study(folder: Path, rows: list[dict[str, Any]]) -> Path:
    base = yaml.safe_load((ROOT / "config" / "compress" / "nano_town_vgd.yaml").read_text())
    base["teacher"] = str(folder / "teacher.safetensors")
    base["data"] = {"root": str(ROOT / "demo" / "town"), "version": "v1.0-mini", "split": "mini_val"}
    base["calibration"] = {"steps": 2, "batch": 1}
    base["training"] |= {
        "length": "5 steps",
        "batch": 1,
        "dense_heads": False,
        "query_groups": 0,
        "warmup_steps": 1,
    }
    base["stages"] = dict.fromkeys(("backbone", "neck", "encoder", "decoder", "final"), 1)
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "title": "A small study",
        "base": str(folder / "base.yaml"),
        "split": "mini_val",
        "out": str(folder / "out"),
        "docs": str(folder / "docs"),
        "rows": rows,
        "paper": {"methods": {"vgd": {"tiny": "0.372 / 0.255"}}},
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a study that has run."""
    folder = tmp_path_factory.mktemp("study")
    torch.manual_seed(0)
    save_model(folder / "teacher.safetensors", small_model(), small_variant(), {"steps": 0}, None)
    assert main(["study", str(write_study(folder, ROWS))]) == 0
    return folder


def test_every_row_and_seed_is_scored_and_weighed(finished: Path) -> None:
    study = json.loads((finished / "docs" / "study.json").read_text())
    assert study["complete"]
    assert [(row["method"], row["seed"]) for row in study["rows"]] == [
        ("float", 0), ("ptq", 0), ("progressive", 3), ("progressive", 4), ("vgd", 3), ("ptq_neck", 0),
    ]  # fmt: skip
    rows = {row["method"]: row for row in study["rows"]}
    assert all(0 <= row["nds"] <= 1 and 0 <= row["map"] <= 1 and row["frames"] == 5 for row in rows.values())
    assert all(row[f"m{error}"] is not None for row in rows.values() for error in ("ATE", "AOE", "AVE"))
    assert rows["vgd"]["size_bytes"] < rows["ptq_neck"]["size_bytes"] < rows["float"]["size_bytes"]
    assert rows["vgd"]["bops"] < rows["ptq_neck"]["bops"] < rows["float"]["bops"]
    assert rows["vgd"]["samples"] == 5
    assert (rows["float"]["weight_bits"], rows["vgd"]["weight_bits"], rows["vgd"]["activation_bits"]) == (
        32,
        4,
        6,
    )
    for name in ("size.png", "curves.png"):
        assert (finished / "docs" / name).read_bytes().startswith(b"\x89PNG")


def test_the_table_has_a_line_for_each_row_with_the_papers_beside_it(finished: Path) -> None:
    text = (finished / "docs" / "tables.md").read_text()
    assert text.count("\n| `") == 5
    assert [line.endswith("| 0.372 / 0.255 |") for line in text.splitlines() if "`vgd`" in line] == [True]


def test_distilled_rows_take_over_the_stages_of_another(finished: Path) -> None:
    out = finished / "out"
    assert sorted(p.name for p in (out / "vgd_seed3").iterdir() if p.is_dir()) == ["5_final"]
    assert (out / "progressive_seed3" / "1_backbone").is_dir()


def test_a_finished_study_runs_nothing_again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "_run", lambda *_: pytest.fail("a finished row ran again"))
    assert main(["study", str(finished / "study.yaml")]) == 0


def test_a_row_of_another_teacher_is_not_finished(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_study(finished / "study.yaml")
    study = run_module.Study(config)
    assert all(study.finished(job) is not None for job in config.jobs())
    monkeypatch.setitem(study.__dict__, "teacher_sha256", "another")
    assert all(study.finished(job) is None for job in config.jobs())


def test_no_two_processes_work_on_a_row(tmp_path: Path) -> None:
    with run_module._alone(tmp_path) as first, run_module._alone(tmp_path) as second:
        assert (first, second) == (True, False)
    with run_module._alone(tmp_path) as again:
        assert again


def test_a_row_waits_for_its_further_teachers_and_is_held_to_them(finished: Path, tmp_path: Path) -> None:
    """They may be models of the same study: teachers that were trained on."""
    control = str(tmp_path / "out" / "float_control_seed3" / "model.safetensors")
    trained_on = {"method": "float_control"}
    by_two = {"distillation": {"further_teachers": [control]}}
    rows: list[dict[str, Any]] = [
        {"name": "float_control", "table": "methods", "text": "", "seeds": [3, 4], "change": trained_on},
        {"name": "ensemble", "table": "beyond", "text": "", "change": by_two},
    ]
    path = write_study(tmp_path, rows)
    (tmp_path / "teacher.safetensors").write_bytes((finished / "teacher.safetensors").read_bytes())
    study = run_module.Study(read_study(path))
    first, _, ensemble = study.config.jobs()
    assert run_module._waits_for_another(study, ensemble)
    assert not run_module._waits_for_another(study, first)
    folder = study.config.folder(first)
    folder.mkdir(parents=True)
    (folder / "row.json").write_text(json.dumps({"settings": study.settings(first), "row": {}}))
    Path(control).write_bytes((finished / "teacher.safetensors").read_bytes())
    assert not run_module._waits_for_another(study, ensemble)
    before = study.settings(ensemble)
    Path(control).write_bytes(b"another")
    assert study.settings(ensemble) != before
    Path(control).unlink()
    assert study.settings(ensemble) != before


def test_bit_operations_are_products_times_both_widths() -> None:
    """By hand for a convolution and a linear of the small model; 32 x 32 where nothing is on the grid."""
    variant, model = small_variant(), small_model()
    matrix = torch.tensor([[10.0, 0, 0, 5], [0, 10, 0, 5], [0, 0, -1, 30], [0, 0, 0, 1]])
    products = layer_products(variant, matrix.expand(6, 4, 4).contiguous())
    last, transformer = variant.transformer.decoder_layers - 1, variant.transformer
    assert products[f"pts_bbox_head.cls_branches.{last}.0"] == transformer.queries * transformer.channels**2
    # What an engine runs: of the class branches the last alone.
    used = {k: n for k, n in products.items() if "cls_branches" not in k or f"cls_branches.{last}." in k}
    total = sum(used.values())
    assert total < sum(products.values())
    assert bit_operations(model, None, products) == total * 32 * 32
    config = QuantConfig(overrides=(Override("*.reference_points", 32, 32, "constant"),))
    quantised = quantise_model(small_model(), config)
    constant = sum(count for key, count in products.items() if key.endswith("reference_points"))
    assert bit_operations(quantised, config, products) == (total - constant) * 4 * 6 + constant * 32 * 32


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"name": "a", "table": "methods", "text": "", "change": {"metod": "ptq"}}, "row 'a': unknown key 'metod'"),
        ({"name": "a", "table": "methods", "text": "", "change": {"method": "best"}}, "row 'a'.*method is 'best'"),
        ({"name": "a", "table": "else", "text": ""}, "row 'a': table 'else'"),
        ({"name": "a", "table": "methods", "text": "", "seeds": ["x"]}, "row 'a': seeds"),
        ({"name": "a", "table": "methods", "text": "", "stages_of": "b"}, "row 'a': no row 'b' before it"),
        ({"name": "a", "text": ""}, "a row has the keys name, table, text"),
        ({"name": "a", "table": "methods", "text": "", "seeds": 7}, "row 'a': seeds must be a list of whole numbers"),
        ({"name": "a", "table": "methods", "text": "", "seeds": None}, "row 'a': seeds must be a list"),
        ({"name": "a", "table": "methods", "text": "", "change": "ptq"}, "row 'a': change must be a mapping"),
        ({"name": "a", "table": "methods", "text": 3}, "row 'a': name, text and stages_of must be text"),
        ("float", "a row has the keys name, table, text"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_named_with_its_file(tmp_path: Path, row: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"study\.yaml: {said}"):
        read_study(write_study(tmp_path, [row]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": None}, "rows must be a list"),
        ({"rows": {"name": "float"}}, "rows must be a list"),
        ({"base": None}, "title, base, split, out and docs must be text"),
        ({"title": 3}, "title, base, split, out and docs must be text"),
        ({"paper": None}, "paper must be a mapping of tables"),
        ({"paper": {"methods": "0.3"}}, "paper must be a mapping of tables"),
    ],
)
def test_a_wrong_study_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    path = write_study(tmp_path, ROWS)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ConfigError, match=rf"study\.yaml: {said}"):
        read_study(path)


STUDIES = sorted((ROOT / "config" / "study").glob("*.yaml"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_studies_of_the_repository_are_valid(path: Path) -> None:
    config = read_study(path)
    assert {"float", "float_control", "ptq"} <= {row.name for row in config.rows}
    assert tables(config, []).startswith(f"# {config.title}")


@pytest.mark.parametrize("name", ["nano_town", "nano_town_long"])
def test_the_studies_of_the_papers_order_have_all_of_it(name: str) -> None:
    rows = read_study(ROOT / "config" / "study" / f"{name}.yaml").rows
    assert {"qat", "progressive", "vgd"} <= {row.name for row in rows}


def test_the_study_of_the_readme_compares_all_methods_and_the_deciding_ones_over_seeds() -> None:
    rows = read_study(ROOT / "config" / "study" / "nano_town.yaml").rows
    assert {"cwd_img", "cwd_bev"} <= {row.name for row in rows}
    deciding = [row for row in rows if row.name in ("float_control", "qat", "progressive", "vgd")]
    assert len(deciding) == 4
    assert all(len(row.seeds) >= 2 for row in deciding)


def test_numbers_over_seeds_are_the_mean_and_its_ends() -> None:
    assert _over_seeds([0.25], 3) == "0.250"
    assert _over_seeds([0.25, 0.75, None], 2) == "0.50 (0.25 to 0.75)"
    assert _over_seeds([None], 2) == "-"
