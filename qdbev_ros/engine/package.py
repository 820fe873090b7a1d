# SPDX-License-Identifier: Apache-2.0
"""The `.qdbev` package: a zip of manifest.json and model.onnx, written bit for bit the same and read with suspicion.

Layout and field meanings: docs/package_format.md. A reader trusts nothing that it has not checked: names, sizes, hashes
and the format version are all verified before the model is looked at.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdbev_ros.core.errors import ConfigError, PackageError
from qdbev_ros.core.variant import CAMERAS, Variant

FORMAT = "qdbev"
FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MODEL = "model.onnx"
MEMBERS = (MANIFEST, MODEL)
MAX_BYTES = {MANIFEST: 4 << 20, MODEL: 512 << 20}
# Zip's earliest date: the same content always gives the same bytes.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_SECTIONS = ("quantisation", "training", "scores")


@dataclass(frozen=True)
class Package:
    """A verified package.

    model is the packed master (ONNX, INT4 weights) · sha256 that of the whole file · quantisation: grid of every
    layer · training: provenance · scores: what was measured on which data
    """

    path: Path
    sha256: str
    variant: Variant
    quantisation: dict[str, Any]
    training: dict[str, Any]
    scores: dict[str, Any]
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
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=target.name, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for name, content in ((MANIFEST, text), (MODEL, model)):
                archive.writestr(_zip_info(name), content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    return hashlib.sha256(target.read_bytes()).hexdigest()


def _zip_info(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.compress_type = zipfile.ZIP_STORED
    info.create_system = 3  # Unix, wherever it is written
    info.external_attr = 0o644 << 16
    return info


def read_package(path: str | Path) -> Package:
    """Opens and verifies a package. Raises PackageError with one line that names the file and what is wrong with it."""
    source = Path(path)
    try:
        size = source.stat().st_size
        if size > sum(MAX_BYTES.values()) + (1 << 16):
            raise PackageError(f"{source}: {size} bytes, larger than any package")
        digest = hashlib.sha256()
        with source.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
            with zipfile.ZipFile(stream) as archive:
                contents = _read_members(source, archive)
    except FileNotFoundError:
        raise PackageError(f"{source}: no such file") from None
    except OSError as error:
        raise PackageError(f"{source}: cannot be read: {error.strerror or error}") from error
    # zipfile reports damage in many ways, among them plain ValueError, struct errors and NotImplementedError.
    except (
        zipfile.BadZipFile,
        EOFError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        OverflowError,
    ) as error:
        raise PackageError(f"{source}: not a whole .qdbev package (damaged or cut short): {error}") from error
    manifest = _parse_manifest(source, contents[MANIFEST])
    _check_model(source, manifest, contents[MODEL])
    try:
        variant = Variant.from_dict(manifest["variant"], f"{source}: {MANIFEST}: variant")
    except (ConfigError, TypeError) as error:
        raise PackageError(f"{source}: {MANIFEST} holds no usable variant: {error}") from error
    sections = {name: manifest[name] for name in _SECTIONS}
    return Package(source, digest.hexdigest(), variant, model=contents[MODEL], **sections)


def _read_members(source: Path, archive: zipfile.ZipFile) -> dict[str, bytes]:
    """The contents by name, once every name and declared size has been found harmless."""
    infos = archive.infolist()
    names = [info.filename for info in infos]
    for name in names:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            raise PackageError(f"{source}: member {name!r} climbs out of the package")
        if name not in MEMBERS:
            raise PackageError(
                f"{source}: unknown member {name!r}; a package holds {' and '.join(MEMBERS)} only"
            )
        if names.count(name) > 1:
            raise PackageError(f"{source}: member {name!r} is there twice")
    for name in MEMBERS:
        if name not in names:
            raise PackageError(f"{source}: member {name!r} is missing")
    for info in infos:
        if info.file_size > MAX_BYTES[info.filename]:
            raise PackageError(
                f"{source}: member {info.filename!r} claims {info.file_size} bytes, limit {MAX_BYTES[info.filename]}"
            )
        # Members are stored as they are, so that nothing can unfold to more than the file's own size.
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise PackageError(
                f"{source}: member {info.filename!r} is compressed; packages hold stored members only"
            )
        if info.flag_bits & 1:
            raise PackageError(f"{source}: member {info.filename!r} is encrypted")
    contents = {}
    for info in infos:
        with archive.open(info) as member:
            data = member.read(info.file_size + 1)
        if len(data) != info.file_size:
            raise PackageError(
                f"{source}: member {info.filename!r} has {len(data)} bytes, claims {info.file_size}"
            )
        contents[info.filename] = data
    return contents


def _parse_manifest(source: Path, text: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{source}: {MANIFEST} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise PackageError(f"{source}: {MANIFEST} is not that of a .qdbev package")
    version = manifest.get("format_version")
    if version != FORMAT_VERSION:
        advice = (
            "update qdbev" if isinstance(version, int) and version > FORMAT_VERSION else "export it again"
        )
        raise PackageError(
            f"{source}: format version {version!r}, this software reads {FORMAT_VERSION}; {advice}"
        )
    if manifest.get("cameras") != list(CAMERAS):
        raise PackageError(
            f"{source}: {MANIFEST}: cameras are {manifest.get('cameras')}, expected {list(CAMERAS)}"
        )
    for name in ("variant", "members", *_SECTIONS):
        if not isinstance(manifest.get(name), dict):
            raise PackageError(f"{source}: {MANIFEST}: {name!r} is missing or no mapping")
    return manifest


def _check_model(source: Path, manifest: dict[str, Any], model: bytes) -> None:
    declared = manifest["members"].get(MODEL)
    if not isinstance(declared, dict) or set(manifest["members"]) != {MODEL}:
        raise PackageError(f"{source}: {MANIFEST}: 'members' must describe {MODEL} and nothing else")
    if declared.get("bytes") != len(model) or declared.get("sha256") != hashlib.sha256(model).hexdigest():
        raise PackageError(f"{source}: {MODEL} is not the one that the manifest describes (SHA-256 differs)")
