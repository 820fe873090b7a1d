# SPDX-License-Identifier: Apache-2.0
"""The scripts around the environment: linking the checkout, packing message packages, counting tests."""

from __future__ import annotations

import base64
import hashlib
import runpy
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import link_project
import run_tests
from rig import pack_wheel

SETUP_CFG = """
[options.entry_points]
console_scripts =
    hello_node = hello_package.node:main
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small project with one program that says how it was called and leaves with 3."""
    root = tmp_path / "a checkout"
    (root / "hello_package").mkdir(parents=True)
    (root / "setup.cfg").write_text(SETUP_CFG)
    (root / "hello_package" / "node.py").write_text(
        "import sys\ndef main():\n    print('hello', *sys.argv[1:])\n    return 3\n"
    )
    (root / "config").mkdir()
    (root / "config" / "detector.yaml").write_text("rate: 12\n")
    return root


@pytest.fixture
def venv(checkout: Path) -> Path:
    """The bare bones of a virtual environment: bin/python and a site-packages folder."""
    folder = checkout / ".venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "site-packages").mkdir()
    (folder / "bin" / "python").symlink_to(sys.executable)
    return folder


def test_linked_program_runs_with_arguments_and_exit_code(checkout: Path, venv: Path) -> None:
    link_project.link_project(checkout, venv, venv / "site-packages")
    # ROS finds programs in lib/PACKAGE, people in bin; the folder's name has a blank in it.
    for program in (venv / "bin" / "hello_node", venv / "lib" / "qdbev_ros" / "hello_node"):
        environment = {"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            [program, "a", "b c"], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == ("hello a b c\n", 3)


def test_a_linked_program_may_start_processes_that_import_it(
    checkout: Path, venv: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `spawn` does: scenes are made side by side."""
    monkeypatch.syspath_prepend(str(checkout))
    link_project.link_project(checkout, venv, venv / "site-packages")
    runpy.run_path(str(venv / "bin" / "hello_node"), run_name="__mp_main__")  # a program that ran would exit


def test_linked_checkout_is_a_ros_prefix_that_follows_edits(checkout: Path, venv: Path) -> None:
    for _ in range(2):  # a second time must not fail on what is there
        link_project.link_project(checkout, venv, venv / "site-packages")
    assert (venv / "share/ament_index/resource_index/packages/qdbev_ros").exists()
    (checkout / "config" / "detector.yaml").write_text("rate: 6\n")
    assert (venv / "share/qdbev_ros/config/detector.yaml").read_text() == "rate: 6\n"
    assert (venv / "site-packages" / "qdbev_ros_checkout.pth").read_text() == f"{checkout}\n"


def test_launch_files_lie_in_a_real_folder_since_ros2_launch_follows_no_linked_one(
    checkout: Path, venv: Path
) -> None:
    (checkout / "launch").mkdir()
    (checkout / "launch" / "detect.launch.py").write_text("")
    link_project.link_project(checkout, venv, venv / "site-packages")
    folder = venv / "share/qdbev_ros/launch"
    assert folder.is_dir()
    assert not folder.is_symlink()
    assert (folder / "detect.launch.py").resolve() == checkout / "launch" / "detect.launch.py"
    (checkout / "launch" / "detect.launch.py").unlink()
    link_project.link_project(checkout, venv, venv / "site-packages")
    assert not (folder / "detect.launch.py").is_symlink()


def test_wheel_holds_what_runs_and_its_record_is_true(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    python = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages/some_msgs"
    kept = [f"{python}/__init__.py", "lib/libsome_msgs.so", "share/some_msgs/msg/A.msg"]
    kept.append("share/ament_index/resource_index/packages/some_msgs")
    dropped = [f"{python}/_a.c", "include/some_msgs/a.h", "share/some_msgs/cmake/some_msgsConfig.cmake"]
    for name in kept + dropped:
        path = prefix / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)

    wheel = pack_wheel.pack(prefix, tmp_path / "out")

    with zipfile.ZipFile(wheel) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
        modes = {entry.filename: entry.external_attr >> 16 for entry in archive.infolist()}
    data = "qdbev_ros_messages-0.1.0.data/data/"
    info = "qdbev_ros_messages-0.1.0.dist-info/"
    expected = {"some_msgs/__init__.py", *(data + name for name in kept[1:])}
    assert {name for name in contents if not name.startswith(info)} == expected
    assert modes[data + "lib/libsome_msgs.so"] == 0o755
    for line in contents[info + "RECORD"].decode().splitlines():
        name, digest, size = line.rsplit(",", 2)
        if digest:
            sha256 = base64.urlsafe_b64encode(hashlib.sha256(contents[name]).digest()).decode().rstrip("=")
            assert (digest, int(size)) == (f"sha256={sha256}", len(contents[name]))
    assert [path.name for path in wheel.parent.iterdir()] == [wheel.name]  # nothing half-written stays


REPORT = """<testsuites><testsuite>
<testcase name="a"/><testcase name="b"/>
<testcase name="c"><failure message="no"/></testcase>
<testcase name="d"><error message="no fixture"/></testcase>
<testcase name="e"><skipped message="no CUDA device"/></testcase>
</testsuite></testsuites>"""


def test_lane_counts_come_from_the_report(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    report.write_text(REPORT)
    result = run_tests.read_report("gpu", report, exit_code=1, seconds=2.0)
    assert (result.passed, result.failed, result.skipped) == (2, 2, 1)
    assert "1 x no CUDA device" in result.line()
    assert [line.split("::")[1] for line in result.failures] == ["c: no", "d: no fixture"]


def test_what_failed_runs_once_more_and_is_named_as_unsteady_when_it_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests" / "unit").mkdir(parents=True)
    (tmp_path / "tests" / "unit" / "test_some.py").write_text(
        "from pathlib import Path\n"
        "def test_fine(): pass\n"
        "def test_late():\n"
        "    first = not Path('seen').exists()\n"
        "    Path('seen').touch()\n"
        "    assert not first, 'too late'\n"
        "def test_wrong(): assert False, 'always'\n"
    )
    monkeypatch.setattr(run_tests, "ROOT", tmp_path)
    result = run_tests.run_lane("unit", [])
    assert (result.passed, result.failed) == (2, 1)
    assert ["::test_wrong: AssertionError: always" in line for line in result.failures] == [True]
    assert ["::test_late: AssertionError: too late" in line for line in result.unsteady] == [True]


@pytest.mark.parametrize(("exit_code", "failed"), [(0, 0), (5, 0), (2, 1), (-11, 1)])
def test_lane_that_leaves_no_report_fails_unless_it_was_empty(
    tmp_path: Path, exit_code: int, failed: int
) -> None:
    # 5: nothing collected. 2: interrupted or a collection error. -11: the interpreter crashed.
    assert run_tests.read_report("ros", tmp_path / "none.xml", exit_code, 0.0).failed == failed
