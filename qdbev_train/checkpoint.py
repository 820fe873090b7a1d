# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as safetensors: a model file to evaluate or export, and a training state to resume from.

A model file holds the tensors of `model.state_dict()` under their own names. Its metadata (strings, JSON inside) say
what they are: `variant` (the whole description), `quantisation` (the grid, absent for float models), `provenance`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.variant import Variant

FORMAT = "qdbev-checkpoint-1"


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    texts = {"format": FORMAT} | {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    temporary = path.with_name(path.name + ".part")
    save_file({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}, str(temporary), texts)
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a file that `write_tensors` wrote; DataError where it is not one."""
    if not path.is_file():
        raise DataError(f"no checkpoint at {path}")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except SafetensorError as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.pop("format", None) != FORMAT:
        raise DataError(f"{path}: a safetensors file, but not a checkpoint of this project ({FORMAT})")
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def save_model(
    path: Path, model: nn.Module, variant: Variant, provenance: dict[str, Any], quantisation: Any
) -> None:
    """Writes a model file; `quantisation` is the quantiser's configuration as plain data, None for a float model."""
    metadata = {"variant": variant.to_dict(), "provenance": provenance}
    if quantisation is not None:
        metadata["quantisation"] = quantisation
    write_tensors(path, dict(model.state_dict()), metadata)


def load_model(path: str | Path) -> tuple[Any, Variant, dict[str, Any]]:
    """(model in eval mode, its variant, metadata) of a model file, float or fake-quantised."""
    from qdbev_train.model import CheckpointError, build_model, load_bevformer_checkpoint

    path = Path(path)
    tensors, metadata = read_tensors(path)
    if "variant" not in metadata:
        raise DataError(f"{path}: a training state, not a model file; use model.safetensors beside it")
    variant = Variant.from_dict(metadata["variant"], str(path))
    model = build_model(variant)
    if "quantisation" in metadata:
        from qdbev_train.quantization import QuantConfig, quantise_model

        model = quantise_model(model, QuantConfig.from_dict(metadata["quantisation"]))
    try:
        load_bevformer_checkpoint(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval(), variant, metadata
