# SPDX-License-Identifier: Apache-2.0
"""View-guided distillation: a float teacher shows a quantised student where its bird's-eye map goes wrong."""

from __future__ import annotations

from qdbev_train.distillation.config import METHODS, DistillationConfig
from qdbev_train.distillation.distillation import Distillation
from qdbev_train.distillation.losses import bev_divergence, image_divergence, view_guided
from qdbev_train.distillation.teacher import Seen, Teacher

__all__ = [
    "METHODS",
    "Distillation",
    "DistillationConfig",
    "Seen",
    "Teacher",
    "bev_divergence",
    "image_divergence",
    "view_guided",
]
