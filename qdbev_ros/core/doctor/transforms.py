# SPDX-License-Identifier: Apache-2.0
"""Faults of tf, a calibration file and odometry: missing frames, turned axes, holes, lateness, jumps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from qdbev_ros.core.doctor.observations import CameraSeen, Drive, Finding
from qdbev_ros.core.geometry import Array, Pose, quaternion_to_matrix, wrap_angle

MAX_HOLE_S = 1.0  # the node does not interpolate across more
LATE_S = 0.2
MAX_SPEED = 60.0  # m/s, the node's default
DIRECTIONS = {
    "CAM_FRONT": 0,
    "CAM_FRONT_LEFT": 55,
    "CAM_BACK_LEFT": 110,
    "CAM_BACK": 180,
    "CAM_BACK_RIGHT": -110,
    "CAM_FRONT_RIGHT": -55,
}
MAX_TURN = 60.0  # degrees from the direction that a camera's name promises
SET_IN = "in the remapping file or the parameter file (params:=)"
OPTICAL = "the optical frame has x right, y down, z forward in the picture (REP 103)"


@dataclass
class Link:
    """One child's way to its parent; `poses` are (stamp, received, pose) in the order of stamps."""

    parent: str
    static: bool
    poses: list[tuple[int, int, Pose]] = field(default_factory=list)


def check_transforms(drive: Drive) -> Iterator[Finding]:
    links, parents = _links(drive)
    yield from _check_invalid(drive)
    for child, several in parents.items():
        if len(several) > 1:
            yield Finding(
                "tf-two-parents",
                child,
                f"frame {child!r} has the parents {', '.join(sorted(several))}",
                "a frame has one parent: stop one of the publishers",
            )
    for camera in drive.cameras.values():
        if camera.pictures and camera.extrinsics is not None:
            yield from _check_mounting(camera, drive.calibration, camera.extrinsics)
        elif camera.pictures:
            yield from _check_camera(drive, links, camera)
    yield from _check_model(drive, links)
    yield from _check_ego_motion(drive, links)


def _links(drive: Drive) -> tuple[dict[str, Link], dict[str, set[str]]]:
    links: dict[str, Link] = {}
    parents: dict[str, set[str]] = {}
    for seen in drive.transforms:
        if seen.pose is None:
            continue
        parents.setdefault(seen.child, set()).add(seen.parent)
        link = links.setdefault(seen.child, Link(seen.parent, seen.static))
        link.poses.append((seen.stamp_ns, seen.received_ns, seen.pose))
    for link in links.values():
        link.poses.sort(key=lambda entry: entry[0])
    return links, parents


def _check_invalid(drive: Drive) -> Iterator[Finding]:
    for name in sorted({f"{t.parent} -> {t.child}" for t in drive.transforms if t.pose is None}):
        yield Finding(
            "tf-invalid",
            name,
            f"transform {name} holds NaN or a quaternion whose length is not 1",
            "correct its publisher; ROS orders a quaternion x, y, z, w",
        )


def _chain(links: dict[str, Link], frame: str) -> list[str]:
    """The frame and its ancestors."""
    chain = [frame]
    while chain[-1] in links and links[chain[-1]].parent not in chain:
        chain.append(links[chain[-1]].parent)
    return chain


def _fixed_pose(links: dict[str, Link], base: str, frame: str) -> Pose | None:
    """frame -> base through their newest poses, for things bolted together; None where they are not connected."""
    up, down = _chain(links, frame), _chain(links, base)
    common = next((f for f in up if f in down), None)
    if common is None:
        return None
    poses = []
    for chain in (up, down):
        pose = Pose.identity()
        for child in chain[: chain.index(common)]:
            pose = links[child].poses[-1][2] @ pose
        poses.append(pose)
    return poses[1].inverse() @ poses[0]


def _check_camera(drive: Drive, links: dict[str, Link], camera: CameraSeen) -> Iterator[Finding]:
    base = drive.base_frame
    frame = camera.pictures[0].frame or camera.frame
    if not frame:
        yield Finding(
            "frame-empty",
            camera.name,
            f"pictures on {camera.image_topic} name no frame",
            "set frame_id in the driver, image_frame in the remapping file, or extrinsics in a calibration "
            "file",
        )
        return
    pose = Pose.identity() if frame == base else _fixed_pose(links, base, frame)
    if pose is None:
        known = sorted({*links, *(link.parent for link in links.values())})
        yield Finding(
            "tf-missing",
            camera.name,
            f"no transform from {frame!r}, the frame of {camera.image_topic}, to {base!r}",
            f"publish it on /tf_static, or give extrinsics in a calibration file; frames that there are: "
            f"{', '.join(known) or 'none'}",
        )
        return
    yield from _check_mounting(camera, f"{base} -> {frame}", pose)


