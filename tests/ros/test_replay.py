# SPDX-License-Identifier: Apache-2.0
"""The main job through real processes and DDS: a bag in, boxes out, the same as without ROS."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.pipeline import CameraFrame, Frame, Pipeline
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.engine import load_package
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.diagnostics import PIPELINE
from qdbev_ros.ros.recording import read_detections, read_status, stamp_ns
from tests.ros.drive import LIDAR2EGO, PERIOD_NS, START_NS, drive
from tests.ros.graph import Graph

NODE = "/qdbev_detector"
STAMPS = [START_NS + i * PERIOD_NS for i in range(4)]


@pytest.fixture(scope="module")
def recording(package: Path, short_bag: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the node answered to the short bag, started as users without `ros2 launch` start it."""
    folder = tmp_path_factory.mktemp("replay")
    out, params = folder / "answers.mcap", folder / "params.yaml"
    # Noise gives low scores only; markers are wanted all the same.
    params.write_text("qdbev_detector: {ros__parameters: {display_threshold: 0.0, queue_size: 10}}")
    arguments = (f"model:={package}", f"bag:={short_bag}", f"record:={out}", f"params:={params}")
    with Graph(folder) as graph:
        run = graph.start("qdbev_ros.bringup", *arguments)
        assert run.wait() == 0, run.output
    return out


@pytest.fixture(scope="module")
def messages(recording: Path) -> dict[str, list[Any]]:
    """topic -> messages of the recording."""
    with BagReader(recording) as bag:
        found: dict[str, list[Any]] = {topic: [] for topic in bag.types}
        for topic, _, message in bag.messages(list(bag.types)):
            found[topic].append(message)
    return found


def test_every_set_is_answered_once_with_the_stamp_and_frame_of_the_set(
    messages: dict[str, list[Any]],
) -> None:
    detections = messages[f"{NODE}/detections"]
    assert [stamp_ns(m.header) for m in detections] == STAMPS
    assert {m.header.frame_id for m in detections} == {"LIDAR_TOP"}


def test_boxes_are_sound(messages: dict[str, list[Any]]) -> None:
    boxes = [d for message in messages[f"{NODE}/detections"] for d in message.detections]
    assert boxes
    for box in boxes:
        assert box.header.frame_id == "LIDAR_TOP"
        hypothesis = box.results[0].hypothesis
        assert hypothesis.class_id in CLASSES
        assert 0 <= hypothesis.score <= 1
        size, center = box.bbox.size, box.bbox.center.position
        assert min(size.x, size.y, size.z) > 0
        assert all(math.isfinite(v) for v in (center.x, center.y, center.z, size.x, size.y, size.z))
    for message in messages[f"{NODE}/detections"]:
        scores = [d.results[0].hypothesis.score for d in message.detections]
        assert scores == sorted(scores, reverse=True)


def test_online_equals_offline(recording: Path, package: Path, tmp_path: Path) -> None:
    """The same pictures through the same pipeline without ROS give the same boxes, memory included."""
    with BagReader(recording) as bag:
        online = read_detections(bag, "qdbev_detector")
    pipeline = Pipeline(load_package(package))
    for frame in drive(tmp_path, 4):
        cameras = {
            c.calibration.name: CameraFrame(c.read(), c.calibration, c.ego2global) for c in frame.cameras
        }
        offline = pipeline.run(Frame(frame.stamp_ns, cameras, frame.ego2global, LIDAR2EGO)).boxes
        boxes = online[frame.stamp_ns]
        assert len(boxes) == len(offline)
        np.testing.assert_allclose(boxes.scores, offline.scores, atol=1e-4)
        np.testing.assert_allclose(boxes.centers[:20], offline.centers[:20], atol=1e-2)
        np.testing.assert_allclose(boxes.sizes[:20], offline.sizes[:20], atol=1e-2)
        np.testing.assert_array_equal(boxes.labels[:20], offline.labels[:20])
    pipeline.close()


def test_objects_tell_velocity_cameras_and_memory(messages: dict[str, list[Any]]) -> None:
    if f"{NODE}/objects" not in messages:
        pytest.skip("qdbev_msgs is not installed")
    objects, detections = messages[f"{NODE}/objects"], messages[f"{NODE}/detections"]
    assert [m.memory_state for m in objects] == ["empty", "tracking", "tracking", "tracking"]
    assert [m.memory_age for m in objects] == [0, 1, 2, 3]
    assert [m.memory_gap for m in objects] == pytest.approx([0, 0.5, 0.5, 0.5])
    for message, twin in zip(objects, detections, strict=True):
        assert message.cameras_used == list(CAMERAS)
        assert message.cameras_missing == []
        assert len(message.objects) == len(twin.detections)
        assert all(math.isfinite(o.velocity.x) and math.isfinite(o.velocity.y) for o in message.objects)


def test_markers_have_stable_ids_and_outlive_the_period(messages: dict[str, list[Any]]) -> None:
    shown: set[tuple[str, int]] = set()
    assert all(len(message.markers) >= 4 for message in messages[f"{NODE}/markers"])
    for message in messages[f"{NODE}/markers"]:
        keys = [(m.ns, m.id) for m in message.markers]
        assert len(keys) == len(set(keys))
        added = {(m.ns, m.id) for m in message.markers if m.action == 0}
        deleted = {(m.ns, m.id) for m in message.markers if m.action == 2}
        assert shown - added <= deleted, "what vanished must be deleted"
        shown = added
        for marker in message.markers:
            if marker.action == 0:
                assert marker.lifetime.sec + marker.lifetime.nanosec * 1e-9 > 0.5
                assert marker.header.frame_id == "LIDAR_TOP"


def test_diagnostics_account_for_every_set_and_stage(recording: Path) -> None:
    with BagReader(recording) as bag:
        status = read_status(bag, PIPELINE)
        camera = read_status(bag, "qdbev_detector: camera CAM_BACK")
    assert status["sets_complete"] == status["sets_answered"] == "4"
    assert not [
        key for key in status if key.startswith(("sets_dropped", "pictures_dropped", "memory_resets"))
    ]
    assert float(status["set_spread_ms"]) == pytest.approx(42.0)
    for stage in ("decode", "preprocess", "engine", "postprocess", "publish", "wait", "total"):
        assert 0 <= float(status[f"latency_ms.{stage}.p50"]) <= float(status[f"latency_ms.{stage}.p99"])
    assert camera["pictures"] == "4"
    assert camera["topic"] == "/CAM_BACK/image_rect_compressed"
    assert len(status["package_sha256"]) == 64


def test_the_recording_holds_what_it_takes_to_judge_it(recording: Path, short_bag: Path) -> None:
    with BagReader(recording) as answers, BagReader(short_bag) as bag:
        for topic in ("/tf", "/tf_static", "/annotations", "/CAM_FRONT/camera_info"):
            expected = Counter(t for t, _, _ in bag.raw([topic]))
            assert Counter(t for t, _, _ in answers.raw([topic])) == expected
