# SPDX-License-Identifier: Apache-2.0
"""Files of Foxglove's schemas, written by Foxglove's own writers from the demo's drive, become ROS 2 bags."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mcap_protobuf", reason="mcap-protobuf-support isn't installed")
pytest.importorskip("foxglove_schemas_protobuf", reason="foxglove-schemas-protobuf isn't installed")

from foxglove_schemas_protobuf.CameraCalibration_pb2 import CameraCalibration
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.FrameTransform_pb2 import FrameTransform
from foxglove_schemas_protobuf.PoseInFrame_pb2 import PoseInFrame
from google.protobuf.json_format import MessageToDict
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.writer import Writer as JsonWriter
from mcap_protobuf.writer import Writer as ProtobufWriter

from qdbev_ros.core.doctor import diagnose
from qdbev_ros.core.errors import QdbevError
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.foxglove import import_foxglove
from qdbev_ros.ros.observe import observe_bag
from qdbev_train.cli import main

DEMO = Path(__file__).resolve().parents[2] / "demo" / "town.mcap"
SETS = 6
Written = list[tuple[str, int, Any]]  # topic, log time, protobuf message


def stamp(header: Any) -> int:
    return int(header.stamp.sec * 10**9 + header.stamp.nanosec)


def transform(source: Any) -> FrameTransform:
    message = FrameTransform(
        parent_frame_id=source.header.frame_id.lower(), child_frame_id=source.child_frame_id.lower()
    )
    message.timestamp.FromNanoseconds(stamp(source.header))
    for axis in "xyz":
        setattr(message.translation, axis, getattr(source.transform.translation, axis))
    for axis in "xyzw":
        setattr(message.rotation, axis, getattr(source.transform.rotation, axis))
    return message


@pytest.fixture(scope="module")
def drive() -> Written:
    """The demo's first sets as foxglove/nuscenes2mcap has them: names in lower case, every transform on /tf."""
    with BagReader(DEMO) as bag:
        source = list(bag.messages(list(bag.types)))
    until = [log for topic, log, _ in source if topic == "/CAM_FRONT/camera_info"][SETS] - 50_000_000
    sensors = next(message for topic, _, message in source if topic == "/tf_static").transforms
    found: Written = []
    for topic, log, message in source:
        if log >= until:
            break
        if topic == "/tf":
            found += [(topic, log, transform(t)) for t in (*message.transforms, *sensors)]
        elif topic.endswith("image_rect_compressed"):
            image = CompressedImage(
                frame_id=message.header.frame_id.lower(), format="jpeg", data=message.data.tobytes()
            )
            image.timestamp.FromNanoseconds(stamp(message.header))
            found += [(topic.lower(), log, image), ("/pose", log, PoseInFrame(frame_id="base_link"))]
        elif topic.endswith("camera_info"):
            info = CameraCalibration(
                frame_id=message.header.frame_id.lower(), width=message.width, height=message.height
            )
            info.timestamp.FromNanoseconds(stamp(message.header))
            info.K[:], info.P[:], info.R[:] = message.k.tolist(), message.p.tolist(), message.r.tolist()
            found.append((topic.lower(), log, info))
    return found


def write_protobuf(drive: Written, path: Path) -> Path:
    with path.open("wb") as stream, ProtobufWriter(stream) as writer:
        for topic, log, message in drive:
            writer.write_message(topic, message, log_time=log, publish_time=log)
    return path


