# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as safetensors: a model file to evaluate or export, and a training state to resume from.

A model file holds the tensors of `model.state_dict()` under their own names. Its metadata (strings, JSON inside) say
what they are: `variant` (the whole description), `quantisation` (the grid, absent for float models), `provenance`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.files import whole_file
from qdbev_ros.core.variant import Variant

FORMAT = "qdbev-checkpoint-1"
RELEASED_SUFFIXES = (".pth", ".pt", ".ckpt")  # what `qdbev import-bevformer` reads


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], texts: dict[str, str]) -> None:
    """Writes tensors whole or not at all; the same tensors and texts give the same bytes."""
    plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(plain, str(temporary), texts)
        except SafetensorError as error:
            raise DataError(f"{path}: cannot be written: {error}") from error
        _sort_metadata(temporary)


def _sort_metadata(path: Path) -> None:
    """Puts the texts of a file's header in order: safetensors writes them in another one each time."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        texts = {"__metadata__": dict(sorted(header.pop("__metadata__").items()))}
        ordered = json.dumps(texts | header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(ordered) > size:
            raise ValueError(f"{path}: the sorted header is longer than the one written")
        file.seek(8)
        file.write(ordered.ljust(size))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
    """Writes tensors and JSON-able metadata whole or not at all."""
    texts = {"format": FORMAT} | {key: json.dumps(value, sort_keys=True) for key, value in metadata.items()}
    write_safetensors(path, tensors, texts)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and metadata of a file that `write_tensors` wrote; DataError where it is not one."""
    if not path.is_file():
        raise DataError(
            f"{path}: a folder, not a checkpoint" if path.is_dir() else f"no checkpoint at {path}"
        )
    if path.suffix in RELEASED_SUFFIXES:
        raise DataError(
            f"{path}: a PyTorch file; `qdbev import-bevformer {path} {path.stem}.safetensors` makes a checkpoint of it"
        )
    try:
        with safe_open(str(path), "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: not a whole safetensors file ({error})") from error
    if metadata.pop("format", None) != FORMAT:
        raise DataError(
            f"{path}: a safetensors file, but not a checkpoint of this project ({FORMAT}); "
            "`qdbev import-bevformer` makes one of released BEVFormer weights"
        )
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def save_model(
    path: Path, model: nn.Module, variant: Variant, provenance: dict[str, Any], quantisation: Any
) -> None:
    """Writes a model file; `quantisation` is the quantiser's configuration as plain data, None for a float model."""
    write_model(path, dict(model.state_dict()), variant, provenance, quantisation)


def write_model(
    path: Path,
    state: Mapping[str, Tensor],
    variant: Variant,
    provenance: dict[str, Any],
    quantisation: Any = None,
) -> None:
    """`save_model` of a state dict that needs no model around it."""
    metadata = {"variant": variant.to_dict(), "provenance": provenance}
    if quantisation is not None:
        metadata["quantisation"] = quantisation
    write_tensors(path, state, metadata)


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
        from qdbev_train.quantization import QuantConfig, float_tables, quantise_model

        config = float_tables(QuantConfig.from_dict(metadata["quantisation"]), tensors)
        metadata["quantisation"]["overrides"] = [asdict(override) for override in config.overrides]
        model = quantise_model(model, config)
    try:
        load_bevformer_checkpoint(model, tensors)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return model.eval(), variant, metadata
