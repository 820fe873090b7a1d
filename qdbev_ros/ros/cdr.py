# SPDX-License-Identifier: Apache-2.0
"""Messages of many elements as CDR (OMG DDS-XTypes, plain CDR version 1, little endian), numbers written by numpy.

rclpy makes a Python object for each part of each element, and copies them all twice; here the bytes of an element are
a template, made once, and one assignment fills in the numbers of all elements. No ROS.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

ENCAPSULATION = b"\x00\x01\x00\x00"  # plain CDR, little endian; alignment counts from behind it
LARGEST = 8  # bytes that anything is aligned to


class Fixed(NamedTuple):
    """A number that never changes; `code` is struct's: d, f, i, I, B or ?."""

    code: str
    value: float


class Slot(NamedTuple):
    """`length` numbers in a row that are filled in later."""

    code: str
    length: int


Field = str | Fixed | Slot
Fields = tuple[Field, ...]


class Template(NamedTuple):
    """An element with zeros in its slots; `slots` are the offsets at which these begin."""

    data: bytes
    slots: tuple[int, ...]


@lru_cache(maxsize=8192)
def template(fields: Fields, phase: int) -> Template:
    """The bytes of `fields` for a place `phase` bytes behind a multiple of eight; padding is zero."""
    data, slots = bytearray(phase), []
    for field in fields:
        code = "I" if isinstance(field, str) else field.code
        data += bytes(-len(data) % struct.calcsize(code))
        if isinstance(field, Slot):
            slots.append(len(data) - phase)
            data += bytes(field.length * struct.calcsize(code))
        elif isinstance(field, Fixed):
            data += struct.pack("<" + code, field.value)
        else:
            text = field.encode(errors="replace") + b"\0"
            data += struct.pack("<I", len(text)) + text
    return Template(bytes(data[phase:]), tuple(slots))


def strings(values: Sequence[str]) -> Fields:
    """A sequence of strings."""
    return (Fixed("I", len(values)), *values)


class CdrWriter:
    """Collects the parts of a message in order. Numbers for the slots come with each part, an array for each slot."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._size = 0
        self._numbers: list[tuple[NDArray[np.int64], str, Any]] = []

    def add(self, fields: Fields, *numbers: Any) -> None:
        """Adds fields once. numbers: (length,) for each slot."""
        self.extend((fields,), (0,), *numbers)

    def extend(self, kinds: Sequence[Fields], which: Iterable[int], *numbers: Any) -> None:
        """Adds the element kinds[i] for each i of `which`. All kinds have the same slots, else they may differ.

        numbers: (elements, length) for each slot, or (length,) that all elements share.
        """
        known: dict[tuple[int, int], Template] = {}
        begins, offsets = [], []
        for kind in which:
            phase = self._size % LARGEST
            made = known.get((kind, phase))
            if made is None:
                made = known[kind, phase] = template(kinds[kind], phase)
            begins.append(self._size)
            offsets.append(made.slots)
            self._parts.append(made.data)
            self._size += len(made.data)
        if not begins:
            return
        slots = [field for field in kinds[0] if isinstance(field, Slot)]
        places = np.array(begins, np.int64)[:, None] + np.array(offsets, np.int64)
        for slot, place, values in zip(slots, places.T, numbers, strict=True):
            self._numbers.append((place, "<" + slot.code, np.atleast_2d(values)))

    def finish(self) -> bytes:
        """The message."""
        body = bytearray(b"".join(self._parts))
        for places, dtype, values in self._numbers:
            size = np.dtype(dtype).itemsize
            whole = np.frombuffer(body, dtype, len(body) // size)
            whole[places[:, None] // size + np.arange(values.shape[1])] = values
        return ENCAPSULATION + body
