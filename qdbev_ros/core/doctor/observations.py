# SPDX-License-Identifier: Apache-2.0
"""What the doctor gets to see of a drive, and what it says. Stamps and times of receipt are ns since 1970."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdbev_ros.core.geometry import Pose


@dataclass(frozen=True)
class Finding:
    """One fault. `code` is stable, for scripts; `where` is a camera, topic or frame; `advice` is what to do."""

    code: str
    where: str
    text: str
    advice: str
    confidence: str = ""  # how sure this is, where it is a judgement of pictures or of statistics


@dataclass(frozen=True)
class Report:
    """`notes` tell what could not be judged; they are no findings."""

    findings: tuple[Finding, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Look:
    """One decoded picture. Colours and brightness are in 0..1, upper third minus lower third of the picture."""

    width: int
    height: int
    brightness: float  # mean
    blueness: float  # mean of blue - red above, less that below
    sky: float  # mean brightness above, less that below
    grey: bool


@dataclass(frozen=True)
class PictureSeen:
    """A picture message. `problem` is why the node refuses it; `look` is set where the picture was decoded."""

    stamp_ns: int
    received_ns: int
    frame: str
    problem: str = ""
    look: Look | None = None


@dataclass(frozen=True)
class InfoSeen:
    """CameraInfo: k row by row (9), p row by row (12), d of any length."""

    width: int
    height: int
    k: tuple[float, ...]
    p: tuple[float, ...]
    d: tuple[float, ...] = ()


@dataclass
class CameraSeen:
    """`infos` holds each different CameraInfo once, in order, or the one that a calibration file stands in with;
    `info_source` is their topic, or that file. `frame` is that of a picture whose header names none.
    """

    name: str
    image_topic: str
    info_source: str = ""
    frame: str = ""
    pictures: list[PictureSeen] = field(default_factory=list)
    infos: list[InfoSeen] = field(default_factory=list)
    extrinsics: Pose | None = None  # of the calibration file: optical frame -> vehicle frame

    def looks(self) -> list[Look]:
        return [picture.look for picture in self.pictures if picture.look]


@dataclass(frozen=True)
class TransformSeen:
    """child -> parent; `pose` is None where the numbers are no pose."""

    parent: str
    child: str
    stamp_ns: int
    received_ns: int
    pose: Pose | None
    static: bool


@dataclass(frozen=True)
class OdometrySeen:
    """Odometry of `frame` of the vehicle; empty: of the vehicle's own."""

    stamp_ns: int
    received_ns: int
    frame: str = ""


@dataclass
class Drive:
    """Everything that was seen, and what the node would expect to see."""

    cameras: dict[str, CameraSeen]
    transforms: list[TransformSeen] = field(default_factory=list)
    odometry: list[OdometrySeen] = field(default_factory=list)
    fixed_frame: str = "map"
    base_frame: str = "base_link"
    model_frame: str = "LIDAR_TOP"
    ego_motion: str = "tf"
    odometry_topic: str = ""
    calibration: str = ""  # the file
    model: Pose | None = None  # of the calibration file: model frame -> vehicle frame
    other_picture_topics: tuple[str, ...] = ()  # picture topics that no camera of the preset has
    max_spread: float = 0.06  # seconds, as the node's parameter
    tf_timeout: float = 0.5
    max_gap: float = 2.0
