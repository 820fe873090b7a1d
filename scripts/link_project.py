# SPDX-License-Identifier: Apache-2.0
"""link_project.py VENV: makes the checkout usable from a virtual environment without building or copying anything.

Run by the environment's own Python. It puts the source folder on the path, writes the programs of setup.cfg to
VENV/bin, and lays the environment out as a ROS prefix holding qdbev_ros (share/, lib/qdbev_ros/, ament index), so
that `ros2 run`, `ros2 launch` and ament_index_python find launch/, config/ and the nodes, always the current ones.
"""

from __future__ import annotations

import configparser
import os
import shutil
import sys
import sysconfig
from pathlib import Path

PACKAGE = "qdbev_ros"
# A shebang holds neither blanks nor more than 127 characters; sh starts the interpreter instead, and Python reads
# the same line as a string.
PROGRAM = """#!/bin/sh
'''exec' "{python}" "$0" "$@"
'''
import sys

from {module} import {function}

if __name__ == "__main__":  # processes that a program spawns import it
    sys.exit({function}())
"""


def programs(setup_cfg: Path) -> dict[str, tuple[str, str]]:
    """Program name -> (module, function), from the entry points in setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read_string(setup_cfg.read_text())
    lines = parser["options.entry_points"]["console_scripts"].split("\n")
    pairs = (line.split("=") for line in lines if line.strip())
    targets = {name.strip(): target.strip().partition(":") for name, target in pairs}
    return {name: (module, function) for name, (module, _, function) in targets.items()}


def link(path: Path, target: Path) -> None:
    """Makes `path` a symbolic link to `target`, replacing a link that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def link_tree(path: Path, target: Path) -> None:
    """Makes `path` a folder like `target` whose files are links: `ros2 launch` looks into no linked folder."""
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)
    for file in sorted(target.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            link(path / file.relative_to(target), file)


def link_project(root: Path, venv: Path, site_packages: Path) -> None:
    """Links the checkout at `root` into the environment `venv`."""
    (site_packages / f"{PACKAGE}_checkout.pth").write_text(f"{root}\n")
    for name, (module, function) in programs(root / "setup.cfg").items():
        script = venv / "bin" / name
        script.write_text(PROGRAM.format(python=venv / "bin" / "python", module=module, function=function))
        script.chmod(0o755)
        link(venv / "lib" / PACKAGE / name, Path(os.path.relpath(script, venv / "lib" / PACKAGE)))
    link(venv / "share" / PACKAGE / "package.xml", root / "package.xml")
    for name in ("launch", "config"):
        link_tree(venv / "share" / PACKAGE / name, root / name)
    index = venv / "share" / "ament_index" / "resource_index" / "packages"
    index.mkdir(parents=True, exist_ok=True)
    (index / PACKAGE).touch()


if __name__ == "__main__":
    link_project(
        Path(__file__).resolve().parents[1], Path(sys.argv[1]).absolute(), Path(sysconfig.get_path("purelib"))
    )
