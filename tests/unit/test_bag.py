# SPDX-License-Identifier: Apache-2.0
"""The bags we write, read back with rosbags: everything the node needs, exactly as in the tables."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.highlevel import AnyReader
from rosbags.interfaces import QosDurability

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import CameraCalibration, Pose
from qdbev_ros.core.pose_buffer import TransformTree
from qdbev_ros.core.projection import lidar_to_image
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import load_calibration
from qdbev_train.bags.writer import write_bag
from qdbev_train.cli import main
from qdbev_train.data.tables import load_scenes
from tests.small_dataset import SPEED, VERSION

VOLATILE = QosDurability.VOLATILE
Messages = dict[str, list[tuple[int, Any]]]


@pytest.fixture(scope="module")
def frames(small_root: Path) -> Any:
    return load_scenes(small_root, VERSION)["scene-0103"]


@pytest.fixture(scope="module")
def bag(frames: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bag") / "town.mcap"
    write_bag(frames, path)
    return path


@pytest.fixture(scope="module")
def messages(bag: Path) -> Messages:
    """topic -> [(log time, message)] in the order of the file."""
    found: Messages = {}
    with AnyReader([bag]) as reader:
        for connection, log_ns, raw in reader.messages():
            message = reader.deserialize(raw, connection.msgtype)
            found.setdefault(connection.topic, []).append((log_ns, message))
    return found


def stamp_of(message: Any) -> int:
    return message.header.stamp.sec * 10**9 + message.header.stamp.nanosec


def pose_of(transform: Any) -> Pose:
    t, q = transform.translation, transform.rotation
    return Pose(np.array([q.w, q.x, q.y, q.z]), np.array([t.x, t.y, t.z]))


def test_the_file_stands_alone(bag: Path, frames: Any) -> None:
    assert [p.name for p in bag.parent.iterdir()] == ["town.mcap"]
    with AnyReader([bag]) as reader:
        types = {c.topic: c.msgtype for c in reader.connections}
        durable = [
            c.topic for c in reader.connections if c.ext.offered_qos_profiles[0].durability is not VOLATILE
        ]
    assert types["/CAM_FRONT/image_rect_compressed"] == "sensor_msgs/msg/CompressedImage"
    assert types["/CAM_FRONT/camera_info"] == "sensor_msgs/msg/CameraInfo"
    assert types["/tf"] == types["/tf_static"] == "tf2_msgs/msg/TFMessage"
    assert types["/odom"] == "nav_msgs/msg/Odometry"
    assert types["/annotations"] == "visualization_msgs/msg/MarkerArray"
    assert len(types) == 16
    assert durable == ["/tf_static"]
    assert b"qdbev_samples" in bag.read_bytes()  # the metadata record that keeps the sample tokens


def test_pictures_are_the_files_bytes_with_the_cameras_own_stamps(messages: Messages, frames: Any) -> None:
    for camera, name in enumerate(CAMERAS):
        images = [m for _, m in messages[f"/{name}/image_rect_compressed"]]
        assert [stamp_of(m) for m in images] == [f.cameras[camera].stamp_ns for f in frames]
        assert [m.header.frame_id for m in images] == [name] * len(frames)
        assert images[0].format == "jpeg"
        assert images[0].data.tobytes() == frames[0].cameras[camera].image.read_bytes()


def test_time_of_receipt_never_goes_back_and_poses_come_before_their_pictures(
    bag: Path, messages: Messages
) -> None:
    with AnyReader([bag]) as reader:
        order = [log for _, log, _ in reader.messages()]
    assert order == sorted(order)
    pose_logs = {stamp_of(m.transforms[0]): log for log, m in messages["/tf"]}
    for log, image in messages["/CAM_BACK/image_rect_compressed"]:
        assert pose_logs[stamp_of(image)] < log


def test_what_the_node_gets_projects_as_the_tables_do(messages: Messages, frames: Any) -> None:
    """From /tf, /tf_static and camera_info alone the projections of every frame come out exactly."""
    tree = TransformTree(keep_s=100.0)
    for t in messages["/tf_static"][0][1].transforms:
        tree.set_static(t.header.frame_id, t.child_frame_id, pose_of(t.transform))
    for _, message in messages["/tf"]:
        for t in message.transforms:
            tree.insert(t.header.frame_id, t.child_frame_id, stamp_of(t), pose_of(t.transform))
    for i, frame in enumerate(frames):
        for camera in frame.cameras:
            name = camera.calibration.name
            info = messages[f"/{name}/camera_info"][i][1]
            assert stamp_of(info) == camera.stamp_ns
            sensor2ego = tree.lookup("base_link", name, camera.stamp_ns)
            calibration = CameraCalibration(name, info.k.reshape(3, 3), info.width, info.height, sensor2ego)
            matrix = lidar_to_image(
                calibration,
                tree.lookup("base_link", "LIDAR_TOP", frame.stamp_ns),
                tree.lookup("map", "base_link", camera.stamp_ns),
                tree.lookup("map", "base_link", frame.stamp_ns),
            )
            np.testing.assert_allclose(matrix, frame.lidar2img(camera), atol=1e-6)


def test_camera_info_is_that_of_a_rectified_picture(messages: Messages) -> None:
    info = messages["/CAM_FRONT/camera_info"][0][1]
    assert (info.width, info.height, info.distortion_model) == (320, 180, "plumb_bob")
    assert not info.d.any()
    np.testing.assert_array_equal(info.p.reshape(3, 4), np.hstack([info.k.reshape(3, 3), np.zeros((3, 1))]))


def test_odometry_has_the_speed_in_the_vehicles_frame(messages: Messages) -> None:
    for _, odom in messages["/odom"]:
        assert (odom.header.frame_id, odom.child_frame_id) == ("map", "base_link")
        assert odom.twist.twist.linear.x == pytest.approx(SPEED)
        assert odom.twist.twist.linear.y == pytest.approx(0.0)


def test_annotations_are_cubes_in_the_map_with_a_lasting_number_and_the_sample_token(
    messages: Messages, frames: Any
) -> None:
    delete_all, add, cube = 3, 0, 1
    numbers = set()
    for i, (log, message) in enumerate(messages["/annotations"]):
        assert log == frames[i].stamp_ns
        first, *boxes = message.markers
        assert first.action == delete_all
        assert [(m.ns, m.action, m.type) for m in boxes] == [("car", add, cube), ("pedestrian", add, cube)]
        assert {m.text for m in message.markers} == {f"scene-0103-{i}"}
        car = boxes[0]
        assert (car.scale.x, car.scale.y, car.scale.z) == (4.5, 2.0, 1.6)  # length, width, height
        assert car.header.frame_id == "map"
        assert car.pose.position.x == pytest.approx(10 + SPEED * 0.5 * i)
        numbers.add(tuple(m.id for m in boxes))
    assert len(numbers) == 1


def test_the_camera_whose_pictures_begin_a_set_is_told(bag: Path, messages: Messages) -> None:
    """The player holds the bag before it: later in a set the node would take the rest for lost."""
    topics = [f"/{camera}/image_rect_compressed" for camera in CAMERAS]
    earliest = min(topics, key=lambda topic: messages[topic][0][0])
    with BagReader(bag) as reader:
        assert reader.first_topic(topics) == earliest != topics[0]
        assert reader.first_topic(["/nothing", "/tf"]) == "/tf"
        assert reader.first_topic(["/nothing"]) == "/nothing"


def test_the_command_writes_a_bag_and_says_what_is_in_it(
    small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "deep" / "out.mcap"
    assert main(["bag", str(small_root), "--scene", "scene-0916", str(out)]) == 0
    assert "scene-0916, 4 frames" in capsys.readouterr().out
    assert out.stat().st_size > 10_000


def test_the_command_writes_the_rigs_calibration_file(small_root: Path, frames: Any, tmp_path: Path) -> None:
    arguments = ["bag", str(small_root), "--scene", "scene-0103", str(tmp_path / "out.mcap")]
    assert main([*arguments, "--calibration", str(tmp_path / "rig.yaml")]) == 0
    rig = load_calibration(tmp_path / "rig.yaml")
    for camera in frames[0].cameras:
        name = camera.calibration.name
        np.testing.assert_allclose(rig.intrinsics[name].matrix, camera.calibration.intrinsics)
        np.testing.assert_allclose(
            rig.extrinsics[name].matrix(), camera.calibration.sensor2ego.matrix(), atol=1e-12
        )
    assert rig.model is not None
    np.testing.assert_allclose(rig.model.matrix(), frames[0].lidar2ego.matrix(), atol=1e-12)


def test_a_missing_picture_is_named_and_leaves_no_half_bag(frames: Any, tmp_path: Path) -> None:
    lost = replace(frames[1].cameras[0], image=tmp_path / "lost.jpg")
    broken = replace(frames[1], cameras=(lost, *frames[1].cameras[1:]))
    out = tmp_path / "bag.mcap"
    with pytest.raises(DataError, match=r"lost\.jpg: No such file"):
        write_bag([frames[0], broken], out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["/nowhere", "--scene", "x", "out.mcap"], "/nowhere: no such folder"),
        (["ROOT", "--scene", "scene-7", "out.mcap"], "no scene 'scene-7'"),
        (["ROOT", "--scene", "scene-0916", "out.bag"], "ends in .mcap"),
    ],
)
def test_bad_input_ends_in_one_line_and_status_2(
    small_root: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bag", *[str(small_root) if a == "ROOT" else a for a in arguments]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("qdbev: error: ")
    assert named in error
    assert error.count("\n") == 1
