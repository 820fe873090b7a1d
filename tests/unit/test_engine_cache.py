# SPDX-License-Identifier: Apache-2.0
"""What a compiled engine and its verdict are kept under, and where they are not kept."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdbev_ros.engine import cache
from qdbev_ros.engine.cache import EngineKey, cache_folder, engine_folder, read_json

KEY = EngineKey("ab" * 32, "tensorrt", "TensorRT 10.13.3", "Orin SM87")
WORDS = st.text(max_size=20)


@settings(deadline=None)
@given(st.sampled_from([f.name for f in fields(EngineKey)]), WORDS)
def test_any_other_field_is_another_engine(name: str, value: str) -> None:
    other = replace(KEY, **{name: value})
    assert (other.digest == KEY.digest) == (other == KEY)


@settings(deadline=None)
@given(WORDS, WORDS, WORDS)
def test_text_that_moves_from_one_field_to_the_next_is_another_engine(a: str, b: str, c: str) -> None:
    one = replace(KEY, version=a + b, device=c)
    two = replace(KEY, version=a, device=b + c)
    assert (one.digest == two.digest) == (one == two)


def test_other_code_of_ours_is_another_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    before = KEY.digest
    monkeypatch.setattr(cache, "code_digest", lambda: "other")
    assert KEY.digest != before


def test_the_folder_says_in_words_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path))
    folder = engine_folder(KEY)
    assert folder == tmp_path / f"tensorrt-{KEY.digest}"
    said = read_json(folder / "key.json")
    assert said is not None
    assert said["device"] == "Orin SM87"


def test_without_an_own_folder_xdg_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDBEV_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "qdbev" / "engines"


@pytest.mark.parametrize("mode", [0o777, 0o775])
def test_a_folder_that_others_can_write_to_is_not_used_and_that_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    tmp_path.chmod(mode)
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path))
    assert cache_folder() is None
    assert engine_folder(KEY) is None
    (told,) = caplog.messages
    assert told.endswith(f"because others can write to {tmp_path} (chmod go-w {tmp_path})")


def test_a_folder_of_another_user_is_not_used_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path))
    monkeypatch.setattr(cache.os, "getuid", lambda: tmp_path.stat().st_uid + 1)
    assert cache_folder() is None
    assert f"because {tmp_path} belongs to another user" in caplog.text


def test_a_folder_that_cannot_be_made_is_none_and_that_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QDBEV_CACHE", str(tmp_path / "file" / "cache"))
    assert cache_folder() is None
    assert "file/cache'" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_json_is_as_good_as_none(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert read_json(tmp_path / "x.json") is None
