# SPDX-License-Identifier: Apache-2.0
"""Named arrays and texts in one safetensors file, mapped into memory instead of read. numpy alone.

The safetensors package is not among the node's requirements and would copy what it reads; the format itself is a
length (8 bytes, little endian), a JSON header and the arrays one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError

Arrays = dict[str, "NDArray[np.generic]"]

_DTYPES = {"F64": "<f8", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1", "BOOL": "|b1"}
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}


def write_arrays(path: Path, arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, str]) -> None:
    """Writes the file whole or not at all. Metadata gets the SHA-256 of the arrays' bytes. Raises OSError."""
    # Wide numbers first: then every array begins at a multiple of its item's size, without gaps.
    ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
    digest, offset, entries = hashlib.sha256(), 0, {}
    for name, array in ordered:
        shape = {"dtype": _NAMES[array.dtype], "shape": list(array.shape)}
        entries[name] = shape | {"data_offsets": [offset, offset + array.nbytes]}
        digest.update(np.ascontiguousarray(array).data)
        offset += array.nbytes
    header = json.dumps({"__metadata__": {**metadata, "sha256": digest.hexdigest()}, **entries}).encode()
    header += b" " * (-len(header) % 8)
    # The host's name as well: two machines may write into one network folder.
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, array in ordered:
                file.write(np.ascontiguousarray(array).data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def map_arrays(path: Path) -> tuple[Arrays, dict[str, str]]:
    """(arrays, metadata) of a file; the arrays are read-only views of the file, which is paged in as it is used.

    Raises DataError where the file is missing, cut off or something else.
    """
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        begin = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:begin].tobytes())
        metadata = dict(header.pop("__metadata__"))
        arrays: Arrays = {}
        end = begin
        for name, entry in header.items():
            first, last = (begin + int(n) for n in entry["data_offsets"])
            arrays[name] = content[first:last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            end = max(end, last)
        if end != len(content):
            raise ValueError(f"{len(content)} bytes instead of {end}")
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: not an index file: {error}") from error
    return arrays, metadata


def payload_sha256(path: Path) -> str:
    """SHA-256 of the arrays' bytes as they are on the disk now."""
    content = np.asarray(np.memmap(path, np.uint8, "r"))
    return hashlib.sha256(content[8 + int.from_bytes(content[:8].tobytes(), "little") :].data).hexdigest()


def pack_texts(name: str, texts: Sequence[str]) -> Arrays:
    """Texts as two arrays: their UTF-8 bytes one after the other, and where each ends. Raises UnicodeEncodeError."""
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([len(e) for e in encoded], dtype=np.int64)
    return {name: np.frombuffer(b"".join(encoded), np.uint8), f"{name}.ends": ends}


class Texts:
    """The texts that pack_texts put into `arrays`, decoded one by one as they are asked for."""

    def __init__(self, arrays: Arrays, name: str) -> None:
        self._bytes, self._ends = arrays[name], arrays[f"{name}.ends"]

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> str:
        first = int(self._ends[row - 1]) if row else 0
        return self._bytes[first : int(self._ends[row])].tobytes().decode()
