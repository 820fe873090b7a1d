# SPDX-License-Identifier: Apache-2.0
"""nuScenes tables into frames: what is in a frame, and how damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import quaternion_to_matrix
from qdbev_ros.core.projection import project_points
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_train.data.frames import mirrored, turned
from qdbev_train.data.index_annotations import CATEGORY_TO_CLASS
from qdbev_train.data.tables import all_frames, load_scenes
from tests.small_dataset import SCENES, SPEED, VERSION


@pytest.fixture
def damaged(small_root: Path, tmp_path: Path) -> Callable[[str, Callable[[Any], Any]], Path]:
    """damaged(table, edit): a copy of the small data set's tables in which `edit` changed one."""

    def damage(table: str, edit: Callable[[Any], Any]) -> Path:
        shutil.copytree(small_root / VERSION, tmp_path / VERSION)
        path = tmp_path / VERSION / f"{table}.json"
        records = json.loads(path.read_text())
        edit(records)
        path.write_text(json.dumps(records))
        return tmp_path

    return damage


def test_scenes_and_frames_come_in_order(small_root: Path) -> None:
    scenes = load_scenes(small_root, VERSION)
    assert tuple(scenes) == SCENES
    frames = scenes["scene-0103"]
    assert [f.sample_token for f in frames] == [f"scene-0103-{i}" for i in range(4)]
    assert [f.stamp_ns - frames[0].stamp_ns for f in frames] == [i * 500_000_000 for i in range(4)]
    assert len(all_frames(scenes)) == 8


def test_each_camera_has_its_own_stamp_and_ego_pose(small_root: Path) -> None:
    frame = load_scenes(small_root, VERSION, scenes=["scene-0103"])["scene-0103"][2]
    assert [c.calibration.name for c in frame.cameras] == list(CAMERAS)
    front = frame.cameras[0]
    assert frame.stamp_ns - front.stamp_ns == 35_000_000
    assert frame.ego2global.translation[0] == pytest.approx(SPEED * 1.0)
    assert front.ego2global.translation[0] == pytest.approx(SPEED * 0.965)
    assert front.read()[:2] == b"\xff\xd8"


def test_boxes_are_in_the_lidar_frame_and_only_of_the_ten_classes(small_root: Path) -> None:
    """The car drives 10 m ahead of the ego: y forward, 9 m ahead of the lidar, heading and velocity along +y."""
    frame = load_scenes(small_root, VERSION, scenes=["scene-0103"])["scene-0103"][1]
    boxes = frame.annotations.boxes
    assert [CLASSES[label] for label in boxes.labels] == ["car", "pedestrian", "traffic_cone"]
    np.testing.assert_allclose(boxes.centers[0], [0.0, 9.0, -1.0], atol=1e-9)
    np.testing.assert_allclose(boxes.velocities[0], [0.0, SPEED], atol=1e-9)
    np.testing.assert_allclose(boxes.yaws[0], np.pi / 2)
    np.testing.assert_allclose(boxes.centers[1], [-3.0, 12 - SPEED * 0.5 - 1, -0.9], atol=1e-9)
    assert frame.annotations.points.tolist() == [5, 5, 0]
    assert frame.annotations.attributes == ("vehicle.moving", "pedestrian.standing", "")


def test_categories_map_to_classes_as_in_the_devkit() -> None:
    utils = pytest.importorskip("nuscenes.eval.detection.utils", reason="nuscenes-devkit isn't installed")
    for category, name in CATEGORY_TO_CLASS.items():
        assert utils.category_to_detection_name(category) == name
    for other in (
        "vehicle.emergency.police",
        "animal",
        "human.pedestrian.stroller",
        "static_object.bicycle_rack",
    ):
        assert utils.category_to_detection_name(other) is None
        assert other not in CATEGORY_TO_CLASS


