# SPDX-License-Identifier: Apache-2.0
"""Presets of the nuScenes bag conventions, remapping files, calibration files, encodings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from qdbev_ros.core.encodings import COLOUR, encoding_problem
from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.geometry import CameraCalibration, Pose, yaw_quaternion
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.calibration_file import (
    RigCalibration,
    calibration_for,
    load_calibration,
    write_calibration,
)
from qdbev_ros.ros.parameters import DetectorParameters
from qdbev_ros.ros.presets import TopicPreset, load_preset, preset_names

# What each convention's own converter writes for its camera behind on the left: type, picture, CameraInfo, source of
# motion with its topic, frame of a picture without one, fixed frame, model frame.
CONVENTIONS = {
    "nuscenes": (
        "compressed", "/CAM_BACK_LEFT/image_rect_compressed", "/CAM_BACK_LEFT/camera_info",
        "tf", "CAM_BACK_LEFT", "map", "LIDAR_TOP",
    ),
    "raw": (
        "raw", "/CAM_BACK_LEFT/image_rect", "/CAM_BACK_LEFT/camera_info",
        "tf", "CAM_BACK_LEFT", "map", "LIDAR_TOP",
    ),
    "nuscenes2mcap": (
        "compressed", "/cam_back_left/image_rect_compressed", "/cam_back_left/camera_info",
        "tf", "cam_back_left", "map", "lidar_top",
    ),
    "watonomous": (
        "compressed", "/CAM_BACK_LEFT/image_rect_compressed", "/CAM_BACK_LEFT/camera_info",
        "tf", "CAM_BACK_LEFT", "map", "LIDAR_TOP",
    ),
    "chris7462": (
        "raw", "/nuscenes/cam_back_left/image_raw", "/nuscenes/cam_back_left/camera_info",
        "odometry", "cam_back_left_link", "map", "lidar_top_link",
    ),
    "nuscenes2bag": ("raw", "/cam_back_left/raw", "", "tf", "cam_back_left", "map", "lidar_top"),
    "dataset_bridge": (
        "raw", "/nuscenes/CAM_BACK_LEFT/image", "/nuscenes/CAM_BACK_LEFT/camera_info",
        "tf", "CAM_BACK_LEFT", "world", "LIDAR_TOP",
    ),
    "bevfusion_demo": ("raw", "/cam_back_left/image_raw", "", "tf", "cam_back_left", "map", "lidar_top"),
}  # fmt: skip
MINIMAL = {"image_type": "raw", "image": "/rig/{camera}/image"}


def remapping(tmp_path: Path, **keys: object) -> TopicPreset:
    path = tmp_path / "rig.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | keys))
    return load_preset(str(path))


@pytest.mark.parametrize("name", CONVENTIONS)
def test_a_preset_has_the_names_that_its_convention_uses(name: str) -> None:
    preset = load_preset(name)
    camera = "CAM_BACK_LEFT"
    found = (
        preset.image_type, preset.image_topic(camera), preset.info_topic(camera), preset.ego_motion,
        preset.image_frame(camera, ""), preset.fixed_frame, preset.model_frame,
    )  # fmt: skip
    assert found == CONVENTIONS[name]
    assert preset.base_frame == "base_link"
    assert len(set(preset.image_topics() + preset.info_topics())) in (6, 12)
    assert preset.odometry == ("/nuscenes/odom" if name == "chris7462" else preset.odometry)


def test_every_preset_is_known_by_its_convention() -> None:
    assert preset_names() == sorted(CONVENTIONS)


def test_an_unknown_preset_is_answered_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no preset 'moon'; known: bevfusion_demo, chris7462, .*NAME\.yaml"
    ):
        load_preset("moon")


def test_a_remapping_file_needs_no_more_than_the_pictures(tmp_path: Path) -> None:
    preset = remapping(tmp_path)
    assert preset.image_topic("CAM_BACK") == "/rig/CAM_BACK/image"
    assert (preset.info_topics(), preset.odometry, preset.fixed_frame) == ([], "", "map")
    assert preset.name == "rig"


def test_a_remapping_file_may_name_cameras_and_single_topics(tmp_path: Path) -> None:
    infos = {camera: f"/info{i}" for i, camera in enumerate(CAMERAS)}
    preset = remapping(
        tmp_path, cameras={"CAM_FRONT": "windscreen"}, camera_info=infos, image_frame="{camera}_optical"
    )
    assert preset.image_topic("CAM_FRONT") == "/rig/windscreen/image"
    assert preset.image_topic("CAM_BACK") == "/rig/CAM_BACK/image"
    assert preset.info_topic(CAMERAS[2]) == "/info2"
    assert preset.image_frame("CAM_FRONT", "") == "windscreen_optical"
    assert preset.image_frame("CAM_FRONT", "/told") == "told"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"image": ""}, "key 'image' is missing"),
        ({"image_type": "jpeg"}, "key 'image_type' is 'jpeg'; use compressed or raw"),
        ({"image": "/front"}, r"key 'image' must hold \{camera\}"),
        ({"image": "front {camera}"}, "key 'image' holds 'front CAM_FRONT', which is no absolute topic"),
        (
            {"image": "/kamera_ä/{camera}"},
            "key 'image' holds '/kamera_ä/CAM_FRONT', which is no absolute topic",
        ),
        ({"image": {"CAM_FRONT": "/a"}}, r"key 'image\.CAM_FRONT_RIGHT' is missing"),
        ({"image": {"FRONT": "/a"}}, r"key 'image\.FRONT' is no camera"),
        ({"image": dict.fromkeys(CAMERAS, "/a")}, "key 'image' gives two cameras the same topic"),
        ({"cameras": {"CAM_FRONT": 3}}, r"key 'cameras\.CAM_FRONT' must be a name, got 3"),
        ({"cameras": {"FRONT": "a"}}, r"key 'cameras\.FRONT' is no camera"),
        ({"cameras": ["a"]}, "key 'cameras' must give each of"),
        ({"ego_motion": "wheels"}, "key 'ego_motion' is 'wheels'; use tf or odometry"),
        ({"odometry": "odom"}, "key 'odometry' holds 'odom', which is no absolute topic"),
        ({"fixed_frame": 7}, "key 'fixed_frame' must be a text, got 7"),
        ({"topics": "all"}, "unknown key 'topics'; known: image_type, image"),
    ],
)
def test_a_faulty_remapping_file_is_named_with_its_key(
    tmp_path: Path, keys: dict[str, object], text: str
) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        remapping(tmp_path, **keys)
    assert "rig.yaml: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a list", "{unclosed", "\x00"])
def test_what_is_no_mapping_is_no_remapping_file(tmp_path: Path, text: str) -> None:
    (tmp_path / "rig.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"rig\.yaml: "):
        load_preset(str(tmp_path / "rig.yaml"))
    with pytest.raises(ConfigError, match=r"no\.yaml: no such remapping file"):
        load_preset(str(tmp_path / "no.yaml"))


def test_parameters_left_empty_are_the_presets() -> None:
    filled = DetectorParameters().with_preset(load_preset("chris7462"))
    assert (filled.ego_motion, filled.model_frame, filled.base_frame) == (
        "odometry",
        "lidar_top_link",
        "base_link",
    )
    filled = DetectorParameters(model_frame="mine", ego_motion="tf").with_preset(load_preset("chris7462"))
    assert (filled.ego_motion, filled.model_frame) == ("tf", "mine")
    with pytest.raises(ConfigError, match="preset dataset_bridge names no such topic"):
        DetectorParameters(ego_motion="odometry").with_preset(load_preset("dataset_bridge"))


INTRINSICS = {"width": 640, "height": 360, "fx": 500.0, "fy": 501.0, "cx": 320.0, "cy": 180.0}
EXTRINSICS = {"x": 1.5, "y": 0.0, "z": 1.4, "qw": 0.5, "qx": -0.5, "qy": 0.5, "qz": -0.5}


def calibration(tmp_path: Path, content: object) -> RigCalibration:
    path = tmp_path / "rig.yaml"
    path.write_text(yaml.safe_dump(content))
    return load_calibration(path)


def test_a_calibration_file_may_hold_any_part(tmp_path: Path) -> None:
    rig = calibration(
        tmp_path,
        {"cameras": {"CAM_FRONT": {"intrinsics": INTRINSICS}, "CAM_BACK": {"extrinsics": EXTRINSICS}}},
    )
    known = rig.intrinsics["CAM_FRONT"]
    assert (known.width, known.height) == (640, 360)
    np.testing.assert_array_equal(known.matrix, [[500, 0, 320], [0, 501, 180], [0, 0, 1]])
    assert rig.extrinsics["CAM_BACK"].translation.tolist() == [1.5, 0.0, 1.4]
    assert rig.model is None
    assert "CAM_BACK" not in rig.intrinsics


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    pose = Pose(yaw_quaternion(0.3), np.array([1.0, 2.0, 3.0]))
    k = np.array([[700.5, 0, 300], [0, 701.5, 200], [0, 0, 1]])
    write_calibration(
        tmp_path / "r.yaml", {"CAM_BACK": CameraCalibration("CAM_BACK", k, 800, 450, pose)}, pose
    )
    rig = load_calibration(tmp_path / "r.yaml")
    np.testing.assert_array_equal(rig.intrinsics["CAM_BACK"].matrix, k)
    np.testing.assert_allclose(rig.extrinsics["CAM_BACK"].matrix(), pose.matrix(), atol=1e-12)
    assert rig.model is not None
    np.testing.assert_allclose(rig.model.matrix(), pose.matrix(), atol=1e-12)
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


@pytest.mark.parametrize(
    ("part", "change", "text"),
    [
        ("intrinsics", {"fx": None}, r"key 'cameras\.CAM_FRONT\.intrinsics\.fx' must be a number, got None"),
        ("intrinsics", {"fx": 0.0}, r"'cameras\.CAM_FRONT\.intrinsics\.fx' must be positive"),
        (
            "intrinsics",
            {"fy": float("nan")},
            r"'cameras\.CAM_FRONT\.intrinsics\.fy' must be a number, got nan",
        ),
        ("intrinsics", {"width": 640.5}, r"'cameras\.CAM_FRONT\.intrinsics\.width' must be positive \(whole"),
        ("intrinsics", {"k1": 0.1}, r"unknown key 'cameras\.CAM_FRONT\.intrinsics\.k1'"),
        ("extrinsics", {"qw": 2.0}, r"quaternion qw qx qy qz has length 2\.179"),
        ("extrinsics", {"x": True}, r"extrinsics\.x' must be a number, got True"),
    ],
)
def test_a_faulty_calibration_file_is_named_with_its_key(
    tmp_path: Path, part: str, change: dict[str, object], text: str
) -> None:
    values = (INTRINSICS if part == "intrinsics" else EXTRINSICS) | change
    with pytest.raises(ConfigError, match=text) as caught:
        calibration(tmp_path, {"cameras": {"CAM_FRONT": {part: values}}})
    assert "rig.yaml: " in str(caught.value)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([], "must be a mapping with cameras, model_frame"),
        ({"camera": {}}, "unknown key 'camera'"),
        ({"cameras": {"FRONT": {}}}, r"unknown key 'cameras\.FRONT'; known: CAM_FRONT"),
        ({"cameras": {"CAM_FRONT": 3}}, r"key 'cameras\.CAM_FRONT' must be a mapping"),
        ({"model_frame": {"x": 0}}, r"key 'model_frame\.y' must be a number"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path: Path, content: object, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        calibration(tmp_path, content)


def test_a_rig_without_camera_info_needs_a_file_with_every_cameras_intrinsics(tmp_path: Path) -> None:
    assert calibration_for(load_preset("nuscenes"), "") == RigCalibration()
    with pytest.raises(
        ConfigError, match="preset nuscenes2bag has no CameraInfo: parameter calibration must"
    ):
        calibration_for(load_preset("nuscenes2bag"), "")
    path = tmp_path / "rig.yaml"
    path.write_text(yaml.safe_dump({"cameras": {c: {"intrinsics": INTRINSICS} for c in CAMERAS[:-1]}}))
    with pytest.raises(ConfigError, match=f"intrinsics of {CAMERAS[-1]}$"):
        calibration_for(load_preset("nuscenes2bag"), str(path))


@pytest.mark.parametrize("encoding", COLOUR)
def test_colours_in_a_stated_order_are_taken(encoding: str) -> None:
    assert encoding_problem(encoding) is None


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("mono8", "has no colours"),
        ("16UC1", "has no colours"),
        ("bayer_rggb8", "debayer and rectify it first"),
        ("8UC3", "does not say the order"),
        ("yuv422_yuy2", "convert to one of bgr8, rgb8"),
    ],
)
def test_other_encodings_are_refused_with_what_to_do(encoding: str, text: str) -> None:
    assert text in (encoding_problem(encoding) or "")


@given(st.text(max_size=12))
def test_no_encoding_passes_unless_it_is_listed(encoding: str) -> None:
    assert (encoding_problem(encoding) is None) == (encoding in COLOUR)