def as_json(message: Any) -> dict[str, Any]:
    """As Foxglove's JSON schemas have it: sec and nsec, base64, zeros left in."""
    content: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    nanoseconds = message.timestamp.ToNanoseconds()
    content["timestamp"] = {"sec": nanoseconds // 10**9, "nsec": nanoseconds % 10**9}
    if isinstance(message, CompressedImage):
        content["data"] = base64.b64encode(message.data).decode()
    return content


def write_json(drive: Written, path: Path) -> Path:
    with path.open("wb") as stream:
        writer = JsonWriter(stream)
        writer.start()
        channels: dict[str, int] = {}
        for topic, log, message in drive:
            if topic not in channels:
                schema = writer.register_schema(message.DESCRIPTOR.full_name, "jsonschema", b"{}")
                channels[topic] = writer.register_channel(topic, "json", schema)
            writer.add_message(channels[topic], log, json.dumps(as_json(message)).encode(), log)
        writer.finish()
    return path


@pytest.fixture(scope="module", params=[write_protobuf, write_json])
def bag(request: pytest.FixtureRequest, drive: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foxglove")
    source = request.param(drive, folder / "in.mcap")
    assert main(["import-foxglove", str(source), str(folder / "out.mcap")]) == 0
    return folder / "out.mcap"


def test_every_picture_and_calibration_is_the_demos(bag: Path) -> None:
    with BagReader(bag) as imported, BagReader(DEMO) as demo:
        for kind in ("image_rect_compressed", "camera_info"):
            found = list(imported.messages([f"/cam_back_left/{kind}"]))
            wanted = list(demo.messages([f"/CAM_BACK_LEFT/{kind}"]))[: len(found)]
            assert len(found) == SETS
            for (_, log, message), (_, log_then, original) in zip(found, wanted):
                assert log == log_then
                assert stamp(message.header) == stamp(original.header)
                assert message.header.frame_id == "cam_back_left"
                if kind == "camera_info":
                    np.testing.assert_array_equal(message.k, original.k)
                    np.testing.assert_array_equal(message.p, original.p)
                    assert (message.width, message.height) == (original.width, original.height)
                else:
                    assert message.data.tobytes() == original.data.tobytes()


def test_what_never_moves_is_sent_once_on_tf_static(bag: Path) -> None:
    with BagReader(bag) as imported, BagReader(DEMO) as demo:
        ((_, _, static),) = imported.messages(["/tf_static"])
        ((_, _, original),) = demo.messages(["/tf_static"])
        moving = [t for _, _, message in imported.messages(["/tf"]) for t in message.transforms]
    assert {t.child_frame_id for t in static.transforms} == {
        t.child_frame_id.lower() for t in original.transforms
    }
    assert {(t.header.frame_id, t.child_frame_id) for t in moving} == {("map", "base_link")}
    assert len(moving) == SETS * 6


def test_the_doctor_finds_the_convention_and_nothing_wrong(bag: Path) -> None:
    name, drive = observe_bag(bag, None, None)
    assert name == "nuscenes2mcap"
    assert diagnose(drive).findings == ()


def test_what_is_left_out_is_told(drive: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_protobuf(drive, tmp_path / "in.mcap")
    assert main(["import-foxglove", str(source), str(tmp_path / "out.mcap")]) == 0
    out = capsys.readouterr().out
    assert f"left out: {SETS * 6} x /pose (foxglove.PoseInFrame)" in out
    assert "messages on 14 topics" in out  # pictures, CameraInfo, /tf and /tf_static


def test_a_cut_file_is_refused_and_leaves_nothing(
    drive: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = write_protobuf(drive, tmp_path / "in.mcap").read_bytes()
    (tmp_path / "in.mcap").write_bytes(whole[: len(whole) // 2])
    assert main(["import-foxglove", str(tmp_path / "in.mcap"), str(tmp_path / "out.mcap")]) == 2
    assert "in.mcap" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.mcap"]


@pytest.mark.parametrize(
    ("kind", "data"),
    [
        ("CompressedImage", "{no json"),
        ("CompressedImage", "[1]"),
        ("CompressedImage", '{"data": "abcde"}'),
        ("CompressedImage", '{"timestamp": {"sec": 1000000000000, "nsec": 0}}'),
        ("CompressedImage", '{"frame_id": 5}'),
        ("CameraCalibration", '{"K": "nine"}'),
        ("CameraCalibration", '{"width": 1e999}'),
        ("FrameTransform", '{"child_frame_id": []}'),
        ("FrameTransform", '{"translation": {"x": null}}'),
    ],
)
def test_a_damaged_message_is_named(
    kind: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with (tmp_path / "in.mcap").open("wb") as stream:
        writer = JsonWriter(stream)
        writer.start()
        for topic, schema in {"/other": "CompressedImage", "/here": kind}.items():
            number = writer.register_schema(f"foxglove.{schema}", "jsonschema", b"{}")
            content = data if topic == "/here" else "{}"
            writer.add_message(writer.register_channel(topic, "json", number), 5, content.encode(), 5)
        writer.finish()
    assert main(["import-foxglove", str(tmp_path / "in.mcap"), str(tmp_path / "out.mcap")]) == 2
    error = capsys.readouterr().err
    assert f"in.mcap: a message on /here is no foxglove.{kind}: " in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["in.mcap"]


@pytest.fixture(scope="module", params=[write_protobuf, write_json])
def small(request: pytest.FixtureRequest, drive: Written, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few bytes of every kind of message, in a folder of its own."""
    chosen = [entry for entry in drive if entry[0] in ("/tf", "/cam_front/camera_info")][:9]
    chosen.append(
        ("/cam_front/image", 10**9, CompressedImage(frame_id="cam_front", format="jpeg", data=b"none"))
    )
    written: Path = request.param(chosen, tmp_path_factory.mktemp("small") / "small.mcap")
    return written


@settings(derandomize=True, deadline=None, max_examples=20, database=None)
@given(data=st.data())
def test_flipped_bits_end_in_a_bag_or_in_one_line(data: st.DataObject, small: Path) -> None:
    damaged = bytearray(small.read_bytes())
    for position in data.draw(st.lists(st.integers(0, len(damaged) - 1), min_size=1, max_size=8)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    source, out = small.with_name("damaged.mcap"), small.with_name("out.mcap")
    source.write_bytes(damaged)
    said = str(source)
    try:
        import_foxglove(source, out)
        out.unlink()
    except QdbevError as error:
        said = str(error)
    assert str(source) in said
    assert "\n" not in said
    assert {path.name for path in small.parent.iterdir()} == {"small.mcap", "damaged.mcap"}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "No such file"),
        (b"short", "is no MCAP file that can be read"),
        (b"not at all", "is no MCAP file that can be read"),
        (DEMO, "holds ROS 2 messages already"),
    ],
)
def test_files_of_other_kinds_are_refused_with_the_reason(
    content: bytes | Path | None, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = content if isinstance(content, Path) else tmp_path / "in.mcap"
    if isinstance(content, bytes):
        source.write_bytes(content)
    assert main(["import-foxglove", str(source), str(tmp_path / "out.mcap")]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_a_command_that_wants_a_ros_bag_says_how_to_make_one(
    drive: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(write_protobuf(drive[:20], tmp_path / "in.mcap"))]) == 2
    assert "qdbev import-foxglove" in capsys.readouterr().err


def test_a_file_without_pictures_is_refused_with_its_schemas(
    drive: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_protobuf([entry for entry in drive if entry[0] == "/tf"], tmp_path / "in.mcap")
    assert main(["import-foxglove", str(source), str(tmp_path / "out.mcap")]) == 2
    assert "its schemas: foxglove.FrameTransform" in capsys.readouterr().err
