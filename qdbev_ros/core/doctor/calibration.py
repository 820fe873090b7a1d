# SPDX-License-Identifier: Apache-2.0
"""Faults of CameraInfo, or of a calibration file in its place: K, its size, its resolution, distortion."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from qdbev_ros.core.doctor.observations import CameraSeen, Drive, Finding, InfoSeen
from qdbev_ros.core.geometry import camera_matrix_problem

SCALE_OFF = 0.12  # nuScenes' principal points are up to 9 % off the centre
FIELD_OF_VIEW = (10.0, 150.0)  # degrees; a pinhole cannot do more
FILE_ADVICE = "or give the intrinsics in a calibration file (calibration:=rig.yaml)"


def check_calibration(drive: Drive) -> Iterator[Finding]:
    for camera in drive.cameras.values():
        if not camera.pictures:
            continue
        if not camera.infos:
            topic = camera.info_source or "a CameraInfo topic"
            yield Finding(
                "info-missing",
                camera.name,
                f"pictures arrive, but nothing on {topic}",
                f"publish sensor_msgs/CameraInfo there, {FILE_ADVICE}",
            )
            continue
        if len(camera.infos) > 1:
            yield Finding(
                "info-changes",
                camera.name,
                f"{camera.info_source} changes its content during the drive",
                "a calibration must not change while driving: look for a second publisher on that topic",
            )
        for info in camera.infos:
            found = list(_check_info(camera, info))
            yield from found
            if found:
                break


def _check_info(camera: CameraSeen, info: InfoSeen) -> Iterator[Finding]:
    topic, name = camera.info_source, camera.name
    if not (np.isfinite(info.k).all() and np.isfinite(info.p).all()):
        yield Finding(
            "info-not-finite",
            name,
            f"{topic}: K or P holds NaN or infinite numbers",
            f"calibrate this camera, {FILE_ADVICE}",
        )
        return
    if info.k[0] <= 0 or info.k[4] <= 0:
        yield Finding(
            "info-zero",
            name,
            f"{topic}: K has fx = {info.k[0]:g}, fy = {info.k[4]:g}: not calibrated",
            f"give the camera driver its calibration file (camera_info_url), {FILE_ADVICE}",
        )
        return
    k, used = np.array(info.k).reshape(3, 3), _effective(info)
    problem = camera_matrix_problem("K", k) or camera_matrix_problem("P", used)
    if problem is not None:
        yield Finding(
            "info-matrix",
            name,
            f"{topic}: {problem}",
            f"fill in K as fx 0 cx, 0 fy cy, 0 0 1, and P as K with a fourth column of zeros, {FILE_ADVICE}",
        )
        return
    if info.width < 1 or info.height < 1:
        yield Finding(
            "info-size",
            name,
            f"{topic}: the size is {info.width}x{info.height}",
            "fill in width and height of the pictures that K belongs to",
        )
        return
    sizes = sorted({(look.width, look.height) for look in camera.looks()})
    if len(sizes) == 1 and sizes[0] != (info.width, info.height):
        yield _wrong_size(camera, info, sizes[0])
        return
    yield from _check_geometry(camera, info)
    yield from _check_distortion(camera, info)


def _wrong_size(camera: CameraSeen, info: InfoSeen, size: tuple[int, int]) -> Finding:
    width, height = size
    said = f"pictures are {width}x{height}, {camera.info_source} is for {info.width}x{info.height}"
    if (info.height, info.width) == size:
        return Finding(
            "picture-rotated",
            camera.name,
            f"{said}: they are turned by 90 degrees",
            "turn the pictures back in the driver, or calibrate the turned ones",
        )
    factor = width / info.width
    if abs(factor - height / info.height) < 0.02:
        return Finding(
            "info-size",
            camera.name,
            f"{said}: K is of another resolution",
            f"multiply width, height, fx, fy, cx, cy by {factor:.4g}, or let what resizes the pictures resize "
            f"CameraInfo, too (image_proc::ResizeNode)",
        )
    return Finding(
        "info-size",
        camera.name,
        f"{said}: the pictures were cropped or are another camera's",
        "give the intrinsics of exactly these pictures",
    )


def _check_geometry(camera: CameraSeen, info: InfoSeen) -> Iterator[Finding]:
    """K as the node uses it: P's where that is set."""
    k = _effective(info)
    across, down = 2 * k[0, 2] / info.width, 2 * k[1, 2] / info.height
    if (
        abs(across - 1) > SCALE_OFF
        and abs(down - 1) > SCALE_OFF
        and abs(across - down) < 0.15 * max(across, down)
    ):
        scale = (across + down) / 2
        guess = f"{info.width * scale:.0f}x{info.height * scale:.0f}"
        yield Finding(
            "info-resolution",
            camera.name,
            f"{camera.info_source}: the principal point ({k[0, 2]:.0f}, {k[1, 2]:.0f}) is the centre of a picture of "
            f"about {guess}, but the size says {info.width}x{info.height}: K is of another resolution",
            f"multiply fx, fy, cx, cy by {1 / scale:.3g}, or calibrate at this resolution",
            "likely; a deliberate crop looks the same",
        )
        return
    if not (-0.1 <= k[0, 2] / info.width <= 1.1 and -0.1 <= k[1, 2] / info.height <= 1.1):
        yield Finding(
            "info-principal-point",
            camera.name,
            f"{camera.info_source}: the principal point ({k[0, 2]:.0f}, {k[1, 2]:.0f}) is outside the picture",
            "calibrate this camera anew, or give the intrinsics of these pictures",
        )
    view = math.degrees(2 * math.atan(info.width / (2 * k[0, 0])))
    if not FIELD_OF_VIEW[0] < view < FIELD_OF_VIEW[1] or not 0.8 < k[0, 0] / k[1, 1] < 1.25:
        yield Finding(
            "info-focal",
            camera.name,
            f"{camera.info_source}: fx = {k[0, 0]:g}, fy = {k[1, 1]:g} would be a field of view of {view:.0f} "
            f"degrees",
            "focal lengths are in pixels of this picture: check their unit and order",
        )


def _check_distortion(camera: CameraSeen, info: InfoSeen) -> Iterator[Finding]:
    """A P that differs from K tells that the pictures were rectified with it; with P = K they were not."""
    k = np.array(info.k).reshape(3, 3)
    if any(abs(value) > 1e-6 for value in info.d) and np.allclose(_effective(info), k, rtol=1e-3):
        said = "claims to be rectified, yet" if "rect" in camera.image_topic else "is not rectified:"
        yield Finding(
            "info-distortion",
            camera.name,
            f"{camera.image_topic} {said} {camera.info_source} has distortion {[round(v, 4) for v in info.d[:5]]} and "
            f"no P of a rectified picture",
            "rectify (image_proc::RectifyNode) and publish the CameraInfo of the rectified picture",
        )


def _effective(info: InfoSeen) -> np.ndarray:  # type: ignore[type-arg]
    p = np.array(info.p).reshape(3, 4)[:, :3]
    return p if p[0, 0] > 0 and p[1, 1] > 0 else np.array(info.k).reshape(3, 3)
