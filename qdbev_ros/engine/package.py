# SPDX-License-Identifier: Apache-2.0
"""The `.qdbev` package: a zip of manifest.json and model.onnx, written bit for bit the same and read with suspicion.

Layout and field meanings: docs/package_format.md. A reader trusts nothing that it has not checked: names, sizes, the
format version and the seal over the whole file are verified before the model is unfolded, its hash and its graph
before anyone gets it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import ConfigError, PackageError
from qdbev_ros.core.files import whole_file
from qdbev_ros.core.variant import CAMERAS, Variant

FORMAT = "qdbev"
FORMAT_VERSION = 2
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MEMBERS = (MANIFEST, MODEL)
MAX_BYTES = {MANIFEST: 4 << 20, MODEL: 512 << 20}
# Codes hardly compress: what unfolds to more than this many times its size is no model.
MAX_RATIO = 16
# The zip's comment: SHA-256 of everything in front of it, in hexadecimal digits.
SEAL = 64
# Zip's earliest date: the same content always gives the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SECTIONS = ("quantisation", "training", "scores")


@dataclass(frozen=True)
class Package:
    """A verified package.

    model is the packed master (ONNX, INT4 weights) · sha256 that of the whole file · quantisation: grid of every
    layer · training: provenance · scores: what was measured on which data · members: `bytes`, `compressed` and `sha256`
    of each
    """

    path: Path
    sha256: str
    variant: Variant
    quantisation: dict[str, Any]
    training: dict[str, Any]
    scores: dict[str, Any]
    members: dict[str, dict[str, Any]]
    model: bytes


def write_package(
    path: str | Path,
    variant: Variant,
    model: bytes,
    quantisation: Mapping[str, Any],
    training: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> str:
    """Writes a package and returns the SHA-256 of the file. Equal arguments give equal bytes; all or nothing."""
    if len(model) > MAX_BYTES[MODEL]:
        raise PackageError(
            f"{path}: the model is {len(model)} bytes, a package holds up to {MAX_BYTES[MODEL]}"
        )
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "variant": variant.to_dict(),
        "cameras": list(CAMERAS),
        "quantisation": dict(quantisation),
        "training": dict(training),
        "scores": dict(scores),
        "members": {MODEL: {"sha256": hashlib.sha256(model).hexdigest(), "bytes": len(model)}},
    }
    text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False).encode()
    data = _sealed_zip({MANIFEST: text, MODEL: model})
    with whole_file(Path(path)) as temporary:
        temporary.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def _sealed_zip(contents: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.comment = b"0" * SEAL
        for name, content in contents.items():
            info = zipfile.ZipInfo(name, _EPOCH)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.create_system = 3  # Unix, wherever it is written
            info.external_attr = 0o644 << 16
            archive.writestr(info, content)
    body = buffer.getvalue()[:-SEAL]
    return body + hashlib.sha256(body).hexdigest().encode()


def read_package(path: str | Path) -> Package:
    """Opens and verifies a package. Raises PackageError with one line that names the file and what is wrong with it."""
    source = Path(path)
    try:
        size = source.stat().st_size
        if size > sum(MAX_BYTES.values()) + (1 << 16):
            raise PackageError(f"{source}: {size} bytes, larger than any package")
        data = source.read_bytes()
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = _members(source, archive)
            manifest = _parse_manifest(source, archive, infos)
            sha256 = _check_seal(source, data)
            model = _read_model(source, archive, infos, manifest)
            contents = {MANIFEST: archive.read(MANIFEST), MODEL: model}
    except FileNotFoundError:
        raise PackageError(f"{source}: no such file") from None
    except OSError as error:
        raise PackageError(f"{source}: cannot be read: {error.strerror or error}") from error
    # zipfile and zlib report damage in many ways, among them plain ValueError, struct errors and NotImplementedError.
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise PackageError(f"{source}: not a whole .qdbev package (damaged or cut short): {error}") from error
    try:
        variant = Variant.from_dict(manifest["variant"], f"{source}: {MANIFEST}: variant")
    except (ConfigError, TypeError) as error:
        raise PackageError(f"{source}: {MANIFEST} holds no usable variant: {error}") from error
    _check_graph(source, model, variant)
    sections = {name: manifest[name] for name in _SECTIONS}
    members = {name: _described(infos[name], content) for name, content in contents.items()}
    return Package(source, sha256, variant, members=members, model=model, **sections)


def _described(info: zipfile.ZipInfo, content: bytes) -> dict[str, Any]:
    digest = hashlib.sha256(content).hexdigest()
    return {"bytes": len(content), "compressed": info.compress_size, "sha256": digest}


def _members(source: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members by name, once every name and declared size has been found harmless."""
    infos: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise PackageError(f"{source}: member {name!r} climbs out of the package")
        if name in infos:
            raise PackageError(f"{source}: member {name!r} is there twice")
        infos[name] = info
        if info.flag_bits & 1:
            raise PackageError(f"{source}: member {name!r} is encrypted")
        limit = MAX_BYTES.get(name, 0)
        if name in MEMBERS and info.file_size > limit:
            raise PackageError(f"{source}: member {name!r} claims {info.file_size} bytes, limit {limit}")
    return infos


