# SPDX-License-Identifier: Apache-2.0
"""BEVFormer in plain PyTorch."""

from __future__ import annotations

from qdbev_train.model.bevformer import BEVFormer, Output, build_model
from qdbev_train.model.checkpoint import CheckpointError, load_bevformer_checkpoint
from qdbev_train.model.decoder import ExtraQueries
from qdbev_train.model.initialise import load_imagenet_backbone, spread_references

__all__ = [
    "BEVFormer",
    "CheckpointError",
    "ExtraQueries",
    "Output",
    "build_model",
    "load_bevformer_checkpoint",
    "load_imagenet_backbone",
    "spread_references",
]
