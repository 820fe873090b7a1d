# SPDX-License-Identifier: Apache-2.0
"""The index of large tables: the same frames from files that are made once and trusted only while the tables stay."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdbev_ros.core.errors import DataError
from qdbev_train.cli import main
from qdbev_train.data import index as index_module
from qdbev_train.data.array_file import map_arrays
from qdbev_train.data.index import FOLDER, PARTS, open_index
from qdbev_train.data.tables import all_frames, load_scenes
from tests.small_dataset import SCENES, VERSION

# A process that opens the index of the folder given, however small the tables are.
OPEN = """
import sys
from pathlib import Path
from qdbev_train.data import index
index.SMALL = 0
"""


@pytest.fixture
def root(small_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the small data set that counts as large; the cache folder is a temporary one."""
    monkeypatch.setattr(index_module, "SMALL", 0)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    shutil.copytree(small_root / VERSION, tmp_path / "root" / VERSION)
    return tmp_path / "root"


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The parts that are built from now on, in order."""
    parts: list[str] = []
    build = index_module._build

    def recorded(source: Any, part: str, *rest: Any) -> Any:
        parts.append(part)
        return build(source, part, *rest)

    monkeypatch.setattr(index_module, "_build", recorded)
    return parts


def files(root: Path) -> dict[str, int]:
    """Files of the index beside the tables, with what tells one writing from another."""
    return {path.name: path.stat().st_ino for path in (root / VERSION / FOLDER).glob("*.safetensors")}


def edit(root: Path, table: str, change: Callable[[Any], Any]) -> None:
    path = root / VERSION / f"{table}.json"
    records = json.loads(path.read_text())
    change(records)
    path.write_text(json.dumps(records))


def assert_same(a: Any, b: Any) -> None:
    """Two frames, or anything in them, are equal to the last bit."""
    assert type(a) is type(b)
    if dataclasses.is_dataclass(a):
        for field in dataclasses.fields(a):
            assert_same(getattr(a, field.name), getattr(b, field.name))
    elif isinstance(a, np.ndarray):
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        assert b.flags.writeable
    elif isinstance(a, tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def test_frames_from_the_index_are_those_from_the_tables(
    nuscenes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(nuscenes_root / "v1.0-mini", root / "v1.0-mini")
    from_tables = load_scenes(root, "v1.0-mini")["scene-0916"]
    assert not (root / "v1.0-mini" / FOLDER).exists()
    monkeypatch.setattr(index_module, "SMALL", 0)
    from_index = load_scenes(root, "v1.0-mini")["scene-0916"]
    assert (root / "v1.0-mini" / FOLDER).is_dir()
    assert len(from_index) == len(from_tables) == 41
    for a, b in zip(from_tables, from_index):
        assert_same(a, b)


def test_small_tables_leave_nothing_on_the_disk(small_root: Path, tmp_path: Path, built: list[str]) -> None:
    shutil.copytree(small_root / VERSION, tmp_path / VERSION)
    before = sorted(tmp_path.rglob("*"))
    load_scenes(tmp_path, VERSION)
    load_scenes(tmp_path, VERSION)
    assert sorted(tmp_path.rglob("*")) == before
    assert built == [*PARTS] * 2


def test_an_index_is_built_once(root: Path, built: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    first = load_scenes(root, VERSION)
    assert "indexed" in capsys.readouterr().err
    second = load_scenes(root, VERSION)
    assert built == list(PARTS)
    assert capsys.readouterr().err == ""
    for a, b in zip(all_frames(first), all_frames(second)):
        assert_same(a, b)


def test_scenes_are_sequences_that_keep_no_frame(root: Path) -> None:
    scenes = load_scenes(root, VERSION)
    frames = scenes["scene-0103"]
    assert frames[1] is not frames[1]
    assert frames[-1].sample_token == "scene-0103-3"
    assert [f.sample_token for f in frames[::2]] == ["scene-0103-0", "scene-0103-2"]
    with pytest.raises(IndexError):
        frames[4]
    everything = all_frames(scenes)
    assert len(everything) == 8
    assert everything[4].sample_token == "scene-0916-0"
    assert everything[-1].sample_token == "scene-0916-3"
    assert [f.scene for f in everything[3:5]] == list(SCENES)
    with pytest.raises(IndexError):
        everything[8]


def test_a_changed_table_costs_its_own_part_only(root: Path, built: list[str]) -> None:
    before = load_scenes(root, VERSION)["scene-0103"][0].annotations.boxes.sizes[0]
    built.clear()
    edit(root, "sample_annotation", lambda records: records[0].update(size=[1.0, 2.0, 3.0]))
    after = load_scenes(root, VERSION)["scene-0103"][0].annotations.boxes.sizes[0]
    assert built == ["annotations"]
    assert before.tolist() != after.tolist() == [1.0, 2.0, 3.0]
    edit(root, "sample", lambda records: records[0].update(extra=1))
    load_scenes(root, VERSION)
    assert built == ["annotations", *PARTS]  # every part's rows are samples


def test_an_edit_that_keeps_size_and_time_is_seen(root: Path, built: list[str], settled: None) -> None:
    path = root / VERSION / "attribute.json"
    load_scenes(root, VERSION)
    built.clear()
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_text(path.read_text().replace('"name": "vehicle.moving"', '"name": "vehicle.MOVING"'))
    os.utime(path, ns=times)
    assert load_scenes(root, VERSION)["scene-0103"][0].annotations.attributes[0] == "vehicle.MOVING"
    assert built == ["annotations"]


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, so that tests needn't wait."""
    monkeypatch.setattr("qdbev_train.data.stamps.SETTLED_NS", 0)


