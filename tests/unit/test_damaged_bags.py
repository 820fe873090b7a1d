# SPDX-License-Identifier: Apache-2.0
"""Bags of other kinds and damaged ones: one line that says what is wrong, whatever the bytes are."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rosbags.rosbag1 import Writer as Ros1Writer
from rosbags.typesys import Stores, get_typestore

from qdbev_ros.core.errors import QdbevError
from qdbev_ros.core.mcap_file import McapFile
from qdbev_ros.ros.bags import BagReader
from qdbev_ros.ros.observe import observe_bag
from qdbev_ros.ros.presets import load_preset
from qdbev_train.bags.messages import STORE
from qdbev_train.cli import main

ENDS = b"\x00\x01\x00\x00"  # of every CDR message: little endian


def one_message(path: Path, topic: str, msgtype: str, data: bytes) -> Path:
    bag = McapFile(path)
    bag.add_topic(topic, msgtype, STORE, latched=False)
    bag.write(topic, 10**9, data)
    bag.close()
    return path


def test_a_ros_1_bag_is_refused_with_the_command_that_converts_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag, store = tmp_path / "scene.bag", get_typestore(Stores.ROS1_NOETIC)
    with Ros1Writer(bag) as writer:
        connection = writer.add_connection("/text", "std_msgs/msg/String", typestore=store)
        message = store.types["std_msgs/msg/String"](data="no CDR")
        writer.write(connection, 10**9, store.serialize_ros1(message, message.__msgtype__))
    assert main(["doctor", str(bag)]) == 2
    error = capsys.readouterr().err
    assert f"{bag} is a ROS 1 bag: rosbags-convert --src {bag} --dst {tmp_path / 'scene'}\n" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("topic", "msgtype", "data"),
    [
        ("/CAM_FRONT/image_rect_compressed", "sensor_msgs/msg/CompressedImage", ENDS + b"\x01\x00"),
        ("/CAM_FRONT/camera_info", "sensor_msgs/msg/CameraInfo", b""),
        (
            "/tf", "tf2_msgs/msg/TFMessage",
            ENDS + b"\x01\x00\x00\x00" + bytes(8) + b"\x04\x00\x00\x00\xff\xfe\xff\x00",
        ),
    ],
    ids=["cut", "empty", "no UTF-8"],
)  # fmt: skip
def test_a_damaged_message_is_named_with_its_topic(
    topic: str, msgtype: str, data: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bag = one_message(tmp_path / "bag.mcap", topic, msgtype, data)
    assert main(["doctor", str(bag)]) == 2
    error = capsys.readouterr().err
    assert f"bag {bag} is damaged: a message on {topic} is no {msgtype}: " in error
    assert error.count("\n") == 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A bag with one message of each kind that the doctor reads, all numbers and texts zero."""
    path = tmp_path_factory.mktemp("small") / "small.mcap"
    preset, bag = load_preset("nuscenes"), McapFile(path)
    for topic, msgtype in {
        preset.image_topic("CAM_FRONT"): "sensor_msgs/msg/CompressedImage",
        preset.info_topic("CAM_FRONT"): "sensor_msgs/msg/CameraInfo",
        "/tf": "tf2_msgs/msg/TFMessage",
    }.items():
        bag.add_topic(topic, msgtype, STORE, latched=False)
        bag.write(topic, 10**9, ENDS + bytes(400))
    bag.close()
    return path.read_bytes()


@settings(
    derandomize=True, deadline=None, max_examples=20, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(data=st.data())
def test_flipped_bits_end_in_a_message_or_in_none(data: st.DataObject, small: bytes, tmp_path: Path) -> None:
    damaged = bytearray(small)
    for position in data.draw(st.lists(st.integers(0, len(small) - 1), min_size=1, max_size=8)):
        damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / "damaged.mcap"
    path.write_bytes(damaged)
    said = str(path)
    try:
        observe_bag(path, load_preset("nuscenes"), None)
        with BagReader(path) as bag:
            list(bag.raw())
    except QdbevError as error:
        said = str(error)
    assert str(path) in said
    assert "\n" not in said
