# SPDX-License-Identifier: Apache-2.0
"""A model variant as data: one frozen description read from YAML, carried inside every package."""

from __future__ import annotations

import dataclasses
import math
import typing
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
MAX_LEVELS = 4  # BEVFormer has an embedding for each of four feature levels, whatever number is in use


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
        if min(self.height, self.width, self.pad_divisor, *self.std) <= 0:
            raise ConfigError("image: height, width, pad_divisor and std must be positive")


@dataclass(frozen=True)
class BackboneSpec:
    """Backbone and neck. `out_stages` counts from 1 (C2) to 4 (C5); `dcn_stages` likewise."""

    kind: str  # "resnet" or "mobilenet_v2"
    depth: int  # 50 or 101; 0 for mobilenet_v2
    style: str  # "pytorch" (stride in the 3x3) or "caffe" (stride in the first 1x1)
    out_stages: tuple[int, ...]
    dcn_stages: tuple[int, ...]
    neck_levels: int  # feature maps the neck puts out, finest first: 1 to 4

    def __post_init__(self) -> None:
        if self.kind not in ("resnet", "mobilenet_v2"):
            raise ConfigError(f"backbone.kind is {self.kind!r}; use 'resnet' or 'mobilenet_v2'")
        if self.kind == "resnet" and self.depth not in (50, 101):
            raise ConfigError(f"backbone: a resnet of depth {self.depth}; use 50 or 101")
        if self.style not in ("pytorch", "caffe"):
            raise ConfigError(f"backbone.style is {self.style!r}; use 'pytorch' or 'caffe'")
        if self.kind == "mobilenet_v2" and (self.depth, self.style, self.dcn_stages) != (0, "pytorch", ()):
            raise ConfigError("backbone: mobilenet_v2 has depth 0, style 'pytorch' and no dcn_stages")
        stages = range(1, 5)
        if not self.out_stages or [s for s in stages if s in self.out_stages] != list(self.out_stages):
            raise ConfigError(
                f"backbone.out_stages is {list(self.out_stages)}; list some of 1 to 4, ascending"
            )
        if not set(self.dcn_stages) <= set(range(1, self.out_stages[-1] + 1)):
            raise ConfigError(
                f"backbone.dcn_stages is {list(self.dcn_stages)}; stages 1 to {self.out_stages[-1]} are built"
            )
        if not 1 <= self.neck_levels <= MAX_LEVELS:
            raise ConfigError(f"backbone.neck_levels is {self.neck_levels}; use 1 to {MAX_LEVELS}")


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

    def __post_init__(self) -> None:
        if min(self.height, self.width, self.pillar_points) < 1:
            raise ConfigError("bev: height, width and pillar_points must be positive")
        low, high = self.pc_range[:3], self.pc_range[3:]
        if not all(-math.inf < a < b < math.inf for a, b in zip(low, high)):
            raise ConfigError(
                f"bev.pc_range is {list(self.pc_range)}; give x0 y0 z0 x1 y1 z1 with x0 < x1 and so on"
            )


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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "dropout" and value < 1:
                raise ConfigError(f"transformer.{name} is {value}; it must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"transformer.dropout is {self.dropout}; use 0 to less than 1")
        if self.channels % self.heads or self.channels % 2:
            raise ConfigError(
                f"transformer.channels is {self.channels}; it must be even and a multiple of heads ({self.heads})"
            )


@dataclass(frozen=True)
class TemporalSpec:
    """Ego motion between frames.

    `rotate_center` is the (x, y) pixel about which the previous BEV is rotated; None means the true centre of
    the map. Released BEVFormer weights were trained with (100, 100) for every map size, which is right for base
    only. `wrap_yaw_delta` wraps can_bus[17] to +-180 degrees; released weights were trained without.
    `dynamics` fills can_bus[7:16]: "can" from a CAN bus where there is one, else as "poses": from the
    last two ego poses, the same on a vehicle as offline.
    """

    rotate_center: tuple[float, float] | None
    wrap_yaw_delta: bool
    dynamics: str
    queue_length: int

    def __post_init__(self) -> None:
        if self.dynamics not in ("can", "poses"):
            raise ConfigError(f"temporal.dynamics is {self.dynamics!r}; use 'can' or 'poses'")
        if self.queue_length < 1:
            raise ConfigError(f"temporal.queue_length is {self.queue_length}; it must be positive")
        if self.rotate_center is not None and not all(math.isfinite(c) for c in self.rotate_center):
            raise ConfigError("temporal.rotate_center must be two finite numbers, or null")


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
        if self.transformer.sca_points % self.bev.pillar_points:
            raise ConfigError(
                f"variant {self.name}: transformer.sca_points ({self.transformer.sca_points}) must be a multiple of "
                f"bev.pillar_points ({self.bev.pillar_points})"
            )
        if not self.classes:
            raise ConfigError(f"variant {self.name}: no classes")

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
        specs = {key: _checked(kind, top[key], source, key + ".") for key, kind in parts.items()}
        try:
            return Variant(**{**top, **{key: kind(**specs[key]) for key, kind in parts.items()}})
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from error


def _checked(kind: Any, data: Any, source: str, prefix: str) -> dict[str, Any]:
    """The mapping `data` with lists as tuples, refused unless it has exactly the fields and types of `kind`."""
    if not isinstance(data, dict):
        raise ConfigError(f"{source}: {prefix or 'the file'} must be a mapping")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = [prefix + k for k in data if k not in fields]
    missing = [prefix + n for n, f in fields.items() if n not in data and f.default is dataclasses.MISSING]
    if unknown or missing:
        raise ConfigError(f"{source}: unknown keys {unknown}, missing keys {missing}")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    for name, hint in typing.get_type_hints(kind).items():
        if name in values and not _fits(values[name], hint):
            wanted = hint.__name__ if isinstance(hint, type) else str(hint)
            raise ConfigError(f"{source}: {prefix}{name} is {data[name]!r}; it must be {wanted}")
    return values


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value is what a field's type asks for; the parts of a variant are looked into later."""
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    alternatives = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, tuple):
            return False
        kinds = alternatives[:1] * len(value) if alternatives[-1] is Ellipsis else alternatives
        return len(kinds) == len(value) and all(map(_fits, value, kinds))
    if alternatives:
        return any(_fits(value, a) for a in alternatives)
    return dataclasses.is_dataclass(hint) or isinstance(value, hint)


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
