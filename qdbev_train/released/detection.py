# SPDX-License-Identifier: Apache-2.0
"""Which variant a state dict is of: the shapes say."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.variant import Variant, load_variant, variant_folder
from qdbev_train.model.bevformer import build_model
from qdbev_train.model.checkpoint import CheckpointError, Misfit, find_misfit

_BEV = "pts_bbox_head.bev_embedding.weight"


@cache
def expected_state(variant: Variant) -> dict[str, Tensor]:
    """The state dict of a variant without memory behind it; parameters are nn.Parameter, buffers are not."""
    with torch.device("meta"):
        return build_model(variant).state_dict(keep_vars=True)


def fitting_variant(
    source: str, state: Mapping[str, Tensor], wanted: str | Path | None, verbose: bool
) -> Variant:
    """The variant `wanted`, or the shipped one, whose keys and shapes are those of `state`.

    CheckpointError where it fits none, with the keys that are wrong: grouped, or one a line if `verbose`.
    """
    if wanted is None:
        return _detected(source, state, verbose)
    variant = load_variant(wanted)
    misfit = find_misfit(expected_state(variant), state)
    if not misfit:
        return variant
    others = [v for v in shipped_variants() if v != variant and _has_map(v, state)]
    fitting = [v.name for v in others if not find_misfit(expected_state(v), state)]
    if fitting or (others and not _has_map(variant, state)):
        like = " or ".join(fitting or [v.name for v in others])
        raise CheckpointError(
            f"{source}: looks like {like}, not {variant.name}; give --variant {like} or none"
        )
    raise _error(source, variant.name, misfit, verbose)


def shipped_variants() -> list[Variant]:
    return [load_variant(path) for path in sorted(variant_folder().glob("*.yaml"))]


def _detected(source: str, state: Mapping[str, Tensor], verbose: bool) -> Variant:
    variants = shipped_variants()
    near = [v for v in variants if _has_map(v, state)]
    if not near:
        names = ", ".join(v.name for v in variants)
        shape = f"{_BEV} is {tuple(state[_BEV].shape)}" if _BEV in state else f"it has no {_BEV}"
        raise CheckpointError(
            f"{source}: not a BEVFormer of {names}: {shape}; give the YAML file of its variant as --variant"
        )
    misfits = {v.name: find_misfit(expected_state(v), state) for v in near}
    fitting = [v for v in near if not misfits[v.name]]
    if len(fitting) > 1:
        names = " and ".join(v.name for v in fitting)
        raise ConfigError(f"{source}: fits {names} alike; say which with --variant")
    if not fitting:
        raise _error(source, *next(iter(misfits.items())), verbose)
    return fitting[0]


def _has_map(variant: Variant, state: Mapping[str, Tensor]) -> bool:
    """Whether the learned map has this variant's size, which no two released ones share."""
    return _BEV in state and state[_BEV].shape == (variant.bev.cells, variant.transformer.channels)


def _error(source: str, name: str, misfit: Misfit, verbose: bool) -> CheckpointError:
    start = f"{source}: does not fit variant {name}: "
    if verbose:
        return CheckpointError("\n  ".join([start.rstrip(": "), *misfit.lines()]))
    every = misfit.summary() != misfit.text()
    return CheckpointError(start + misfit.summary() + ("; --verbose lists every key" if every else ""))
