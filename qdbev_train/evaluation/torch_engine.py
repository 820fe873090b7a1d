# SPDX-License-Identifier: Apache-2.0
"""A checkpoint, float or fake-quantised, as an engine of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from qdbev_train.checkpoint import load_model


@dataclass(frozen=True)
class TorchOutput:
    """class_logits (Q, 10) and boxes (Q, 10) of the last decoder layer, bev (cells, C)."""

    class_logits: NDArray[np.float32]
    boxes: NDArray[np.float32]
    bev: NDArray[np.float32]


class TorchEngine:
    """Runs one frame at a time, on the GPU where there is one."""

    def __init__(self, checkpoint: Path) -> None:
        model, self.variant, _ = load_model(checkpoint)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = model.to(self._device)

    @torch.inference_mode()
    def infer(
        self,
        images: NDArray[np.float32],
        lidar2img: NDArray[np.float32],
        can_bus: NDArray[np.float32],
        prev_bev: NDArray[np.float32] | None,
    ) -> TorchOutput:
        """See qdbev_ros.core.pipeline.Engine for the shapes."""
        history = None if prev_bev is None else self._tensor(prev_bev)
        out = self._model(self._tensor(images), self._tensor(lidar2img), self._tensor(can_bus), history)
        return TorchOutput(
            out.class_logits[-1, 0].float().cpu().numpy(),
            out.boxes[-1, 0].float().cpu().numpy(),
            out.bev[0].float().cpu().numpy(),
        )

    def _tensor(self, array: NDArray[np.float32]) -> torch.Tensor:
        """With a batch dimension, on the model's device; the pipeline reuses its buffers, so it is a copy."""
        return torch.tensor(array).unsqueeze(0).to(self._device)