def test_velocities_are_the_devkits_for_every_annotation(devkit: Any, real_frames: Any) -> None:
    unknown = 0
    for frame in real_frames:
        to_global = quaternion_to_matrix(frame.lidar2global.rotation)
        by_instance = {}
        for token in devkit.get("sample", frame.sample_token)["anns"]:
            by_instance[devkit.get("sample_annotation", token)["instance_token"]] = token
        for instance, velocity in zip(frame.annotations.instances, frame.annotations.boxes.velocities):
            expected = devkit.box_velocity(by_instance[instance])
            unknown += int(np.isnan(expected).any())
            np.testing.assert_allclose((to_global @ [*velocity, 0])[:2], expected[:2], atol=0.02)
    assert unknown < 10


def test_boxes_of_every_frame_are_the_devkits_in_the_lidar_frame(devkit: Any, real_frames: Any) -> None:
    """All 41 frames: centre, size and heading as get_sample_data turns them into the sensor's frame, in its order."""
    for frame in real_frames:
        lidar = devkit.get("sample", frame.sample_token)["data"]["LIDAR_TOP"]
        expected = [b for b in devkit.get_sample_data(lidar)[1] if b.name in CATEGORY_TO_CLASS]
        boxes = frame.annotations.boxes
        assert len(boxes) == len(expected) > 0
        order = {devkit.get("sample_annotation", box.token)["instance_token"]: box for box in expected}
        for i, instance in enumerate(frame.annotations.instances):
            box = order[instance]
            np.testing.assert_allclose(boxes.centers[i], box.center, atol=1e-6)
            np.testing.assert_array_equal(boxes.sizes[i], box.wlh)
            assert CLASSES[boxes.labels[i]] == CATEGORY_TO_CLASS[box.name]
            # Our boxes stand upright in the lidar frame, the devkit's are tilted with the road under the car.
            ahead = box.rotation_matrix[:, 0]
            heading = np.array([np.cos(boxes.yaws[i]), np.sin(boxes.yaws[i])])
            np.testing.assert_allclose(heading, ahead[:2] / np.linalg.norm(ahead[:2]), atol=1e-4)


def test_every_camera_of_every_frame_projects_as_the_devkit(devkit: Any, real_frames: Any) -> None:
    """Its steps one by one: lidar -> ego -> global at the lidar's time, global -> ego -> camera at the camera's."""
    from nuscenes.utils.data_classes import LidarPointCloud
    from nuscenes.utils.geometry_utils import view_points
    from pyquaternion import Quaternion

    points = np.random.default_rng(0).uniform([-40, -40, -3], [40, 40, 3], (300, 3))
    for frame in real_frames:
        data = devkit.get("sample", frame.sample_token)["data"]
        assert frame.stamp_ns == devkit.get("sample_data", data["LIDAR_TOP"])["timestamp"] * 1000
        for camera in frame.cameras:
            cloud = LidarPointCloud(np.concatenate([points.T, np.zeros((1, 300))]))
            for record, forward in (
                (devkit.get("sample_data", data["LIDAR_TOP"]), True),
                (devkit.get("sample_data", data[camera.calibration.name]), False),
            ):
                sensor = devkit.get("calibrated_sensor", record["calibrated_sensor_token"])
                ego = devkit.get("ego_pose", record["ego_pose_token"])
                for pose in (sensor, ego) if forward else (ego, sensor):
                    if forward:
                        cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix)
                        cloud.translate(np.array(pose["translation"]))
                    else:
                        cloud.translate(-np.array(pose["translation"]))
                        cloud.rotate(Quaternion(pose["rotation"]).rotation_matrix.T)
            seen = cloud.points[2] > 1
            expected = view_points(
                cloud.points[:3, seen], np.array(sensor["camera_intrinsic"]), normalize=True
            )
            pixels, depths = project_points(frame.lidar2img(camera), points)
            np.testing.assert_allclose(depths, cloud.points[2], atol=1e-6)
            np.testing.assert_allclose(pixels[seen], expected[:2].T, atol=1e-3)
            assert camera.image == Path(devkit.get_sample_data_path(data[camera.calibration.name]))
            assert camera.stamp_ns == record["timestamp"] * 1000


