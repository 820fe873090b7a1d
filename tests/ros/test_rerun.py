# SPDX-License-Identifier: Apache-2.0
"""`qdbev rerun`: what is read back from the .rrd file is what bag and answers hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from qdbev_msgs.msg import DetectedObjectArray

from qdbev_ros.core.boxes import Boxes
from qdbev_ros.core.drawing import COLORS
from qdbev_ros.core.geometry import Pose
from qdbev_ros.core.memory import MemoryInput
from qdbev_ros.core.variant import CAMERAS, CLASSES
from qdbev_ros.ros.bags import BagReader, BagWriter
from qdbev_ros.ros.encode import encode_detections, encode_objects
from qdbev_ros.ros.messages import Answer
from qdbev_ros.ros.presets import load_preset
from qdbev_ros.ros.recording import read_sets, read_transforms, read_views
from qdbev_ros.ros.rerun_export import layout
from qdbev_train.cli import main
from tests.conventions import convert
from tests.ros.drive import LIDAR2EGO, PERIOD_NS, START_NS, edit_bag, ego_pose

dataframe = pytest.importorskip("rerun.dataframe", reason="Rerun is not installed")
blueprint = pytest.importorskip("rerun.blueprint", reason="Rerun is not installed")

STAMPS = [START_NS + i * PERIOD_NS for i in range(4)]
NODE = "/qdbev_detector"


def two_boxes(x: float) -> Boxes:
    """A bus that moves and a cone whose score is below what is shown."""
    return Boxes(
        np.array([[x, 20.0, 0.5], [x, 5.0, 0.0]]), np.array([[2.5, 11.0, 3.0], [0.4, 0.4, 0.8]]),
        np.array([np.pi / 2, 0.0]), np.array([[1.0, 5.0], [0.0, 0.0]]), np.array([0.75, 0.1]),
        np.array([CLASSES.index("bus"), CLASSES.index("traffic_cone")]),
    )  # fmt: skip


def seen_from(stamp: int) -> Any:
    """Origin of the model frame in the fixed frame."""
    return (ego_pose(stamp) @ LIDAR2EGO).translation


@pytest.fixture(scope="module")
def recording(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a node would have answered to the short bag."""
    path = tmp_path_factory.mktemp("rerun") / "answers.mcap"
    writer, memory = BagWriter(path), MemoryInput(np.zeros(18, np.float32), None, 0, 0.0, None)
    writer.add_topic(f"{NODE}/detections", "vision_msgs/msg/Detection3DArray")
    writer.add_topic(f"{NODE}/objects", "qdbev_msgs/msg/DetectedObjectArray")
    for index, stamp in enumerate(STAMPS):
        boxes = two_boxes(float(index))
        answer = Answer(stamp, 0.03, boxes, CAMERAS, {}, None, memory)
        writer.write(f"{NODE}/detections", stamp, encode_detections(stamp, "LIDAR_TOP", boxes))
        objects = encode_objects(DetectedObjectArray, "LIDAR_TOP", boxes, "nano", answer)
        writer.write(f"{NODE}/objects", stamp, objects)
    writer.close()
    return path


@pytest.fixture(scope="module")
def exported(short_bag: Path, recording: Path) -> tuple[dict[str, int], Any]:
    """The counts of the command, and the recording as it is read back."""
    out, counts = recording.with_name("drive.rrd"), recording.with_name("counts.json")
    assert main(["rerun", str(short_bag), str(recording), str(out), "--json", str(counts)]) == 0
    return json.loads(counts.read_text()), dataframe.load_recording(out)


def column(recording: Any, entity: str, component: str) -> tuple[list[int], list[Any]]:
    """Stamps in ns and values of one component of one entity."""
    found = recording.view(index="stamp", contents=entity).select().read_all()
    name = next(n for n in found.schema.names if n.endswith(component) and n.startswith(entity + ":"))
    rows = [
        (stamp.value if hasattr(stamp, "value") else stamp, value)
        for stamp, value in zip(found["stamp"].cast("int64").to_pylist(), found[name].to_pylist())
        if value is not None
    ]
    return [stamp for stamp, _ in rows], [value for _, value in rows]


