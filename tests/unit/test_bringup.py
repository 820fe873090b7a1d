# SPDX-License-Identifier: Apache-2.0
"""The one description of the processes, the parameters' file, the presets and the view."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from qdbev_ros import bringup
from qdbev_ros.bringup import ARGUMENTS, command, describe, parse, recorded_topics
from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.parameters import DetectorParameters, PlayerParameters, RecorderParameters
from qdbev_ros.ros.presets import config_folder, load_preset, preset_names

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "detector_node": DetectorParameters,
    "bag_player_node": PlayerParameters,
    "recorder_node": RecorderParameters,
}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, str]:
    """Arguments whose files exist."""
    (tmp_path / "m.qdbev").touch()
    (tmp_path / "b.mcap").touch()
    return {"model": str(tmp_path / "m.qdbev"), "bag": str(tmp_path / "b.mcap")}


def test_live_cameras_need_the_detector_alone(given: dict[str, str]) -> None:
    processes = describe({"model": given["model"]}).processes
    assert [p.executable for p in processes] == ["detector_node"]
    assert "image_reliability" not in processes[0].parameters


def test_a_bag_a_recording_and_rviz_are_processes_of_their_own(given: dict[str, str]) -> None:
    processes = describe({**given, "record": "out/x.mcap", "rviz": "true", "loop": "true"}).processes
    assert [p.executable for p in processes] == ["detector_node", "recorder_node", "bag_player_node", "rviz2"]
    assert processes[2].parameters["loop"] is True


def test_every_parameter_that_is_passed_is_declared_with_that_type(given: dict[str, str]) -> None:
    arguments = {**given, "record": "x.mcap", "engine": "onnxruntime", "queue_size": "5", "rate": "2"}
    for process in describe(arguments).processes:
        declared = {f.name: type(f.default) for f in dataclasses.fields(KINDS[process.executable])}
        declared["use_sim_time"] = bool
        assert {name: type(value) for name, value in process.parameters.items()}.items() <= declared.items()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": ""}, "model is missing"),
        ({"model": "nowhere.qdbev"}, r"model: /.*/nowhere\.qdbev doesn't exist"),
        ({"bag": "nowhere.mcap"}, r"bag: /.*/nowhere\.mcap doesn't exist"),
        ({"params": "nowhere.yaml"}, r"params: /.*/nowhere\.yaml doesn't exist"),
        ({"record": "run.bag"}, r"record: /.*/run\.bag is no name of an MCAP file"),
        ({"loop": "perhaps"}, "loop is 'perhaps'"),
        ({"rate": "fast"}, "rate is 'fast'"),
        ({"preset": "moon"}, "no preset 'moon'"),
        ({"colour": "red"}, "no argument 'colour'"),
    ],
)
def test_bad_arguments_are_named(given: dict[str, str], change: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        describe({**given, **change})


def test_the_home_folder_may_be_a_tilde(
    given: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    processes = describe({"model": "~/m.qdbev", "bag": "~/b.mcap", "record": "~/out.mcap"}).processes
    paths = [p.parameters[name] for p, name in zip(processes, ("model", "output", "bag"))]
    assert paths == [str(tmp_path / name) for name in ("m.qdbev", "out.mcap", "b.mcap")]


def test_words_are_name_and_value() -> None:
    assert parse(["bag:=a:=b", "loop:=true"]) == {"bag": "a:=b", "loop": "true"}
    with pytest.raises(ConfigError, match="'loop=true' is no argument"):
        parse(["loop=true"])


def test_a_profile_of_the_users_is_left_alone(given: dict[str, str]) -> None:
    ours = describe(given, {}).environment
    assert Path(ours["FASTRTPS_DEFAULT_PROFILES_FILE"]).is_file()
    assert describe(given, {"FASTDDS_DEFAULT_PROFILES_FILE": "mine.xml"}).environment == {}


def test_overrides_win_over_the_parameter_file(given: dict[str, str], tmp_path: Path) -> None:
    """A section of the node's name beats a bare -p, so the overrides are such a section, and come last.

    With the slash: "qdbev_detector" would be merged into a file's section of that name, which others may follow.
    """
    line = command(describe({**given, "engine": "onnxruntime"}).processes[0], tmp_path)
    files = [line[i + 1] for i, word in enumerate(line) if word == "--params-file"]
    assert files[0] == str(config_folder() / "detector.yaml")
    overrides = yaml.safe_load(Path(files[-1]).read_text())
    assert overrides["/qdbev_detector"]["ros__parameters"]["engine"] == "onnxruntime"
    assert line[:3] == [sys.executable, "-m", "qdbev_ros.detector_node"]


def test_the_recording_holds_all_results(given: dict[str, str]) -> None:
    preset = load_preset("nuscenes")
    without = recorded_topics(preset, images=False)
    assert {"/qdbev_detector/detections", "/diagnostics", "/tf_static", "/annotations"} <= set(without)
    assert not set(preset.image_topics()) & set(without)
    assert set(preset.image_topics()) <= set(recorded_topics(preset, images=True))


def test_the_parameter_file_holds_the_defaults() -> None:
    """Of every parameter, but for those that come from the launch arguments alone."""
    file = yaml.safe_load((config_folder() / "detector.yaml").read_text())
    defaults = {f.name: f.default for f in dataclasses.fields(DetectorParameters)}
    assert file["qdbev_detector"]["ros__parameters"] == {
        name: value for name, value in defaults.items() if name not in ("model", "preset")
    }


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_parameter_has_a_text_and_numbers_have_bounds(kind: type) -> None:
    for item in dataclasses.fields(kind):
        assert item.metadata["text"]
        if type(item.default) in (int, float):
            assert item.metadata["low"] <= item.default <= item.metadata["high"]


def rviz_topics(view: str) -> set[str]:
    manager = yaml.safe_load(Path(view).read_text())["Visualization Manager"]
    return {d["Topic"]["Value"] for d in manager["Displays"] if "Topic" in d}


@pytest.mark.parametrize("name", preset_names())
def test_the_rviz_view_shows_what_node_and_bag_publish_with_any_preset(name: str) -> None:
    """After remapping; and the transport, the last part of the shown name, is that of the preset's pictures."""
    preset, rviz = load_preset(name), bringup._rviz(load_preset(name), {})
    view, remapped = rviz.arguments[1], dict(rviz.remappings)
    pictures = {t for t in rviz_topics(view) if t.startswith("/CAM_")}
    assert {t.endswith("/compressed") for t in pictures} == {preset.image_type == "compressed"}
    shown = {remapped.get(topic, topic) for topic in rviz_topics(view)}
    ours = {"/qdbev_detector/markers", "/qdbev_detector/overlay/compressed"}
    assert shown == {*ours, *preset.image_topics(), preset.annotations or "/annotations"}
    assert set(remapped) <= rviz_topics(view)
    assert rviz.arguments[2] == "-f"
    assert rviz.arguments[3] == (preset.base_frame if preset.ego_motion == "odometry" else preset.fixed_frame)


