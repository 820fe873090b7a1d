# SPDX-License-Identifier: Apache-2.0
"""The ROS packages: what package.xml, setup.py and CMakeLists.txt say agrees with what is there."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

import link_project
import qdbev_ros
import setup as package_setup

ROOT = Path(__file__).resolve().parents[2]
NODE_SOURCES = sorted((ROOT / "qdbev_ros").rglob("*.py"))
PACKAGE_FILES = [ROOT / "package.xml", ROOT / "msg" / "package.xml"]


def imports(source: Path) -> Iterator[str]:
    """Top-level names of the modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def text(package_xml: Path, tag: str) -> str:
    found = ElementTree.parse(package_xml).findtext(tag)
    assert found is not None
    return found


@pytest.mark.parametrize("source", NODE_SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_node_runs_without_torch(source: Path) -> None:
    assert not {"torch", "torchvision", "lightning_fabric", "nuscenes", "qdbev_train"} & set(imports(source))


def test_every_ros_package_that_the_node_imports_is_declared() -> None:
    tree = ElementTree.parse(ROOT / "package.xml")
    declared = {element.text for element in tree.iter("exec_depend")}
    imported = {name for source in NODE_SOURCES for name in imports(source)}
    ros = {n for n in imported if n.endswith("_msgs") or n in ("rclpy", "launch", "std_srvs")}
    assert not ros - declared


def test_versions_agree() -> None:
    versions = {text(path, "version") for path in PACKAGE_FILES} | {qdbev_ros.__version__}
    versions.update(re.findall(r'version="([^"]+)"', (ROOT / "setup.py").read_text()))
    assert len(versions) == 1


@pytest.mark.parametrize("path", PACKAGE_FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_maintainer_email_is_valid(path: Path) -> None:
    # colcon takes a package with an invalid one for plain Python and doesn't find it.
    maintainer = ElementTree.parse(path).find("maintainer")
    assert maintainer is not None
    assert re.fullmatch(r"[-\w.+]+@[-\w]+\.[-\w.]+", maintainer.get("email", ""))


@pytest.mark.parametrize("name", ["detector_node", "bag_player_node", "recorder_node", "qdbev"])
def test_every_program_has_its_function(name: str) -> None:
    module, function = link_project.programs(ROOT / "setup.cfg")[name]
    source = ROOT / (module.replace(".", "/") + ".py")
    defined = [node.name for node in ast.parse(source.read_text()).body if isinstance(node, ast.FunctionDef)]
    assert function in defined


def test_every_launch_and_config_file_is_installed() -> None:
    installed = {file: target for target, files in package_setup.shared_files() for file in files}
    on_disk = [
        p.relative_to(ROOT) for top in ("launch", "config") for p in (ROOT / top).rglob("*") if p.is_file()
    ]
    for path in (p for p in on_disk if "__pycache__" not in p.parts):
        assert installed.get(path.as_posix()) == f"share/qdbev_ros/{path.parent.as_posix()}"


@pytest.mark.parametrize(
    "folder", ["msg", *(f"scripts/rig/compat_msgs/{n}" for n in ("tf2_msgs", "vision_msgs"))]
)
def test_every_message_is_built_and_its_packages_are_declared(folder: str) -> None:
    cmake = (ROOT / folder / "CMakeLists.txt").read_text()
    files = sorted((ROOT / folder).rglob("*.msg"))
    assert sorted(re.findall(r"(\w+)\.msg\b", cmake)) == [path.stem for path in files]

    name = text(ROOT / folder / "package.xml", "name")
    definitions = "\n".join(
        line.partition("#")[0] for path in files for line in path.read_text().splitlines()
    )
    used = set(re.findall(r"^(\w+)/\w+", definitions, re.MULTILINE)) - {name}
    assert used
    assert used <= set(re.findall(r"find_package\((\w+) REQUIRED\)", cmake))
    assert used == {
        element.text for element in ElementTree.parse(ROOT / folder / "package.xml").iter("depend")
    }


def test_what_is_no_python_in_the_packages_is_installed_as_well() -> None:
    folders = {name.replace(".", "/"): patterns for name, patterns in package_setup.PACKAGE_DATA.items()}
    for top in ("qdbev_ros", "qdbev_train"):
        for path in (ROOT / top).rglob("*.*"):
            if path.is_file() and path.suffix != ".py" and path.parent.name != "__pycache__":
                patterns = folders.get(path.parent.relative_to(ROOT).as_posix(), [])
                assert any(path.match(pattern) for pattern in patterns), f"{path} is not in PACKAGE_DATA"
