# SPDX-License-Identifier: Apache-2.0
"""What a stopped evaluation has done already survives whatever happens while it goes on."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from qdbev_ros.core.errors import DataError
from qdbev_train.evaluation.finished import FinishedScenes

RUN = {"model": "0", "engine": "auto"}
ONE, TWO = {"a": [{"detection_name": "car"}]}, {"b": []}


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """Files end at `size` bytes, as they do where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def two_scenes(results: Path) -> FinishedScenes:
    finished = FinishedScenes(results, RUN)
    finished.add("scene-1", ONE)
    finished.add("scene-2", TWO)
    return finished


def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path) -> None:
    path = two_scenes(tmp_path / "r.json").path
    path.write_text(path.read_text()[:-2])
    finished = FinishedScenes(tmp_path / "r.json", RUN)
    assert finished.scenes == {"scene-1": ONE}
    finished.add("scene-2", TWO)
    assert FinishedScenes(tmp_path / "r.json", RUN).scenes == {"scene-1": ONE, "scene-2": TWO}


def test_going_on_where_the_disk_is_full_loses_nothing(tmp_path: Path) -> None:
    path = two_scenes(tmp_path / "r.json").path
    before = path.read_bytes()
    with disk_of(20), pytest.raises(DataError, match=r"r\.json\.scenes: cannot be written: File too large"):
        FinishedScenes(tmp_path / "r.json", RUN)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_scene_that_cannot_be_kept_ends_the_run_with_its_file_and_loses_only_itself(tmp_path: Path) -> None:
    finished = FinishedScenes(tmp_path / "r.json", RUN)
    finished.add("scene-1", ONE)
    with disk_of(finished.path.stat().st_size + 5), pytest.raises(DataError, match="File too large"):
        finished.add("scene-2", TWO)
    assert FinishedScenes(tmp_path / "r.json", RUN).scenes == {"scene-1": ONE}


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"r\.json\.scenes: cannot be written"):
        FinishedScenes(tmp_path / "file" / "r.json", RUN)


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\n", b"[]\n", b"{\n", b'{"model": "0", "engine": "auto"}\n[1]\n']
)
def test_a_file_that_is_none_of_ours_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json.scenes").write_bytes(content)
    with pytest.raises(DataError, match=r"r\.json\.scenes: damaged; remove it to begin anew"):
        FinishedScenes(tmp_path / "r.json", RUN)


@pytest.mark.parametrize(
    ("before", "now"), [(RUN | {"lost": "CAM_BACK"}, RUN), (RUN, RUN | {"lost": "CAM_BACK"})]
)
def test_what_differs_is_named_also_where_only_one_run_has_it(
    tmp_path: Path, before: dict[str, str], now: dict[str, str]
) -> None:
    FinishedScenes(tmp_path / "r.json", before)
    with pytest.raises(DataError, match="an unfinished evaluation of another lost; remove it"):
        FinishedScenes(tmp_path / "r.json", now)
