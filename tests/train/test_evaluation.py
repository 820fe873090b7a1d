# SPDX-License-Identifier: Apache-2.0
"""The official score: truth scores perfectly, through our conversion, through a recording, and through the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rosbags.rosbag2 import StoragePlugin, Writer
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.variant import CLASSES, load_variant
from qdbev_train.checkpoint import save_model
from qdbev_train.cli import main
from qdbev_train.data.frames import Frame
from qdbev_train.data.tables import all_frames, load_scenes
from qdbev_train.evaluation.metrics import official_score
from qdbev_train.evaluation.recording import match, read_answers
from qdbev_train.evaluation.results import CLASS_RANGE, result_entries
from qdbev_train.model import build_model
from tests.small_dataset import VERSION

pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")

MSG = Path(__file__).resolve().parents[2] / "msg"
PRESENT = ("car", "truck", "bus", "pedestrian", "motorcycle", "bicycle")  # classes that occur in scene-0916


def truth(frame: Frame) -> tuple[Boxes, tuple[str, ...]]:
    """The annotations that count, as detections: unknown velocities are 0, as nothing can be wrong about them."""
    kept = np.flatnonzero(frame.annotations.points > 0)
    boxes = frame.annotations.boxes.select(kept)
    boxes = replace(boxes, velocities=np.nan_to_num(boxes.velocities))
    return boxes, tuple(frame.annotations.attributes[i] for i in kept)


def truth_entries(frame: Frame) -> list[dict[str, Any]]:
    boxes, attributes = truth(frame)
    return result_entries(frame.sample_token, boxes, frame.lidar2ego, frame.ego2global, attributes)


def test_the_truth_of_the_real_scene_scores_perfectly(nuscenes_root: Path, real_frames: Any) -> None:
    """AP 1 and no errors for the six classes that occur; the other four count as AP 0, error 1 by the devkit's rule.

    Frames tilt a little against the horizon and yaw is an angle in their plane: hence the 0.001 rad of orientation.
    """
    results = {f.sample_token: truth_entries(f) for f in real_frames}
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", results)
    assert score.class_ap == pytest.approx({n: float(n in PRESENT) for n in CLASSES}, abs=1e-9)
    assert score.mAP == pytest.approx(0.6)
    # Cones count for neither of the last three errors, barriers not for the last two.
    expected = {"mATE": 4 / 10, "mASE": 4 / 10, "mAOE": 3 / 9, "mAVE": 2 / 8, "mAAE": 2 / 8}
    assert score.errors == pytest.approx(expected, abs=1e-3)
    assert score.nds == pytest.approx((5 * 0.6 + sum(1 - e for e in expected.values())) / 10, abs=1e-3)
    assert score.frames == 41


def test_moved_and_turned_boxes_cost_what_the_metric_says(nuscenes_root: Path, real_frames: Any) -> None:
    """0.7 m aside: lost at the 0.5 m threshold only, and mATE 0.7; half a radian: mAOE 0.5."""
    results = {}
    for frame in real_frames:
        boxes, attributes = truth(frame)
        off = replace(boxes, centers=boxes.centers + np.array([0.7, 0, 0]), yaws=boxes.yaws + 0.5)
        results[frame.sample_token] = result_entries(
            frame.sample_token, off, frame.lidar2ego, frame.ego2global, attributes
        )
    score = official_score(nuscenes_root, "v1.0-mini", "mini_val", results)
    assert score.class_ap["truck"] == pytest.approx(0.75, abs=0.03)
    assert score.errors["mATE"] == pytest.approx((6 * 0.7 + 4) / 10, abs=0.05)
    assert score.errors["mAOE"] == pytest.approx((6 * 0.5 + 3) / 9, abs=0.02)


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


def test_a_split_that_does_not_belong_to_the_version_is_refused(small_root: Path) -> None:
    frames = all_frames(load_scenes(small_root, VERSION))
    with pytest.raises(DataError, match="not compatible"):
        official_score(small_root, VERSION, "val", {f.sample_token: truth_entries(f) for f in frames})


def test_class_ranges_are_the_official_ones() -> None:
    from nuscenes.eval.common.config import config_factory

    assert config_factory("detection_cvpr_2019").class_range == CLASS_RANGE


def test_far_boxes_and_more_than_500_are_left_out() -> None:
    """A cone counts up to 30 m from the ego, a car up to 50: measured from the ego, not from the lidar."""
    centers = np.array([[0, 29.5, 0], [0, 30.5, 0], [0, 49.5, 0], [0, 50.5, 0]], np.float64)
    labels = np.array([9, 9, 0, 0])
    boxes = Boxes(
        centers, np.ones((4, 3)), np.zeros(4), np.zeros((4, 2)), np.array([0.4, 0.3, 0.2, 0.1]), labels
    )
    entries = result_entries("t", boxes, Pose.identity(), Pose.identity())
    assert [e["detection_score"] for e in entries] == [0.4, 0.2]
    lidar_ahead = Pose(np.array([1.0, 0, 0, 0]), np.array([0.0, 1.0, 0.0]))
    assert result_entries("t", boxes, lidar_ahead, Pose.identity()) == []
    many = Boxes(
        np.zeros((600, 3)),
        np.ones((600, 3)),
        np.zeros(600),
        np.zeros((600, 2)),
        np.linspace(0, 1, 600),
        np.zeros(600, int),
    )
    scores = [e["detection_score"] for e in result_entries("t", many, Pose.identity(), Pose.identity())]
    assert len(scores) == 500
    assert scores[0] == 1.0


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


# Recordings


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
                cameras_used=[],
                cameras_missing=[],
                memory_state="tracking",
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


@pytest.mark.parametrize("frame_id", ["LIDAR_TOP", "map"])
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
