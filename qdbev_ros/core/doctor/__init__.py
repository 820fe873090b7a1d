# SPDX-License-Identifier: Apache-2.0
"""The doctor: names the faults of a drive's calibration, transforms, stamps and pictures. No ROS in here."""

from __future__ import annotations

from qdbev_ros.core.doctor.calibration import check_calibration
from qdbev_ros.core.doctor.observations import (
    CameraSeen,
    Drive,
    Finding,
    InfoSeen,
    Look,
    OdometrySeen,
    PictureSeen,
    Report,
    TransformSeen,
)
from qdbev_ros.core.doctor.pictures import check_pictures, notes
from qdbev_ros.core.doctor.stamps import check_stamps
from qdbev_ros.core.doctor.transforms import check_transforms

__all__ = [
    "CameraSeen",
    "Drive",
    "Finding",
    "InfoSeen",
    "Look",
    "OdometrySeen",
    "PictureSeen",
    "Report",
    "TransformSeen",
    "diagnose",
]


def diagnose(drive: Drive) -> Report:
    """All faults that can be told, those that hide others first."""
    checks = (check_stamps, check_pictures, check_calibration, check_transforms)
    return Report(tuple(finding for check in checks for finding in check(drive)), tuple(notes(drive)))
