# SPDX-License-Identifier: Apache-2.0
"""The synthetic town as a data set: schema, determinism, stamps, velocities, merging, bad input."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

pytest.importorskip("vtkmodules", reason="the synthetic town is drawn with VTK")
pytest.importorskip("nuscenes", reason="nuscenes-devkit is not installed")

from nuscenes.eval.common.config import config_factory
from nuscenes.eval.detection.evaluate import DetectionEval
from nuscenes.eval.detection.utils import category_to_detection_name
from nuscenes.nuscenes import NuScenes

from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.variant import CAMERAS
from qdbev_train.synthetic import command
from qdbev_train.synthetic.plan import plan_scene
from qdbev_train.synthetic.rig import CAMERA_OFFSET_US, cameras
from qdbev_train.synthetic.tables import can_bus_poses, frame_tables

FRAMES = 4
DEMO = Path(__file__).resolve().parents[2] / "demo" / "town"


def synth(out: Path, *options: str) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(out), "--jobs", "1", "--size", "400x225", *options]))


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("town")
    synth(out, "--split", "mini_val", "--scenes", "2", "--seed", "5", "--frames", str(FRAMES))
    return out


@pytest.fixture(scope="module")
def tables(town: Path) -> NuScenes:
    return NuScenes("v1.0-mini", str(town), verbose=False)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def test_devkit_loads_it_with_the_official_scene_names(tables: NuScenes) -> None:
    assert [s["name"] for s in tables.scene] == ["scene-0103", "scene-0916"]
    assert len(tables.sample) == 2 * FRAMES
    assert len(tables.sample_data) == 2 * FRAMES * 7
    assert len(tables.sample_annotation) > 50


def test_every_image_is_there_and_small(tables: NuScenes) -> None:
    sizes = []
    for row in tables.sample_data:
        if row["sensor_modality"] == "camera":
            path = Path(tables.dataroot) / row["filename"]
            assert cv2.imread(str(path)).shape == (225, 400, 3)
            sizes.append(path.stat().st_size)
    assert 6_000 < np.mean(sizes) < 20_000


def test_cameras_fire_one_after_another_and_back_left_with_the_lidar(tables: NuScenes) -> None:
    for sample in tables.sample:
        stamps = {channel: tables.get("sample_data", t)["timestamp"] for channel, t in sample["data"].items()}
        assert stamps["LIDAR_TOP"] == stamps["CAM_BACK_LEFT"] == sample["timestamp"]
        assert {c: stamps[c] - sample["timestamp"] for c in CAMERAS} == CAMERA_OFFSET_US
        assert CAMERA_OFFSET_US["CAM_FRONT_LEFT"] == -42_000


def test_ego_pose_of_each_sensor_is_that_of_its_own_stamp(tables: NuScenes) -> None:
    plan = plan_scene("scene-0103", 5, FRAMES)
    sample = tables.get("sample", tables.scene[0]["first_sample_token"])
    for channel in CAMERAS:
        data = tables.get("sample_data", sample["data"][channel])
        x, y, _ = plan.town.ego.pose(CAMERA_OFFSET_US[channel] * 1e-6)
        assert tables.get("ego_pose", data["ego_pose_token"])["translation"][:2] == pytest.approx([x, y])


def test_velocities_that_the_devkit_derives_are_the_simulated_ones(tables: NuScenes) -> None:
    compared = 0
    for scene in tables.scene:
        plan = plan_scene(scene["name"], 5, FRAMES)
        middle = tables.get("sample", scene["first_sample_token"])["next"]
        for token in tables.get("sample", middle)["anns"]:
            row = tables.get("sample_annotation", token)
            if not (row["prev"] and row["next"]):
                continue
            distance = [
                np.hypot(*(np.array(o.track.pose(0.5)[:2]) - row["translation"][:2])) for o in plan.objects
            ]
            before, after = (
                np.array(plan.objects[int(np.argmin(distance))].track.pose(t)[:2]) for t in (0.0, 1.0)
            )
            assert min(distance) < 1e-6
            assert tables.box_velocity(token)[:2] == pytest.approx(after - before, abs=1e-6)
            compared += 1
    assert compared > 10


def test_can_bus_has_the_fields_and_rate_of_nuscenes(town: Path) -> None:
    rows = json.loads((town / "can_bus" / "scene-0103_pose.json").read_text())
    assert set(rows[0]) == {"accel", "orientation", "pos", "rotation_rate", "utime", "vel"}
    assert set(np.diff([r["utime"] for r in rows])) == {20_000}
    moved = np.hypot(*(np.array(rows[60]["pos"]) - rows[50]["pos"])[:2])
    assert moved == pytest.approx(0.2 * rows[55]["vel"][0], abs=0.05)


def test_map_mask_is_white_where_the_ego_car_drives(tables: NuScenes) -> None:
    log = tables.get("log", tables.scene[0]["log_token"])
    mask = tables.get("map", log["map_token"])["mask"]
    for pose in tables.ego_pose[:FRAMES]:
        assert mask.is_on_mask(*pose["translation"][:2])


def test_the_devkit_gives_the_annotations_themselves_full_marks(tables: NuScenes, tmp_path: Path) -> None:
    results: dict[str, list[dict[str, object]]] = {s["token"]: [] for s in tables.sample}
    for row in (r for r in tables.sample_annotation if r["num_lidar_pts"]):  # the devkit drops the others
        name = category_to_detection_name(row["category_name"])
        attributes = [tables.get("attribute", t)["name"] for t in row["attribute_tokens"]]
        box = {
            **{key: row[key] for key in ("sample_token", "translation", "size", "rotation")},
            "velocity": np.nan_to_num(tables.box_velocity(row["token"])[:2]).tolist(),
            "detection_name": name,
            "detection_score": 0.5,
            "attribute_name": attributes[0] if attributes else "",
        }
        results[row["sample_token"]].append(box)
    meta = {f"use_{source}": source == "camera" for source in ("camera", "lidar", "radar", "map", "external")}
    (tmp_path / "results.json").write_text(json.dumps({"meta": meta, "results": results}))
    config = config_factory("detection_cvpr_2019")
    scoring = DetectionEval(
        tables, config, str(tmp_path / "results.json"), "mini_val", str(tmp_path), verbose=False
    )
    metrics, _ = scoring.evaluate()
    present = {box.detection_name for box in scoring.gt_boxes.all}
    assert len(present) > 5
    for name in present:
        assert metrics.get_label_ap(name, 0.5) > 0.98, name
        assert metrics.get_label_tp(name, "trans_err") < 0.01, name
        assert np.nan_to_num(metrics.get_label_tp(name, "attr_err")) < 0.01, name


def test_the_same_seed_gives_the_same_bytes(town: Path, tmp_path: Path) -> None:
    synth(tmp_path, "--split", "mini_val", "--scenes", "2", "--seed", "5", "--frames", str(FRAMES))
    assert files(tmp_path) == files(town)


def test_the_scene_of_the_demo_is_still_what_its_seed_gives() -> None:
    """Places, headings and times of the committed scene; another generation has to raise GENERATION."""
    plan = plan_scene("scene-0103", 2004, 34)
    made = frame_tables(plan, cameras((400, 225)), (400, 225))
    for table in ("ego_pose", "calibrated_sensor"):
        committed = {r["token"]: r for r in json.loads((DEMO / "v1.0-mini" / f"{table}.json").read_text())}
        assert committed.keys() == {row["token"] for row in made[table]}
        for row in made[table]:
            for key, value in row.items():
                expected = committed[row["token"]][key]
                if key in ("translation", "rotation", "camera_intrinsic"):
                    np.testing.assert_allclose(value, expected, atol=1e-6)
                else:
                    assert value == expected, key
    committed = json.loads((DEMO / "can_bus" / "scene-0103_pose.json").read_text())
    orientations = [row["orientation"] for row in can_bus_poses(plan.town, "scene-0103")]
    np.testing.assert_allclose(orientations, [row["orientation"] for row in committed], atol=1e-6)


def test_splits_merge_and_finished_scenes_are_kept(tmp_path: Path) -> None:
    options = ("--scenes", "1", "--frames", "2", "--seed", "1")
    synth(tmp_path, "--split", "mini_train", *options)
    picture = next(tmp_path.glob("samples/CAM_FRONT/*.jpg"))
    os.utime(picture, (1, 1))
    synth(tmp_path, "--split", "mini_val", *options)
    synth(tmp_path, "--split", "mini_train", *options)
    assert picture.stat().st_mtime == 1
    names = [s["name"] for s in NuScenes("v1.0-mini", str(tmp_path), verbose=False).scene]
    assert names == ["scene-0061", "scene-0103"]


def test_other_settings_in_the_same_folder_are_refused(town: Path) -> None:
    with pytest.raises(QdbevError, match="scene-0103 was made with seed 5 instead of 6"):
        synth(town, "--split", "mini_val", "--scenes", "2", "--seed", "6", "--frames", str(FRAMES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scenes", "3"), "split mini_val has names for 1 to 2 scenes"),
        (("--scenes", "1", "--frames", "1"), "--frames 1"),
        (("--scenes", "1", "--jobs", "0"), "--jobs 0"),
        (("--scenes", "1", "--size", "400"), "--size 400"),
    ],
)
def test_bad_options_are_named(tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    with pytest.raises(QdbevError, match=message):
        synth(tmp_path, "--split", "mini_val", *options)
    assert not any(tmp_path.iterdir())
