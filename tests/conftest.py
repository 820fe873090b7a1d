# SPDX-License-Identifier: Apache-2.0
"""Which lanes this environment can run. A lane is a folder: unit, train (torch), ros (ROS 2), gpu (torch and CUDA)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
NEEDS = {"train": "torch", "gpu": "torch", "ros": "rclpy"}


def _lane(path: Path) -> str:
    parts = path.relative_to(TESTS).parts if path.is_relative_to(TESTS) else ()
    return parts[0] if parts else ""


def _missing(lane: str) -> str | None:
    module = NEEDS.get(lane)
    return module if module and importlib.util.find_spec(module) is None else None


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """A lane whose module is missing is left out before its tests import it."""
    return True if _missing(_lane(collection_path)) else None


def pytest_report_header() -> list[str]:
    """Says which lanes were left out."""
    return [f"lane {lane}: left out, no {_missing(lane)} here (make test sets it up)" for lane in NEEDS if _missing(lane)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks every test with its lane, and skips the GPU's where there is none."""
    for item in items:
        lane = _lane(item.path)
        if lane in NEEDS:
            item.add_marker(lane)
        if lane == "gpu" and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
