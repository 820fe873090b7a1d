# SPDX-License-Identifier: Apache-2.0
"""The package: written bit for bit the same, refused in one line and at once when anything is off."""

from __future__ import annotations

import io
import json
import struct
import time
import zipfile
from pathlib import Path

import pytest

from qdbev_ros.core.errors import PackageError
from qdbev_ros.engine.package import MANIFEST, MODEL, read_package, write_package
from tests.small_master import small_variant

MODEL_BYTES = bytes(range(256)) * 8
Members = list[tuple[str, bytes]]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "model.qdbev"
    write_package(path, small_variant(), MODEL_BYTES, {"layers": []}, {"steps": 7}, {"nds": 0.25})
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def rewrite(path: Path, content: Members, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in content:
            archive.writestr(name, data)
    return path


def with_manifest(path: Path, **changes: object) -> Path:
    content = dict(members(path))
    manifest = json.loads(content[MANIFEST]) | changes
    return rewrite(path, [(MANIFEST, json.dumps(manifest).encode()), (MODEL, content[MODEL])])


def refusal(path: Path) -> str:
    """The message with which a package is refused; it is one line, names the file, and comes in well under a second."""
    start = time.process_time()  # of this process alone: the machine may be busy
    with pytest.raises(PackageError) as caught:
        read_package(path)
    assert time.process_time() - start < 0.5
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def test_a_package_gives_back_what_was_put_in(package: Path) -> None:
    read = read_package(package)
    assert read.variant == small_variant()
    assert read.model == MODEL_BYTES
    assert read.training == {"steps": 7}
    assert read.scores == {"nds": 0.25}


def test_equal_content_gives_equal_bytes_and_the_reported_hash(package: Path, tmp_path: Path) -> None:
    again = tmp_path / "sub" / "again.qdbev"
    digest = write_package(again, small_variant(), MODEL_BYTES, {"layers": []}, {"steps": 7}, {"nds": 0.25})
    assert again.read_bytes() == package.read_bytes()
    assert read_package(package).sha256 == digest


def test_a_failed_write_leaves_the_old_package_and_no_debris(package: Path) -> None:
    before = package.read_bytes()
    with pytest.raises(ValueError):
        write_package(package, small_variant(), b"new", {"scale": float("nan")}, {}, {})
    assert package.read_bytes() == before
    assert list(package.parent.iterdir()) == [package]


def test_any_flipped_byte_is_refused_or_harmless(package: Path) -> None:
    """Zip carries bytes that mean nothing (dates); a flip there may pass, one that changes any content may not."""
    good, data = read_package(package), package.read_bytes()
    refused = 0
    for position in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[position] ^= 0x10
        package.write_bytes(bytes(damaged))
        try:
            read = read_package(package)
        except PackageError:
            refused += 1
        else:
            assert (read.variant, read.model, read.scores) == (good.variant, good.model, good.scores)
    assert refused > 0.9 * len(range(0, len(data), 7))


def test_a_model_that_is_not_the_described_one_is_refused_by_its_hash(package: Path) -> None:
    content = dict(members(package))
    changed = bytes([content[MODEL][0] ^ 1]) + content[MODEL][1:]
    rewrite(package, [(MANIFEST, content[MANIFEST]), (MODEL, changed)])
    assert "SHA-256" in refusal(package)


@pytest.mark.parametrize("missing", [MANIFEST, MODEL])
def test_a_missing_member_is_named(package: Path, missing: str) -> None:
    rewrite(package, [m for m in members(package) if m[0] != missing])
    assert f"{missing!r} is missing" in refusal(package)


def test_an_unknown_member_is_named(package: Path) -> None:
    rewrite(package, [*members(package), ("setup.py", b"import os")])
    assert "'setup.py'" in refusal(package)


@pytest.mark.parametrize("name", ["../model.onnx", "/etc/passwd", "a/../../model.onnx", "..\\model.onnx"])
def test_a_member_that_climbs_out_is_refused(package: Path, name: str) -> None:
    rewrite(package, [*members(package), (name, b"x")])
    assert "climbs out" in refusal(package)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_that_is_there_twice_is_refused(package: Path) -> None:
    rewrite(package, [*members(package), (MODEL, b"other")])
    assert "twice" in refusal(package)


@pytest.mark.parametrize(
    ("version", "advice"), [(2, "update qdbev"), (0, "export it again"), ("1", "export")]
)
def test_another_format_version_is_refused_with_advice(package: Path, version: object, advice: str) -> None:
    message = refusal(with_manifest(package, format_version=version))
    assert repr(version) in message
    assert advice in message


def test_a_manifest_of_something_else_or_with_holes_is_refused(package: Path) -> None:
    assert "not that of" in refusal(with_manifest(package, format="other"))


@pytest.mark.parametrize("section", ["variant", "members", "quantisation", "training", "scores"])
def test_a_manifest_section_of_the_wrong_kind_is_named(package: Path, section: str) -> None:
    assert section in refusal(with_manifest(package, **{section: [1, 2]}))


def test_a_variant_that_cannot_be_is_refused(package: Path) -> None:
    broken = small_variant().to_dict()
    del broken["bev"]
    assert "bev" in refusal(with_manifest(package, variant=broken))


@pytest.mark.parametrize("kept", [0, 3, 100, 0.5, 0.99])
def test_a_file_cut_short_is_refused(package: Path, kept: float) -> None:
    data = package.read_bytes()
    package.write_bytes(data[: int(kept * len(data)) if kept < 1 else int(kept)])
    refusal(package)


def test_a_zip_bomb_is_refused_without_unfolding_it(package: Path) -> None:
    content = dict(members(package))
    with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, content[MANIFEST])
        with archive.open(MODEL, "w") as member:
            for _ in range(64):
                member.write(bytes(1 << 20))
    assert package.stat().st_size < 1 << 20
    assert "compressed" in refusal(package)


def test_a_declared_size_of_ten_gigabytes_is_refused(package: Path) -> None:
    """The central directory is edited by hand: both sizes of the last member become ten billion, in zip64 form."""
    data = package.read_bytes()
    at = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    entry = bytearray(data[at:end])
    name_length = struct.unpack_from("<H", entry, 28)[0]
    extra = struct.pack("<HHQQ", 1, 16, 10_000_000_000, 10_000_000_000)
    struct.pack_into("<II", entry, 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", entry, 30, len(extra))
    grown = bytes(entry[: 46 + name_length]) + extra
    tail = bytearray(data[end:])
    struct.pack_into("<I", tail, 12, struct.unpack_from("<I", tail, 12)[0] + len(extra))
    package.write_bytes(data[:at] + grown + bytes(tail))
    assert "10000000000 bytes" in refusal(package)


def test_what_is_no_package_at_all_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing.qdbev")
    refusal(tmp_path)
    text = tmp_path / "text.qdbev"
    text.write_text("not a zip")
    refusal(text)
    empty = io.BytesIO()
    zipfile.ZipFile(empty, "w").close()
    text.write_bytes(empty.getvalue())
    assert "missing" in refusal(text)