def test_the_real_scene_is_complete(devkit: Any, real_frames: Any) -> None:
    """Every annotation of a detection class is there in every frame, with the devkit's points and attribute."""
    assert len(real_frames) == 41
    for frame in real_frames:
        records = [
            devkit.get("sample_annotation", t) for t in devkit.get("sample", frame.sample_token)["anns"]
        ]
        wanted = {r["instance_token"]: r for r in records if r["category_name"] in CATEGORY_TO_CLASS}
        annotations = frame.annotations
        assert set(annotations.instances) == set(wanted)
        for i, instance in enumerate(annotations.instances):
            record = wanted[instance]
            valid = record["num_lidar_pts"] + record["num_radar_pts"] > 0
            assert (annotations.points[i] > 0) == valid
            assert annotations.points[i] == record["num_lidar_pts"] + record["num_radar_pts"]
            assert annotations.visibility[i] == int(record["visibility_token"])
            names = [devkit.get("attribute", t)["name"] for t in record["attribute_tokens"]]
            assert annotations.attributes[i] == (names[0] if names else "")


def test_can_dynamics_are_those_of_the_message_after_the_sample(small_root: Path, tmp_path: Path) -> None:
    """The reference's one-message skew; the last message where none follows; None without a file."""
    root = tmp_path / "root"
    shutil.copytree(small_root, root)
    start = 1_500_000_000_000_000
    messages = [
        {
            "utime": start + t,
            "accel": [t, 0, 9.8],
            "rotation_rate": [0, 0, t],
            "vel": [t, 0, 0],
            "pos": [0, 0, 0],
        }
        for t in (-20_000, 0, 20_000, 600_000)
    ]
    (root / "can_bus").mkdir()
    (root / "can_bus" / "scene-0103_pose.json").write_text(json.dumps(messages))
    scenes = load_scenes(root, VERSION)
    speeds = [frame.can_dynamics[6] for frame in scenes["scene-0103"]]
    assert speeds == [20_000, 600_000, 600_000, 600_000]
    np.testing.assert_array_equal(
        scenes["scene-0103"][0].can_dynamics, [20_000, 0, 9.8, 0, 0, 20_000, 20_000, 0, 0]
    )
    assert scenes["scene-0916"][0].can_dynamics is None


def test_a_split_takes_its_scenes_from_the_official_list(small_root: Path) -> None:
    pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")
    assert tuple(load_scenes(small_root, VERSION, split="mini_val")) == SCENES
    assert tuple(load_scenes(small_root, VERSION, "mini_val", ["scene-0916"])) == ("scene-0916",)
    with pytest.raises(DataError, match="none of its 2 scenes"):
        load_scenes(small_root, VERSION, split="mini_train")


def test_a_split_may_be_listed_beside_the_tables(small_root: Path, tmp_path: Path) -> None:
    shutil.copytree(small_root / VERSION, tmp_path / VERSION)
    (tmp_path / VERSION / "splits.json").write_text(json.dumps({"evening": ["scene-0916"]}))
    assert tuple(load_scenes(tmp_path, VERSION, split="evening")) == ("scene-0916",)
    with pytest.raises(DataError, match="'morning'"):
        load_scenes(tmp_path, VERSION, split="morning")


