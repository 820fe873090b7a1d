# SPDX-License-Identifier: Apache-2.0
"""Markers outlive the time to the next answer at any rate, by the wall's clock and by a bag's, and do not linger."""

from __future__ import annotations

import numpy as np
import pytest

from qdbev_ros.core.lifetime import MarkerLifetime


@pytest.mark.parametrize("rate_hz", [0.2, 1.0, 2.0, 12.0])
@pytest.mark.parametrize("speed", [0.25, 1.0, 8.0])
def test_nothing_flickers_at_any_rate_and_speed_of_a_bag(rate_hz: float, speed: float) -> None:
    """Gaps vary by half; every answer is shown until the next, whichever clock the viewer has."""
    gaps = np.random.default_rng(1).uniform(0.75, 1.25, 60) / rate_hz
    stamps = np.cumsum(gaps)
    walls, lifetime = stamps / speed, MarkerLifetime()
    shown = [lifetime.after(wall, stamp) for wall, stamp in zip(walls, stamps)]
    needed = np.maximum(np.diff(walls), np.diff(stamps))
    assert (np.array(shown[1:-1]) > needed[1:]).all() or max(needed) > 20 / 1.25


def test_what_a_silent_node_left_behind_goes_within_three_periods() -> None:
    lifetime = MarkerLifetime()
    shown = [lifetime.after(0.5 * i, 0.5 * i) for i in range(5)]
    assert shown == [2.0, 1.5, 1.5, 1.5, 1.5]


def test_a_fast_node_shows_boxes_for_a_second_and_none_for_more_than_twenty() -> None:
    lifetime = MarkerLifetime()
    assert [lifetime.after(t, t) for t in (0.0, 0.08, 0.16)][1:] == [1.0, 1.0]
    assert lifetime.after(300.0, 300.0) == 20.0


def test_a_bag_that_starts_again_changes_nothing() -> None:
    lifetime = MarkerLifetime()
    assert [lifetime.after(t, stamp) for t, stamp in ((0.0, 900.0), (0.5, 900.5), (1.0, 0.0))][1:] == [
        1.5,
        1.5,
    ]