def test_unchanged_tables_are_not_read_again(
    root: Path, settled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    hash_file = index_module.Stamps.hash
    monkeypatch.setattr(
        index_module.Stamps,
        "hash",
        lambda self, path, bar: (hashed.append(path.name), hash_file(self, path, bar)),
    )
    load_scenes(root, VERSION)
    assert "sample_data.json" in hashed
    hashed.clear()
    load_scenes(root, VERSION)
    assert hashed == []


def test_tables_written_a_moment_ago_are_hashed_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They could be written to once more within the same tick of the clock."""
    monkeypatch.setattr("qdbev_train.data.stamps.SETTLED_NS", 1 << 60)
    load_scenes(root, VERSION)
    assert json.loads((root / VERSION / FOLDER / "stamps.json").read_text()) == {}


def test_a_copied_data_root_takes_its_index_along(root: Path, built: list[str], settled: None) -> None:
    """The copies have new times: they are hashed once, and nothing is built."""
    load_scenes(root, VERSION)
    copy = root.parent / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    built.clear()
    assert len(load_scenes(copy, VERSION)) == 2
    assert built == []


def test_can_bus_files_may_come_later(root: Path, built: list[str]) -> None:
    assert load_scenes(root, VERSION)["scene-0103"][0].can_dynamics is None
    built.clear()
    message = {"utime": 1, "accel": [1, 2, 3], "rotation_rate": [4, 5, 6], "vel": [7, 8, 9]}
    (root / "can_bus").mkdir()
    (root / "can_bus" / "scene-0103_pose.json").write_text(json.dumps([message]))
    scenes = load_scenes(root, VERSION)
    np.testing.assert_array_equal(scenes["scene-0103"][0].can_dynamics, np.arange(1.0, 10))
    assert scenes["scene-0916"][0].can_dynamics is None
    assert built == ["can_bus"]


def test_beside_tables_that_cannot_be_written_to_the_index_goes_to_the_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / VERSION / FOLDER).write_text("a file where the folder would be")
    load_scenes(root, VERSION)
    (place,) = (tmp_path / "cache" / "qdbev" / "index").iterdir()
    assert place.name.startswith(VERSION)
    assert {path.stem for path in place.glob("*.safetensors")} == set(PARTS)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / VERSION / FOLDER))
    with pytest.raises(DataError, match=r"no place for the index .* set XDG_CACHE_HOME"):
        load_scenes(root, VERSION)


def test_a_killed_build_goes_on_where_it_stopped(root: Path, built: list[str]) -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED, str(root)], capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert set(files(root)) == {"samples.safetensors", "readings.safetensors"}
    assert len(load_scenes(root, VERSION)) == 2
    assert built == ["annotations", "can_bus"]


KILLED = (
    OPEN
    + f"""
import os, signal
build = index._build
def until(source, part, *rest):
    if part == "annotations":
        os.kill(os.getpid(), signal.SIGKILL)
    return build(source, part, *rest)
index._build = until
index.open_index(Path(sys.argv[1]), "{VERSION}")
"""
)


def test_of_two_processes_one_builds_and_the_other_waits(root: Path) -> None:
    place = root / VERSION / FOLDER
    place.mkdir()
    with (place / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # this process is the one that builds
        code = OPEN + f'print(len(index.open_index(Path(sys.argv[1]), "{VERSION}")))'
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        other = subprocess.Popen([sys.executable, "-c", code, str(root)], **pipes)
        assert other.stderr is not None
        assert "waiting for the process that builds" in other.stderr.readline()
        source = index_module.Source(root, VERSION)
        keys = index_module.part_keys(source, index_module.Stamps(root, {}))
        index_module._build_missing(source, keys, {}, place)
        written = files(root)
    output, errors = other.communicate(timeout=60)
    assert (output, errors) == ("8\n", "")
    assert files(root) == written


def test_what_a_killed_process_left_is_removed(root: Path) -> None:
    place = root / VERSION / FOLDER
    place.mkdir()
    old, young = place / "samples.safetensors.host.1.tmp", place / "samples.safetensors.host.2.tmp"
    old.touch()
    young.touch()
    os.utime(old, (time.time() - 7200,) * 2)
    load_scenes(root, VERSION)
    assert not old.exists()
    assert young.exists()


def test_a_part_that_was_cut_off_is_built_anew(root: Path, built: list[str]) -> None:
    load_scenes(root, VERSION)
    path = root / VERSION / FOLDER / "readings.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    built.clear()
    load_scenes(root, VERSION)
    assert built == ["readings"]


def test_the_command_finds_a_byte_that_flipped(
    root: Path, built: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    load_scenes(root, VERSION)
    path = root / VERSION / FOLDER / "annotations.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    built.clear()
    assert main(["index", str(root), "--version", VERSION]) == 0
    assert "damaged, made anew" in capsys.readouterr().out
    assert built == ["annotations"]


def test_the_command_says_what_is_there(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = tmp_path / "numbers.json"
    assert main(["index", str(root), "--version", VERSION, "--json", str(numbers)]) == 0
    found = json.loads(numbers.read_text())
    assert (found["scenes"], found["samples"]) == (2, 8)
    assert found["boxes"]["traffic_cone"] == {"all": 8, "with_points": 0}
    assert found["scenes_without_can_bus"] == list(SCENES)
    assert found["index_bytes"] == sum(Path(path).stat().st_size for path in found["index"])
    assert "scenes 2, samples 8" in capsys.readouterr().out


def test_the_command_names_what_is_wrong(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(root, "ego_pose", lambda records: records.pop(0))
    assert main(["index", str(root), "--version", VERSION]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("qdbev: error: ")
    assert "ego_pose.json: no record 'scene-0103-0-LIDAR_TOP'" in error


def test_parts_are_safetensors_mapped_from_the_file(root: Path) -> None:
    """The library's reader finds the same arrays in them; ours don't leave the file."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors isn't installed")
    open_index(root, VERSION)
    for part in PARTS:
        path = root / VERSION / FOLDER / f"{part}.safetensors"
        mapped, metadata = map_arrays(path)
        assert metadata["tables"] == VERSION
        expected = safetensors.load_file(path)
        assert set(expected) == set(mapped)
        for name, array in mapped.items():
            np.testing.assert_array_equal(array, expected[name])
            assert not array.flags.owndata
