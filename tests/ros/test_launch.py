# SPDX-License-Identifier: Apache-2.0
"""The launch file under the real `ros2 launch`, where that is installed."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from qdbev_ros.bringup import ARGUMENTS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.recording import read_detections
from tests.ros.drive import PERIOD_NS, START_NS
from tests.ros.graph import Graph, Running, child
from tests.ros.rig import Rig, patient

LAUNCH_FILE = Path(__file__).resolve().parents[2] / "launch" / "detect.launch.py"
pytestmark = pytest.mark.skipif(shutil.which("ros2") is None, reason="ros2 launch is not installed")


def launch(graph: Graph, *arguments: str) -> Running:
    return graph.command("ros2", "launch", str(LAUNCH_FILE), *arguments)


def test_every_argument_is_shown_with_its_text(graph: Graph) -> None:
    shown = graph.command("ros2", "launch", "--show-args", str(LAUNCH_FILE))
    assert shown.wait() == 0
    for argument in ARGUMENTS:
        assert f"'{argument.name}':" in shown.output
        assert argument.text in shown.output


def test_a_bag_is_answered_and_everything_ends_by_itself(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.mcap"
    run = launch(graph, f"model:={package}", f"bag:={short_bag}", f"record:={out}", "queue_size:=4")
    assert run.wait() == 0, run.output
    with BagReader(out) as recording:
        expected = [START_NS + i * PERIOD_NS for i in range(4)]
        assert sorted(read_detections(recording, "qdbev_detector")) == expected


def test_ctrl_c_ends_everything_cleanly(graph: Graph, package: Path, short_bag: Path) -> None:
    run = launch(graph, f"model:={package}", f"bag:={short_bag}", "loop:=true")
    run.wait_for("pass 2")
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 0, run.output
    assert "Traceback" not in run.output


def test_bad_arguments_and_failing_processes_fail_the_launch(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    missing = launch(graph, f"model:={package}", "bag:=nowhere.mcap")
    assert missing.wait() == 1
    assert "nowhere.mcap doesn't exist" in missing.output
    (tmp_path / "text.mcap").write_text("no bag at all")
    failing = launch(graph, f"model:={package}", f"bag:={tmp_path / 'text.mcap'}")
    assert failing.wait() == 1
    assert "text.mcap cannot be read" in failing.output


INCLUDED = """
from launch import LaunchDescription
from launch.actions import GroupAction, IncludeLaunchDescription
from launch.launch_description_sources import PythonLaunchDescriptionSource
from launch_ros.actions import PushRosNamespace


def generate_launch_description():
    detect = IncludeLaunchDescription(PythonLaunchDescriptionSource({file!r}), launch_arguments={arguments!r})
    return LaunchDescription([GroupAction([PushRosNamespace("car1"), detect])])
"""


def test_under_a_namespace_the_nodes_stay_where_presets_recorder_and_parameter_files_name_them(
    graph: Graph, package: Path, short_bag: Path, tmp_path: Path
) -> None:
    """Sections of a parameter file are by the node's full name; the recording is of full names of topics."""
    out, params, vehicle = tmp_path / "out.mcap", tmp_path / "params.yaml", tmp_path / "vehicle.launch.py"
    params.write_text("qdbev_detector: {ros__parameters: {max_detections: 7}}")
    arguments = {
        "model": str(package), "bag": str(short_bag), "record": str(out), "params": str(params), "queue_size": "4",
    }  # fmt: skip
    vehicle.write_text(INCLUDED.format(file=str(LAUNCH_FILE), arguments=list(arguments.items())))
    run = graph.command("ros2", "launch", str(vehicle))
    assert run.wait() == 0, run.output
    with BagReader(out) as recording:
        answers = read_detections(recording, "qdbev_detector")
    assert [len(boxes) for boxes in answers.values()] == [7] * 4


def test_without_a_bag_a_recorder_that_dies_is_told_and_detection_goes_on(
    graph: Graph, package: Path, tmp_path: Path
) -> None:
    pytest.importorskip("qdbev_msgs", reason="qdbev_msgs tells which cameras were used")
    run = launch(graph, f"model:={package}", f"record:={tmp_path / 'lost.mcap'}", patient(tmp_path))
    run.wait_for("ready: nano")
    child(run, "recorder_node").kill()
    run.wait_for("the detector goes on without it")
    with Rig(graph, run) as rig:
        assert rig.ask()
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 1, "scripts see that the recording failed"
    assert run.output.rstrip().rsplit("\n", 1)[1].startswith("[ERROR]")