def _axes_problem(r: Array) -> tuple[str, str] | None:
    """What is wrong with a camera's axes, and what to do. Columns of r: right, down and forward in x forward, z up."""
    if abs(r[2, 2]) < 0.6 and r[2, 1] < -0.7:
        return None
    if r[2, 2] > 0.7:
        return (
            "the camera's z axis points up: these are the axes of a body (x forward), not of a picture",
            f"{OPTICAL}: take the camera's _optical_frame, which is turned by roll -90, pitch 0, yaw -90 degrees",
        )
    if abs(r.T[2, 2]) < 0.6 and r.T[2, 1] < -0.7:
        return (
            "the transform is the wrong way round (vehicle in the camera)",
            "invert it: from the camera (child) to the vehicle",
        )
    if abs(r[2, 2]) < 0.6 and r[2, 1] > 0.7:
        return (
            "the camera's y axis points up: it is upside down",
            f"{OPTICAL}: turn by 180 degrees about the optical axis; if the camera hangs that way, turn the pictures",
        )
    if abs(r[2, 2]) < 0.6:
        return (
            "the camera is rolled onto its side",
            f"{OPTICAL}: check the order of the quaternion (x, y, z, w)",
        )
    return ("the camera looks up or down", f"{OPTICAL}: check the order of the quaternion (x, y, z, w)")


def _check_mounting(camera: CameraSeen, source: str, pose: Pose) -> Iterator[Finding]:
    """`source` is the transform or the file that the pose is from."""
    rotation = quaternion_to_matrix(pose.rotation)
    problem = _axes_problem(rotation)
    if problem:
        yield Finding("tf-camera-axes", camera.name, f"{source}: {problem[0]}", problem[1])
        return
    forward = rotation[:, 2]
    yaw = float(np.degrees(np.arctan2(forward[1], forward[0])))

    def turn(name: str) -> float:
        return abs(float(np.degrees(wrap_angle(np.radians(yaw - DIRECTIONS[name])))))

    if camera.name in DIRECTIONS and turn(camera.name) > MAX_TURN:
        nearest = min(DIRECTIONS, key=turn)
        yield Finding(
            "tf-camera-direction",
            camera.name,
            f"{source}: the camera looks {yaw:.0f} degrees to the left of ahead, which is about {nearest}'s direction",
            "the topics or frames of two cameras are swapped, or the vehicle frame is not x forward, y left",
        )
    x, y, z = pose.translation
    if not (abs(x) < 20 and abs(y) < 10 and -2 < z < 8):
        yield Finding(
            "tf-camera-position",
            camera.name,
            f"{source}: the camera is at x {x:.1f}, y {y:.1f}, z {z:.1f} m",
            "no vehicle is that large: millimetres instead of metres, or another parent frame",
        )


def _check_model(drive: Drive, links: dict[str, Link]) -> Iterator[Finding]:
    frame, base = drive.model_frame, drive.base_frame
    pose = drive.model or _fixed_pose(links, base, frame)
    if pose is None:
        yield Finding(
            "tf-model-frame",
            frame,
            f"no transform from the model frame {frame!r} to {base!r}",
            "publish it on /tf_static (x right, y forward, z up, where nuScenes has its lidar), set "
            "model_frame, or give model_frame in a calibration file",
        )
        return
    r = quaternion_to_matrix(pose.rotation)
    if r[1, 0] > -0.8 or r[2, 2] < 0.8:
        source = drive.calibration if drive.model else f"{base} -> {frame}"
        turned = float(np.degrees(np.arctan2(r[1, 0], r[0, 0]))) + 90
        yield Finding(
            "tf-model-axes",
            frame,
            f"{source}: the model frame's x axis must point right; this one is turned by {turned:.0f} degrees",
            "boxes would be turned as much: it has to have x right, y forward, z up",
        )


