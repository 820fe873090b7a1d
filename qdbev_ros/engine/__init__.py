# SPDX-License-Identifier: Apache-2.0
"""Running a `.qdbev` package: `load_package(path).infer(...)`. No torch, no ROS."""

from __future__ import annotations

from qdbev_ros.engine.backends import BACKENDS
from qdbev_ros.engine.engine import Engine, InferenceResult, load_package
from qdbev_ros.engine.package import Package, read_package, write_package

__all__ = [
    "BACKENDS",
    "Engine",
    "InferenceResult",
    "Package",
    "load_package",
    "read_package",
    "write_package",
]
