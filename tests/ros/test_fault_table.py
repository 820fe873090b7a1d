# SPDX-License-Identifier: Apache-2.0
"""Every fault of the table (docs/reliability.md), put in front of a running node over DDS.

After each the node lives, its diagnostics have said what is wrong, no answer held a number that is none, and it runs
again without a restart.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core.geometry import Pose, yaw_quaternion
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.parameters import DetectorParameters
from tests.ros.drive import HEIGHT, OFFSETS_MS, WIDTH
from tests.ros.fault_rig import FaultRig, both, boxes_of, first
from tests.ros.fault_table import record
from tests.ros.graph import Graph
from tests.ros.rig import LONG_S, MS, PATIENCE_S

ERROR = bytes([2])
NODE = {"image_reliability": "reliable", "max_detections": 20, "queue_size": 10}
SYNC_DEADLINE_S = DetectorParameters().sync_deadline
SAME = {"atol": 1e-3}  # boxes of equal pictures at another time


@pytest.fixture(scope="module")
def graph_of_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Graph]:
    with Graph(tmp_path_factory.mktemp("faults")) as graph:
        yield graph


@pytest.fixture(scope="module")
def running(graph_of_all: Graph, package: Path) -> Iterator[FaultRig]:
    """One node for all faults."""
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    node = graph_of_all.node("detector_node", model=package, **NODE)
    node.wait_for("ready")
    with FaultRig(graph_of_all, node) as rig:
        yield rig
    assert node.stop() == 0
    assert "Traceback" not in node.output


@pytest.fixture
def rig(running: FaultRig) -> FaultRig:
    """The node runs, in a scene of its own."""
    running.steady()
    return running


@pytest.mark.parametrize("lost", CAMERAS)
def test_a_lost_camera(rig: FaultRig, lost: str) -> None:
    rig.suffer(
        f"camera lost: {lost}",
        rig.says("degraded", f"camera {lost}: no picture in time"),
        lambda: rig.step(without=[lost]),
    )


def test_three_cameras_lost_at_once_cost_no_set(rig: FaultRig) -> None:
    sent: list[int] = []
    rig.suffer(
        "three cameras lost at once",
        rig.says("degraded", f"camera {CAMERAS[4]}: no picture in time"),
        lambda: sent.append(rig.step(without=CAMERAS[3:])),
    )
    assert set(sent) <= set(rig.answers)


def test_late_pictures_cost_their_camera(rig: FaultRig) -> None:
    """CAM_BACK's pictures come when their set is decided."""

    def do() -> None:
        stamp = rig.step(without=["CAM_BACK"])
        rig.until(lambda: stamp in rig.answers, "no answer without the late camera")
        rig.send_camera("CAM_BACK", stamp + OFFSETS_MS["CAM_BACK"] * MS)

    told = both(rig.says("degraded", "camera CAM_BACK"), rig.counts("pictures_dropped.late"))
    rig.suffer("pictures late", told, do)


def test_duplicated_pictures_are_harmless(rig: FaultRig) -> None:
    told = both(rig.counts("pictures_dropped.duplicate", "sets_answered"), rig.says("running", ""))
    rig.suffer("pictures duplicated", told, lambda: rig.step(edit=lambda *_: 2))


def test_reordered_pictures_still_make_their_sets(rig: FaultRig) -> None:
    def do() -> None:
        """CAM_BACK's picture of the next set comes before this set."""
        started, following = time.monotonic(), rig.now_ns + 200 * MS
        rig.move(following)
        rig.send_camera("CAM_BACK", following + OFFSETS_MS["CAM_BACK"] * MS)
        stamps = [rig.send(period_s=0.1), rig.send(period_s=0.1, without=["CAM_BACK"])]
        rig.pace(started, stamps[-1])
        rig.until(lambda: all(stamp in rig.answers for stamp in stamps), "a set is lost")

    told = both(rig.counts("pictures_reordered"), rig.says("running", ""))
    rig.suffer("pictures reordered", told, do)


def test_a_corrupt_jpeg_costs_its_camera(rig: FaultRig) -> None:
    rig.suffer(
        "corrupt JPEG",
        rig.camera_says("CAM_BACK", ERROR, "no JPEG or PNG picture"),
        lambda: rig.step(pictures={"CAM_BACK": rig.jpeg[:200]}),
    )


