# SPDX-License-Identifier: Apache-2.0
"""Files are written whole or not at all."""

import json
import os
import re
from contextlib import suppress
from pathlib import Path

import pytest

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import whole_file, write_json, write_text


def test_a_file_gets_its_name_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "plot.png"
    with whole_file(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists()
        assert not list(path.parent.glob("*.png"))
    assert path.read_bytes() == b"half"
    assert os.listdir(path.parent) == ["plot.png"]


def test_of_two_writers_the_last_one_wins_whole(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    with whole_file(path) as first:
        first.write_bytes(b"AAA")
        with whole_file(path) as second:
            second.write_bytes(b"BBB")
            first.write_bytes(b"AAAAAA")
        assert path.read_bytes() == b"BBB"
    assert path.read_bytes() == b"AAAAAA"
    assert os.listdir(tmp_path) == ["model.bin"]


def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    write_text(path, "old")
    with suppress(ZeroDivisionError), whole_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["scores.json"]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "scores.json").write_text("old")
    (tmp_path / "scores.json").symlink_to(tmp_path / "disk" / "scores.json")
    write_text(tmp_path / "scores.json", "new")
    assert (tmp_path / "scores.json").is_symlink()
    assert (tmp_path / "disk" / "scores.json").read_text() == "new"
    assert os.listdir(tmp_path / "disk") == ["scores.json"]


def test_a_pipe_is_written_to_as_it_stands(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_json(tmp_path / "pipe", {"nds": 0.5}, indent=None)
        assert os.read(reader, 100) == b'{"nds": 0.5}\n'
    finally:
        os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("place", ["file/scores.json", "folder", "."])
def test_what_cannot_be_written_is_named(tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    with pytest.raises(DataError, match=f"^{re.escape(place)}: cannot be written: "):
        write_text(Path(place), "text")


def test_json_is_readable_or_one_line(tmp_path: Path) -> None:
    content = {"nds": 0.5, "errors": [1, 2]}
    write_json(tmp_path / "pretty.json", content)
    write_json(tmp_path / "short.json", content, indent=None)
    pretty, short = (tmp_path / "pretty.json").read_text(), (tmp_path / "short.json").read_text()
    assert json.loads(pretty) == json.loads(short) == content
    assert pretty.count("\n") > 3
    assert short.count("\n") == 1
