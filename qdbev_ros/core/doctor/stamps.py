# SPDX-License-Identifier: Apache-2.0
"""Faults of stamps, rates and of how well the cameras' pictures go together."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.doctor.observations import CameraSeen, Drive, Finding
from qdbev_ros.core.geometry import Array

FUTURE_S = 0.05
REPLAY_S = 10.0  # older pictures are a replay; what the times of receipt are then tells nothing
RATE_OFF = 1.3
LOST_SHARE = 0.05
MIN_PICTURES = 4


def check_stamps(drive: Drive) -> Iterator[Finding]:
    seen = [camera for camera in drive.cameras.values() if camera.pictures]
    yield from _check_missing(drive)
    for camera in seen:
        yield from _check_camera(camera)
    if any(0 in _stamps(camera) for camera in seen):
        return
    odd = set()
    for name, finding in _check_rates(seen, drive.max_gap):
        odd.add(name)
        yield finding
    yield from _check_spread(drive, [camera for camera in seen if camera.name not in odd])


def _stamps(camera: CameraSeen) -> list[int]:
    return [picture.stamp_ns for picture in camera.pictures]


def _check_missing(drive: Drive) -> Iterator[Finding]:
    for camera in drive.cameras.values():
        if not camera.pictures:
            others = ", ".join(drive.other_picture_topics)
            yield Finding(
                "camera-missing",
                camera.name,
                f"no picture on {camera.image_topic}",
                f"start this camera, or map its topic with a remapping file (preset:=rig.yaml); other pictures are on: "
                f"{others or 'no other topic'}",
            )


def _check_camera(camera: CameraSeen) -> Iterator[Finding]:
    """Stamps of one camera, in the order of receipt."""
    stamps = np.array(_stamps(camera), np.int64)
    zero = int((stamps == 0).sum())
    if zero:
        yield Finding(
            "stamp-zero",
            camera.name,
            f"{zero} of {len(stamps)} pictures have no stamp (0)",
            "the driver must fill header.stamp with the time of exposure",
        )
        return
    delay = np.array([(p.received_ns - p.stamp_ns) * 1e-9 for p in camera.pictures])
    if np.median(delay) < -FUTURE_S:
        yield Finding(
            "stamp-future",
            camera.name,
            f"stamps are {-float(np.median(delay)):.3f} s ahead of the time of receipt",
            "synchronise the clocks (PTP, chrony) or correct the driver's offset",
        )
    steps = np.diff(stamps)
    back = int((steps < 0).sum())
    if back:
        yield Finding(
            "stamp-back",
            camera.name,
            f"stamps go back {back} times, by up to {-float(steps.min()) * 1e-9:.3f} s",
            "a looped bag, two publishers on one topic, or a clock that is set while driving",
        )
    same = int((steps == 0).sum())
    if same:
        yield Finding(
            "stamp-repeated",
            camera.name,
            f"{same} of {len(stamps)} pictures repeat a stamp",
            "two publishers on one topic, or a driver that stamps several frames at once",
        )
    if not back and not same:
        yield from _check_receipt(camera, steps * 1e-9, delay)


def _check_receipt(camera: CameraSeen, periods: Array, delay: Array) -> Iterator[Finding]:
    """Stamps of exposure are regular and receipt scatters; stamps of receipt scatter just as receipt does.

    Bags made from data sets have the stamp as time of receipt: no scatter at all between the two, nothing to judge.
    """
    if len(periods) < 8 or not 0 <= float(np.median(delay)) < REPLAY_S:
        return
    jitter, scatter = _deviation(periods), _deviation(delay)
    if (
        1e-6 < scatter < jitter / 4
        and jitter > max(0.004, 0.03 * float(np.median(periods)))
        and np.median(delay) < 0.005
    ):
        yield Finding(
            "stamp-receipt",
            camera.name,
            f"the period scatters by {jitter * 1e3:.1f} ms, and so does receipt, only {np.median(delay) * 1e3:.1f} ms "
            f"later: these are times of receipt, not of exposure",
            "stamp in the driver with the hardware's time of exposure; boxes of a turning vehicle shift otherwise",
            "likely",
        )


def _deviation(values: Array) -> float:
    """A standard deviation that outliers leave alone."""
    return float(1.4826 * np.median(np.abs(values - np.median(values))))


def _check_rates(seen: list[CameraSeen], max_gap: float) -> Iterator[tuple[str, Finding]]:
    periods = {
        c.name: np.diff(sorted(set(_stamps(c)))) * 1e-9 for c in seen if len(set(_stamps(c))) >= MIN_PICTURES
    }
    if not periods:
        return
    medians = {name: float(np.median(values)) for name, values in periods.items()}
    usual = float(np.median(list(medians.values())))
    for name, period in medians.items():
        if not usual / RATE_OFF < period < usual * RATE_OFF:
            yield (
                name,
                Finding(
                    "rate-differs",
                    name,
                    f"{1 / period:.2f} pictures a second where the other cameras have {1 / usual:.2f}",
                    "run all cameras at one rate, triggered together; the slowest one sets the rate of the boxes",
                ),
            )
            continue
        lost = float((periods[name] > 1.8 * period).mean())
        if lost > LOST_SHARE:
            yield (
                name,
                Finding(
                    "pictures-lost",
                    name,
                    f"{lost:.0%} of the gaps between pictures are of two periods or more",
                    "pictures get lost: shared memory or a larger receive buffer for DDS, less load, a faster disk",
                ),
            )
    if usual > max_gap:
        yield (
            "",
            Finding(
                "rate-low",
                "all cameras",
                f"a picture every {usual:.1f} s: the memory is forgotten after {max_gap:g} s",
                "feed at least one set a second, or set max_gap higher and expect a worse memory",
            ),
        )


def _offsets(anchors: NDArray[np.int64], stamps: list[NDArray[np.int64]]) -> Array:
    """(cameras, anchors): seconds from each stamp in `anchors` to the nearest one of each camera; all in order."""
    rows = []
    for own in stamps:
        right = np.clip(np.searchsorted(own, anchors), 1, len(own) - 1)
        before, after = own[right - 1], own[right]
        rows.append((np.where(anchors - before < after - anchors, before, after) - anchors) * 1e-9)
    return np.array(rows)


def _check_spread(drive: Drive, seen: list[CameraSeen]) -> Iterator[Finding]:
    """Around each picture of the camera that the others agree with most, the nearest ones of the others."""
    if len(seen) < 2 or any(len(camera.pictures) < MIN_PICTURES for camera in seen):
        return
    # Around a camera that is itself half a period off, the others' nearest pictures would be of different sets.
    stamps = [np.unique(_stamps(camera)) for camera in seen]
    tables = [_offsets(anchors, stamps) for anchors in stamps]
    table = min(tables, key=lambda offsets: float(np.median(np.abs(offsets))))
    spread = float(np.median(table.max(0) - table.min(0)))
    if spread <= drive.max_spread:
        return
    typical = np.median(table, axis=1)
    off = np.abs(typical - np.median(typical))
    name = seen[int(off.argmax())].name
    yield Finding(
        "spread",
        name,
        f"pictures of one set are {spread * 1e3:.0f} ms apart (at most {drive.max_spread * 1e3:.0f} ms are taken); "
        f"{name} is {off.max() * 1e3:.0f} ms from the middle",
        f"trigger the cameras together or correct {name}'s stamps; the node takes them with the parameter max_spread "
        f"at {spread * 1.2:.2f}",
    )