def test_a_picture_of_the_wrong_size_costs_its_camera(rig: FaultRig) -> None:
    ok, data = cv2.imencode(".jpg", np.zeros((HEIGHT // 2, WIDTH // 2, 3), np.uint8))
    assert ok
    rig.suffer(
        "wrong size",
        rig.camera_says("CAM_BACK", ERROR, f"its CameraInfo says {WIDTH}x{HEIGHT}"),
        lambda: rig.step(pictures={"CAM_BACK": data.tobytes()}),
    )


@pytest.mark.parametrize(
    ("name", "focal", "text"), [("zeros", 0.0, "must be positive"), ("NaN", float("nan"), "NaN")]
)
def test_a_k_that_cannot_project_costs_its_camera(rig: FaultRig, name: str, focal: float, text: str) -> None:
    told = rig.camera_says("CAM_FRONT", ERROR, text)
    rig.suffer(f"K of {name}", told, lambda: rig.step(focal={"CAM_FRONT": focal}))


def test_a_k_without_a_last_row_costs_its_camera(rig: FaultRig) -> None:
    """It would divide by a depth of 0."""

    def spoilt(camera: str, info: Any, image: Any) -> int:
        if camera == "CAM_FRONT":
            info.k[8] = 0.0
        return 1

    told = rig.camera_says("CAM_FRONT", ERROR, "K is no camera matrix, its last row is 0 0 0")
    rig.suffer("K without a last row", told, lambda: rig.step(edit=spoilt))


def test_a_frame_without_a_transform_costs_its_camera_until_the_transform_comes(rig: FaultRig) -> None:
    def renamed(camera: str, info: Any, image: Any) -> int:
        if camera == "CAM_BACK":
            info.header.frame_id = image.header.frame_id = "new_mount"
        return 1

    told = rig.says("degraded", "no transform names 'new_mount'")
    text, seconds = rig.told(told, lambda: rig.step(edit=renamed))
    rig.mount({}, {"CAM_BACK": "new_mount"})
    back = rig.mended(edit=renamed)
    record(
        "camera frame without a transform", text, seconds, f"running {back:.1f} s after the transform came"
    )


def test_without_ego_motion_nothing_is_remembered(rig: FaultRig) -> None:
    rig.suffer("no ego motion", rig.says("degraded", "no ego motion"), lambda: rig.step(tf=False))


def test_an_absurd_transform_is_counted_and_costs_nothing(rig: FaultRig) -> None:
    """Finite, so it is a transform; but a sum of two such is no number."""

    def do() -> None:
        rig.send_transform("base_link", "CAM_BACK", Pose(yaw_quaternion(0.8), np.array([1.7e308] * 3)))
        rig.step()

    told = both(rig.counts("inputs_refused.tf", "sets_answered"), rig.says("running", ""))
    rig.suffer("transform of 1.7e308 m", told, do)


def test_transforms_that_come_after_the_pictures_are_waited_for(rig: FaultRig) -> None:
    def do() -> None:
        started, stamp = time.monotonic(), rig.send(period_s=0.1, tf=False)
        while time.monotonic() < started + 0.1:
            rig.spin()
        rig.move(rig.now_ns)
        rig.pace(started, stamp)
        rig.until(lambda: stamp in rig.answers, "the set is lost")

    told = both(rig.counts("sets_answered"), rig.says("running", ""))
    rig.suffer("transforms after the pictures", told, do)


def test_a_calibration_that_changes_in_flight_resets_the_memory(rig: FaultRig) -> None:
    told = rig.counts("memory_resets.calibration_change")
    do = first(lambda: rig.mount({"CAM_FRONT": 0.5}), rig.step)
    rig.suffer("calibration changed in flight", told, do)
    rig.mount({})


@pytest.mark.parametrize(
    ("fault", "how", "resets"),
    [
        ("stamps from the future", {"offset_s": 3600.0}, ("gap", "time_back")),
        ("clock going back", {"period_s": -30.0}, ("time_back",)),
        ("vehicle teleported", {"jump_m": 500.0}, ("ego_jump",)),
    ],
)
def test_a_past_that_does_not_fit_leaves_no_box(
    rig: FaultRig, fault: str, how: dict[str, float], resets: tuple[str, ...]
) -> None:
    """The first answer afterwards is that of a node without a past, to the number."""
    alone = rig.fresh()
    rig.steady()
    stamps: list[int] = []
    stays = {"jump_m": how["jump_m"]} if "jump_m" in how else {}
    told = rig.counts(*(f"memory_resets.{reason}" for reason in resets))
    do = first(lambda: stamps.append(rig.step(**how)), lambda: rig.step(**stays))
    rig.suffer(fault, told, do, **stays)
    answer = rig.answer(stamps[0])
    assert (answer.memory_state, answer.memory_age) == ("reset", 0)
    np.testing.assert_allclose(boxes_of(answer), alone, **SAME)


def test_one_cameras_clock_in_the_future_costs_that_camera(rig: FaultRig) -> None:
    def ahead(camera: str, info: Any, image: Any) -> int:
        if camera == "CAM_BACK":
            info.header.stamp.sec += 3600
            image.header.stamp.sec += 3600
        return 1

    told = rig.says("degraded", "camera CAM_BACK: no picture in time")
    rig.suffer("one camera's clock in the future", told, lambda: rig.step(edit=ahead))


def test_a_bag_looped_a_hundred_times_leaves_no_box(rig: FaultRig) -> None:
    """Two sets, again and again with the same stamps: each pass begins like a node without a past."""
    alone, begin = rig.fresh(), rig.now_ns + 100_000_000_000
    resets = int(rig.values().get("memory_resets.time_back", 0))
    assert rig.set_parameter(
        "sync_deadline", LONG_S
    ).successful  # a busy machine may take its time to send a set
    started = time.monotonic()
    for _ in range(100):
        rig.now_ns, rig.answers = begin, {}
        answer = rig.ask(period_s=1.0)
        assert answer.memory_age == 0
        np.testing.assert_allclose(boxes_of(answer), alone, **SAME)
        second = rig.ask(period_s=0.5)
        assert second.memory_age == 1
    assert not np.allclose(boxes_of(second), alone, **SAME), "a past makes no difference: this test is blind"
    seconds = time.monotonic() - started
    assert rig.set_parameter("sync_deadline", SYNC_DEADLINE_S).successful
    said = both(rig.says("running", ""), rig.counts("sets_answered"))
    text, told_s = rig.told(said, rig.step)
    counted = int(rig.values()["memory_resets.time_back"]) - resets
    assert counted >= 99
    record(
        "bag looped 100 times",
        f"memory_resets.time_back {counted}; {text.split(';')[0]}",
        told_s,
        f"200 of 200 sets answered in {seconds:.0f} s; the first of each pass as without a past",
    )


def test_a_peer_that_is_killed_while_it_sends_is_a_lost_camera(rig: FaultRig, graph_of_all: Graph) -> None:
    told = rig.says("degraded", "camera CAM_BACK: no picture in time")
    for _ in range(3):
        peer = graph_of_all.start("tests.ros.peer", "CAM_BACK")
        peer.wait_for("ready")
        heard = int(rig.values("CAM_BACK")["pictures"])
        rig.mended(without=["CAM_BACK"])
        assert int(rig.values("CAM_BACK")["pictures"]) > heard
        peer.process.kill()
        peer.wait()
        text, seconds = rig.told(told, lambda: rig.step(without=["CAM_BACK"]))
    back = rig.mended()
    record("DDS peer killed while it sends", text, seconds, f"running {back:.1f} s after another one sends")


def test_the_rate_that_a_subscriber_sees_is_the_one_in_diagnostics(rig: FaultRig) -> None:
    """Over the last 30 answers, which are of the last 30 pictures of each camera."""

    def agree() -> bool:
        claims = [float(rig.values(camera)["rate_hz"]) for camera in ("", *CAMERAS)]
        return claims == pytest.approx([rig.heard_hz()] * len(claims), rel=0.05)

    started = time.monotonic()
    while not agree():
        assert time.monotonic() < started + PATIENCE_S, f"heard {rig.heard_hz()} Hz: {rig.statuses}"
        rig.step()
