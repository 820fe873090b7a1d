# SPDX-License-Identifier: Apache-2.0
"""Turns a released checkpoint into a model file of ours, and back."""

from __future__ import annotations

import json
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdbev_ros.core.errors import ConfigError, DataError
from qdbev_ros.core.files import whole_file
from qdbev_ros.core.variant import Variant
from qdbev_train.checkpoint import read_tensors, write_model, write_safetensors
from qdbev_train.model.checkpoint import CheckpointError, find_misfit, grouped
from qdbev_train.released.detection import expected_state, fitting_variant
from qdbev_train.released.reading import ReleasedFile, file_identity, read_released

# What mmcv's `meta` holds that says where weights come from; the rest describes the machine or repeats the config.
_KEPT = (
    "epoch",
    "iter",
    "time",
    "seed",
    "exp_name",
    "mmcv_version",
    "mmdet_version",
    "mmseg_version",
    "mmdet3d_version",
)


def import_released(source: Path, out: Path, variant: str | None, verbose: bool) -> dict[str, Any]:
    """Writes `source` as the model file `out`; returns what is worth telling. The same source gives the same bytes."""
    if out.suffix != ".safetensors":
        raise ConfigError(f"{out}: checkpoints here are .safetensors files; name it {out.stem}.safetensors")
    released = read_released(source)
    fits = fitting_variant(str(source), released.state_dict, variant, verbose)
    _check_classes(released, fits)
    _check_finite(released)
    wanted = expected_state(fits)
    state = {key: released.state_dict[key].to(tensor.dtype) for key, tensor in wanted.items()}
    converted = Counter(
        f"{_kind(released.state_dict[key])} to {_kind(tensor)}"
        for key, tensor in wanted.items()
        if released.state_dict[key].dtype != tensor.dtype
    )
    origin = {"file": source.name, "bytes": released.size, "sha256": released.sha256}
    meta = {k: released.meta[k] for k in _KEPT if isinstance(released.meta.get(k), str | int | float)}
    provenance = {"source": origin, "meta": meta, "converted": dict(converted)}
    write_model(out, state, fits, provenance)
    size, digest = file_identity(out)
    return {
        "variant": fits.name,
        "given": variant is not None,
        "parameters": sum(t.numel() for t in wanted.values() if isinstance(t, nn.Parameter)),
        "tensors": len(state),
        "converted": dict(converted),
        "left_out": list(released.left_out),
        "meta": meta,
        "source": origin,
        "result": {"file": out.name, "bytes": size, "sha256": digest},
    }


def export_released(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Writes a float model file of ours under the released names: for mmcv as .pth, or as .safetensors."""
    if out.suffix not in (".pth", ".safetensors"):
        raise ConfigError(f"{out}: give a name that ends in .pth (what mmcv reads) or .safetensors")
    tensors, metadata = read_tensors(checkpoint)
    if "variant" not in metadata:
        raise DataError(f"{checkpoint}: a training state, not a model file; use model.safetensors beside it")
    if "quantisation" in metadata:
        raise ConfigError(
            f"{checkpoint}: quantised, and released BEVFormer has no place for its scales; export the float model"
        )
    variant = Variant.from_dict(metadata["variant"], str(checkpoint))
    wanted = expected_state(variant)
    misfit = find_misfit(wanted, tensors)
    if misfit:
        raise CheckpointError(f"{checkpoint}: does not fit its variant {variant.name}: {misfit.summary()}")
    provenance = metadata.get("provenance", {})
    meta = dict(provenance.get("meta", {})) | {
        "CLASSES": variant.classes,
        "variant": variant.name,
        "provenance": json.dumps(provenance, sort_keys=True),
    }
    state = OrderedDict((key, tensors[key]) for key in wanted)
    if out.suffix == ".pth":
        _write_pth(out, {"meta": meta, "state_dict": state})
    else:
        write_safetensors(out, state, {"format": "pt", "meta": json.dumps(meta, sort_keys=True)})
    size, digest = file_identity(out)
    result = {"file": out.name, "bytes": size, "sha256": digest}
    return {"variant": variant.name, "tensors": len(state), "result": result}


def _write_pth(out: Path, content: dict[str, Any]) -> None:
    with whole_file(out) as temporary, temporary.open("wb") as file:
        try:
            # Into an open file, because torch writes the name of a path into the archive.
            torch.save(content, file)
        except RuntimeError as error:  # how torch ends once the disk is full; what happened is behind it
            raise DataError(f"{out}: cannot be written: {error.__context__ or error}") from error


def _check_classes(released: ReleasedFile, variant: Variant) -> None:
    classes = released.meta.get("CLASSES")
    if isinstance(classes, list | tuple) and tuple(classes) != variant.classes:
        raise CheckpointError(
            f"{released.path}: detects {', '.join(map(str, classes))}, in this order; variant {variant.name} detects "
            f"{', '.join(variant.classes)}; give --variant a YAML file with these `classes`"
        )


def _check_finite(released: ReleasedFile) -> None:
    bad = {key: n for key, tensor in released.state_dict.items() if (n := _not_finite(tensor))}
    if bad:
        keys = grouped([f"{key} ({n})" for key, n in bad.items()])
        raise CheckpointError(
            f"{released.path}: {sum(bad.values())} weights in {len(bad)} tensors are NaN or infinite: {keys}"
        )


def _not_finite(tensor: Tensor) -> int:
    return 0 if not tensor.is_floating_point() else int((~torch.isfinite(tensor)).sum())


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
