# SPDX-License-Identifier: Apache-2.0
"""The doctor without bags: rigs of every shape are good, faults of every size are named, nothing makes it fail."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qdbev_ros.bringup import ARGUMENTS
from qdbev_ros.core.doctor import (
    CameraSeen,
    Drive,
    InfoSeen,
    Look,
    OdometrySeen,
    PictureSeen,
    TransformSeen,
    diagnose,
)
from qdbev_ros.core.doctor.transforms import DIRECTIONS
from qdbev_ros.core.geometry import Pose, quaternion_multiply, yaw_quaternion
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.presets import preset_names

ROOT = Path(__file__).resolve().parents[2]
START = 1_700_000_000 * 10**9
OPTICAL = np.array([0.5, -0.5, 0.5, -0.5])
reproducible = settings(derandomize=True, deadline=None, max_examples=30, database=None)


def optical(yaw_degrees: float, pitch_degrees: float = 0.0) -> Pose:
    """A camera that looks `yaw` to the left of ahead and `pitch` down."""
    half = np.radians(pitch_degrees) / 2
    pitch = np.array([np.cos(half), 0.0, np.sin(half), 0.0])
    rotation = quaternion_multiply(
        yaw_quaternion(np.radians(yaw_degrees)), quaternion_multiply(pitch, OPTICAL)
    )
    return Pose(rotation, np.array([1.0, 0.2, 1.5]))


def rig(
    rate: float = 10.0, sets: int = 12, width: int = 1600, height: int = 900, focal: float = 0.8,
    yaw: float = 0.0, pitch: float = 0.0, transport: float = 0.03, jitter_ms: float = 0.0, seed: int = 0,
) -> Drive:  # fmt: skip
    """A good drive; stamps of exposure are regular, receipt scatters."""
    rng = np.random.default_rng(seed)
    fx = focal * width
    k = (fx, 0.0, width * 0.51, 0.0, fx, height * 0.53, 0.0, 0.0, 1.0)
    p = (*k[:3], 0.0, *k[3:6], 0.0, *k[6:], 0.0)
    look = Look(width, height, 0.5, 0.05, 0.2, False)
    cameras, transforms = {}, []
    for index, name in enumerate(CAMERAS):
        camera = cameras[name] = CameraSeen(name, f"/{name}/image_rect", f"/{name}/camera_info", name)
        camera.infos.append(InfoSeen(width, height, k, p, (0.0,) * 5))
        for i in range(sets):
            stamp = START + round((i / rate + index * 0.005) * 1e9)
            received = stamp + round((transport + rng.uniform(0, jitter_ms * 1e-3)) * 1e9)
            camera.pictures.append(PictureSeen(stamp, received, name, look=look))
        transforms.append(
            TransformSeen("base_link", name, 0, START, optical(DIRECTIONS[name] + yaw, pitch), True)
        )
    lidar = Pose(yaw_quaternion(-np.pi / 2), np.array([0.9, 0.0, 1.8]))
    transforms.append(TransformSeen("base_link", "LIDAR_TOP", 0, START, lidar, True))
    length = sets / rate + 0.1
    for t in np.arange(-0.1, length, 0.05):
        stamp = START + round(t * 1e9)
        here = Pose(yaw_quaternion(0.1 * t), np.array([500 + 8 * t, 900.0, 0.0]))
        transforms.append(TransformSeen("map", "base_link", stamp, stamp + 5_000_000, here, False))
    return Drive(cameras, transforms)


def codes(drive: Drive) -> set[str]:
    return {finding.code for finding in diagnose(drive).findings}


def edit_infos(drive: Drive, camera: str, **fields: object) -> Drive:
    seen = drive.cameras[camera]
    seen.infos = [replace(info, **fields) for info in seen.infos]  # type: ignore[arg-type]
    return drive


def edit_pose(drive: Drive, child: str, pose: Pose | None) -> Drive:
    drive.transforms = [replace(t, pose=pose) if t.child == child else t for t in drive.transforms]
    return drive


@reproducible
@given(
    rate=st.floats(1.0, 40.0),
    size=st.sampled_from([(320, 180), (640, 480), (1600, 900), (2880, 1860)]),
    focal=st.floats(0.4, 2.0),
    yaw=st.floats(-20, 20),
    pitch=st.floats(-15, 15),
    transport=st.floats(0.0, 0.08),
    jitter_ms=st.floats(0.0, 50.0),
)
def test_good_rigs_of_every_shape_are_good(
    rate: float,
    size: tuple[int, int],
    focal: float,
    yaw: float,
    pitch: float,
    transport: float,
    jitter_ms: float,
) -> None:
    drive = rig(rate, 12, *size, focal, yaw, pitch, transport, jitter_ms)
    assert diagnose(drive).findings == ()


@reproducible
@given(camera=st.sampled_from(CAMERAS), factor=st.one_of(st.floats(0.2, 0.8), st.floats(1.25, 4.0)))
def test_a_k_of_any_other_resolution_is_named(camera: str, factor: float) -> None:
    drive = rig()
    info = drive.cameras[camera].infos[0]
    k = (*(v * factor for v in info.k[:6]), *info.k[6:])
    p = (*(v * factor for v in info.p[:8]), *info.p[8:])
    found = diagnose(edit_infos(drive, camera, k=k, p=p)).findings
    assert ("info-resolution", camera) in {(f.code, f.where) for f in found}


@reproducible
@given(
    camera=st.sampled_from(CAMERAS), index=st.integers(0, 8), value=st.sampled_from([np.nan, np.inf, -np.inf])
)
def test_one_number_that_is_none_is_enough(camera: str, index: int, value: float) -> None:
    drive = rig()
    k = list(drive.cameras[camera].infos[0].k)
    k[index] = value
    assert codes(edit_infos(drive, camera, k=tuple(k))) == {"info-not-finite"}


@reproducible
@given(camera=st.sampled_from(CAMERAS), yaw=st.floats(-180, 180))
def test_body_axes_are_named_whatever_the_direction(camera: str, yaw: float) -> None:
    body = Pose(yaw_quaternion(np.radians(yaw)), np.array([1.0, 0.0, 1.5]))
    findings = diagnose(edit_pose(rig(), camera, body)).findings
    assert [(f.code, f.where) for f in findings] == [("tf-camera-axes", camera)]
    assert "axes of a body" in findings[0].text


@reproducible
@given(camera=st.sampled_from(CAMERAS), turn=st.floats(75, 285))
def test_a_camera_that_looks_elsewhere_is_named(camera: str, turn: float) -> None:
    findings = diagnose(edit_pose(rig(), camera, optical(DIRECTIONS[camera] + turn))).findings
    assert [(f.code, f.where) for f in findings] == [("tf-camera-direction", camera)]


@pytest.mark.parametrize(
    ("rotation", "text"),
    [
        ((0.5, 0.5, 0.5, 0.5), "upside down"),
        ((0.7071, 0.0, 0.7071, 0.0), "rolled onto its side"),
        ((0.0, 0.7071, -0.7071, 0.0), "looks up or down"),
    ],
)
def test_other_turned_axes_are_told_apart(rotation: tuple[float, ...], text: str) -> None:
    findings = diagnose(edit_pose(rig(), "CAM_FRONT", Pose(np.array(rotation), np.zeros(3)))).findings
    assert [f.code for f in findings] == ["tf-camera-axes"]
    assert text in findings[0].text


@reproducible
@given(offset=st.floats(0.1, 1e6))
def test_clocks_ahead_are_named_with_the_offset(offset: float) -> None:
    drive = rig()
    for camera in drive.cameras.values():
        camera.pictures = [
            replace(p, received_ns=p.received_ns - round((offset + 0.03) * 1e9)) for p in camera.pictures
        ]
    findings = [f for f in diagnose(drive).findings if f.code == "stamp-future"]
    assert len(findings) == 6
    assert f"{offset:.3f} s ahead" in findings[0].text


@reproducible
@given(camera=st.sampled_from(CAMERAS), late=st.floats(0.03, 0.05), rate=st.sampled_from([2.0, 5.0]))
@example(camera="CAM_FRONT", late=0.046875, rate=5.0)  # half a period
def test_a_camera_out_of_step_is_named(camera: str, late: float, rate: float) -> None:
    """Beyond the 60 ms that a set may span, counting the 25 ms that the good rig has."""
    drive = rig(rate)
    shift = round((late + 0.06) * 1e9)
    seen = drive.cameras[camera]
    seen.pictures = [
        replace(p, stamp_ns=p.stamp_ns + shift, received_ns=p.received_ns + shift) for p in seen.pictures
    ]
    findings = [f for f in diagnose(drive).findings if f.code == "spread"]
    assert [f.where for f in findings] == [camera]


@reproducible
@given(every=st.integers(2, 4), camera=st.sampled_from(CAMERAS))
def test_a_slower_camera_is_named_and_no_spread_blamed_on_it(every: int, camera: str) -> None:
    drive = rig(sets=24)
    drive.cameras[camera].pictures = drive.cameras[camera].pictures[::every]
    assert [(f.code, f.where) for f in diagnose(drive).findings] == [("rate-differs", camera)]


@reproducible
@given(missing=st.sets(st.sampled_from(CAMERAS), min_size=1, max_size=6))
def test_every_missing_camera_is_named(missing: set[str]) -> None:
    drive = rig()
    for name in missing:
        drive.cameras[name].pictures = []
    found = diagnose(drive).findings
    assert {f.where for f in found if f.code == "camera-missing"} == missing
    assert {f.code for f in found} == {"camera-missing"}


def odometry(frame: str = "base_link") -> list[OdometrySeen]:
    """Two seconds, steadily."""
    return [OdometrySeen(START + i * 50_000_000, START + i * 50_000_000, frame) for i in range(-2, 40)]


def test_odometry_of_a_frame_without_a_transform_to_the_vehicle_is_named() -> None:
    drive = rig()
    drive.ego_motion, drive.odometry_topic, drive.odometry = "odometry", "/odom", odometry("imu_link")
    (finding,) = diagnose(drive).findings
    assert (finding.code, finding.where) == ("odometry-frame", "/odom")
    assert "publish base_link -> imu_link on /tf_static" in finding.advice
    drive.transforms.append(TransformSeen("base_link", "imu_link", 0, START, Pose.identity(), True))
    assert codes(drive) == set()
    drive.odometry = odometry("")
    assert codes(drive) == set()


def test_odometry_is_looked_at_where_it_is_the_ego_motion() -> None:
    drive = rig()
    drive.ego_motion, drive.odometry_topic = "odometry", "/odom"
    assert codes(drive) == {"ego-missing"}
    drive.odometry = odometry()
    assert codes(drive) == set()
    drive.odometry = drive.odometry[:5] + drive.odometry[30:]
    assert "tf-gap" in codes(drive)


def test_the_topmost_frame_is_offered_where_the_fixed_one_is_missing() -> None:
    drive = rig()
    drive.fixed_frame = "world"
    (finding,) = diagnose(drive).findings
    assert (finding.code, finding.where) == ("ego-missing", "world -> base_link")
    assert "topmost frame is 'map': set fixed_frame to that in the remapping file" in finding.advice


def test_odometry_is_offered_where_the_fixed_frame_is_missing() -> None:
    drive = rig()
    drive.transforms = [t for t in drive.transforms if t.child != "base_link"]
    drive.odometry_topic, drive.odometry = "/odom", odometry()
    (finding,) = diagnose(drive).findings
    assert finding.code == "ego-missing"
    assert (
        "set ego_motion to odometry in the remapping file or the parameter file (params:=)" in finding.advice
    )


def test_advice_names_no_launch_argument_that_there_is_not() -> None:
    """`name:=value` is for `ros2 launch`; what is a parameter alone has its place in a file."""
    source = "".join(path.read_text() for path in (ROOT / "qdbev_ros" / "core" / "doctor").glob("*.py"))
    named = set(re.findall(r"(\w+):=", source))
    assert {"params", "calibration"} <= named <= {argument.name for argument in ARGUMENTS}


def test_what_refused_pictures_cost_is_said_as_the_node_does_it() -> None:
    """It answers without the camera (tests/ros/test_degraded.py)."""
    drive = rig()
    camera = drive.cameras["CAM_BACK"]
    camera.pictures = [replace(picture, problem="mono8", look=None) for picture in camera.pictures]
    (finding,) = diagnose(drive).findings
    assert (finding.code, finding.where) == ("picture-refused", "CAM_BACK")
    assert "leaves this camera out of every set with such a picture" in finding.advice
    assert "answers none where fewer than min_cameras are left" in finding.advice


@pytest.mark.parametrize("late_s", [0.4, 0.8])
@pytest.mark.parametrize("ego_motion", ["tf", "odometry"])
def test_what_late_poses_cost_is_said_as_the_node_does_it(late_s: float, ego_motion: str) -> None:
    """Sets wait for them up to tf_timeout, and are then answered without (tests/unit/test_assembly.py)."""
    drive, late_ns = rig(), round(late_s * 1e9)
    drive.ego_motion, drive.odometry_topic = ego_motion, "/odom"
    drive.odometry = [replace(seen, received_ns=seen.received_ns + late_ns) for seen in odometry()]
    drive.transforms = [
        t if t.static else replace(t, received_ns=t.received_ns + late_ns) for t in drive.transforms
    ]
    (finding,) = diagnose(drive).findings
    assert finding.code == "tf-late"
    assert ("every set waits for them" in finding.text) == (late_s < drive.tf_timeout)
    lost = "more than tf_timeout (0.5 s): sets are answered without ego motion, and nothing is remembered"
    assert (lost in finding.text) == (late_s > drive.tf_timeout)
    assert ("set ego_motion to odometry" in finding.advice) == (ego_motion == "tf")


def test_two_parents_are_named() -> None:
    drive = rig()
    drive.transforms.append(TransformSeen("odom", "LIDAR_TOP", 0, START, Pose.identity(), True))
    assert "tf-two-parents" in codes(drive)


def test_what_a_calibration_file_gives_is_not_missed() -> None:
    drive = rig()
    drive.transforms = [t for t in drive.transforms if t.child == "base_link"]
    drive.model = Pose(yaw_quaternion(-np.pi / 2), np.zeros(3))
    for camera in drive.cameras.values():
        camera.extrinsics = optical(DIRECTIONS[camera.name])
    assert codes(drive) == set()


@reproducible
@given(
    blueness=st.lists(st.floats(-0.3, 0.3), min_size=6, max_size=6),
    sky=st.lists(st.floats(-0.5, 0.5), min_size=6, max_size=6),
)
def test_colours_are_judged_by_two_thirds_of_the_cameras_or_not_at_all(
    blueness: list[float], sky: list[float]
) -> None:
    drive = rig()
    for camera, blue, bright in zip(drive.cameras.values(), blueness, sky):
        look = Look(1600, 900, 0.5, blue, bright, False)
        camera.pictures = [replace(picture, look=look) for picture in camera.pictures]
    reddish, darker = sum(b < -0.002 for b in blueness), sum(s < 0 for s in sky)
    expected = set()
    if reddish >= 4 and darker >= 4:
        expected = {"picture-upside-down"}
    elif reddish >= 4 and darker <= 2:
        expected = {"picture-swapped-colours"}
    assert codes(drive) == expected


def test_in_the_dark_colours_are_not_judged_and_a_note_says_so() -> None:
    drive = rig()
    for camera in drive.cameras.values():
        look = Look(1600, 900, 0.1, -0.2, 0.2, False)
        camera.pictures = [replace(picture, look=look) for picture in camera.pictures]
    report = diagnose(drive)
    assert report.findings == ()
    assert report.notes == ("order of colours: not judged, 0 cameras have 3 coloured pictures in daylight",)


@reproducible
@given(data=st.data())
def test_no_input_makes_it_fail(data: st.DataObject) -> None:
    """Anything may be missing, zero or out of order at once."""
    drive = rig(sets=data.draw(st.integers(1, 6)))
    for camera in drive.cameras.values():
        camera.pictures = data.draw(st.permutations(camera.pictures))[: data.draw(st.integers(0, 6))]
        camera.infos = camera.infos * data.draw(st.integers(0, 2))
        if data.draw(st.booleans()):
            camera.pictures = [
                replace(p, stamp_ns=data.draw(st.integers(0, 2**62)), frame="") for p in camera.pictures
            ]
    drive.transforms = data.draw(st.permutations(drive.transforms))[: data.draw(st.integers(0, 20))]
    drive.ego_motion = data.draw(st.sampled_from(["tf", "odometry"]))
    times, frames = st.integers(0, 2**62), st.sampled_from(["", "base_link", "imu"])
    drive.odometry = data.draw(st.lists(st.builds(OdometrySeen, times, times, frames), max_size=4))
    for finding in diagnose(drive).findings:
        assert finding.text
        assert finding.advice


def test_the_docs_list_every_finding_and_every_preset() -> None:
    docs = (ROOT / "docs" / "bags.md").read_text()
    source = "".join(path.read_text() for path in (ROOT / "qdbev_ros" / "core" / "doctor").glob("*.py"))
    known = set(re.findall(r'Finding\(\s*"([a-z-]+)"', source))
    assert len(known) > 20
    assert {f"`{code}`" for code in known} <= set(re.findall(r"`[a-z-]+`", docs))
    assert all(f"| `{name}` |" in docs for name in preset_names())