def test_the_mirrored_frame_shows_the_mirrored_world(real_frames: Any) -> None:
    """A box that was at pixel u is at W - u in the camera of the other side, at the same depth; twice is the same."""
    frame = real_frames[7]
    mirror = mirrored(frame)
    pairs = {"CAM_FRONT": "CAM_FRONT", "CAM_FRONT_LEFT": "CAM_FRONT_RIGHT", "CAM_BACK_RIGHT": "CAM_BACK_LEFT"}
    old = {c.calibration.name: c for c in frame.cameras}
    for camera in mirror.cameras:
        other = old.get(pairs.get(camera.calibration.name, ""))
        if other is None:
            continue
        assert camera.image == other.image
        pixels, depths = project_points(frame.lidar2img(other), frame.annotations.boxes.corners())
        mirror_corners = mirror.annotations.boxes.corners()[
            :, [1, 0, 3, 2, 5, 4, 7, 6]
        ]  # left and right exchanged
        mirror_pixels, mirror_depths = project_points(mirror.lidar2img(camera), mirror_corners)
        front = depths > 1
        np.testing.assert_allclose(mirror_depths, depths, atol=1e-6)
        np.testing.assert_allclose(mirror_pixels[front], ([1600, 0] + [-1, 1] * pixels)[front], atol=1e-5)
    again = mirrored(mirror)
    np.testing.assert_allclose(again.lidar2ego.matrix(), frame.lidar2ego.matrix(), atol=1e-12)
    np.testing.assert_allclose(again.annotations.boxes.centers, frame.annotations.boxes.centers)
    # A moving car's velocity follows its track in the mirrored world as well.
    np.testing.assert_allclose(
        mirror.lidar2global.matrix()[:3, :3] @ np.append(mirror.annotations.boxes.velocities[0], 0),
        np.array([1, -1, 1])
        * (frame.lidar2global.matrix()[:3, :3] @ np.append(frame.annotations.boxes.velocities[0], 0)),
        atol=1e-9,
    )


def test_a_turned_world_looks_the_same_from_inside(real_frames: Any) -> None:
    frame = real_frames[7]
    other = turned(frame, 1.0)
    for before, after in zip(frame.cameras, other.cameras):
        np.testing.assert_allclose(other.lidar2img(after), frame.lidar2img(before), atol=1e-6)
    assert np.cos(other.ego2global.yaw() - frame.ego2global.yaw() - 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("table", "edit", "named"),
    [
        (
            "sample",
            lambda r: r.pop(1),
            r"sample.json: no record 'scene-0103-1', which sample scene-0103-0 refers to",
        ),
        ("ego_pose", lambda r: r.pop(0), r"ego_pose.json: no record 'scene-0103-0-LIDAR_TOP'"),
        ("calibrated_sensor", lambda r: r.pop(1), r"calibrated_sensor.json: no record 'CAM_FRONT'"),
        ("sample_data", lambda r: r.pop(2), r"sample_data.json: sample scene-0103-0 has no CAM_FRONT_RIGHT"),
        ("instance", lambda r: r.pop(0), r"instance.json: no record 'scene-0103-object0'"),
        (
            "sample_annotation",
            lambda r: r.pop(0),
            r"sample_annotation.json: no record 'scene-0103-object0-0'",
        ),
        ("category", lambda r: r.pop(0), r"category.json: no record 'vehicle.car'"),
        ("sample_data", lambda r: r[0].pop("timestamp"), "no field 'timestamp'"),
        ("sample", lambda r: r[3].update(next="scene-0103-0"), "scene-0103 goes on after its 4 samples"),
        ("calibrated_sensor", lambda r: r[1].update(camera_intrinsic=[[0, 0, 0]] * 3), "camera CAM_FRONT: K"),
    ],
)
def test_damage_is_named_by_table_and_token(
    damaged: Callable[..., Path], table: str, edit: Callable[[Any], Any], named: str
) -> None:
    with pytest.raises(Exception, match=named) as caught:
        load_scenes(damaged(table, edit), VERSION)
    assert "\n" not in str(caught.value)


def test_a_root_without_tables_says_what_is_there(small_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load_scenes(tmp_path / "nowhere", VERSION)
    with pytest.raises(DataError, match="no version with tables here"):
        load_scenes(tmp_path, VERSION)
    with pytest.raises(DataError, match=r"versions here: v1\.0-mini"):
        load_scenes(small_root, "v1.0-trainval")
    with pytest.raises(DataError, match="no scene 'scene-9999'"):
        load_scenes(small_root, VERSION, scenes=["scene-9999"])


def test_a_table_that_is_cut_off_is_refused(small_root: Path, tmp_path: Path) -> None:
    shutil.copytree(small_root / VERSION, tmp_path / VERSION)
    path = tmp_path / VERSION / "sample.json"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"sample\.json: not JSON"):
        load_scenes(tmp_path, VERSION)
    path.unlink()
    with pytest.raises(DataError, match=r"sample\.json: table cannot be read"):
        load_scenes(tmp_path, VERSION)