def _unfold(source: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's content; never unfolds more than the size that the member claims."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise PackageError(f"{source}: member {info.filename!r} is compressed in another way than deflate")
    with archive.open(info) as member:
        data = member.read(info.file_size)
        # At the claimed size zipfile stops, and compares the checksum once more is asked for.
        more = member.read(1)
    if more or len(data) != info.file_size:
        raise PackageError(
            f"{source}: member {info.filename!r} has {len(data)} bytes, claims {info.file_size}"
        )
    return data


def _parse_manifest(
    source: Path, archive: zipfile.ZipFile, infos: Mapping[str, zipfile.ZipInfo]
) -> dict[str, Any]:
    """The manifest, of a version that is known, in a package that holds what it must and nothing else."""
    if MANIFEST not in infos:
        raise PackageError(f"{source}: member {MANIFEST!r} is missing")
    try:
        manifest = json.loads(_unfold(source, archive, infos[MANIFEST]))
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{source}: {MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"{source}: {MANIFEST} is not that of a .qdbev package")
    version = manifest.get("format_version")
    # Before anything else: another version may look different in everything but this.
    if version != FORMAT_VERSION or isinstance(version, bool):
        newer = isinstance(version, int) and version > FORMAT_VERSION
        advice = "update qdbev" if newer else "export it again"
        raise PackageError(
            f"{source}: format version {version!r}, this software reads {FORMAT_VERSION}; {advice}"
        )
    for name in infos:
        if name not in MEMBERS:
            raise PackageError(f"{source}: unknown member {name!r}; there are {' and '.join(MEMBERS)} only")
    if MODEL not in infos:
        raise PackageError(f"{source}: member {MODEL!r} is missing")
    if manifest.get("cameras") != list(CAMERAS):
        raise PackageError(
            f"{source}: {MANIFEST}: cameras are {manifest.get('cameras')}, expected {list(CAMERAS)}"
        )
    for name in ("variant", "members", *_SECTIONS):
        if not isinstance(manifest.get(name), dict):
            raise PackageError(f"{source}: {MANIFEST}: {name!r} is missing or no mapping")
    return manifest


def _check_seal(source: Path, data: bytes) -> str:
    """SHA-256 of the whole file, once that of all but its end is what the end says."""
    digest = hashlib.sha256(memoryview(data)[:-SEAL])
    if digest.hexdigest().encode() != data[-SEAL:]:
        raise PackageError(
            f"{source}: damaged, or changed after its export: its SHA-256 is not the one at its end"
        )
    digest.update(data[-SEAL:])
    return digest.hexdigest()


def _read_model(
    source: Path,
    archive: zipfile.ZipFile,
    infos: Mapping[str, zipfile.ZipInfo],
    manifest: Mapping[str, Any],
) -> bytes:
    """The model, if it is the one that the manifest describes."""
    info, declared = infos[MODEL], manifest["members"].get(MODEL)
    if not isinstance(declared, dict) or set(manifest["members"]) != {MODEL}:
        raise PackageError(f"{source}: {MANIFEST}: 'members' must describe {MODEL} and nothing else")
    if declared.get("bytes") != info.file_size:
        raise PackageError(
            f"{source}: member {MODEL!r} claims {info.file_size} bytes, the manifest {declared.get('bytes')}"
        )
    if info.file_size > MAX_RATIO * info.compress_size:
        raise PackageError(
            f"{source}: member {MODEL!r} would unfold from {info.compress_size} to {info.file_size} bytes, "
            f"more than {MAX_RATIO} times as much"
        )
    model = _unfold(source, archive, info)
    if declared.get("sha256") != hashlib.sha256(model).hexdigest():
        raise PackageError(f"{source}: {MODEL} is not the one that the manifest describes (SHA-256 differs)")
    return model


def _check_graph(source: Path, model: bytes, variant: Variant) -> None:
    from qdbev_ros.engine.master import check_master  # onnx takes longer to import than all the rest

    try:
        check_master(model, variant)
    except PackageError as error:
        raise PackageError(f"{source}: {MODEL}: {error}") from error
