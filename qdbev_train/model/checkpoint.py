# SPDX-License-Identifier: Apache-2.0
"""Loading released BEVFormer checkpoints, strictly and with one complete complaint."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from qdbev_ros.core.errors import QdbevError
from qdbev_train.model.bevformer import BEVFormer


class CheckpointError(QdbevError):
    """A checkpoint does not fit the model."""


def load_bevformer_checkpoint(model: BEVFormer, state_dict: Mapping[str, Tensor]) -> None:
    """Copies `state_dict` (the released key names, which are the model's own) into `model`.

    Raises CheckpointError naming every missing, unexpected and mis-shaped key; the model is untouched then.
    """
    wanted = model.state_dict()
    missing = [key for key in wanted if key not in state_dict]
    unexpected = [key for key in state_dict if key not in wanted]
    shapes = [
        f"{key} is {tuple(state_dict[key].shape)} but must be {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    problems = [
        f"{len(found)} {title}: {', '.join(found)}"
        for title, found in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(f"checkpoint does not fit variant {model.variant.name}: " + "; ".join(problems))
    model.load_state_dict(state_dict)