def test_rviz_shows_boxes_in_the_vehicles_frame_where_the_motion_is_odometry(given: dict[str, str]) -> None:
    """Nobody broadcasts preset chris7462's fixed frame then: RViz would show nothing at all."""
    rviz = describe({**given, "preset": "chris7462", "rviz": "true"}).processes[-1]
    assert (rviz.name, rviz.arguments[2:]) == ("rviz2", ("-f", "base_link"))
    rviz = describe({**given, "preset": "bevfusion_demo", "rviz": "true"}).processes[-1]
    assert rviz.arguments[2:] == ("-f", "map")


def test_the_rviz_views_of_compressed_and_raw_pictures_differ_in_these_alone() -> None:
    compressed, raw = (
        yaml.safe_load((config_folder() / name).read_text()) for name in ("qdbev.rviz", "qdbev_raw.rviz")
    )
    for display in compressed["Visualization Manager"]["Displays"]:
        if display["Name"] in CAMERAS:
            display["Topic"]["Value"] = display["Topic"]["Value"].removesuffix("/compressed")
    assert compressed == raw


def test_the_overlay_is_off_in_rviz_until_somebody_ticks_it() -> None:
    displays = yaml.safe_load((config_folder() / "qdbev.rviz").read_text())["Visualization Manager"][
        "Displays"
    ]
    assert [d["Name"] for d in displays if not d["Enabled"]] == ["Overlay"]


def test_rviz_has_a_place_in_its_window_for_every_picture_and_panel() -> None:
    view = yaml.safe_load((config_folder() / "qdbev.rviz").read_text())
    placed = bytes.fromhex(view["Window Geometry"]["QMainWindow State"])
    displays = view["Visualization Manager"]["Displays"]
    images = [d["Name"] for d in displays if d["Class"] == "rviz_default_plugins/Image"]
    names = [*images, *(panel["Name"] for panel in view["Panels"])]
    assert len(names) == len(CAMERAS) + 3
    assert [name for name in names if name.encode("utf-16-be") not in placed] == []


def foxglove_panels(part: Any, configurations: dict[str, Any]) -> Iterator[str]:
    """Names of all panels below a part of the layout, those in tabs among them."""
    if isinstance(part, dict):
        for side in ("first", "second"):
            yield from foxglove_panels(part[side], configurations)
    else:
        yield part
        for tab in configurations[part].get("tabs", []):
            yield from foxglove_panels(tab["layout"], configurations)


def test_the_foxglove_layout_shows_what_the_node_and_the_bag_publish() -> None:
    """Every panel has its settings, and every topic is one of the node's or of preset nuscenes."""
    layout = json.loads((config_folder() / "foxglove_layout.json").read_text())
    panels, topics = layout["configById"], set()
    assert sorted(foxglove_panels(layout["layout"], panels)) == sorted(panels)
    for panel in panels.values():
        topics |= set(panel.get("topics", {})) | set(panel.get("imageMode", {}).values())
        topics |= {panel["topicToRender"]} if "topicToRender" in panel else set()
    preset = load_preset("nuscenes")
    ours = {"/qdbev_detector/markers", "/qdbev_detector/overlay/compressed", "/diagnostics"}
    assert topics == {*preset.image_topics(), *preset.info_topics(), preset.annotations, *ours}


def test_the_launch_file_declares_nothing_of_its_own() -> None:
    """Arguments and processes are described in bringup alone; the launch file only turns them into actions."""
    tree = ast.parse((ROOT / "launch" / "detect.launch.py").read_text())
    strings = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    assert not strings & ({a.name for a in ARGUMENTS} | set(KINDS))
