# SPDX-License-Identifier: Apache-2.0
"""Reads a released checkpoint as mmcv writes it, without mmcv and without running anything that is in the file."""

from __future__ import annotations

import hashlib
import json
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qdbev_ros.core.errors import DataError
from qdbev_train.model.checkpoint import shown


@dataclass(frozen=True)
class ReleasedFile:
    """The weights of a file under their released names, what it says of itself, and which file it was."""

    path: Path
    state_dict: dict[str, Tensor]
    meta: dict[str, Any]
    left_out: tuple[str, ...]  # what else is in the file, such as the optimizer's state
    size: int  # bytes
    sha256: str


class _Ignored:
    """Stands where a file has a numpy value: mmcv's hooks leave such in `meta`, and nothing here needs them."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


# Names of numpy 1 and 2. Placeholders instead of numpy's own: they fit whatever numpy is installed, and even a crafted
# file reaches nothing but an empty constructor.
_NUMPY_VALUES = [
    type(name, (_Ignored,), {"__module__": module})
    for module, name in (
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "scalar"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.multiarray", "_reconstruct"),
    )
]


def read_released(path: Path) -> ReleasedFile:
    """Reads `{"meta", "state_dict", ...}`, or a bare state dict, from a torch or safetensors file.

    The tensors of a torch file stay on disk until they are used, so an optimizer's state costs nothing. DataError where
    the file holds code, is damaged, or is something else.
    """
    content = _content(path)
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds a {type(content).__name__}, not a checkpoint")
    has_layers = "state_dict" in content
    state = content["state_dict"] if has_layers else content
    meta = content.get("meta") if has_layers else None
    size, digest = file_identity(path)
    return ReleasedFile(
        path,
        _plain_state(path, state),
        dict(meta) if isinstance(meta, Mapping) else {},
        tuple(str(key) for key in content if key not in ("meta", "state_dict")) if has_layers else (),
        size,
        digest,
    )


def file_identity(path: Path) -> tuple[int, str]:
    """(bytes, SHA-256) of a file."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return size, digest.hexdigest()


def _plain_state(path: Path, state: Any) -> dict[str, Tensor]:
    """The state dict without DataParallel's prefix; DataError unless it maps names to tensors."""
    if not isinstance(state, dict) or not state:
        raise DataError(f"{path}: its state_dict is empty; there are no weights in the file")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise DataError(
                f"{path}: {key!r} is a {type(value).__name__}, and a state_dict maps names to tensors"
            )
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key[len(prefix) :]: value.detach() for key, value in state.items()}


def _content(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path}: a folder, not a checkpoint" if path.is_dir() else f"{path}: no such file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    if head.startswith(b"PK"):
        _check_archive(path)
        return _load(path, mapped=True)
    if head.startswith(b"\x80"):
        return _load(path, mapped=False)
    if head[8:9] == b"{":
        return _safetensors(path)
    name = _foreign_global(path, whole=True)
    raise DataError(f"{path}: {_refusal(name) if name else _what_else(head)}")


def _what_else(head: bytes) -> str:
    text = head.lstrip().lower()
    if not head:
        return "an empty file; download it again"
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return "a web page, not a checkpoint: the download failed; fetch the file itself and try again"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the checkpoint itself; run `git lfs pull`"
    if b"\0" not in head and head.decode("utf-8", "replace").count("\ufffd") <= 1:
        return "a text file, not a checkpoint"
    return "not a checkpoint: neither a torch nor a safetensors file"


def _check_archive(path: Path) -> None:
    """DataError unless this is a whole archive of torch's; torch itself compares no checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                if member.CRC:  # torch can be told not to compute it, and writes 0 then
                    with archive.open(member) as content:
                        while content.read(1 << 20):
                            pass
    except Exception as error:  # arbitrary bytes make zipfile raise many kinds
        raise DataError(f"{path}: cut short or damaged ({shown(str(error))}); download it again") from error
    if any(member.filename.endswith("/constants.pkl") for member in members):
        raise DataError(f"{path}: a TorchScript program, not a checkpoint")
    if not any(member.filename.endswith("/data.pkl") for member in members):
        raise DataError(f"{path}: a zip archive, but not one that torch wrote")


@contextmanager
def _numpy_values_ignored() -> Iterator[None]:
    """torch.serialization.safe_globals, which torch 2.4 doesn't have yet."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([*_NUMPY_VALUES])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _load(path: Path, mapped: bool) -> Any:
    """torch.load of tensors and plain values. Files from before torch 1.6 can't be mapped, they are read whole."""
    with _numpy_values_ignored(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice to programmers: an old protocol, storages of old
        try:
            return torch.load(str(path), map_location="cpu", weights_only=True, mmap=mapped)
        except Exception as error:  # arbitrary bytes make torch raise nearly anything
            raise DataError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    name = found.group(1) if found else _foreign_global(path)
    if name:
        return _refusal(name)
    detail = str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__
    return f"not a whole torch file ({shown(detail.splitlines()[0][:160])}); download it again"


def _refusal(name: str) -> str:
    return (
        f"refused, because reading it would run code: it holds {name}; only tensors and plain values are read. "
        "Where you trust the file, load it where it was made and save its state_dict alone"
    )


def _foreign_global(path: Path, whole: bool = False) -> str | None:
    """The first name that a bare pickle of any protocol would import from outside torch; reads, never runs.

    `whole`: only if all of it reads as a pickle, because any text can begin like one of the oldest protocols.
    """
    with path.open("rb") as file:
        head = file.read(1 << 20)
    strings: list[str] = []
    first = None
    try:
        for operation, argument, _ in pickletools.genops(head):
            name = None
            if operation.name == "GLOBAL":
                name = str(argument).replace(" ", ".")
            elif operation.name == "STACK_GLOBAL":
                name = ".".join(strings[-2:])
            elif isinstance(argument, str):
                strings.append(argument)
            if name and not name.startswith(("torch.", "collections.")):
                first = first or name
    except ValueError:
        return None if whole else first
    return first


def _safetensors(path: Path) -> dict[str, Any]:
    """The content of a file that `qdbev export-bevformer` or another tool wrote under released names."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        meta = json.loads(metadata.get("meta", "{}"))
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from error
    except ValueError:
        meta = {}  # another tool's: no business of ours
    if "variant" in metadata:
        raise DataError(f"{path}: a checkpoint of this project already; use it as it is")
    return {"meta": meta, "state_dict": state}
