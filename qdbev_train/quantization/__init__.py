# SPDX-License-Identifier: Apache-2.0
"""W4A6 quantisation: the integer grid in training, calibration, post-training quantisation."""

from __future__ import annotations

from qdbev_train.quantization.calibrate import calibrate, post_training_quantise, tune_layers
from qdbev_train.quantization.config import EXCEPTIONS, PARTS, STRICT, Override, QuantConfig
from qdbev_train.quantization.model import freeze_ranges, quantise_model, settle_scales
from qdbev_train.quantization.tables import float_tables

__all__ = [
    "EXCEPTIONS",
    "PARTS",
    "STRICT",
    "Override",
    "QuantConfig",
    "calibrate",
    "float_tables",
    "freeze_ranges",
    "post_training_quantise",
    "quantise_model",
    "settle_scales",
    "tune_layers",
]
