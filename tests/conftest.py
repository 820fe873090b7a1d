# SPDX-License-Identifier: Apache-2.0
"""Which lanes this environment can run. A lane is a folder: unit, train (torch), ros (ROS 2), gpu (torch and CUDA)."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    left_out = {lane: module for lane in NEEDS if (module := _missing(lane))}
    return [
        f"lane {lane}: left out, no {module} here (make test sets it up)" for lane, module in left_out.items()
    ]


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


@pytest.fixture(scope="session", autouse=True)
def engine_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Engines and verdicts of the tests, and of the processes that they start, in a folder of their own."""
    folder = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDBEV_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def nuscenes_root() -> Path:
    """The real scene-0916 (v1.0-mini tables with one scene): $QDBEV_NUSCENES, or shared/data beside the repository."""
    default = TESTS.parents[1] / "shared" / "data" / "nuscenes-scene-0916"
    root = Path(os.environ.get("QDBEV_NUSCENES", default))
    if not (root / "v1.0-mini" / "scene.json").is_file():
        pytest.skip(f"no nuScenes scene-0916 at {root}; QDBEV_NUSCENES names its folder")
    return root


@pytest.fixture(scope="session")
def real_frames(nuscenes_root: Path) -> tuple[Any, ...]:
    """The 41 frames of the real scene-0916."""
    from qdbev_train.data.tables import load_scenes

    return load_scenes(nuscenes_root, "v1.0-mini", scenes=["scene-0916"])["scene-0916"]


@pytest.fixture(scope="session")
def devkit(nuscenes_root: Path) -> Any:
    """The real scene opened by the official devkit: the second opinion on every convention."""
    nuscenes = pytest.importorskip("nuscenes", reason="nuscenes-devkit isn't installed")
    return nuscenes.NuScenes(version="v1.0-mini", dataroot=str(nuscenes_root), verbose=False)


@pytest.fixture(scope="session")
def small_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data set of tests/small_dataset.py; shared, so not to be written to."""
    from tests.small_dataset import write_small_dataset

    root = tmp_path_factory.mktemp("nuscenes") / "small"
    write_small_dataset(root)
    return root
