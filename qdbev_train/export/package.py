# SPDX-License-Identifier: Apache-2.0
"""Exports a model as a `.qdbev` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qdbev_ros.core.variant import Variant
from qdbev_ros.engine.package import write_package
from qdbev_train.export.graph import export_master
from qdbev_train.model import BEVFormer
from qdbev_train.quantization.config import QuantConfig
from qdbev_train.quantization.report import describe


def export_package(
    model: BEVFormer,
    variant: Variant,
    config: QuantConfig | None,
    path: str | Path,
    training: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> str:
    """Writes the package of a quantised model (config None: of a float one) and returns its SHA-256.

    training says where the weights come from, scores what was measured with them; both are plain data.
    """
    grid = describe(model, config if config is not None else QuantConfig(parts=(), overrides=()))
    return write_package(path, variant, export_master(model.eval(), variant), grid, training, scores)
