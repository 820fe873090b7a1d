# SPDX-License-Identifier: Apache-2.0
"""The package: written bit for bit the same, refused in one line and at once when anything is off."""

from __future__ import annotations

import hashlib
import io
import json
import os
import struct
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import DataError, PackageError
from qdbev_ros.engine.package import MANIFEST, MODEL, SEAL, read_package, write_package
from qdbev_ros.engine.sampling import DOMAIN, PREFIX, Sampling, function_of
from tests.small_master import small_master, small_variant, write_small_package

GOLDEN = Path(__file__).with_name("golden_small.qdbev")
MODEL_BYTES = small_master()
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.qdbev"
    write_package(path, small_variant(), MODEL_BYTES, {"layers": []}, {"steps": 7}, {"nds": 0.25})
    return path


@pytest.fixture
def package(whole: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model.qdbev"
    path.write_bytes(whole.read_bytes())
    return path


def members(path: Path) -> Members:
    with zipfile.ZipFile(path) as archive:
        return [(name, archive.read(name)) for name in archive.namelist()]


def seal(data: bytes) -> bytes:
    """A zip with a comment that has room for it, sealed as an exporter does: forgeries must not fail for less."""
    body = data[:-SEAL]
    return body + hashlib.sha256(body).hexdigest().encode()


def rewrite(path: Path, content: Members, compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.comment = bytes(SEAL)
        for name, data in content:
            archive.writestr(name, data)
    path.write_bytes(seal(path.read_bytes()))
    return path


def with_manifest(path: Path, **changes: object) -> Path:
    content = dict(members(path))
    manifest = json.loads(content[MANIFEST]) | changes
    return rewrite(path, [(MANIFEST, json.dumps(manifest).encode()), (MODEL, content[MODEL])])


def with_model(path: Path, model: bytes, **described: object) -> Path:
    """Another model, described as it is but for `described`."""
    manifest = json.loads(dict(members(path))[MANIFEST])
    true = {"bytes": len(model), "sha256": hashlib.sha256(model).hexdigest()}
    manifest["members"] = {MODEL: true | described}
    return rewrite(path, [(MANIFEST, json.dumps(manifest).encode()), (MODEL, model)])


def with_central(path: Path, **fields: int) -> Path:
    """The last member's entry in the zip's directory with other numbers in it, sealed again."""
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    offsets = {
        "flags": (8, "<H"),
        "method": (10, "<H"),
        "crc": (16, "<I"),
        "packed": (20, "<I"),
        "size": (24, "<I"),
    }
    for name, value in fields.items():
        offset, kind = offsets[name]
        struct.pack_into(kind, data, at + offset, value)
    path.write_bytes(seal(bytes(data)))
    return path


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


def test_the_format_is_that_of_the_golden_package(tmp_path: Path) -> None:
    """A file of this version that was written once stays readable, and what is written now holds the same bytes.

    Compared unfolded: how zlib packs them is its own affair. `QDBEV_WRITE_GOLDEN=1 pytest tests/unit/test_package.py`
    renews it, after a wanted change and with a new format version.
    """
    path = GOLDEN if os.environ.get("QDBEV_WRITE_GOLDEN") else tmp_path / "new.qdbev"
    digest = write_small_package(path)
    golden = read_package(GOLDEN)
    assert [(name, data) for name, data in members(path)] == members(GOLDEN)
    assert golden.model == small_master()
    assert golden.training == {"steps": 3}
    assert golden.scores == {"nds": 0.5}
    assert read_package(path).sha256 == digest == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_failed_write_leaves_the_old_package_and_no_debris(package: Path) -> None:
    before = package.read_bytes()
    with pytest.raises(ValueError):
        write_package(package, small_variant(), b"new", {"scale": float("nan")}, {}, {})
    assert package.read_bytes() == before
    assert list(package.parent.iterdir()) == [package]


def test_a_package_that_cannot_be_written_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.qdbev").mkdir()
    for target in (tmp_path / "file" / "out.qdbev", tmp_path / "folder.qdbev"):
        with pytest.raises(DataError, match=rf"{target.name}: cannot be written: "):
            write_package(target, small_variant(), b"new", {}, {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder.qdbev"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(st.data())
def test_a_flipped_bit_anywhere_is_refused(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    """Dates and other bytes that mean nothing to zip included: the seal covers every one."""
    damaged, path = bytearray(whole.read_bytes()), tmp_path / "damaged.qdbev"
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(damaged)
    with pytest.raises(PackageError) as caught:
        read_package(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_in_front_of_a_package_or_behind_it_are_refused(package: Path) -> None:
    data = package.read_bytes()
    for changed in (b"\0" + data, data + b"\0"):
        package.write_bytes(changed)
        refusal(package)


def test_a_package_that_was_zipped_again_by_hand_is_refused(package: Path) -> None:
    content = members(package)
    with zipfile.ZipFile(package, "w") as archive:
        for name, data in content:
            archive.writestr(name, data)
    assert "changed after its export" in refusal(package)


def test_a_model_that_is_not_the_described_one_is_refused_by_its_hash(package: Path) -> None:
    content = dict(members(package))
    changed = bytes([content[MODEL][0] ^ 1]) + content[MODEL][1:]
    rewrite(package, [(MANIFEST, content[MANIFEST]), (MODEL, changed)])
    assert "not the one that the manifest describes" in refusal(package)
    assert "the manifest 7" in refusal(with_model(package, MODEL_BYTES, bytes=7))


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
    ("version", "advice"),
    [(3, "update qdbev"), (1, "export it again"), (True, "export it again"), ("2", "export it again")],
)
def test_another_format_version_is_refused_with_advice(package: Path, version: object, advice: str) -> None:
    message = refusal(with_manifest(package, format_version=version))
    assert repr(version) in message
    assert advice in message


def test_a_future_version_is_named_as_such_whatever_else_it_holds(package: Path) -> None:
    content = dict(members(package))
    manifest = json.loads(content[MANIFEST]) | {"format_version": 3, "cameras": ["FRONT"]}
    rewrite(package, [(MANIFEST, json.dumps(manifest).encode()), ("model.bin", b"x")])
    assert "format version 3" in refusal(package)


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


@cache
def ten_gigabytes() -> bytes:
    """A deflate stream that unfolds to 10 GiB of zeros, put together from 2560 times the same 4 MiB."""
    compress = zlib.compressobj(6, zlib.DEFLATED, -15)
    block = compress.compress(bytes(1 << 22)) + compress.flush(zlib.Z_FULL_FLUSH)
    return block * 2560 + compress.flush()


def bomb(path: Path, name: str, declared: int) -> Path:
    """A package whose member `name` is a bomb that claims `declared` bytes, everywhere where one can claim them."""
    content = dict(members(path))
    if name == MODEL:
        manifest = json.loads(content[MANIFEST])
        manifest["members"][MODEL]["bytes"] = declared
        content[MANIFEST] = json.dumps(manifest).encode()
    rewrite(
        path,
        [(n, d) for n, d in content.items() if n != name] + [(name, ten_gigabytes())],
        zipfile.ZIP_STORED,
    )
    return with_central(path, method=zipfile.ZIP_DEFLATED, size=declared)


@pytest.mark.parametrize("name", [MANIFEST, MODEL])
def test_a_bomb_of_ten_gigabytes_that_claims_to_be_small_is_not_unfolded(package: Path, name: str) -> None:
    """zlib stops at the claimed size, and the checksum of what came out is another one."""
    bomb(package, name, 5000)
    assert package.stat().st_size < 12_000_000
    assert "damaged" in refusal(package)


def test_a_bomb_that_keeps_under_the_limit_is_refused_by_its_ratio(package: Path) -> None:
    bomb(package, MODEL, 400 << 20)
    assert "more than 16 times" in refusal(package)


@pytest.mark.parametrize(
    ("field", "value", "reason"), [("flags", 1, "encrypted"), ("method", 14, "than deflate")]
)
def test_an_encrypted_or_strangely_compressed_member_is_refused(
    package: Path, field: str, value: int, reason: str
) -> None:
    content = members(package)
    rewrite(package, content[::-1])  # the manifest last: it is unfolded first
    assert reason in refusal(with_central(package, **{field: value}))


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
    package.write_bytes(seal(data[:at] + grown + bytes(tail)))
    assert "10000000000 bytes" in refusal(package)


def changed_model(**changes: object) -> bytes:
    model = onnx.load_from_string(MODEL_BYTES)
    for key, value in changes.items():
        setattr(model, key, value)
    return model.SerializeToString()


def test_a_graph_that_is_not_ours_is_refused(package: Path) -> None:
    """With hashes and seal as they should be: whoever makes a package by hand can make these."""
    assert "no ONNX file" in refusal(with_model(package, b"\xff\xff"))
    assert "not made by `qdbev export`" in refusal(
        with_model(package, changed_model(producer_name="pytorch"))
    )
    model = onnx.load_from_string(MODEL_BYTES)
    model.graph.node[0].domain = "com.microsoft"
    assert "com.microsoft:Reshape" in refusal(with_model(package, model.SerializeToString()))
    model = onnx.load_from_string(MODEL_BYTES)
    model.graph.output[0].name = "logits"
    assert "'logits'" in refusal(with_model(package, model.SerializeToString()))
    model = onnx.load_from_string(MODEL_BYTES)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16
    assert "'images' has shape (1, 6, 3, 16, 8)" in refusal(with_model(package, model.SerializeToString()))


@pytest.fixture
def sampled() -> onnx.ModelProto:
    """The small graph and two samplings of one shape, with the function that they share."""
    model = onnx.load_from_string(MODEL_BYTES)
    shape = {"heads": 1, "depth": 4, "points": 1, "sizes": [2, 3]}
    for name in ("first", "second"):
        node = onnx.helper.make_node(PREFIX, ["v", "l", "w"], [name], domain=DOMAIN, **shape)
        node.op_type = Sampling.of(node).op_type
        model.graph.node.append(node)
    model.functions.append(function_of(Sampling.of(node)))
    return model


def test_functions_other_than_those_of_the_samplings_are_refused(
    package: Path, sampled: onnx.ModelProto
) -> None:
    read_package(with_model(package, sampled.SerializeToString()))

    def refused(change: Callable[[onnx.ModelProto], object]) -> str:
        changed = onnx.ModelProto()
        changed.CopyFrom(sampled)
        change(changed)
        return refusal(with_model(package, changed.SerializeToString()))

    evil = onnx.helper.make_node("Evil", ["output"], ["more"], domain="com.evil")
    other = onnx.helper.make_function(DOMAIN, "Other", ["x"], ["y"], [evil], [])
    message = "not those that `qdbev export` makes"
    assert message in refused(lambda model: model.functions[0].node.append(evil))
    assert message in refused(lambda model: model.functions.append(other))
    assert message in refused(lambda model: model.functions.pop())
    assert "qdbev:Other" in refused(lambda model: setattr(model.graph.node[-1], "op_type", "Other"))


def test_a_sampling_of_maps_that_cannot_be_is_refused(package: Path, sampled: onnx.ModelProto) -> None:
    for attribute in sampled.graph.node[-1].attribute:
        if attribute.name == "sizes":
            attribute.ints[:] = [2, -3]
    assert "no deformable sampling" in refusal(with_model(package, sampled.SerializeToString()))


def test_external_data_is_refused_wherever_it_may_stand(package: Path) -> None:
    model = onnx.load_from_string(MODEL_BYTES)
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "/etc/passwd")
    assert "outside its own file" in refusal(with_model(package, model.SerializeToString()))
    model = onnx.load_from_string(MODEL_BYTES)
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["leak"], value=tensor))
    assert "outside its own file" in refusal(with_model(package, model.SerializeToString()))


def test_sparse_tensors_are_refused(package: Path) -> None:
    model = onnx.load_from_string(MODEL_BYTES)
    model.graph.sparse_initializer.add()
    assert "sparse" in refusal(with_model(package, model.SerializeToString()))
    model = onnx.load_from_string(MODEL_BYTES)
    sparse = onnx.SparseTensorProto(dims=[4])
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["sparse"], sparse_value=sparse))
    assert "sparse" in refusal(with_model(package, model.SerializeToString()))


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