def _check_ego_motion(drive: Drive, links: dict[str, Link]) -> Iterator[Finding]:
    if drive.ego_motion == "odometry":
        if not drive.odometry:
            yield Finding(
                "ego-missing",
                drive.odometry_topic,
                f"no odometry on {drive.odometry_topic}",
                f"publish nav_msgs/Odometry there, or set ego_motion to tf {SET_IN}",
            )
            return
        yield from _check_odometry_frames(drive, links)
        entries = sorted((seen.stamp_ns, seen.received_ns) for seen in drive.odometry)
        yield from _check_times(drive, drive.odometry_topic, entries)
        return
    chain = _chain(links, drive.base_frame)
    name = f"{drive.fixed_frame} -> {drive.base_frame}"
    if drive.fixed_frame not in chain:
        top = (
            f"; {drive.base_frame}'s topmost frame is {chain[-1]!r}: set fixed_frame to that {SET_IN}"
            if chain[1:]
            else ""
        )
        odometry = (
            f", or set ego_motion to odometry {SET_IN}: there is {drive.odometry_topic}"
            if drive.odometry
            else ""
        )
        yield Finding(
            "ego-missing",
            name,
            f"no transform {name}: the vehicle's motion is unknown",
            f"publish it on /tf{odometry}{top}",
        )
        return
    for child in chain[: chain.index(drive.fixed_frame)]:
        link = links[child]
        if not link.static and len({pose.translation.tobytes() for _, _, pose in link.poses}) > 1:
            name = f"{link.parent} -> {child}"
            yield from _check_times(drive, name, [(stamp, received) for stamp, received, _ in link.poses])
            yield from _check_jumps(name, link)


def _check_odometry_frames(drive: Drive, links: dict[str, Link]) -> Iterator[Finding]:
    base = drive.base_frame
    for frame in sorted({seen.frame or base for seen in drive.odometry}):
        if frame != base and _fixed_pose(links, base, frame) is None:
            yield Finding(
                "odometry-frame",
                drive.odometry_topic,
                f"the odometry is of {frame!r} (child_frame_id), and no transform leads from there to {base!r}: the "
                f"vehicle's motion is unknown",
                f"publish {base} -> {frame} on /tf_static; or, if that is the vehicle's frame by another name, set "
                f"base_frame {SET_IN}",
            )


def _check_times(drive: Drive, name: str, entries: list[tuple[int, int]]) -> Iterator[Finding]:
    """Whether there is a pose for every picture, in time. `entries`: (stamp, received), by stamp."""
    stamps = [stamp for stamp, _ in entries]
    pictures = [p for camera in drive.cameras.values() for p in camera.pictures if p.stamp_ns]
    gaps = np.diff(np.array(stamps, np.int64)) * 1e-9
    if len(gaps) and gaps.max() > MAX_HOLE_S:
        yield Finding(
            "tf-gap",
            name,
            f"{name} has {int((gaps > MAX_HOLE_S).sum())} holes of up to {gaps.max():.1f} s",
            f"the node interpolates across {MAX_HOLE_S:g} s at most: publish poses steadily, 10 Hz or more",
        )
    outside = sum(not stamps[0] <= p.stamp_ns <= stamps[-1] for p in pictures)
    if pictures and outside > 0.1 * len(pictures):
        ahead = (stamps[0] - min(p.stamp_ns for p in pictures)) * 1e-9
        yield Finding(
            "tf-coverage",
            name,
            f"{outside} of {len(pictures)} pictures are from before or after all of {name} (the first pose is "
            f"{ahead:.3f} s after the first picture)",
            "poses and pictures must have one clock: check use_sim_time and the drivers' stamps",
        )
        return
    soonest = np.minimum.accumulate(np.array([received for _, received in entries], np.int64)[::-1])[::-1]
    waits = [
        (int(soonest[index]) - p.received_ns) * 1e-9
        for p in pictures
        if (index := bisect_left(stamps, p.stamp_ns)) < len(stamps)
    ]
    if waits and np.median(waits) > LATE_S:
        late = float(np.median(waits))
        cost = ": every set waits for them"
        if late > drive.tf_timeout:
            cost = (
                f", more than tf_timeout ({drive.tf_timeout:g} s): sets are answered without ego motion, and nothing "
                f"is remembered"
            )
        other = "" if drive.ego_motion == "odometry" else f", or set ego_motion to odometry {SET_IN}"
        yield Finding(
            "tf-late",
            name,
            f"poses arrive {late:.2f} s after their pictures{cost}",
            f"publish poses sooner{other}",
        )


def _check_jumps(name: str, link: Link) -> Iterator[Finding]:
    steps = [
        (float(np.linalg.norm(b.translation - a.translation)), (after - before) * 1e-9)
        for (before, _, a), (after, _, b) in zip(link.poses, link.poses[1:])
        if after > before
    ]
    jumps = [moved for moved, elapsed in steps if moved > 0.5 and moved > MAX_SPEED * elapsed]
    if jumps:
        yield Finding(
            "ego-jump",
            name,
            f"{name} jumps {len(jumps)} times, by up to {max(jumps):.1f} m",
            "the memory is forgotten at every jump: take a continuous frame (odom) as fixed_frame",
        )
