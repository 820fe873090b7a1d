# SPDX-License-Identifier: Apache-2.0
"""Settings out of YAML and JSON: whether a value is of the plain type that a dataclass asks for."""

from __future__ import annotations

from typing import Any

from qdbev_ros.core.errors import ConfigError

PLAIN: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}


def require_plain(value: Any, wanted: str, source: str) -> None:
    """Raises ConfigError, naming `source`, where `value` is not of the type `wanted`, a key of PLAIN."""
    if not isinstance(value, PLAIN[wanted]) or (wanted == "bool") != isinstance(value, bool):
        raise ConfigError(f"{source} is {value!r}, expected {wanted}")
