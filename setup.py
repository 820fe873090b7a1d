# SPDX-License-Identifier: Apache-2.0
"""Builds the ROS package qdbev_ros (ament_python). The programs are listed in setup.cfg."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "qdbev_ros"
HERE = Path(__file__).resolve().parent
# Compiled on the vehicle, for its own CPU.
PACKAGE_DATA = {"qdbev_ros.engine": ["*.c"]}


def shared_files() -> list[tuple[str, list[str]]]:
    """(target folder, files) of everything that goes to share/qdbev_ros, launch/ and config/ with their sub-folders."""
    targets: dict[str, list[str]] = {}
    for top in ("launch", "config"):
        for path in sorted((HERE / top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(HERE)
                targets.setdefault(f"share/{PACKAGE}/{relative.parent.as_posix()}", []).append(
                    relative.as_posix()
                )
    return sorted(targets.items())


if __name__ == "__main__":
    setup(
        name=PACKAGE,
        version="0.1.0",
        description="A 4-bit BEVFormer as a ROS 2 node, and the tools that train and compress it",
        maintainer="QD-BEV for ROS 2 maintainers",
        maintainer_email="maintainers@qdbev.example",
        license="Apache-2.0",
        packages=find_packages(include=["qdbev_ros", "qdbev_ros.*", "qdbev_train", "qdbev_train.*"]),
        package_data=PACKAGE_DATA,
        data_files=[
            ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
            (f"share/{PACKAGE}", ["package.xml"]),
            *shared_files(),
        ],
        install_requires=["setuptools"],
        zip_safe=False,
    )
