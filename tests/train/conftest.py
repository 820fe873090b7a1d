# SPDX-License-Identifier: Apache-2.0
"""Every test of this lane draws the same random numbers, whichever tests ran in its process before."""

from __future__ import annotations

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
