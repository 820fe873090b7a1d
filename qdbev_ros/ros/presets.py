# SPDX-License-Identifier: Apache-2.0
"""Topic and frame names of a bag or vehicle: a preset of config/presets, or a remapping file of the same layout."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import CAMERAS, variant_folder

IMAGE_TYPES = ("compressed", "raw")
EGO_MOTIONS = ("tf", "odometry")
TOPIC = re.compile(r"/[A-Za-z_]\w*(/[A-Za-z_]\w*)*", re.ASCII)
KEYS = (
    "image_type", "image", "camera_info", "image_frame", "cameras", "ego_motion", "odometry", "annotations",
    "fixed_frame", "base_frame", "model_frame",
)  # fmt: skip


def config_folder() -> Path:
    """config/ of the source tree, or of the installed ROS package's share folder."""
    return variant_folder().parent


@dataclass(frozen=True)
class TopicPreset:
    """Names of one rig. `images`, `infos` and `image_frames` are by camera; without CameraInfo `infos` is empty."""

    name: str
    image_type: str  # "compressed" (sensor_msgs/CompressedImage) or "raw" (sensor_msgs/Image)
    images: dict[str, str]
    infos: dict[str, str] = field(default_factory=dict)
    image_frames: dict[str, str] = field(default_factory=dict)  # of pictures whose header names no frame
    ego_motion: str = "tf"  # or "odometry"
    odometry: str = ""
    annotations: str = ""  # MarkerArray of the ground truth
    fixed_frame: str = "map"
    base_frame: str = "base_link"
    model_frame: str = "LIDAR_TOP"

    def image_topic(self, camera: str) -> str:
        return self.images[camera]

    def info_topic(self, camera: str) -> str:
        """Empty where this rig has no CameraInfo."""
        return self.infos.get(camera, "")

    def image_topics(self) -> list[str]:
        return [self.images[camera] for camera in CAMERAS]

    def info_topics(self) -> list[str]:
        return list(self.infos.values())

    def image_frame(self, camera: str, header_frame: str) -> str:
        """The frame of a picture whose header names `header_frame`, without the slash that old tools write."""
        return header_frame.lstrip("/") or self.image_frames.get(camera, "")


def preset_names() -> list[str]:
    return sorted(path.stem for path in (config_folder() / "presets").glob("*.yaml"))


def is_file_name(preset: str) -> bool:
    """Whether `preset` names a remapping file rather than a preset of config/presets."""
    return preset.endswith((".yaml", ".yml"))


def load_preset(name: str) -> TopicPreset:
    """A preset of config/presets, or the remapping file `name` (.yaml). Raises ConfigError that names file and key."""
    path = (
        Path(name).expanduser()
        if is_file_name(name)
        else config_folder() / "presets" / f"{Path(name).name}.yaml"
    )
    try:
        content = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        if is_file_name(name):
            raise ConfigError(f"{path}: no such remapping file") from None
        known = ", ".join(preset_names())
        raise ConfigError(
            f"no preset {name!r}; known: {known}; or give a remapping file, NAME.yaml"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {' '.join(str(error).split())}") from error
    return _Reader(path, content).preset(path.stem if is_file_name(name) else name)


class _Reader:
    """Turns one file's content into a preset; every complaint names the file and the key."""

    def __init__(self, path: Path, content: Any) -> None:
        self._path = path
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: must be a mapping with the keys {', '.join(KEYS)}")
        for key in content:
            if key not in KEYS:
                raise ConfigError(f"{path}: unknown key {key!r}; known: {', '.join(KEYS)}")
        for key in ("image_type", "image"):
            if not content.get(key):
                raise ConfigError(f"{path}: key {key!r} is missing")
        self._content = content

    def preset(self, name: str) -> TopicPreset:
        names = self._camera_names()
        infos = self._by_camera("camera_info", names) if self._content.get("camera_info") else {}
        frames = self._by_camera("image_frame", names) if self._content.get("image_frame") else {}
        images = self._by_camera("image", names)
        for key, topics in (("image", images), ("camera_info", infos)):
            for topic in topics.values():
                self._check_topic(key, topic)
            if len(set(topics.values())) < len(topics):
                raise ConfigError(f"{self._path}: key {key!r} gives two cameras the same topic")
        return TopicPreset(
            name, self._choice("image_type", IMAGE_TYPES), images, infos, frames,
            self._choice("ego_motion", EGO_MOTIONS, "tf"), self._topic("odometry"), self._topic("annotations"),
            self._text("fixed_frame", "map"), self._text("base_frame", "base_link"),
            self._text("model_frame", "LIDAR_TOP"),
        )  # fmt: skip

    def _camera_names(self) -> dict[str, str]:
        """What {camera} stands for, by camera."""
        given = self._content.get("cameras", {})
        if not isinstance(given, dict):
            raise ConfigError(f"{self._path}: key 'cameras' must give each of {', '.join(CAMERAS)} its name")
        self._check_cameras("cameras", given)
        names = {camera: given.get(camera, camera) for camera in CAMERAS}
        for camera, value in names.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{self._path}: key 'cameras.{camera}' must be a name, got {value!r}")
        return names

    def _by_camera(self, key: str, names: dict[str, str]) -> dict[str, str]:
        """A template with {camera}, or a mapping that gives every camera its own."""
        value = self._content[key]
        if isinstance(value, str):
            if "{camera}" not in value:
                raise ConfigError(f"{self._path}: key {key!r} must hold {{camera}}, got {value!r}")
            return {camera: value.replace("{camera}", name) for camera, name in names.items()}
        if not isinstance(value, dict):
            raise ConfigError(
                f"{self._path}: key {key!r} must be a text with {{camera}}, or one text per camera"
            )
        self._check_cameras(key, value)
        for camera in CAMERAS:
            if not isinstance(value.get(camera), str) or not value[camera]:
                raise ConfigError(f"{self._path}: key '{key}.{camera}' is missing or no text")
        return {camera: value[camera] for camera in CAMERAS}

    def _check_cameras(self, key: str, given: dict[str, Any]) -> None:
        for camera in given:
            if camera not in CAMERAS:
                raise ConfigError(
                    f"{self._path}: key '{key}.{camera}' is no camera; known: {', '.join(CAMERAS)}"
                )

    def _check_topic(self, key: str, topic: str) -> None:
        if not TOPIC.fullmatch(topic):
            raise ConfigError(f"{self._path}: key {key!r} holds {topic!r}, which is no absolute topic name")

    def _topic(self, key: str) -> str:
        topic = self._text(key, "")
        if topic:
            self._check_topic(key, topic)
        return topic

    def _text(self, key: str, default: str) -> str:
        value = self._content.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise ConfigError(f"{self._path}: key {key!r} must be a text, got {value!r}")
        return value

    def _choice(self, key: str, legal: tuple[str, ...], default: str = "") -> str:
        value = self._text(key, default)
        if value not in legal:
            raise ConfigError(f"{self._path}: key {key!r} is {value!r}; use {' or '.join(legal)}")
        return value
