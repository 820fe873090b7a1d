# SPDX-License-Identifier: Apache-2.0
"""QD-BEV for ROS 2: the part that runs on the vehicle. No torch in here."""

from __future__ import annotations

__version__ = "0.1.0"
