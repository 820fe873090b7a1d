# SPDX-License-Identifier: Apache-2.0
"""The doctor over bags: every fault planted in a slice of the demo's bag is named, and good bags are called good."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from qdbev_ros.core.doctor import diagnose
from qdbev_ros.core.variant import CAMERAS
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.observe import best_preset, observe_bag
from qdbev_train.bags.messages import TYPES
from qdbev_train.cli import main
from tests.conventions import Entry, write_bag

DEMO = Path(__file__).resolve().parents[2] / "demo" / "town.mcap"
SETS = 10
FRONT = "/CAM_FRONT/image_rect_compressed"
FRONT_INFO = "/CAM_FRONT/camera_info"
Fault = Callable[[list[Entry]], list[Entry]]


@pytest.fixture(scope="module")
def healthy() -> list[Entry]:
    """The first five seconds of the demo."""
    with BagReader(DEMO) as bag:
        entries = list(bag.messages(list(bag.types)))
    until = [log for topic, log, _ in entries if topic == FRONT][SETS] - 50_000_000
    return [entry for entry in entries if entry[1] < until and entry[0] != "/annotations"]


def stamp(header: Any) -> int:
    return int(header.stamp.sec * 10**9 + header.stamp.nanosec)


def set_stamp(header: Any, ns: int) -> None:
    header.stamp.sec, header.stamp.nanosec = ns // 10**9, ns % 10**9


def images(entries: list[Entry]) -> Iterator[Any]:
    return (message for topic, _, message in entries if topic.endswith("image_rect_compressed"))


def each(topic: str, edit: Callable[[Any], None]) -> Fault:
    """Edits every message of a topic, or of all topics that end so."""

    def fault(entries: list[Entry]) -> list[Entry]:
        for name, _, message in entries:
            if name.endswith(topic):
                edit(message)
        return entries

    return fault


def transforms(child: str, edit: Callable[[Any], None]) -> Fault:
    """Edits every transform of a frame."""

    def fault(entries: list[Entry]) -> list[Entry]:
        for topic, _, message in entries:
            if topic in ("/tf", "/tf_static"):
                for transform in message.transforms:
                    if transform.child_frame_id == child:
                        edit(transform)
        return entries

    return fault


def without(keep: Callable[[Entry], bool]) -> Fault:
    return lambda entries: [entry for entry in entries if keep(entry)]


def redrawn(edit: Callable[[Any], Any]) -> Fault:
    """Every picture decoded, edited and encoded again."""

    def fault(message: Any) -> None:
        picture = edit(cv2.imdecode(message.data, cv2.IMREAD_COLOR))
        message.data = cv2.imencode(".jpg", picture)[1].ravel()

    return each("image_rect_compressed", fault)


def fill(info: Any, value: float) -> None:
    info.k[:], info.p[:] = value, value


def set_entry(matrix: Any, index: int) -> None:
    matrix[index] = 0.0


def scale_k(info: Any) -> None:
    info.k[:6] *= 0.5
    info.p[:7] *= 0.5


def double(info: Any) -> None:
    info.width, info.height = info.width * 2, info.height * 2
    info.k[:6] *= 2
    info.p[:7] *= 2


def distort(info: Any) -> None:
    info.d[:2] = -0.3, 0.1


def turn(x: float, y: float, z: float, w: float) -> Callable[[Any], None]:
    def edit(transform: Any) -> None:
        rotation = transform.transform.rotation
        rotation.x, rotation.y, rotation.z, rotation.w = x, y, z, w

    return edit


def invert(transform: Any) -> None:
    rotation = transform.transform.rotation
    rotation.x, rotation.y, rotation.z = -rotation.x, -rotation.y, -rotation.z


def later(topic: str, seconds: float, stamps: bool = False) -> Fault:
    """Moves the receipt of a topic, with its stamps or without."""

    def fault(entries: list[Entry]) -> list[Entry]:
        for name, _, message in entries:
            if name == topic and stamps:
                set_stamp(message.header, stamp(message.header) + round(seconds * 1e9))
        return [(t, log + round(seconds * 1e9) if t == topic else log, m) for t, log, m in entries]

    return fault


def tf_hole(entries: list[Entry]) -> list[Entry]:
    start = entries[0][1]
    return [e for e in entries if e[0] != "/tf" or not 1.2e9 < e[1] - start < 3.4e9]


def stamped_at_receipt(entries: list[Entry]) -> list[Entry]:
    """Pictures come 15 to 75 ms late, and get their stamp 1 ms before they are recorded."""
    rng = np.random.default_rng(3)
    moved = []
    for topic, log, message in entries:
        if topic == FRONT:
            log += int(rng.uniform(0.015, 0.075) * 1e9)
            set_stamp(message.header, log - 1_000_000 - int(rng.uniform(0, 2e5)))
        moved.append((topic, log, message))
    return moved


def looped(entries: list[Entry]) -> list[Entry]:
    length = entries[-1][1] - entries[0][1] + 10**8
    return entries + [(topic, log + length, message) for topic, log, message in entries]


def jump(entries: list[Entry]) -> list[Entry]:
    half = entries[0][1] + 2_500_000_000

    def edit(transform: Any) -> None:
        if stamp(transform.header) > half:
            transform.transform.translation.x += 200.0

    return transforms("base_link", edit)(entries)


def raw(encoding: str) -> Fault:
    """Pictures as sensor_msgs/Image on the topics of preset raw."""

    def fault(entries: list[Entry]) -> list[Entry]:
        return [
            (topic.replace("_compressed", ""), log, _raw(message, encoding))
            if topic.endswith("_compressed")
            else (topic, log, message)
            for topic, log, message in entries
        ]

    return fault


def _raw(message: Any, encoding: str) -> Any:
    picture = cv2.imdecode(message.data, cv2.IMREAD_COLOR)
    if encoding == "mono8":
        picture = picture[..., 0]
    height, width = picture.shape[:2]
    return TYPES["sensor_msgs/msg/Image"](
        header=message.header,
        height=height,
        width=width,
        encoding=encoding,
        is_bigendian=0,
        step=picture[0].size,
        data=np.ascontiguousarray(picture).reshape(-1),
    )


def swap(picture: Any) -> Any:
    return picture[..., ::-1]


def grey(picture: Any) -> Any:
    return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)


FAULTS: dict[str, tuple[Fault, str, str]] = {
    "K of zeros": (each(FRONT_INFO, lambda i: fill(i, 0.0)), "info-zero", "CAM_FRONT"),
    "K of NaN": (each(FRONT_INFO, lambda i: fill(i, float("nan"))), "info-not-finite", "CAM_FRONT"),
    "K without a last row": (each(FRONT_INFO, lambda i: set_entry(i.k, 8)), "info-matrix", "CAM_FRONT"),
    "P without a last row": (each(FRONT_INFO, lambda i: set_entry(i.p, 10)), "info-matrix", "CAM_FRONT"),
    "K of half the resolution": (each(FRONT_INFO, scale_k), "info-resolution", "CAM_FRONT"),
    "CameraInfo of twice the size": (each(FRONT_INFO, double), "info-size", "CAM_FRONT"),
    "distortion on a rectified topic": (each(FRONT_INFO, distort), "info-distortion", "CAM_FRONT"),
    "no CameraInfo": (without(lambda e: e[0] != FRONT_INFO), "info-missing", "CAM_FRONT"),
    "no frame of a camera": (
        transforms("CAM_FRONT", lambda t: setattr(t, "child_frame_id", "front")),
        "tf-missing",
        "CAM_FRONT",
    ),
    "a camera frame with x forward": (
        transforms("CAM_FRONT", turn(0, 0, 0, 1)),
        "tf-camera-axes",
        "CAM_FRONT",
    ),
    "a transform the wrong way round": (transforms("CAM_FRONT", invert), "tf-camera-axes", "CAM_FRONT"),
    "a camera in another direction": (
        transforms("CAM_FRONT", turn(-0.5, -0.5, 0.5, 0.5)),
        "tf-camera-direction",
        "CAM_FRONT",
    ),
    "millimetres": (
        transforms("CAM_FRONT", lambda t: setattr(t.transform.translation, "x", 1700.0)),
        "tf-camera-position",
        "CAM_FRONT",
    ),
    "a quaternion of zeros": (
        transforms("CAM_BACK", turn(0, 0, 0, 0)),
        "tf-invalid",
        "base_link -> CAM_BACK",
    ),
    "no model frame": (
        transforms("LIDAR_TOP", lambda t: setattr(t, "child_frame_id", "lidar")),
        "tf-model-frame",
        "LIDAR_TOP",
    ),
    "a model frame with x forward": (transforms("LIDAR_TOP", turn(0, 0, 0, 1)), "tf-model-axes", "LIDAR_TOP"),
    "a hole in tf": (tf_hole, "tf-gap", "map -> base_link"),
    "tf that comes late": (later("/tf", 0.4), "tf-late", "map -> base_link"),
    "no ego motion": (without(lambda e: e[0] != "/tf"), "ego-missing", "map -> base_link"),
    "an ego jump": (jump, "ego-jump", "map -> base_link"),
    "stamps of zero": (each(FRONT, lambda m: set_stamp(m.header, 0)), "stamp-zero", "CAM_FRONT"),
    "stamps of receipt": (stamped_at_receipt, "stamp-receipt", "CAM_FRONT"),
    "a looped bag": (looped, "stamp-back", "CAM_BACK"),
    "one camera slower": (
        without(lambda e: e[0] != FRONT or stamp(e[2].header) // 500_000_000 % 2 == 0),
        "rate-differs",
        "CAM_FRONT",
    ),
    "one camera 120 ms off": (later(FRONT, 0.12, stamps=True), "spread", "CAM_FRONT"),
    "a camera missing": (without(lambda e: e[0] != FRONT), "camera-missing", "CAM_FRONT"),
    "truncated pictures": (
        each(FRONT, lambda m: setattr(m, "data", m.data[:20])),
        "picture-refused",
        "CAM_FRONT",
    ),
    "pictures in mono8": (raw("mono8"), "picture-refused", "CAM_FRONT"),
    "grey pictures": (redrawn(grey), "picture-grey", "CAM_FRONT"),
    "pictures turned by 90 degrees": (
        redrawn(lambda p: cv2.rotate(p, cv2.ROTATE_90_CLOCKWISE)),
        "picture-rotated",
        "CAM_FRONT",
    ),
    "pictures upside down": (redrawn(lambda p: p[::-1, ::-1]), "picture-upside-down", "all cameras"),
    "red for blue": (redrawn(swap), "picture-swapped-colours", "all cameras"),
    "red for blue in raw pictures": (raw("rgb8"), "picture-swapped-colours", "all cameras"),
}
# What a fault brings along.
COMPANIONS = {
    "a quaternion of zeros": {"tf-missing"},
    "a looped bag": {"stamp-repeated"},
    "pictures turned by 90 degrees": {"info-size"},
    "an ego jump": set(),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_named_and_no_other(healthy: list[Entry], tmp_path: Path, name: str) -> None:
    fault, code, where = FAULTS[name]
    bag = write_bag(fault(copy.deepcopy(healthy)), tmp_path / "faulty.mcap")
    findings = diagnose(observe_bag(bag, None, None)[1]).findings
    assert code in {f.code for f in findings}
    assert {f.code for f in findings} - COMPANIONS.get(name, set()) == {code}
    assert where in {f.where for f in findings if f.code == code}
    assert all(f.advice and f.text and "\n" not in f.text for f in findings)


def test_the_slice_that_the_faults_are_planted_in_is_good(healthy: list[Entry], tmp_path: Path) -> None:
    name, drive = observe_bag(write_bag(healthy, tmp_path / "good.mcap"), None, None)
    assert name == "nuscenes"
    assert [len(camera.pictures) for camera in drive.cameras.values()] == [SETS] * 6
    assert diagnose(drive).findings == ()


def test_stamps_of_the_future_are_told_with_the_offset(healthy: list[Entry], tmp_path: Path) -> None:
    """All clocks of the vehicle two seconds ahead of the recorder's, poses and pictures alike."""
    moved = [(topic, log - 2 * 10**9, message) for topic, log, message in healthy]
    findings = diagnose(observe_bag(write_bag(moved, tmp_path / "f.mcap"), None, None)[1]).findings
    assert [(f.code, f.where) for f in findings] == [("stamp-future", camera) for camera in CAMERAS]
    assert "2.000 s ahead" in findings[0].text


