# SPDX-License-Identifier: Apache-2.0
"""BEVFormer's result conversion, rule by rule, and the proof of the whole path: truth as a network would say it.

The proof: annotations -> class logits and box codes -> decode -> conversion -> JSON file -> official devkit.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdbev_ros.core.boxes import Boxes, decode_boxes, encode_boxes
from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.variant import CLASSES
from qdbev_train.data.frames import Frame
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.evaluation.metrics import Score, official_score
from qdbev_train.evaluation.results import CLASS_RANGE, result_entries, write_results
from tests.truth import network_answer, seen, whole_path

pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")
from pyquaternion import Quaternion

TOWN = Path(__file__).resolve().parents[2] / "demo" / "town"
PRESENT = ("car", "truck", "bus", "pedestrian", "motorcycle", "bicycle")  # classes that occur in scene-0916


def assert_only_flatness_is_lost(score: Score, classes: tuple[str, ...]) -> None:
    """AP 1 at every distance; position and size to float32. A code is flat in the lidar's frame, which tilts against
    the horizon: second order in the tilt, 0.002 rad of heading and 0.01 m/s of velocity."""
    largest = {"ATE": 1e-4, "ASE": 1e-4, "AOE": 2e-3, "AVE": 1e-2}
    for name in classes:
        assert min(score.classes[name].ap_at.values()) > 1 - 1e-9, name
        for error, limit in largest.items():
            value = score.classes[name].errors[error]
            assert np.isnan(value) or value < limit, (name, error)


@pytest.fixture(scope="module")
def town_frames() -> list[Frame]:
    return all_frames(load_scenes(TOWN, "v1.0-mini", "mini_val"))


def test_truth_through_the_whole_path_scores_perfectly_on_the_real_scene(
    nuscenes_root: Path, real_frames: Any
) -> None:
    """Six of ten classes occur; each of the others counts as AP 0 and error 1 by the devkit's rule."""
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", whole_path(real_frames, True))
    assert_only_flatness_is_lost(score, PRESENT)
    assert score.frames == 41
    assert score.mAP == pytest.approx(0.6)
    # Cones count for neither of the last three errors, barriers not for the last two.
    expected = {"mATE": 4 / 10, "mASE": 4 / 10, "mAOE": 3 / 9, "mAVE": 2 / 8, "mAAE": 2 / 8}
    assert score.errors == pytest.approx(expected, abs=2e-3)
    assert score.nds == pytest.approx((5 * 0.6 + sum(1 - e for e in expected.values())) / 10, abs=1e-3)


def test_truth_through_the_whole_path_scores_perfectly_in_the_town(town_frames: list[Frame]) -> None:
    """All ten classes occur: NDS and mAP 1, every error 0."""
    score = official_score(TOWN, "v1.0-mini", "mini_val", whole_path(town_frames, True))
    assert_only_flatness_is_lost(score, tuple(CLASSES))
    assert score.mAP == pytest.approx(1.0)
    assert score.errors == pytest.approx(dict.fromkeys(score.errors, 0.0), abs=1e-3)
    assert score.nds == pytest.approx(1.0, abs=1e-3)


def test_class_and_speed_cannot_tell_every_attribute(nuscenes_root: Path, real_frames: Any) -> None:
    """All that the rule of attributes costs a perfect detector is mAAE: it knows no sitting pedestrian, for one."""
    results = whole_path(real_frames, with_attributes=False)
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", results)
    assert_only_flatness_is_lost(score, PRESENT)
    said = {e["attribute_name"] for entries in results.values() for e in entries}
    assert "pedestrian.sitting_lying_down" not in said
    assert "pedestrian.sitting_lying_down" in {a for f in real_frames for a in f.annotations.attributes}
    assert score.classes["pedestrian"].errors["AAE"] == pytest.approx(0.2, abs=0.05)
    assert score.classes["bicycle"].errors["AAE"] == 0.0
    assert 2 / 8 < score.errors["mAAE"] < 2 / 8 + 0.1


def test_every_box_counts_in_the_errors(nuscenes_root: Path, real_frames: Any) -> None:
    """0.7 m aside: lost at the 0.5 m threshold only, and mATE 0.7; half a radian: mAOE 0.5; 1 m/s: mAVE 1."""
    results, rng = {}, np.random.default_rng(0)
    for frame in real_frames:
        boxes = frame.annotations.boxes.select(seen(frame))
        off = replace(
            boxes,
            centers=boxes.centers + np.array([0.7, 0, 0]),
            yaws=boxes.yaws + 0.5,
            velocities=boxes.velocities + np.array([0.0, 1.0]),
        )
        decoded = decode_boxes(*network_answer(off, rng))
        results[frame.sample_token] = result_entries(
            frame.sample_token, decoded, frame.lidar2ego, frame.ego2global
        )
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", results)
    assert score.classes["truck"].ap_at["0.5"] < 0.1
    assert score.classes["truck"].ap == pytest.approx(0.75, abs=0.03)
    assert score.errors["mATE"] == pytest.approx((6 * 0.7 + 4) / 10, abs=0.05)
    assert score.errors["mAOE"] == pytest.approx((6 * 0.5 + 3) / 9, abs=0.06)
    assert score.errors["mAVE"] == pytest.approx((6 * 1.0 + 2) / 8, abs=0.06)


