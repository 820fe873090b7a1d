# SPDX-License-Identifier: Apache-2.0
"""Faults that are seen in the pictures: encodings, sizes, order of colours, pictures upside down.

Order of colours and what is up are judged by what roads look like: the sky is brighter than the road and, next to it,
bluer. Blue for red turns the sign of the second only, a picture upside down turns both. One camera may well look at a
blue car below a brick wall, so only the rig as a whole is judged, and dark pictures are left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np

from qdbev_ros.core.doctor.observations import CameraSeen, Drive, Finding

MIN_CAMERAS = 4  # with fewer the colours are not judged
MIN_LOOKS = 3  # of a camera
DARK = 0.15
NEUTRAL = 0.002  # a difference of blue and red that tells nothing
# What the rule says of the synthetic town: benchmarks/doctor_colours.py data/town --every 2
SWAPPED_CONFIDENCE = (
    "probable, not certain: {votes} say so; so did 2 of 126 correct scenes, and 115 of 126 swapped ones"
)
TURNED_CONFIDENCE = (
    "probable, not certain: {votes} say so; so did none of 126 correct scenes, and 115 turned ones"
)


def check_pictures(drive: Drive) -> Iterator[Finding]:
    for camera in drive.cameras.values():
        yield from _check_camera(camera)
    yield from _check_scene(drive)


def _check_camera(camera: CameraSeen) -> Iterator[Finding]:
    problems = Counter(picture.problem for picture in camera.pictures if picture.problem)
    for problem, count in problems.most_common(3):
        yield Finding(
            "picture-refused",
            camera.name,
            f"{camera.image_topic}: {count} pictures are refused: {problem}",
            "the node leaves this camera out of every set with such a picture, and answers none where fewer than "
            "min_cameras are left: correct the driver or the recording",
        )
    looks = camera.looks()
    sizes = {(look.width, look.height) for look in looks}
    if len(sizes) > 1:
        listed = ", ".join(f"{w}x{h}" for w, h in sorted(sizes))
        yield Finding(
            "picture-size",
            camera.name,
            f"{camera.image_topic} changes its size: {listed}",
            "CameraInfo holds for one size only: fix the size in the driver",
        )
    elif sizes and min(w - h for w, h in sizes) < 0:
        yield Finding(
            "picture-rotated",
            camera.name,
            f"{camera.image_topic}: the pictures are upright, {looks[0].width}x{looks[0].height}",
            "the model knows pictures that are wider than high: turn them",
        )
    if len(looks) >= MIN_LOOKS and all(look.grey for look in looks):
        yield Finding(
            "picture-grey",
            camera.name,
            f"{camera.image_topic}: the pictures have no colours",
            "the model needs colours: use a colour camera, or switch the driver to colour",
        )


def _votes(drive: Drive) -> list[tuple[float, float]]:
    """(blueness, brightness of the sky) of every camera with enough coloured pictures in daylight, medians."""
    votes = []
    for camera in drive.cameras.values():
        bright = [look for look in camera.looks() if look.brightness > DARK and not look.grey]
        if len(bright) >= MIN_LOOKS:
            votes.append(
                (
                    float(np.median([look.blueness for look in bright])),
                    float(np.median([look.sky for look in bright])),
                )
            )
    return votes


def _check_scene(drive: Drive) -> Iterator[Finding]:
    votes = _votes(drive)
    if len(votes) < MIN_CAMERAS:
        return
    most = 2 / 3 * len(votes)
    reddish = sum(blueness < -NEUTRAL for blueness, _ in votes)
    darker = sum(sky < 0 for _, sky in votes)
    if reddish < most:
        return
    if darker >= most:
        told = f"in {darker} of {len(votes)} cameras the lower part is brighter and bluer than the upper one"
        yield Finding(
            "picture-upside-down",
            "all cameras",
            f"the pictures seem to be upside down: {told}",
            "turn them by 180 degrees in the driver, and calibrate the turned pictures",
            TURNED_CONFIDENCE.format(votes=f"{darker} of {len(votes)} cameras"),
        )
    elif darker <= len(votes) / 3:
        told = f"in {reddish} of {len(votes)} cameras the sky is redder than the road"
        yield Finding(
            "picture-swapped-colours",
            "all cameras",
            f"red and blue seem to be swapped: {told}",
            "the encoding says one order and the data have the other (rgb8, bgr8): correct the driver, or for "
            "JPEG what is handed to the encoder",
            SWAPPED_CONFIDENCE.format(votes=f"{reddish} of {len(votes)} cameras"),
        )


def notes(drive: Drive) -> Iterator[str]:
    """What could not be judged."""
    judged = len(_votes(drive))
    if judged < MIN_CAMERAS:
        yield f"order of colours: not judged, {judged} cameras have {MIN_LOOKS} coloured pictures in daylight"
