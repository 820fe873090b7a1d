# SPDX-License-Identifier: Apache-2.0
"""What is quantised to how many bits, and how ranges are found: plain data that travels with a checkpoint."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from qdbev_ros.core.errors import ConfigError
from qdbev_train.settings import PLAIN, require_plain

# In the order of the data flow, which is also the order of progressive training.
PARTS = ("backbone", "neck", "encoder", "decoder")
FLOAT = 32
BITS = (*range(2, 9), FLOAT)


@dataclass(frozen=True)
class Override:
    """Layers and embeddings whose name matches `pattern` (shell style) differ from the rule; 32 bits mean float."""

    pattern: str
    weight: int
    activation: int
    reason: str

    def __post_init__(self) -> None:
        if self.weight not in BITS or self.activation not in BITS:
            raise ConfigError(f"quantisation override {self.pattern!r}: bits must be 2 to 8, or 32 for float")
        if FLOAT in (self.weight, self.activation) and self.weight != self.activation:
            raise ConfigError(f"quantisation override {self.pattern!r}: a float layer has 32 bits in both")


# Seven bits where eight would do: CPUs without VNNI add pairs of 8 x 8 bit products in 16 bits, which can overflow.
EXCEPTIONS = (
    Override("img_backbone.features.0.0", 7, 8, "first convolution: it sees the picture itself"),
    Override("img_backbone.conv1", 7, 8, "first convolution: it sees the picture itself"),
    Override("*.cls_branches.*.6", 7, 8, "last layer of a branch: its output is the answer"),
    Override("*.reg_branches.*.4", 7, 8, "last layer of a branch: its output is the answer"),
    Override(
        "*.can_bus_mlp.*", FLOAT, FLOAT, "can_bus mixes metres, unit quaternions and degrees in one vector"
    ),
    Override("*.reference_points", FLOAT, FLOAT, "works on constants: engines compute it once, at load"),
    Override("*.conv_offset", 7, 8, "says where a deformable convolution looks: a pixel's fraction matters"),
    # Eight bits, because nothing multiplies by it.
    Override("*.query_embedding", 8, 8, "says where on the map a query looks first: metres at four bits"),
)
# What stays out even where every layer is asked for.
STRICT = tuple(o for o in EXCEPTIONS if o.pattern == "*.reference_points")


@dataclass(frozen=True)
class QuantConfig:
    """Bits and range methods. `parts` are quantised, the others stay float; the first matching override wins.

    weight_range: "minmax" (the paper's) or "mse" · weight_rounding: "nearest", or "output" for the codes with the least
    error at the layer's output (in post-training quantisation) · activation_range: "minmax", "percentile" or "mse" ·
    bias_correction: shift biases so that the mean output of every channel is that of the float model ·
    scales: what they do in training: "fixed" as calibrated, "running" (min-max ranges that follow the weights and, with
    `momentum`, the activations: the paper's), or "learned" (LSQ: steps are parameters)
    """

    parts: tuple[str, ...] = PARTS
    weight_bits: int = 4
    activation_bits: int = 6
    overrides: tuple[Override, ...] = EXCEPTIONS
    weight_range: str = "mse"
    weight_rounding: str = "output"
    activation_range: str = "mse"
    percentile: float = 99.99
    bias_correction: bool = True
    scales: str = "fixed"
    momentum: float = 0.95

    def __post_init__(self) -> None:
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown:
            raise ConfigError(f"quantisation: unknown parts {unknown}; known: {list(PARTS)}")
        if self.weight_bits not in BITS[:-1] or self.activation_bits not in BITS[:-1]:
            raise ConfigError("quantisation: weight_bits and activation_bits must be 2 to 8")
        choices = {
            "weight_range": ("minmax", "mse"),
            "weight_rounding": ("nearest", "output"),
            "activation_range": ("minmax", "percentile", "mse"),
            "scales": ("fixed", "running", "learned"),
        }
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ConfigError(f"quantisation: {key} {getattr(self, key)!r}; use one of {list(allowed)}")
        if self.scales == "running" and (self.weight_range, self.activation_range) != ("minmax", "minmax"):
            raise ConfigError("quantisation: running scales are min-max ranges; set both ranges to 'minmax'")
        if not 0.0 < self.momentum < 1.0 or not 0.0 < self.percentile <= 100.0:
            raise ConfigError(
                "quantisation: momentum must be between 0 and 1, percentile above 0 and at most 100"
            )

    def override(self, name: str) -> Override | None:
        """The exception that applies to the layer of this name, if any."""
        return next((o for o in self.overrides if fnmatchcase(name, o.pattern)), None)

    def bits(self, name: str) -> tuple[int, int]:
        """(weight bits, activation bits) of the layer of this name; 32 means that it stays float."""
        exception = self.override(name)
        return (
            (exception.weight, exception.activation)
            if exception
            else (self.weight_bits, self.activation_bits)
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(data: Any) -> QuantConfig:
        """The inverse of `to_dict`, also of its JSON; missing keys keep their defaults."""
        fields = {f.name for f in dataclasses.fields(QuantConfig)}
        if not isinstance(data, dict) or set(data) - fields:
            unknown = sorted(set(data) - fields) if isinstance(data, dict) else type(data).__name__
            raise ConfigError(f"quantisation: unknown keys {unknown}; known: {sorted(fields)}")
        _check_types(QuantConfig, data, "quantisation")
        values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        if "overrides" in values:
            values["overrides"] = tuple(_override(o) for o in values["overrides"])
        return QuantConfig(**values)


def _override(data: Any) -> Override:
    fields = [f.name for f in dataclasses.fields(Override)]
    if not isinstance(data, dict) or set(data) != set(fields):
        raise ConfigError(f"quantisation: overrides: {data!r} is no mapping of {', '.join(fields)}")
    _check_types(Override, data, "quantisation: overrides")
    return Override(**data)


def _check_types(kind: type[QuantConfig | Override], data: dict[str, Any], source: str) -> None:
    """Raises ConfigError where a value isn't what the field of `kind` asks for; tuples may be lists."""
    for field in dataclasses.fields(kind):
        if field.name in data:
            value, wanted, where = data[field.name], str(field.type), f"{source}: {field.name}"
            if wanted in PLAIN:
                require_plain(value, wanted, where)
            elif not isinstance(value, (list, tuple)):
                raise ConfigError(f"{where} is {value!r}, expected a list")