def test_boxes_stand_where_they_were_seen_with_colour_and_heading(
    exported: tuple[dict[str, int], Any],
) -> None:
    entity = "/world/model/detections"
    stamps, centers = column(exported[1], entity, "centers")
    assert stamps == STAMPS
    np.testing.assert_allclose(centers, [[[i, 20.0, 0.5]] for i in range(4)])
    _, halves = column(exported[1], entity, "half_sizes")
    np.testing.assert_allclose(halves, [[[5.5, 1.25, 1.5]]] * 4)
    _, turns = column(exported[1], entity, "quaternions")
    np.testing.assert_allclose(turns, [[[0, 0, np.sin(np.pi / 4), np.cos(np.pi / 4)]]] * 4, atol=1e-6)
    blue, green, red = COLORS["bus"]
    assert column(exported[1], entity, "colors")[1] == [[red << 24 | green << 16 | blue << 8 | 255]] * 4
    assert column(exported[1], entity, "labels")[1] == [["bus 0.75"]] * 4
    _, headings = column(exported[1], f"{entity}/heading", "strips")
    np.testing.assert_allclose(headings, [[[[i, 20.0, 0.5], [i, 26.0, 0.5]]] for i in range(4)], atol=1e-5)
    _, motion = column(exported[1], "/world/model/motion", "vectors")
    np.testing.assert_allclose(motion, [[[1.0, 5.0, 0.0]]] * 4)


def test_the_vehicle_moves_and_boxes_stay_where_they_were_seen_from(
    exported: tuple[dict[str, int], Any],
) -> None:
    """Pictures between two answers move the vehicle, not the boxes."""
    stamps, places = column(exported[1], "/world/ego", "translation")
    assert set(STAMPS) <= set(stamps)
    for stamp, place in zip(stamps, places):
        np.testing.assert_allclose(place, [ego_pose(stamp).translation], atol=1e-3)
    stamps, frames = column(exported[1], "/world/model", "translation")
    assert stamps == STAMPS
    np.testing.assert_allclose(frames, [[seen_from(stamp)] for stamp in STAMPS], atol=1e-3)


def test_every_picture_and_the_ground_truth_are_in_it(
    exported: tuple[dict[str, int], Any], short_bag: Path
) -> None:
    counts, recording = exported
    assert counts == {"sets": 4, "detections": 4, "annotations": 4, "pictures": 24}
    with BagReader(short_bag) as bag:
        topic = "/CAM_BACK/image_rect_compressed"
        pictures = [bytes(message.data) for _, _, message in bag.messages([topic])]
    _, blobs = column(recording, "/world/CAM_BACK/image", "blob")
    assert [bytes(blob[0]) for blob in blobs] == pictures
    _, truth = column(recording, "/world/truth", "centers")
    assert [len(boxes) for boxes in truth] == [1] * 4


def export(bag: Path, recording: Path, folder: Path, *more: str) -> tuple[int, dict[str, int]]:
    """Exit code of the command, and what it counted."""
    out, counts = folder / "out.rrd", folder / "counts.json"
    code = main(["rerun", str(bag), str(recording), str(out), "--json", str(counts), *more])
    assert out.exists() == (code == 0)
    return code, json.loads(counts.read_text()) if code == 0 else {}


@pytest.mark.parametrize("preset", ["nuscenes2bag", "chris7462"])
def test_a_bag_of_another_convention_with_its_calibration_file_is_shown_whole(
    preset: str, short_bag: Path, recording: Path, calibration: Path, tmp_path: Path
) -> None:
    """One has no CameraInfo and the sensors on /tf alone; the other has no transform, and its motion as Odometry."""
    bag = convert(short_bag, preset, tmp_path / "bag.mcap")
    given = ("--preset", preset, "--calibration", str(calibration))
    assert export(bag, recording, tmp_path, *given) == (0, {"sets": 4, "detections": 4, "pictures": 24})
    shown = dataframe.load_recording(tmp_path / "out.rrd")
    stamps, places = column(shown, "/world/ego", "translation")
    for stamp, place in zip(stamps, places):
        np.testing.assert_allclose(place, [ego_pose(stamp).translation], atol=1e-2)
    _, frames = column(shown, "/world/model", "translation")
    np.testing.assert_allclose(frames, [[seen_from(stamp)] for stamp in STAMPS], atol=1e-2)
    stamps, front = column(shown, "/world/CAM_FRONT", "translation")
    mounted = Pose(np.array([1.0, 0, 0, 0]), np.array([1.2, 0.0, 1.5]))
    places = [[(ego_pose(stamp) @ mounted).translation] for stamp in stamps]
    np.testing.assert_allclose(front, places, atol=1e-2)


