# SPDX-License-Identifier: Apache-2.0
"""Latency windows."""

from __future__ import annotations

import pytest

from qdbev_ros.core.latency import StageLatencies


def test_percentiles_are_over_the_last_frames_only() -> None:
    latencies = StageLatencies(window=100)
    for value in range(200):
        latencies.add({"engine": float(value)})
    p50, p99 = latencies.percentiles(50, 99)["engine"]
    assert (p50, p99) == (pytest.approx(149.5), pytest.approx(198.01))


def test_stages_keep_their_order() -> None:
    latencies = StageLatencies()
    latencies.add({"decode": 1.0, "engine": 2.0})
    latencies.add({"decode": 3.0, "engine": 2.0})
    assert latencies.percentiles(50) == {"decode": (2.0,), "engine": (2.0,)}