def literal_conversion(
    logits: NDArray[np.float32], codes: NDArray[np.float32], devkit: Any, token: str
) -> list[dict[str, Any]]:
    """BEVFormer's and mmdet3d's formulae one after the other, on the devkit's own tables, one box at a time."""
    data = devkit.get("sample_data", devkit.get("sample", token)["data"]["LIDAR_TOP"])
    sensor = devkit.get("calibrated_sensor", data["calibrated_sensor_token"])
    ego = devkit.get("ego_pose", data["ego_pose_token"])
    scores = (1 / (1 + np.exp(-logits.astype(np.float64)))).flatten()
    found = []
    for index in np.argsort(-scores, kind="stable")[:300]:
        label, code = index % 10, codes[index // 10].astype(np.float64)
        w, length, h = np.exp(code[2]), np.exp(code[3]), np.exp(code[5])
        yaw_second = np.arctan2(code[6], code[7])
        bottom = code[4] - h / 2  # the box's origin is at its bottom in between ...
        center = np.array(
            [code[0], code[1], bottom + h / 2]
        )  # ... and the gravity centre again for the output
        turn = Quaternion(axis=[0, 0, 1], radians=-yaw_second - np.pi / 2)
        velocity = np.array([code[8], code[9], 0.0])
        for pose in (sensor, ego):
            rotation = Quaternion(pose["rotation"])
            center = rotation.rotate(center) + np.array(pose["translation"])
            turn, velocity = rotation * turn, rotation.rotate(velocity)
            if pose is sensor and np.linalg.norm(center[:2]) > CLASS_RANGE[CLASSES[label]]:
                break
        else:
            numbers = {"translation": center, "size": (w, length, h), "turn": turn, "velocity": velocity[:2]}
            found.append(numbers | {"detection_name": CLASSES[label], "detection_score": scores[index]})
    return found


def test_frames_sizes_and_angles_are_those_of_the_literal_formulae(real_frames: Any, devkit: Any) -> None:
    """200 boxes anywhere on the map, of any class, size, heading and speed, in a moving and tilted ego frame."""
    from nuscenes.eval.common.utils import quaternion_yaw

    rng = np.random.default_rng(3)
    frame = real_frames[20]
    boxes = Boxes(
        rng.uniform([-51, -51, -4], [51, 51, 2], (200, 3)),
        rng.uniform(0.3, 12.0, (200, 3)),
        rng.uniform(-np.pi, np.pi, 200),
        rng.normal(0, 5, (200, 2)),
        np.ones(200),
        rng.integers(0, 10, 200),
    )
    answer = network_answer(boxes, rng)
    ours = result_entries(frame.sample_token, decode_boxes(*answer), frame.lidar2ego, frame.ego2global)
    expected = literal_conversion(*answer, devkit, frame.sample_token)
    assert 50 < len(expected) < 200
    assert len(ours) == len(expected)
    for entry, want in zip(ours, expected):
        for key in ("translation", "size", "velocity", "detection_score"):
            np.testing.assert_allclose(entry[key], want[key], rtol=1e-9, atol=1e-9, err_msg=key)
        turn = quaternion_yaw(Quaternion(entry["rotation"])) - quaternion_yaw(want["turn"])
        assert abs((turn + np.pi) % (2 * np.pi) - np.pi) < 1e-9
        assert entry["detection_name"] == want["detection_name"]


def one(label: str, center: tuple[float, float, float], velocity: tuple[float, float] = (0.0, 0.0)) -> Boxes:
    return Boxes(
        np.array([center]),
        np.array([[1.0, 2.0, 3.0]]),
        np.zeros(1),
        np.array([velocity]),
        np.ones(1),
        np.array([CLASSES.index(label)]),
    )


@pytest.mark.parametrize(
    ("name", "moving", "resting"),
    [
        *(
            (n, "vehicle.moving", "vehicle.parked")
            for n in ("car", "truck", "trailer", "construction_vehicle")
        ),
        ("bus", "vehicle.moving", "vehicle.stopped"),
        ("bicycle", "cycle.with_rider", "cycle.without_rider"),
        ("motorcycle", "cycle.with_rider", "cycle.without_rider"),
        ("pedestrian", "pedestrian.moving", "pedestrian.standing"),
        ("barrier", "", ""),
        ("traffic_cone", "", ""),
    ],
)
def test_attributes_follow_from_class_and_a_speed_of_0_2(name: str, moving: str, resting: str) -> None:
    def attribute(speed: float) -> str:
        boxes = one(name, (1.0, 1.0, 0.0), (0.6 * speed, -0.8 * speed))
        return result_entries("t", boxes, Pose.identity(), Pose.identity())[0]["attribute_name"]

    assert attribute(0.21) == moving
    assert attribute(0.19) == attribute(0.0) == resting


def test_an_unknown_velocity_counts_as_resting() -> None:
    boxes = one("car", (1.0, 1.0, 0.0), (float("nan"), float("nan")))
    entry = result_entries("t", boxes, Pose.identity(), Pose.identity())[0]
    assert entry["attribute_name"] == "vehicle.parked"


def test_class_ranges_are_the_official_ones() -> None:
    from nuscenes.eval.common.config import config_factory

    assert config_factory("detection_cvpr_2019").class_range == CLASS_RANGE


@pytest.mark.parametrize(("name", "reach"), CLASS_RANGE.items())
def test_class_ranges_are_measured_from_the_ego_in_the_plane(name: str, reach: float) -> None:
    """Not from the lidar, 1 m ahead of it, not in the global frame, and height does not count."""
    lidar2ego = Pose(np.array([1.0, 0, 0, 0]), np.array([0.0, 1.0, 2.0]))
    ego2global = Pose(yaw_quaternion(0.3), np.array([500.0, 900.0, 0.0]))

    def kept(y: float) -> bool:
        return bool(result_entries("t", one(name, (0.0, y, -4.0)), lidar2ego, ego2global))

    assert (kept(reach - 1.01), kept(reach - 0.99)) == (True, False)
    assert (kept(-reach - 0.99), kept(-reach - 1.01)) == (True, False)


def test_velocity_and_heading_turn_with_the_frames() -> None:
    """The lidar looks left of the ego by a quarter turn, the ego left of global x by another: x becomes -x."""
    quarter = Pose(yaw_quaternion(np.pi / 2), np.zeros(3))
    entry = result_entries("t", one("car", (1.0, 0.0, 0.0), (3.0, 0.5)), quarter, quarter)[0]
    np.testing.assert_allclose(entry["velocity"], [-3.0, -0.5], atol=1e-12)
    np.testing.assert_allclose(entry["translation"], [-1.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(np.abs(entry["rotation"]), [0.0, 0.0, 0.0, 1.0], atol=1e-12)


def test_sizes_are_width_length_height_and_the_centre_is_that_of_gravity() -> None:
    code = encode_boxes(
        np.array([[4.0, 5.0, -0.6]]), np.array([[1.9, 4.6, 1.7]]), np.zeros(1), np.zeros((1, 2))
    )
    logits = np.zeros((1, 10), np.float32)
    entry = result_entries("t", decode_boxes(logits, code), Pose.identity(), Pose.identity())[0]
    np.testing.assert_allclose(entry["size"], [1.9, 4.6, 1.7], rtol=1e-6)
    np.testing.assert_allclose(entry["translation"], [4.0, 5.0, -0.6], rtol=1e-6)


def test_the_best_500_boxes_of_a_sample_are_kept() -> None:
    scores = np.random.default_rng(0).uniform(0, 1, 600)
    boxes = Boxes(
        np.zeros((600, 3)), np.ones((600, 3)), np.zeros(600), np.zeros((600, 2)), scores, np.zeros(600, int)
    )
    entries = result_entries("t", boxes, Pose.identity(), Pose.identity())
    assert [e["detection_score"] for e in entries] == sorted(scores, reverse=True)[:500]


def test_the_file_says_camera_and_external_data_and_names_every_sample(tmp_path: Path) -> None:
    """External: the weights began on other data than nuScenes. A sample in which nothing is seen has an empty list."""
    entries = result_entries("a", one("car", (1.0, 1.0, 0.0)), Pose.identity(), Pose.identity())
    write_results(tmp_path / "r.json", {"a": entries, "b": []})
    written = json.loads((tmp_path / "r.json").read_text())
    use = {"camera": True, "lidar": False, "radar": False, "map": False, "external": True}
    assert written["meta"] == {f"use_{key}": value for key, value in use.items()}
    assert written["results"] == {"a": entries, "b": []}
    assert set(entries[0]) == {
        *("sample_token", "translation", "size", "rotation", "velocity"),
        *("detection_name", "detection_score", "attribute_name"),
    }
