# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear line that names the culprit; where the node can live on, it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.calibration_file import write_calibration
from qdbev_ros.ros.diagnostics import CAMERA, PIPELINE
from qdbev_ros.ros.recording import read_detections, read_status, stamp_ns
from tests.ros.drive import PERIOD_NS, START_NS, drive, edit_bag
from tests.ros.graph import Graph

STAMPS = [START_NS + i * PERIOD_NS for i in range(4)]
Edit = Callable[[str, Any], Any]


def answers_to(graph: Graph, package: Path, bag: Path, out: Path, camera: str, *more: str) -> tuple[Any, ...]:
    """(answered stamps, pipeline's status, the camera's status, everything printed) of a replay that must not fail."""
    run = graph.start(
        "qdbev_ros.bringup", f"model:={package}", f"bag:={bag}", f"record:={out}", "queue_size:=4", *more
    )
    assert run.wait() == 0, run.output
    with BagReader(out) as recording:
        stamps = sorted(read_detections(recording, "qdbev_detector"))
        return stamps, read_status(recording, PIPELINE), read_status(recording, CAMERA + camera), run.output


def one_line(text: str, name: str) -> str:
    """The single line of `name` that says error."""
    lines = [line for line in text.splitlines() if line.startswith(f"{name}: error:")]
    assert len(lines) == 1, text
    assert "Traceback" not in text
    return lines[0]


