# SPDX-License-Identifier: Apache-2.0
"""The index of a data set: built once per folder of tables, opened in an instant afterwards.

Four parts, each one file that is valid as long as the tables it was made from have the bytes that they had: building
goes on where it was stopped, and a changed table costs its own part only. Small tables are read into memory each time
and leave nothing on the disk.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from qdbev_ros.core.errors import DataError
from qdbev_train.data.array_file import Arrays, map_arrays, payload_sha256, write_arrays
from qdbev_train.data.index_annotations import build_annotations
from qdbev_train.data.index_frames import Index
from qdbev_train.data.index_parts import build_can_bus, build_readings, build_samples
from qdbev_train.data.json_tables import Progress, Tables
from qdbev_train.data.stamps import Stamps

FORMAT = "1"  # raised whenever the parts' arrays or what they mean change
SMALL = 64_000_000  # bytes of tables, which take about a second to read: not worth a file
FOLDER = "qdbev_index"

_OWN = {
    "samples": ("scene", "sample"),
    "readings": ("sample_data", "ego_pose", "calibrated_sensor", "sensor"),
    "annotations": ("sample_annotation", "instance", "category", "attribute"),
    "can_bus": (),
}
PARTS = tuple(_OWN)


@dataclass(frozen=True)
class Source:
    """A data set's files that the index is made from. Raises DataError where there is no such folder of tables."""

    root: Path
    version: str

    def __post_init__(self) -> None:
        if not self.root.is_dir():
            raise DataError(
                f"{self.root}: no such folder; give the data root that holds {self.version}/ and samples/"
            )
        if not self.tables.is_dir():
            versions = sorted(p.parent.name for p in self.root.glob("*/scene.json"))
            found = f"versions here: {', '.join(versions)}" if versions else "no version with tables here"
            raise DataError(f"{self.tables}: no such folder of tables; {found}")

    @property
    def tables(self) -> Path:
        return self.root / self.version

    def files(self, part: str) -> list[Path]:
        """The files of a part's own (all parts depend on the samples' as well)."""
        if part == "can_bus":
            return sorted((self.root / "can_bus").glob("*_pose.json"))
        return [self.tables / f"{name}.json" for name in _OWN[part]]

    def size(self, part: str) -> int:
        """Bytes of a part's own files. Raises DataError where one is missing."""
        return sum(_size(path) for path in self.files(part))

    def places(self) -> list[Path]:
        """Where the index may be: beside the tables, and in the user's cache folder."""
        key = hashlib.sha256(str(self.tables.resolve()).encode()).hexdigest()[:16]
        cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        return [self.tables / FOLDER, Path(cache) / "qdbev" / "index" / f"{self.version}-{key}"]


def open_index(root: Path, version: str) -> Index:
    """The index of the tables in root / version, built first where it is missing or of other tables.

    Raises DataError naming the table and the record that cannot be used.
    """
    source = Source(root, version)
    if is_small(source):
        arrays: Arrays = {}
        for part in PARTS:
            arrays |= _build(source, part, arrays, lambda _: None)
        return Index(root, arrays)
    stamps = Stamps.read(source.root, source.places())
    keys = part_keys(source, stamps)
    files = find_parts(source, keys)
    if len(files) < len(PARTS):
        place = writable_place(source)
        with _one_at_a_time(place):
            files = find_parts(source, keys)  # perhaps another process built them meanwhile
            _build_missing(source, keys, files, place)
    arrays = {}
    for part in PARTS:
        arrays |= map_arrays(files[part])[0]
    return Index(root, arrays, [files[part] for part in PARTS])


def remove_damaged(source: Source) -> list[Path]:
    """Removes parts whose bytes aren't those that were written, and returns them. Opening trusts the disk: reading
    everything each time would take longer than it saves. Raises DataError where one cannot be removed."""
    damaged = []
    for path in (place / f"{part}.safetensors" for place in source.places() for part in PARTS):
        try:
            if path.is_file() and map_arrays(path)[1].get("sha256") != payload_sha256(path):
                path.unlink()
                damaged.append(path)
        except DataError:
            continue  # no index file at all: opening replaces it
        except OSError as error:
            raise DataError(f"{path}: damaged, and cannot be removed: {error.strerror}") from error
    return damaged