def test_without_its_calibration_file_cameras_that_nothing_describes_are_left_out_and_counted(
    short_bag: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = convert(short_bag, "nuscenes2bag", tmp_path / "bag.mcap")
    code, counts = export(bag, recording, tmp_path, "--preset", "nuscenes2bag")
    assert (code, counts) == (0, {"sets": 4, "detections": 4, "cameras left out": 6})
    (line,) = (
        line for line in capsys.readouterr().out.splitlines() if "left out" in line and "rrd" not in line
    )
    assert "CAM_BACK_RIGHT: preset nuscenes2bag has no CameraInfo" in line
    assert "--calibration FILE" in line


def test_without_its_calibration_file_a_bag_that_places_nothing_is_refused_in_one_line(
    short_bag: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = convert(short_bag, "chris7462", tmp_path / "bag.mcap")
    assert export(bag, recording, tmp_path, "--preset", "chris7462") == (2, {})
    error = capsys.readouterr().err
    assert "nothing says where the model frame 'lidar_top_link' is" in error
    assert "--calibration FILE" in error
    assert error.count("\n") == 1


def test_a_camera_info_of_zeros_costs_its_camera_unless_the_calibration_file_has_better(
    short_bag: Path, recording: Path, calibration: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def damage(topic: str, message: Any) -> Any:
        if topic == "/CAM_BACK/camera_info":
            message.k = np.zeros(9)
        return None if topic == "/CAM_FRONT/camera_info" else message

    bag = edit_bag(short_bag, tmp_path / "bag.mcap", damage)
    code, counts = export(bag, recording, tmp_path, "--calibration", str(calibration))
    assert (code, counts["pictures"]) == (0, 24)
    code, counts = export(bag, recording, tmp_path)
    assert (code, counts["pictures"], counts["cameras left out"]) == (0, 16, 2)
    told = capsys.readouterr().out
    assert "CAM_BACK: /CAM_BACK/camera_info: K is no camera matrix" in told
    assert "CAM_FRONT: nothing on /CAM_FRONT/camera_info" in told


def test_the_overview_leaves_a_camera_without_intrinsics_out(short_bag: Path, tmp_path: Path) -> None:
    def damage(topic: str, message: Any) -> Any:
        if topic == "/CAM_BACK/camera_info":
            message.k = np.zeros(9)
        return None if topic == "/CAM_FRONT/camera_info" else message

    preset = load_preset("nuscenes")
    with BagReader(edit_bag(short_bag, tmp_path / "bag.mcap", damage)) as bag:
        views = read_views(
            bag, preset, read_sets(bag, preset)[1], read_transforms(bag), ("map", "base_link", "LIDAR_TOP")
        )
    assert sorted(views) == sorted(set(CAMERAS) - {"CAM_BACK", "CAM_FRONT"})


def test_what_cannot_be_shown_is_refused_in_one_line(
    short_bag: Path, recording: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rerun", str(short_bag), str(short_bag), str(tmp_path / "x.rrd")]) == 2
    assert "holds no answers on /qdbev_detector/detections" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    assert main(["rerun", str(short_bag), str(recording), str(tmp_path / "file" / "x.rrd")]) == 2
    error = capsys.readouterr().err
    assert "file/x.rrd: cannot be written: " in error
    assert error.count("\n") == 1


def test_every_view_shows_entities_that_there_are(exported: tuple[dict[str, int], Any]) -> None:
    entities = {column.entity_path for column in exported[1].schema().component_columns()}

    def check(part: Any) -> int:
        if isinstance(part, blueprint.View):
            shown = [path.removesuffix("/**").replace("$origin", part.origin) for path in part.contents]
            assert {part.origin, *shown, *part.overrides} <= entities
            return 1
        return sum(check(inner) for inner in part.contents)

    assert check(layout().root_container) == 7
