# SPDX-License-Identifier: Apache-2.0
"""W4A6 quantisation: the integer grid in training, calibration, post-training quantisation."""

from __future__ import annotations

from qdbev_train.quantization.calibrate import calibrate, correct_biases, post_training_quantise
from qdbev_train.quantization.config import EXCEPTIONS, PARTS, Override, QuantConfig
from qdbev_train.quantization.model import quantise_model

__all__ = [
    "EXCEPTIONS",
    "PARTS",
    "Override",
    "QuantConfig",
    "calibrate",
    "correct_biases",
    "post_training_quantise",
    "quantise_model",
]
