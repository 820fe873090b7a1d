# SPDX-License-Identifier: Apache-2.0
"""The official score of parts of a split, of checkpoints and of result files, and the commands that give it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qdbev_ros.core.pipeline import Pipeline
from qdbev_ros.core.variant import CAMERAS, CLASSES, load_variant
from qdbev_train.checkpoint import read_tensors, save_model, write_tensors
from qdbev_train.cli import main
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.evaluation import inference
from qdbev_train.evaluation.inference import detect, open_engine
from qdbev_train.evaluation.metrics import official_score
from qdbev_train.evaluation.results import write_results
from qdbev_train.model import build_model
from tests.small_dataset import FRAMES, SCENES, VERSION
from tests.truth import truth_entries

TOKENS = [f"{scene}-{frame}" for scene in SCENES for frame in range(FRAMES)]

pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")


def test_part_of_a_split_can_be_scored(small_root: Path) -> None:
    """One of the two scenes of mini_val that the small data set holds."""
    frames = all_frames(load_scenes(small_root, VERSION, "mini_val", ["scene-0916"]))
    score = official_score(
        small_root, VERSION, "mini_val", {f.sample_token: truth_entries(f) for f in frames}
    )
    assert score.frames == 4
    assert score.class_ap["car"] == pytest.approx(1.0)
    assert score.class_ap["pedestrian"] == pytest.approx(1.0)
    assert score.class_ap["traffic_cone"] == 0.0  # it has no lidar point, so it is no truth


def test_nothing_seen_scores_nothing(small_root: Path) -> None:
    frames = all_frames(load_scenes(small_root, VERSION, "mini_val"))
    score = official_score(small_root, VERSION, "mini_val", {f.sample_token: [] for f in frames})
    assert (score.nds, score.mAP, score.boxes, score.frames) == (0.0, 0.0, 0, 8)


def test_a_split_of_another_version_is_refused_before_the_model_runs(
    small_root: Path, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(small_root), "--version", VERSION, "--split", "val"]
    for command in (["eval", str(random_checkpoint)], ["score", "results.json"]):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert "split val belongs to tables whose version ends in 'trainval', not to v1.0-mini" in error
        assert error.count("\n") == 1


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    variant = load_variant("nano")
    path = tmp_path_factory.mktemp("model") / "nano.safetensors"
    save_model(path, build_model(variant), variant, {}, None)
    return path


def test_eval_scores_a_checkpoint_and_keeps_the_results(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["eval", str(random_checkpoint), str(small_root), "--version", VERSION, "--split", "mini_val"]
    files = ["--json", str(tmp_path / "score.json"), "--results", str(tmp_path / "results.json")]
    assert main([*arguments, *files, "--scene", "scene-0916"]) == 0
    assert "NDS" in capsys.readouterr().out
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["frames"] == 4
    assert 0 <= score["nds"] < 0.3
    assert set(score["class_ap"]) == set(CLASSES)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["results"]) == {f"scene-0916-{i}" for i in range(4)}
    assert results["meta"]["use_camera"] is True


def evaluate(model: Path, root: Path, *more: str) -> int:
    return main(["eval", str(model), str(root), "--version", VERSION, "--split", "mini_val", *more])


def test_a_scene_is_detected_the_same_whatever_came_before(
    small_root: Path, random_checkpoint: Path, tmp_path: Path
) -> None:
    """The memory begins anew with each scene."""
    detected = {}
    for name in ("both", "scene-0103", "scene-0916"):
        scenes = [] if name == "both" else ["--scene", name]
        path = tmp_path / f"{name}.json"
        assert evaluate(random_checkpoint, small_root, "--results", str(path), *scenes) == 0
        detected[name] = json.loads(path.read_text())["results"]
    assert detected["both"] == detected["scene-0103"] | detected["scene-0916"]
    assert any(detected["both"].values())


def test_eval_without_a_camera_runs_as_if_it_were_lost(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[str]] = []
    real_run = Pipeline.run

    def watched(self: Pipeline, frame: Any) -> Any:
        seen.append(set(frame.cameras))
        return real_run(self, frame)

    monkeypatch.setattr(Pipeline, "run", watched)
    score = tmp_path / "score.json"
    lost = ["--without", "CAM_BACK", "--without", "CAM_FRONT", "--scene", "scene-0916"]
    assert evaluate(random_checkpoint, small_root, "--json", str(score), *lost) == 0
    assert seen == [set(CAMERAS) - {"CAM_BACK", "CAM_FRONT"}] * 4
    assert json.loads(score.read_text())["without"] == ["CAM_BACK", "CAM_FRONT"]


def test_a_stopped_evaluation_goes_on_after_its_last_whole_scene(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the second scene, with half a line in the file; the second run sees four frames, not eight."""
    runs: list[str] = []
    real_run = Pipeline.run

    def stopped(self: Pipeline, frame: Any) -> Any:
        if len(runs) == 6:
            raise KeyboardInterrupt
        runs.append(frame.scene)
        return real_run(self, frame)

    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    assert evaluate(random_checkpoint, small_root, "--results", str(whole)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "run", stopped)
        assert evaluate(random_checkpoint, small_root, "--results", str(parts)) == 130
    kept = tmp_path / "parts.json.scenes"
    kept.write_text(kept.read_text() + '{"scene": "scene-09')
    monkeypatch.setattr(Pipeline, "run", lambda self, f: (runs.append(f.scene), real_run(self, f))[1])
    assert evaluate(random_checkpoint, small_root, "--results", str(parts)) == 0
    assert runs == ["scene-0103"] * 4 + ["scene-0916"] * 2 + ["scene-0916"] * 4
    assert parts.read_text() == whole.read_text()
    assert not kept.exists()