def test_a_camera_info_of_zeros_costs_its_camera(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    def spoil(topic: str, message: Any) -> Any:
        if topic == "/CAM_FRONT/camera_info":
            message.k, message.p = np.zeros(9), np.zeros(12)
        return message

    bag = edit_bag(short_bag, tmp_path / "bad.mcap", spoil)
    stamps, status, camera, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_FRONT")
    assert stamps == STAMPS
    assert status["sets_degraded"] == camera["sets_without"] == "4"
    assert "/CAM_FRONT/camera_info cannot be used" in output


def test_a_set_waits_for_the_first_camera_info(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    """Topics are not ordered among each other: a camera's first picture may overtake its CameraInfo."""

    def lose(topic: str, message: Any) -> Any:
        lost = topic == "/CAM_FRONT/camera_info" and stamp_ns(message.header) < STAMPS[0]
        return None if lost else message  # that of the first set: CAM_FRONT is 35 ms early

    bag = edit_bag(short_bag, tmp_path / "late.mcap", lose)
    stamps, _, _, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_FRONT")
    assert stamps == STAMPS
    assert "set dropped" not in output


def test_a_damaged_picture_costs_its_camera_in_its_set_only(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    def spoil(topic: str, message: Any) -> Any:
        second = STAMPS[1] - 10_000_000  # CAM_BACK is 10 ms early
        if topic == "/CAM_BACK/image_rect_compressed" and stamp_ns(message.header) == second:
            message.data = message.data[:40]
        return message

    bag = edit_bag(short_bag, tmp_path / "bad.mcap", spoil)
    stamps, status, camera, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_BACK")
    assert stamps == STAMPS
    assert status["sets_degraded"] == camera["picture_errors"] == "1"
    assert "/CAM_BACK/image_rect_compressed: camera CAM_BACK: 40 bytes that are no" in output


def test_a_picture_of_another_size_than_its_calibration(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    def spoil(topic: str, message: Any) -> Any:
        if topic == "/CAM_BACK/camera_info":
            message.width, message.height = 800, 450
        return message

    bag = edit_bag(short_bag, tmp_path / "bad.mcap", spoil)
    stamps, _, camera, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_BACK")
    assert stamps == STAMPS
    assert camera["picture_errors"] == camera["sets_without"] == "4"
    assert "its CameraInfo says 800x450" in output


def test_a_camera_frame_that_no_transform_names(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    def spoil(topic: str, message: Any) -> Any:
        if topic == "/tf_static":
            message.transforms = [t for t in message.transforms if t.child_frame_id != "CAM_BACK_LEFT"]
        return message

    bag = edit_bag(short_bag, tmp_path / "bad.mcap", spoil)
    stamps, status, camera, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_BACK_LEFT")
    assert stamps == STAMPS
    assert status["sets_degraded"] == camera["sets_without"] == "4"
    assert "no transform names 'CAM_BACK_LEFT'" in output


def test_a_camera_that_loses_pictures(graph: Graph, package: Path, short_bag: Path, tmp_path: Path) -> None:
    def lose(topic: str, message: Any) -> Any:
        lost = topic == "/CAM_FRONT/image_rect_compressed" and message.header.stamp.nanosec > 900_000_000
        return None if lost else message  # those of the first and the third set

    bag = edit_bag(short_bag, tmp_path / "bad.mcap", lose)
    stamps, status, _, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_FRONT")
    assert stamps == STAMPS
    assert status["sets_incomplete"] == status["sets_degraded"] == "2"
    assert "/CAM_FRONT/image_rect_compressed: no picture in time" in output


def test_a_missing_bag(graph: Graph, package: Path) -> None:
    player = graph.node("bag_player_node", bag="nowhere.mcap")
    assert player.wait() == 2
    assert "nowhere.mcap doesn't exist" in one_line(player.output, "bag_player_node")
    bringup = graph.start("qdbev_ros.bringup", f"model:={package}", "bag:=nowhere.mcap")
    assert bringup.wait() == 2
    assert "nowhere.mcap doesn't exist" in one_line(bringup.output, "bringup")


def test_a_bag_of_five_cameras_is_played_and_answered(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    bag = edit_bag(
        short_bag, tmp_path / "five.mcap", lambda topic, m: None if topic.startswith("/CAM_FRONT/") else m
    )
    stamps, status, _, output = answers_to(graph, package, bag, tmp_path / "out.mcap", "CAM_FRONT")
    assert stamps == STAMPS
    assert status["sets_degraded"] == "4"
    (line,) = (line for line in output.splitlines() if " lacks " in line)
    assert "/CAM_FRONT/image_rect_compressed, /CAM_FRONT/camera_info" in line


def test_a_bag_without_camera_info_is_answered_with_a_calibration_file(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    (frame,) = drive(tmp_path, 1)
    cameras = {camera.calibration.name: camera.calibration for camera in frame.cameras}
    write_calibration(tmp_path / "rig.yaml", cameras, frame.lidar2ego)
    bag = edit_bag(short_bag, tmp_path / "bare.mcap", lambda t, m: None if t.endswith("camera_info") else m)
    stamps, status, _, output = answers_to(
        graph, package, bag, tmp_path / "out.mcap", "CAM_FRONT", f"calibration:={tmp_path / 'rig.yaml'}"
    )
    assert stamps == STAMPS
    assert status["sets_degraded"] == "0"
    assert len([line for line in output.splitlines() if " lacks " in line]) == 1


def test_a_bag_without_any_picture_is_refused(graph: Graph, short_bag: Path, tmp_path: Path) -> None:
    bag = edit_bag(short_bag, tmp_path / "blind.mcap", lambda t, m: None if "image" in t else m)
    player = graph.node("bag_player_node", bag=bag)
    assert player.wait() == 2
    line = one_line(player.output, "bag_player_node")
    assert f"{bag} lacks /CAM_FRONT/image_rect_compressed, " in line
    assert "it holds /CAM_BACK/camera_info, " in line


def test_a_file_that_is_no_bag(graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "text.mcap").write_text("no bag at all")
    player = graph.node("bag_player_node", bag=tmp_path / "text.mcap")
    assert player.wait() == 2
    assert "text.mcap cannot be read" in one_line(player.output, "bag_player_node")


def test_a_missing_and_a_damaged_model(graph: Graph, package: Path, tmp_path: Path) -> None:
    missing = graph.node("detector_node", model="nowhere.qdbev")
    assert missing.wait() == 2
    assert "nowhere.qdbev" in one_line(missing.output, "detector_node")
    damaged = tmp_path / "damaged.qdbev"
    data = bytearray(package.read_bytes())
    data[len(data) // 2] ^= 0xFF
    damaged.write_bytes(data)
    node = graph.node("detector_node", model=damaged)
    assert node.wait() == 2
    assert "damaged.qdbev" in one_line(node.output, "detector_node")


@pytest.mark.parametrize(
    ("parameter", "value"), [("max_gap", "-1.0"), ("preset", "moon"), ("ego_motion", "luck"), ("model", "''")]
)
def test_parameters_that_cannot_work_are_named(
    graph: Graph, package: Path, parameter: str, value: str
) -> None:
    node = graph.node("detector_node", **{"model": package, parameter: value})
    assert node.wait() == 2
    assert value.strip("'") in one_line(node.output, "detector_node")
