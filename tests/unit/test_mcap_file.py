# SPDX-License-Identifier: Apache-2.0
"""A recording that meets a full disk, or cannot get its name, is kept and named."""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from mcap.exceptions import McapError
from mcap.records import Message
from mcap.stream_reader import StreamReader
from rosbags.typesys import Stores, get_typestore

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.mcap_file import McapFile
from qdbev_ros.ros.bags import BagReader

# A limit on the size of files stands for a disk that is full; Python ignores the signal that comes with it.
FULL_DISK = """
import resource, sys
from rosbags.typesys import Stores, get_typestore
from qdbev_ros.core.errors import DataError
from qdbev_ros.core.mcap_file import McapFile

bag = McapFile(sys.argv[1])
bag.add_topic("/chatter", "std_msgs/msg/String", get_typestore(Stores.ROS2_JAZZY), latched=False)
resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, resource.RLIM_INFINITY))
try:
    for number in range(int(sys.argv[2])):
        bag.write("/chatter", number, bytes(300_000))
except DataError as error:
    print(error)
    if sys.argv[3] == "freed":  # somebody made room: nothing may follow what is cut off
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
try:
    bag.close()
except DataError as error:
    print(error)
"""


def write_until_full(target: Path, messages: int, then: str = "full") -> list[str]:
    """What write and close complain of when file sizes end at 5 MB."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(target), str(messages), then],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout.splitlines()


def readable_stamps(path: Path) -> list[int]:
    """Stamps of the messages in a file without an end, as `mcap recover` finds them: record by record."""
    stamps = []
    with path.open("rb") as stream, suppress(McapError, EOFError):
        for record in StreamReader(stream).records:
            if isinstance(record, Message):
                stamps.append(record.log_time)
    return stamps


@pytest.mark.parametrize("then", ["full", "freed"])
def test_a_full_disk_leaves_what_was_written_under_a_plain_name(tmp_path: Path, then: str) -> None:
    target, partial = tmp_path / "run.mcap", tmp_path / "run.partial.mcap"
    lines = write_until_full(target, 40, then)
    assert [path.name for path in tmp_path.iterdir()] == [partial.name]
    assert len(lines) == 2, "write complains, and close says what is left"
    assert "cannot be written: File too large" in lines[1]
    assert f"mcap recover {partial} -o" in lines[1]
    stamps = readable_stamps(partial)
    assert stamps == list(range(len(stamps)))
    assert len(stamps) >= 12, "all but the last megabytes"
    assert partial.stat().st_size <= 5_000_000, "nothing is added behind what was cut off"
    with pytest.raises(DataError, match=f"{partial} cannot be read: .*: mcap recover {partial} -o"):
        BagReader(partial)


def test_a_disk_that_is_full_at_the_end_leaves_it_too(tmp_path: Path) -> None:
    """The last megabyte is written when the file is closed."""
    lines = write_until_full(tmp_path / "run.mcap", 18)
    assert len(lines) == 1
    assert "run.partial.mcap" in lines[0]
    assert len(readable_stamps(tmp_path / "run.partial.mcap")) >= 12


def filled(target: Path) -> McapFile:
    bag = McapFile(target)
    bag.add_topic("/chatter", "std_msgs/msg/String", get_typestore(Stores.ROS2_JAZZY), latched=False)
    bag.write("/chatter", 7, bytes(8))
    return bag


def test_a_file_that_cannot_get_its_name_keeps_another(tmp_path: Path) -> None:
    bag = filled(tmp_path / "run.mcap")
    (tmp_path / "run.mcap").mkdir()
    with pytest.raises(DataError, match=r"run\.mcap: cannot be written: .*run\.partial\.mcap"):
        bag.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.mcap", "run.partial.mcap"]
    with BagReader(tmp_path / "run.partial.mcap") as written:
        assert written.counts == {"/chatter": 1}


def test_where_no_name_can_be_given_the_file_stays_where_it_was_written(tmp_path: Path) -> None:
    bag = filled(tmp_path / "run.mcap")
    for name in ("run.mcap", "run.partial.mcap"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"run\.mcap: cannot be written") as complaint:
        bag.close()
    (left,) = tmp_path.glob(".run-*/run/run.mcap")
    assert str(left) in str(complaint.value)