def is_small(source: Source) -> bool:
    return sum(source.size(part) for part in PARTS if part != "can_bus") < SMALL


def part_keys(source: Source, stamps: Stamps) -> dict[str, str]:
    """What each part has to be made from: a hash over the names and contents of its files and of the samples'.

    Files that haven't changed since they were hashed aren't read again; for others there is a progress bar.
    """
    groups = {part: source.files(part) for part in PARTS}
    unknown = [path for paths in groups.values() for path in paths if not stamps.knows(path)]
    total = sum(_size(path) for path in unknown)
    with tqdm(
        total=total, desc="hash tables", unit="B", unit_scale=True, disable=None if unknown else True
    ) as bar:
        for path in unknown:
            stamps.hash(path, bar.update)
    if unknown:
        stamps.write(source.places())
    keys = {}
    for part, paths in groups.items():
        used = paths if part == "samples" else [*groups["samples"], *paths]
        lines = [f"{FORMAT} {part}", *(f"{path.name} {stamps.sha256(path)}" for path in used)]
        keys[part] = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return keys


def find_parts(source: Source, keys: dict[str, str]) -> dict[str, Path]:
    """The parts that are there and made from the present tables."""
    found = {}
    for part in PARTS:
        for path in (place / f"{part}.safetensors" for place in source.places()):
            if part not in found and path.is_file() and _made_from(path) == keys[part]:
                found[part] = path
    return found


def _made_from(path: Path) -> str | None:
    try:
        return map_arrays(path)[1].get("made_from")
    except DataError:
        return None  # cut off or of something else: to be made again


def _build_missing(source: Source, keys: dict[str, str], files: dict[str, Path], place: Path) -> None:
    missing = [part for part in PARTS if part not in files]
    if not missing:
        return
    begin = time.monotonic()
    total = sum(source.size(part) for part in missing)
    with tqdm(total=total, desc="index", unit="B", unit_scale=True, disable=None) as bar:
        for part in missing:
            bar.set_description(f"index {part}")
            samples = map_arrays(files["samples"])[0] if "samples" in files else {}
            arrays = _build(source, part, samples, bar.update)
            files[part] = place / f"{part}.safetensors"
            try:
                write_arrays(files[part], arrays, {"made_from": keys[part], "tables": source.version})
            except OSError as error:
                raise DataError(f"{files[part]}: cannot be written: {error.strerror}") from error
    print(f"indexed {source.tables} in {time.monotonic() - begin:.0f} s: {place}", file=sys.stderr)


def _build(source: Source, part: str, samples: Arrays, progress: Progress) -> Arrays:
    tables = Tables(source.tables, progress)
    builders: dict[str, Callable[[], Arrays]] = {
        "samples": lambda: build_samples(tables),
        "readings": lambda: build_readings(tables, samples),
        "annotations": lambda: build_annotations(tables, samples),
        "can_bus": lambda: build_can_bus(source.root, samples, progress),
    }
    with _without_garbage_collection():
        return builders[part]()


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Reading makes many small records and no cycles: the collector would only search in vain."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def writable_place(source: Source) -> Path:
    """The first place that can be written to, made if need be. Raises DataError where there is none."""
    for place in source.places():
        try:
            place.mkdir(parents=True, exist_ok=True)
            with (place / "lock").open("a"):
                return place
        except OSError:
            continue
    raise DataError(
        f"no place for the index of {source.tables}: neither {' nor '.join(map(str, source.places()))} can be"
        " written to; set XDG_CACHE_HOME to a folder that can"
    )


@contextmanager
def _one_at_a_time(place: Path) -> Iterator[None]:
    """Lets one process build; the others wait and find its work. A killed process holds no lock."""
    with (place / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for the process that builds {place}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            pass  # no locks on this file system: several build the same, and each file appears whole
        _remove_leftovers(list(place.glob("*.tmp")))
        yield


def _remove_leftovers(files: Sequence[Path]) -> None:
    """Removes what killed processes left; a file that is still being written is younger than an hour."""
    for path in files:
        try:
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()
        except OSError:
            continue


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: table cannot be read: {error.strerror}") from error
