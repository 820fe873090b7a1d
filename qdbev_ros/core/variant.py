# SPDX-License-Identifier: Apache-2.0
"""A model variant as data: one frozen description read from YAML, carried inside every package."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qdbev_ros.core.errors import ConfigError

CAMERAS = ("CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_FRONT_LEFT", "CAM_BACK", "CAM_BACK_LEFT", "CAM_BACK_RIGHT")
CLASSES = (
    "car",
    "truck",
    "construction_vehicle",
    "bus",
    "trailer",
    "barrier",
    "motorcycle",
    "bicycle",
    "pedestrian",
    "traffic_cone",
)


@dataclass(frozen=True)
class ImageSpec:
    """How a camera picture becomes the network's input.

    Every picture is resized to (height, width), then zero-padded right and bottom to a multiple of
    `pad_divisor`. `decode` is "full", or "reduced": JPEGs are decoded at the smallest of 1/1, 1/2, 1/4, 1/8
    that still covers (height, width), which is several times faster and a box filter at that.
    """

    height: int
    width: int
    pad_divisor: int
    color: str  # "rgb" or "bgr": channel order of the network's input
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    decode: str

    @property
    def padded_height(self) -> int:
        return -(-self.height // self.pad_divisor) * self.pad_divisor

    @property
    def padded_width(self) -> int:
        return -(-self.width // self.pad_divisor) * self.pad_divisor

    def __post_init__(self) -> None:
        if self.color not in ("rgb", "bgr"):
            raise ConfigError(f"image.color is {self.color!r}; use 'rgb' or 'bgr'")
        if self.decode not in ("full", "reduced"):
            raise ConfigError(f"image.decode is {self.decode!r}; use 'full' or 'reduced'")
        if min(self.height, self.width, self.pad_divisor) < 1 or len(self.mean) != 3 or len(self.std) != 3:
            raise ConfigError(
                "image: height, width and pad_divisor must be positive, mean and std have 3 numbers"
            )


@dataclass(frozen=True)
class BackboneSpec:
    """Backbone and neck. `out_stages` counts from 1 (C2) to 4 (C5); `dcn_stages` likewise."""

    kind: str  # "resnet" or "mobilenet_v2"
    depth: int  # 50 or 101; 0 for mobilenet_v2
    style: str  # "pytorch" (stride in the 3x3) or "caffe" (stride in the first 1x1)
    out_stages: tuple[int, ...]
    dcn_stages: tuple[int, ...]
    neck_levels: int  # feature maps the neck puts out, finest first


@dataclass(frozen=True)
class BevSpec:
    """The bird's-eye grid: row-major (height, width), column grows with +x, row with +y of the LIDAR_TOP frame."""

    height: int
    width: int
    pc_range: tuple[float, float, float, float, float, float]  # x0 y0 z0 x1 y1 z1 in metres, LIDAR_TOP frame
    pillar_points: int

    @property
    def cells(self) -> int:
        return self.height * self.width


@dataclass(frozen=True)
class TransformerSpec:
    """Sizes of the BEV encoder and the decoder (BEVFormer)."""

    channels: int
    heads: int
    ffn_channels: int
    encoder_layers: int
    decoder_layers: int
    queries: int
    tsa_points: int
    sca_points: int
    decoder_points: int
    dropout: float


@dataclass(frozen=True)
class TemporalSpec:
    """Ego motion between frames.

    `rotate_center` is the (x, y) pixel about which the previous BEV is rotated; None means the true centre of
    the map. Released BEVFormer weights were trained with (100, 100) for every map size, which is right for base
    only. `wrap_yaw_delta` wraps can_bus[17] to +-180 degrees; released weights were trained without.
    `dynamics` fills can_bus[7:16]: "can" from a CAN bus file where there is one (else zeros), "poses" from the
    last two ego poses, the same on a vehicle as offline.
    """

    rotate_center: tuple[float, float] | None
    wrap_yaw_delta: bool
    dynamics: str
    queue_length: int


@dataclass(frozen=True)
class Variant:
    """One model variant. `load_variant` reads it; `to_dict` gives back what a manifest stores."""

    name: str
    image: ImageSpec
    backbone: BackboneSpec
    bev: BevSpec
    transformer: TransformerSpec
    temporal: TemporalSpec
    classes: tuple[str, ...] = CLASSES

    def __post_init__(self) -> None:
        if self.transformer.channels % self.transformer.heads:
            raise ConfigError(f"variant {self.name}: channels must be a multiple of heads")
        if self.transformer.sca_points % self.bev.pillar_points:
            raise ConfigError(f"variant {self.name}: sca_points must be a multiple of pillar_points")
        if self.temporal.dynamics not in ("can", "poses"):
            raise ConfigError(f"variant {self.name}: temporal.dynamics must be 'can' or 'poses'")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any, source: str) -> Variant:
        """Builds a variant from plain data; `source` names the file in errors."""
        parts = {
            "image": ImageSpec,
            "backbone": BackboneSpec,
            "bev": BevSpec,
            "transformer": TransformerSpec,
            "temporal": TemporalSpec,
        }
        top = _checked(Variant, data, source, "")
        for key, kind in parts.items():
            top[key] = kind(**_checked(kind, top[key], source, key + "."))
        return Variant(**top)


def _checked(kind: Any, data: Any, source: str, prefix: str) -> dict[str, Any]:
    """The mapping `data` with lists as tuples, refused unless it has exactly the fields of `kind`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: {prefix or 'the file'} must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [prefix + k for k in data if k not in fields]
    missing = [prefix + n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    if unknown or missing:
        raise ConfigError(f"{source}: unknown keys {unknown}, missing keys {missing}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}


def variant_folder() -> Path:
    """config/variants of the source tree, or of the installed ROS package's share folder."""
    source = Path(__file__).resolve().parents[2] / "config" / "variants"
    if source.is_dir():
        return source
    from ament_index_python.packages import get_package_share_directory

    return Path(get_package_share_directory("qdbev_ros")) / "config" / "variants"


def load_variant(name: str | Path) -> Variant:
    """Reads a variant by name ("nano", "tiny", "small", "base") or from the path of a YAML file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = variant_folder() / f"{name}.yaml"
    try:
        data = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in variant_folder().glob("*.yaml")))
        raise ConfigError(f"no variant {str(name)!r} ({path}); known: {known}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    return Variant.from_dict(data, str(path))