def test_pictures_without_a_frame_have_the_presets(healthy: list[Entry], tmp_path: Path) -> None:
    entries = copy.deepcopy(healthy)
    for message in images(entries):
        message.header.frame_id = ""
    assert diagnose(observe_bag(write_bag(entries, tmp_path / "f.mcap"), None, None)[1]).findings == ()


def test_good_raw_pictures_are_good(healthy: list[Entry], tmp_path: Path) -> None:
    name, drive = observe_bag(write_bag(raw("bgr8")(copy.deepcopy(healthy)), tmp_path / "f.mcap"), None, None)
    assert (name, diagnose(drive).findings) == ("raw", ())


def test_nothing_is_found_in_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(DEMO)]) == 0
    out = capsys.readouterr().out
    assert "preset nuscenes, 6 cameras, 204 pictures" in out
    assert out.endswith("nothing found\n")


def test_nothing_is_found_in_the_real_scene(real_frames: Any, tmp_path: Path) -> None:
    from qdbev_train.bags.writer import write_bag

    write_bag(real_frames[:14], tmp_path / "real.mcap")
    assert diagnose(observe_bag(tmp_path / "real.mcap", None, None)[1]).findings == ()


def test_findings_end_in_1_and_are_written_as_json(
    healthy: list[Entry], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = write_bag(FAULTS["K of zeros"][0](copy.deepcopy(healthy)), tmp_path / "faulty.mcap")
    assert main(["doctor", str(bag), "--json", str(tmp_path / "out" / "doctor.json")]) == 1
    out = capsys.readouterr().out
    assert "CAM_FRONT: /CAM_FRONT/camera_info: K has fx = 0, fy = 0: not calibrated\n  do: give" in out
    written = json.loads((tmp_path / "out" / "doctor.json").read_text())
    assert (written["healthy"], written["preset"], written["pictures"]["CAM_BACK"]) == (
        False,
        "nuscenes",
        SETS,
    )
    assert [finding["code"] for finding in written["findings"]] == ["info-zero"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "give either a bag or --live"),
        (["nowhere.mcap"], "nowhere.mcap doesn't exist"),
        ([str(DEMO), "--preset", "moon"], "no preset 'moon'"),
        ([str(DEMO), "--live"], "give either a bag or --live"),
        (["--live", "--seconds", "0"], "--seconds is 0"),
        ([str(DEMO), "--calibration", "no.yaml"], "no.yaml: no such calibration file"),
    ],
)
def test_bad_input_ends_in_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


def test_the_preset_that_fits_best_is_taken() -> None:
    compressed, raw_kind = "sensor_msgs/msg/CompressedImage", "sensor_msgs/msg/Image"
    jpeg = {f"/{camera}/image_rect_compressed": compressed for camera in CAMERAS}
    assert best_preset(jpeg).name == "nuscenes"
    assert (
        best_preset(jpeg | {"/markers/annotations": "visualization_msgs/msg/MarkerArray"}).name
        == "watonomous"
    )
    assert best_preset({f"/{camera.lower()}/raw": raw_kind for camera in CAMERAS}).name == "nuscenes2bag"
    assert best_preset({f"/nuscenes/{camera}/image": raw_kind for camera in CAMERAS}).name == "dataset_bridge"