def test_an_unfinished_evaluation_of_another_model_is_not_gone_on_with(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.json.scenes").write_text('{"model": "0", "data root": "x", "version": "v1.0-mini"}\n')
    assert evaluate(random_checkpoint, small_root, "--results", str(tmp_path / "r.json")) == 2
    assert "unfinished evaluation of another model, engine, data root; remove it" in capsys.readouterr().err


def test_without_annotations_there_is_a_file_for_the_server_and_no_score(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "unannotated"
    shutil.copytree(small_root, root)
    for table in ("sample_annotation", "instance"):
        (root / VERSION / f"{table}.json").write_text("[]")
    assert evaluate(random_checkpoint, root) == 2
    assert "has no annotations; give --results FILE" in capsys.readouterr().err
    assert evaluate(random_checkpoint, root, "--results", str(tmp_path / "r.json")) == 0
    assert "NDS" not in capsys.readouterr().out
    assert len(json.loads((tmp_path / "r.json").read_text())["results"]) == 8


@pytest.fixture
def copy(small_root: Path, tmp_path: Path) -> Path:
    """The small data set once more, to be damaged."""
    shutil.copytree(small_root, tmp_path / "copy")
    return tmp_path / "copy"


def one_line(captured: Any) -> str:
    """The one line of complaint; progress bars aside."""
    lines: list[str] = [line for line in captured.err.splitlines() if "qdbev: error: " in line]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


def test_a_table_that_only_the_devkit_needs_is_missed_before_the_model_is_opened(
    copy: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / VERSION / "map.json").unlink()
    monkeypatch.setattr(inference, "open_engine", lambda *_: pytest.fail("the model was opened"))
    assert evaluate(random_checkpoint, copy) == 2
    assert "map.json" in one_line(capsys.readouterr())


def test_truth_that_the_devkit_refuses_is_refused_before_the_first_frame(
    copy: Path, random_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two attributes at one annotation: the devkit raises a bare Exception."""
    table = copy / VERSION / "sample_annotation.json"
    rows = json.loads(table.read_text())
    rows[0]["attribute_tokens"] *= 2
    table.write_text(json.dumps(rows))
    monkeypatch.setattr(Pipeline, "run", lambda *_: pytest.fail("a frame was run"))
    assert evaluate(random_checkpoint, copy) == 2
    assert "must not have more than one attribute" in one_line(capsys.readouterr())


def test_a_json_file_that_cannot_be_written_does_not_cost_the_score(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, results = tmp_path / "folder", tmp_path / "results.json"
    folder.mkdir()
    files = ["--scene", "scene-0916", "--results", str(results), "--json", str(folder)]
    assert evaluate(random_checkpoint, small_root, *files) == 2
    captured = capsys.readouterr()
    assert "NDS" in captured.out
    assert str(folder) in one_line(captured)
    arguments = [str(results), str(small_root), "--version", VERSION, "--split", "mini_val"]
    assert main(["score", *arguments, "--scene", "scene-0916", "--json", str(folder)]) == 2
    assert "NDS" in capsys.readouterr().out


def test_a_picture_that_is_no_picture_is_named_by_its_file(
    copy: Path, random_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = sorted((copy / "samples" / "CAM_FRONT").iterdir())[2]
    picture.write_bytes(b"")
    assert evaluate(random_checkpoint, copy) == 2
    assert picture.name in one_line(capsys.readouterr())


def test_a_tiny_with_random_weights_runs_over_real_frames_and_is_scored(
    nuscenes_root: Path, real_frames: Any, tmp_path: Path
) -> None:
    """Two frames, the second with a memory of the first; all 41 are in docs/evaluation.md."""
    checkpoint = tmp_path / "tiny.safetensors"
    assert main(["init", "tiny", str(checkpoint), "--seed", "1"]) == 0
    results = detect(open_engine(checkpoint), {"scene-0916": real_frames[:2]})
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", results)
    assert score.frames == 2
    assert score.boxes > 0
    assert 0 <= score.nds < 0.1


# Bad input


@pytest.mark.parametrize(
    ("name", "content"), [("none.qdbev", None), ("model.pth", b"x"), ("model.safetensors", b"x")]
)
def test_eval_refuses_what_is_no_model(
    small_root: Path, tmp_path: Path, name: str, content: bytes | None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main(["eval", str(path), str(small_root), "--version", VERSION, "--split", "mini_val"]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1


def test_a_checkpoint_for_another_number_of_cameras_is_refused(
    small_root: Path, random_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors, metadata = read_tensors(random_checkpoint)
    key = "pts_bbox_head.transformer.cams_embeds"
    write_tensors(tmp_path / "five.safetensors", tensors | {key: tensors[key][:5]}, metadata)
    assert evaluate(tmp_path / "five.safetensors", small_root) == 2
    error = capsys.readouterr().err
    assert f"{key} is (5, 96) but must be (6, 96)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("version", "split", "message"),
    [
        ("v2.0-mini", "mini_val", "no such folder of tables; versions here: v1.0-mini"),
        (VERSION, "mini_train", "none of its 2 scenes is in split 'mini_train'"),
        (VERSION, "holidays", "no split 'holidays'"),
    ],
)
def test_eval_and_score_name_a_wrong_version_or_split(
    small_root: Path,
    random_checkpoint: Path,
    version: str,
    split: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [str(small_root), "--version", version, "--split", split]
    for command in (["eval", str(random_checkpoint)], ["score", str(random_checkpoint)]):
        assert main([*command, *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1


def test_init_refuses_an_unknown_variant_and_a_name_that_is_no_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "huge", str(tmp_path / "m.safetensors")]) == 2
    assert "no variant 'huge'" in capsys.readouterr().err
    assert main(["init", "nano", str(tmp_path / "m.pth")]) == 2
    assert "ends in .safetensors" in capsys.readouterr().err


# Result files


def test_a_result_file_is_scored_like_the_evaluation_that_wrote_it(small_root: Path, tmp_path: Path) -> None:
    frames = all_frames(load_scenes(small_root, VERSION, "mini_val"))
    path = tmp_path / "results.json"
    write_results(path, {f.sample_token: truth_entries(f) for f in frames})
    arguments = [str(path), str(small_root), "--version", VERSION, "--split", "mini_val"]
    assert main(["score", *arguments, "--json", str(tmp_path / "all.json")]) == 0
    assert main(["score", *arguments, "--scene", "scene-0103", "--json", str(tmp_path / "one.json")]) == 0
    scores = [json.loads((tmp_path / name).read_text()) for name in ("all.json", "one.json")]
    assert [s["frames"] for s in scores] == [8, 4]
    assert [s["class_ap"]["car"] for s in scores] == pytest.approx([1.0, 1.0])
    assert scores[0]["classes"]["car"]["ap_at"]["0.5"] == pytest.approx(1.0)
    assert scores[0]["classes"]["barrier"]["errors"]["AVE"] is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"meta": {}, "results": {"scene-0103-0": []}}',
            "lacks 7 of the 8 samples of mini_val, first scene-0103-1",
        ),
        ('{"meta": {}}', "not a nuScenes result file"),
        ("[1, 2]", "not a nuScenes result file"),
        ("{", "not a nuScenes result file"),
        *[
            (
                json.dumps({"results": dict.fromkeys(TOKENS, entries)}),
                "sample scene-0103-0 holds no list of boxes",
            )
            for entries in (None, 5, "car", [[1]])
        ],
    ],
)
def test_a_result_file_that_cannot_be_scored_is_refused(
    small_root: Path, tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    assert main(["score", str(path), str(small_root), "--version", VERSION, "--split", "mini_val"]) == 2
    error = capsys.readouterr().err
    assert f"{path}: {message}" in error
    assert error.count("\n") == 1


def test_a_box_that_the_devkit_cannot_use_is_refused(
    small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = all_frames(load_scenes(small_root, VERSION, "mini_val"))
    results = {f.sample_token: truth_entries(f) for f in frames}
    results[TOKENS[0]][0]["velocity"] = None
    write_results(tmp_path / "results.json", results)
    arguments = [str(tmp_path / "results.json"), str(small_root), "--version", VERSION, "--split", "mini_val"]
    assert main(["score", *arguments]) == 2
    assert "the devkit refuses" in one_line(capsys.readouterr())
