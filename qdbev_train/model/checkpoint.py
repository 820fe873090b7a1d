# SPDX-License-Identifier: Apache-2.0
"""Loading released BEVFormer checkpoints, strictly and with one complete complaint."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qdbev_ros.core.errors import QdbevError
from qdbev_train.model.bevformer import BEVFormer

_LISTED = 8  # a summary names so many keys of a kind; more are counted by their common prefix


class CheckpointError(QdbevError):
    """A checkpoint does not fit the model."""


@dataclass(frozen=True)
class Misfit:
    """How a state dict differs from a model's: keys, and for mis-shaped ones what they are and must be."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshaped: Mapping[str, str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)

    def text(self) -> str:
        """One line with every key."""
        misshaped = [f"{key} {what}" for key, what in self.misshaped.items()]
        return self._joined(", ".join(self.missing), ", ".join(self.unexpected), ", ".join(misshaped))

    def summary(self) -> str:
        """One line for people: a few keys in full, many as counts by common prefix."""
        misshaped = [f"{key} {what}" for key, what in self.misshaped.items()]
        listed = ", ".join(misshaped) if len(misshaped) <= _LISTED else grouped(tuple(self.misshaped))
        return self._joined(grouped(self.missing), grouped(self.unexpected), listed)

    def _joined(self, missing: str, unexpected: str, misshaped: str) -> str:
        parts = (
            (len(self.missing), "missing", missing),
            (len(self.unexpected), "unexpected", unexpected),
            (len(self.misshaped), "mis-shaped", misshaped),
        )
        return "; ".join(f"{count} {title}: {keys}" for count, title, keys in parts if count)

    def lines(self) -> list[str]:
        """One line for each key."""
        misshaped = [f"mis-shaped {key} {what}" for key, what in self.misshaped.items()]
        return (
            [f"missing {k}" for k in self.missing] + [f"unexpected {k}" for k in self.unexpected] + misshaped
        )


def grouped(keys: Sequence[str]) -> str:
    """A few keys as they are; many as "prefix.* count", with the longest prefixes that make few groups."""
    if len(keys) <= _LISTED:
        return ", ".join(keys)
    groups = Counter({"": len(keys)})
    for depth in range(1, 1 + max(key.count(".") for key in keys)):
        deeper = Counter(".".join(key.split(".")[:depth]) for key in keys)
        if len(deeper) > _LISTED:
            break
        groups = deeper
    return ", ".join(f"{prefix}.* {count}".lstrip(".") for prefix, count in groups.items())


def shown(text: str) -> str:
    """Text of a file for a terminal: damage and malice put control characters into names."""
    return text if text.isprintable() else repr(text)


def find_misfit(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Misfit:
    """Compares keys, shapes, and whether the numbers are floating; a precision may differ."""
    misshaped = {}
    for key, tensor in wanted.items():
        if key not in given:
            continue
        own = given[key]
        if own.shape != tensor.shape:
            misshaped[key] = f"is {tuple(own.shape)} but must be {tuple(tensor.shape)}"
        elif own.is_floating_point() != tensor.is_floating_point() or own.layout != torch.strided:
            misshaped[key] = f"is {own.dtype} ({own.layout}) but must be {tensor.dtype}"
    return Misfit(
        tuple(key for key in wanted if key not in given),
        tuple(shown(key) for key in given if key not in wanted),
        misshaped,
    )


def load_bevformer_checkpoint(model: BEVFormer, state_dict: Mapping[str, Tensor]) -> None:
    """Copies `state_dict` (the released key names, which are the model's own) into `model`.

    Raises CheckpointError naming every missing, unexpected and mis-shaped key; the model is untouched then.
    """
    misfit = find_misfit(model.state_dict(), state_dict)
    if misfit:
        raise CheckpointError(f"checkpoint does not fit variant {model.variant.name}: {misfit.text()}")
    model.load_state_dict(state_dict)
