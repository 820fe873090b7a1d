# SPDX-License-Identifier: Apache-2.0
"""Python packages that ROS does not bring may be missing: one line says which, and what brings them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.ros.graph import Graph, Running


def without(graph: Graph, folder: Path, name: str) -> None:
    """From here on no process of the graph finds the package `name`."""
    (folder / "sitecustomize.py").write_text(f"import sys\n\nsys.modules[{name!r}] = None\n")
    graph.environment["PYTHONPATH"] = str(folder)


def ends_with_one_line(run: Running, node: str, package: str) -> None:
    assert run.wait() == 2, run.output
    (line,) = (line for line in run.output.splitlines() if line.startswith(f"{node}: error:"))
    assert package in line
    assert "-m pip install -r requirements/node.txt" in line
    assert "Traceback" not in run.output


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_the_detector(graph: Graph, package: Path, tmp_path: Path, missing: str) -> None:
    without(graph, tmp_path, missing)
    ends_with_one_line(graph.node("detector_node", model=package), "detector_node", missing)


def test_the_player_and_the_recorder(graph: Graph, short_bag: Path, tmp_path: Path) -> None:
    without(graph, tmp_path, "rosbags")
    player = graph.node("bag_player_node", bag=short_bag)
    recorder = graph.node("recorder_node", output=tmp_path / "out.mcap", topics="/tf")
    ends_with_one_line(player, "bag_player_node", "rosbags")
    ends_with_one_line(recorder, "recorder_node", "rosbags")


def test_all_of_them(graph: Graph, package: Path, tmp_path: Path) -> None:
    without(graph, tmp_path, "onnx")
    run = graph.start("qdbev_ros.bringup", f"model:={package}")
    ends_with_one_line(run, "detector_node", "onnx")
