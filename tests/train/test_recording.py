# SPDX-License-Identifier: Apache-2.0
"""The official score of what a node answered: out of a recorded bag, matched to the samples of a data set."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.geometry import yaw_quaternion
from qdbev_ros.core.variant import CLASSES
from qdbev_train.cli import main
from qdbev_train.data.tables import load_scenes
from qdbev_train.evaluation.recording import match, read_answers
from qdbev_train.evaluation.results import result_entries
from tests.small_dataset import VERSION
from tests.truth import truth

pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")

MSG = Path(__file__).resolve().parents[2] / "msg"


def store() -> Any:
    """Jazzy's types and our own, from the .msg files."""
    types = get_typestore(Stores.ROS2_JAZZY)
    for name in ("DetectedObject", "DetectedObjectArray"):
        types.register(get_types_from_msg((MSG / f"{name}.msg").read_text(), f"qdbev_msgs/msg/{name}"))
    return types


def record(path: Path, frames: Any, delay_ns: int = 0, frame_id: str = "LIDAR_TOP") -> Path:
    """A recording in which the node answers every frame with the truth, in `frame_id`, `delay_ns` after the lidar."""
    types = store()
    t = types.types
    with Writer(path, version=8, storage_plugin=StoragePlugin.MCAP) as writer:
        kind = "qdbev_msgs/msg/DetectedObjectArray"
        connection = writer.add_connection("/qdbev_detector/objects", kind, typestore=types)
        for number, frame in enumerate(frames):
            boxes, attributes = truth(frame)
            if frame_id == "map":
                boxes = boxes.transformed(frame.lidar2global)
            stamp = frame.stamp_ns + delay_ns
            message = t[kind](
                header=t["std_msgs/msg/Header"](
                    stamp=t["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9),
                    frame_id=frame_id,
                ),
                model="truth",
                state="running",
                cameras_used=[],
                cameras_missing=[],
                missing_reasons=[],
                set_spread=0.0,
                ego_motion=True,
                memory_state="tracking",
                memory_reset_reason="",
                memory_age=0,
                memory_gap=0.0,
                objects=[_object(t, boxes, i, attributes[i]) for i in range(len(boxes))],
            )
            writer.write(connection, frames[0].stamp_ns + number, types.serialize_cdr(message, kind))
    return path


def _object(t: Any, boxes: Boxes, i: int, attribute: str) -> Any:
    def vector(x: float, y: float, z: float) -> Any:
        return t["geometry_msgs/msg/Vector3"](x=float(x), y=float(y), z=float(z))

    x, y, z = boxes.centers[i]
    w, length, h = boxes.sizes[i]
    qw, qx, qy, qz = yaw_quaternion(boxes.yaws[i])
    pose = t["geometry_msgs/msg/Pose"](
        position=t["geometry_msgs/msg/Point"](x=x, y=y, z=z),
        orientation=t["geometry_msgs/msg/Quaternion"](x=qx, y=qy, z=qz, w=qw),
    )
    return t["qdbev_msgs/msg/DetectedObject"](
        class_name=CLASSES[boxes.labels[i]],
        score=1.0,
        pose=pose,
        size=vector(length, w, h),
        velocity=vector(*boxes.velocities[i], 0.0),
        attribute=attribute,
    )


@pytest.mark.parametrize("frame_id", ["LIDAR_TOP", "map", "lidar_top_link"])
def test_a_recording_of_the_truth_scores_perfectly(
    nuscenes_root: Path, real_frames: Any, tmp_path: Path, frame_id: str
) -> None:
    bag = record(tmp_path / "bag", real_frames, frame_id=frame_id)
    arguments = [str(bag), str(nuscenes_root), "--version", "v1.0-mini", "--split", "mini_val"]
    assert main(["score", *arguments, "--json", str(tmp_path / "score.json")]) == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["mAP"] == pytest.approx(0.6)
    assert score["mATE"] == pytest.approx(0.4, abs=1e-6)
    assert score["mAVE"] == pytest.approx(0.25, abs=1e-3)
    assert score["mAAE"] == pytest.approx(0.25)
    assert score["answered"] == 41
    assert score["unanswered"] == []


def test_a_rig_with_frames_of_its_own_is_scored_with_its_remapping_file(
    small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = load_scenes(small_root, VERSION)["scene-0916"]
    bag = record(tmp_path / "bag", frames, frame_id="lidar_link")
    rig = tmp_path / "rig.yaml"
    rig.write_text('image_type: raw\nimage: "/{camera}/image"\nmodel_frame: lidar_link\n')
    arguments = ["score", str(bag), str(small_root), "--version", VERSION, "--split", "mini_val"]
    assert main(arguments) == 2
    assert "boxes in frame 'lidar_link'" in (error := capsys.readouterr().err)
    assert "--preset" in error
    assert main([*arguments, "--preset", str(rig)]) == 0
    assert main([*arguments[:1], str(record(tmp_path / "plain", frames)), *arguments[2:]]) == 0
    own, plain = capsys.readouterr().out.split(f"{tmp_path / 'plain'}: ")
    assert own.endswith(plain)
    assert "NDS" in plain


def test_boxes_are_placed_by_the_ego_pose_of_their_own_stamp(real_frames: Any, tmp_path: Path) -> None:
    """CAM_FRONT fires 35 ms before the lidar: boxes of that moment's LIDAR_TOP lie that much further back."""
    frame = real_frames[2]
    front = next(c for c in frame.cameras if c.calibration.name == "CAM_FRONT")
    answer = read_answers(record(tmp_path / "bag", [frame], front.stamp_ns - frame.stamp_ns))[1]
    entries = match(answer, {"scene-0916": real_frames}).results[frame.sample_token]
    moved = frame.ego2global.translation - front.ego2global.translation
    assert np.linalg.norm(moved) > 0.05
    expected = result_entries(frame.sample_token, answer[0].boxes, frame.lidar2ego, front.ego2global)
    np.testing.assert_allclose(entries[0]["translation"], expected[0]["translation"], atol=1e-9)


def test_unanswered_repeated_and_foreign_messages_are_told_apart(real_frames: Any, tmp_path: Path) -> None:
    """Frames 0 to 9 answered, then played again; one answer 200 ms off every sample."""
    answers = read_answers(record(tmp_path / "bag", real_frames[:10]))[1]
    stray = replace(answers[0], stamp_ns=answers[0].stamp_ns + 200_000_000)
    matched = match([*answers, stray, *answers], {"scene-0916": real_frames})
    assert len(matched.results) == 41
    assert [f.sample_token for f in matched.unanswered] == [f.sample_token for f in real_frames[10:]]
    assert (matched.repeated, matched.foreign) == (10, 1)
    assert matched.results[real_frames[20].sample_token] == []


def test_of_several_answers_for_a_sample_the_nearest_counts(real_frames: Any, tmp_path: Path) -> None:
    """A detector at 20 Hz and more: 45 ms early, on time, 20 ms late; on time once more, as in a looped bag."""
    answer = read_answers(record(tmp_path / "bag", real_frames[2:3]))[1][0]
    answers = []
    for number, late_ms in enumerate((-45, 0, 20, 0)):
        boxes = replace(answer.boxes, scores=np.full(len(answer.boxes), 0.1 * (number + 1)))
        answers.append(replace(answer, stamp_ns=answer.stamp_ns + late_ms * 10**6, boxes=boxes))
    matched = match(answers, {"scene-0916": real_frames})
    assert matched.results[real_frames[2].sample_token][0]["detection_score"] == 0.2
    assert matched.repeated == 3


def test_scenes_that_the_recording_does_not_touch_are_not_scored(small_root: Path, tmp_path: Path) -> None:
    scenes = load_scenes(small_root, VERSION)
    answers = read_answers(record(tmp_path / "bag", scenes["scene-0916"]))[1]
    assert set(match(answers, scenes).results) == {f"scene-0916-{i}" for i in range(4)}


def test_a_bag_without_answers_says_what_it_holds(
    small_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = tmp_path / "drive.mcap"
    assert main(["bag", str(small_root), "--scene", "scene-0916", str(bag)]) == 0
    arguments = [str(small_root), "--version", VERSION, "--split", "mini_val"]
    assert main(["score", str(bag), *arguments]) == 2
    error = capsys.readouterr().err
    assert "no qdbev_msgs/msg/DetectedObjectArray" in error
    assert "/CAM_FRONT/camera_info" in error
    assert main(["score", str(tmp_path / "none.mcap"), *arguments]) == 2
    (tmp_path / "text.mcap").write_text("no bag")
    assert main(["score", str(tmp_path / "text.mcap"), *arguments]) == 2
    assert "text.mcap" in capsys.readouterr().err
