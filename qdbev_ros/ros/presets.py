# SPDX-License-Identifier: Apache-2.0
"""Topic names, read from config/presets.yaml."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import yaml

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import CAMERAS, variant_folder


def config_folder() -> Path:
    """config/ of the source tree, or of the installed ROS package's share folder."""
    return variant_folder().parent


@dataclass(frozen=True)
class TopicPreset:
    """Topic names of one rig; `image` and `camera_info` hold {camera}."""

    name: str
    image_type: str  # "compressed" or "raw"
    image: str
    camera_info: str
    odometry: str
    annotations: str

    def __post_init__(self) -> None:
        if self.image_type not in ("compressed", "raw"):
            raise ConfigError(
                f"preset {self.name}: image_type is {self.image_type!r}; use 'compressed' or 'raw'"
            )
        for key in ("image", "camera_info"):
            if "{camera}" not in getattr(self, key):
                raise ConfigError(
                    f"preset {self.name}: {key} must hold {{camera}}, got {getattr(self, key)!r}"
                )

    def image_topic(self, camera: str) -> str:
        return self.image.format(camera=camera)

    def info_topic(self, camera: str) -> str:
        return self.camera_info.format(camera=camera)

    def image_topics(self) -> list[str]:
        return [self.image_topic(camera) for camera in CAMERAS]

    def info_topics(self) -> list[str]:
        return [self.info_topic(camera) for camera in CAMERAS]


def load_preset(name: str, path: Path | None = None) -> TopicPreset:
    """The preset `name`. Raises ConfigError that names the file and the known presets."""
    path = path or config_folder() / "presets.yaml"
    presets = yaml.safe_load(path.read_text())
    if name not in presets:
        raise ConfigError(f"{path}: no preset {name!r}; known: {', '.join(sorted(presets))}")
    keys = {field.name for field in dataclasses.fields(TopicPreset)} - {"name"}
    if set(presets[name]) != keys:
        raise ConfigError(f"{path}: preset {name} must have exactly the keys {sorted(keys)}")
    return TopicPreset(name=name, **presets[name])
