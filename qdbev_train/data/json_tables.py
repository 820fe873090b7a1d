# SPDX-License-Identifier: Apache-2.0
"""JSON tables read a few megabytes at a time, and their fields checked as columns.

A table is a JSON list of flat records. Reading it in blocks that are cut between two records is as fast as one
json.loads of everything (and as ijson with its C backend), and memory stays at a block whatever the table's size.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.geometry import Array

Record = dict[str, Any]
Progress = Callable[[int], object]
T = TypeVar("T")

BLOCK = 4 << 20  # bytes read at once
_BETWEEN_RECORDS = re.compile(rb"\}\s*,\s*\{")
_TAIL = 1 << 16  # where the last cut of a block is looked for first
# What reading fields of a damaged record can raise.
_FAULTS = (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError)


class Tables:
    """The JSON tables of one version's folder. `progress` is called with the bytes read since the last call."""

    def __init__(self, folder: Path, progress: Progress = lambda _: None) -> None:
        self.folder, self._progress = folder, progress

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def stream(self, name: str) -> Iterator[list[Record]]:
        """A table's records, some thousands at a time. Raises DataError where it cannot be read or is not JSON."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                yield from _lists(path, iter(lambda: file.read(BLOCK), b""), self._progress)
        except OSError as error:
            raise DataError(f"{path}: table cannot be read: {error.strerror}") from error

    def read(self, name: str) -> dict[str, Record]:
        """All records of a (small) table by token. Raises DataError where two have the same token."""
        records: dict[str, Record] = {}
        for part in self.stream(name):
            for token, record in zip(self.checked(name, part, lambda rs: texts(rs, "token")), part):
                if token in records:
                    raise self.twice(name, token)
                records[token] = record
        return records

    def checked(self, name: str, records: list[Record], read: Callable[[list[Record]], T]) -> T:
        """read(records), where `read` has no effect but its result. What goes wrong in it becomes a DataError that
        names the table, the record and the reason."""
        try:
            return read(records)
        except _FAULTS as error:
            for record in records:
                try:
                    read([record])
                except _FAULTS as fault:
                    raise DataError(f"{self.path(name)}: {_named(record)}: {_reason(fault)}") from fault
            raise DataError(f"{self.path(name)}: a record cannot be used: {_reason(error)}") from error

    def rows(
        self, name: str, records: list[Record], field: str, table: str, known: Mapping[str, int]
    ) -> NDArray[np.int64]:
        """(len(records),) rows in `table` of the tokens in a field, by `known`. Raises DataError for a dangling one."""
        tokens = texts(records, field)
        found = [known.get(token, -1) for token in tokens]
        if -1 in found:
            first = found.index(-1)
            raise self.dangling(table, tokens[first], f"{name} {texts([records[first]], 'token')[0]}")
        return np.array(found, np.int64)

    def dangling(self, table: str, token: str, wanted_by: str) -> DataError:
        return DataError(f"{self.path(table)}: no record {token!r}, which {wanted_by} refers to")

    def twice(self, table: str, token: str) -> DataError:
        return DataError(f"{self.path(table)}: two records with the token {token!r}")


def texts(records: Sequence[Record], field: str) -> list[str]:
    """A field that holds printable text in every record. Raises KeyError, TypeError, ValueError."""
    values = [record[field] for record in records]
    _require(values, field, "text", str)
    if not all(map(str.isprintable, values)):
        raise ValueError(f"{field!r} holds a character that cannot be printed")
    return values


def integers(records: Sequence[Record], field: str) -> NDArray[np.int64]:
    """(len(records),) of a field that holds a whole number in every record. Raises KeyError, TypeError,
    OverflowError."""
    values = [record[field] for record in records]
    _require(values, field, "a whole number", int)
    return np.array(values, np.int64)


def flags(records: Sequence[Record], field: str) -> list[bool]:
    """A field that holds true or false in every record. Raises KeyError, TypeError."""
    values = [record[field] for record in records]
    _require(values, field, "true or false", bool)
    return values


def numbers(records: Sequence[Record], field: str, width: int) -> Array:
    """(len(records), width) of a field that holds a list of finite numbers. Raises KeyError, TypeError, ValueError."""
    values = [record[field] for record in records]
    _require(values, field, f"a list of {width} numbers", list)
    array = np.array(values, np.float64)
    if not values:
        return np.zeros((0, width))
    if array.shape != (len(values), width) or not np.isfinite(array).all():
        raise ValueError(f"{field!r} is not a list of {width} finite numbers")
    return array


def rotations(records: Sequence[Record]) -> Array:
    """(len(records), 4) unit quaternions (w, x, y, z) of the field "rotation", as accurate as the table has them."""
    array = numbers(records, "rotation", 4)
    if not (np.abs(np.linalg.norm(array, axis=1) - 1) < 1e-2).all():
        raise ValueError("'rotation' is not a unit quaternion")
    return array


def _require(values: list[Any], field: str, kind: str, wanted: type) -> None:
    # type() and not isinstance(): True is an int and means something else.
    if not set(map(type, values)) <= {wanted}:
        raise TypeError(f"{field!r} is not {kind}")


def _named(record: Any) -> str:
    token = record.get("token") if isinstance(record, dict) else None
    printable = isinstance(token, str) and token.isprintable()
    return f"record {token}" if printable else f"record {str(record)[:60]!r}"


def _reason(fault: Exception) -> str:
    return f"no field {fault}" if isinstance(fault, KeyError) else str(fault).replace("\n", " ")


def _lists(path: Path, blocks: Iterator[bytes], progress: Progress) -> Iterator[list[Record]]:
    """The records in the blocks of a file, cut between two records."""
    rest, opening, start = b"", b"", 0  # not parsed yet; what makes it a list again; its place in the file
    for block in blocks:
        rest += block
        cut = _last_cut(rest)
        if cut is not None:
            records = _parse(path, opening + rest[: cut[0]] + b"]", start - len(opening), whole=False)
            # None: the cut was inside a text or a nested list, which only happens where tables are unusual.
            if records is not None:
                start += cut[1]
                rest, opening = rest[cut[1] :], b"["
                yield records
        progress(len(block))
    records = _parse(path, opening + rest, start - len(opening), whole=True)
    if records is not None:
        yield records


def _last_cut(text: bytes) -> tuple[int, int] | None:
    """Where the last record that is surely complete ends and the next begins."""
    for begin in (max(0, len(text) - _TAIL), 0):
        last = deque(_BETWEEN_RECORDS.finditer(text, begin), maxlen=1)
        if last:
            return last[0].start() + 1, last[0].end() - 1
    return None


def _parse(path: Path, text: bytes, offset: int, whole: bool) -> list[Record] | None:
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        if not whole and (error.msg.startswith("Unterminated") or error.pos >= len(text) - 1):
            return None
        raise DataError(f"{path}: not JSON: {error.msg} at byte {max(0, offset + error.pos)}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: a table must be a list of records")
    return records
