# SPDX-License-Identifier: Apache-2.0
"""The synchroniser: complete sets of one moment, in order, and a reason for every picture that is dropped."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.synchroniser import FrameSet, Synchroniser
from qdbev_ros.core.variant import CAMERAS

MS = 1_000_000
# nuScenes' shutter order, relative to the last camera of a set.
OFFSETS_MS = {
    "CAM_FRONT_LEFT": -42,
    "CAM_FRONT": -35,
    "CAM_FRONT_RIGHT": -27,
    "CAM_BACK_RIGHT": -19,
    "CAM_BACK": -10,
    "CAM_BACK_LEFT": 0,
}


def pictures(period_ms: int, count: int, start_ms: int = 1_000_000) -> list[tuple[str, int]]:
    """(camera, stamp) of `count` sets in the order of their stamps."""
    all_of_them = [
        (camera, (start_ms + index * period_ms + offset) * MS)
        for index in range(count)
        for camera, offset in OFFSETS_MS.items()
    ]
    return sorted(all_of_them, key=lambda entry: entry[1])


def feed(sync: Synchroniser[int], images: list[tuple[str, int]]) -> list[FrameSet[int]]:
    """Every set that came out; the payload is the stamp, to see that pictures are not mixed up."""
    return [frame for camera, stamp in images for frame in sync.add(camera, stamp, stamp)]


def accounted(sync: Synchroniser[int], sets: list[FrameSet[int]]) -> bool:
    used = sum(len(s.images) for s in sets if not s.missing)
    return sync.counters.received == used + sum(sync.counters.dropped.values()) + sync.waiting


@pytest.mark.parametrize("period_ms", [500, 83, 50])
def test_every_moment_becomes_one_set_named_by_its_newest_stamp(period_ms: int) -> None:
    sync: Synchroniser[int] = Synchroniser(CAMERAS)
    sets = feed(sync, pictures(period_ms, 5))
    assert [s.stamp_ns for s in sets] == [(1_000_000 + i * period_ms) * MS for i in range(5)]
    for frame in sets:
        assert tuple(frame.images) == CAMERAS
        assert frame.missing == ()
        assert all(image.stamp_ns == image.payload for image in frame.images.values())
        assert frame.spread_s == pytest.approx(0.042)
    assert not sync.counters.dropped
    assert sync.waiting == 0


def test_a_lost_picture_costs_its_set_only_and_names_the_camera() -> None:
    sync: Synchroniser[int] = Synchroniser(CAMERAS)
    images = pictures(83, 4)
    images.remove(("CAM_BACK", (1_000_083 - 10) * MS))
    sets = feed(sync, images)
    assert [s.missing for s in sets] == [(), ("CAM_BACK",), (), ()]
    assert sync.counters.missing == {"CAM_BACK": 1}
    assert sync.counters.dropped == {"incomplete": 5}


def test_pictures_further_apart_than_the_spread_are_never_one_set() -> None:
    sync: Synchroniser[int] = Synchroniser(("A", "B"), max_spread_s=0.06)
    assert not feed(sync, [("A", 0), ("B", 61 * MS)])
    assert feed(sync, [("A", 100 * MS)])[-1].stamp_ns == 100 * MS


def test_duplicates_and_late_pictures_are_dropped_and_counted() -> None:
    sync: Synchroniser[int] = Synchroniser(("A", "B"))
    feed(sync, [("A", 100 * MS), ("A", 100 * MS), ("B", 101 * MS), ("B", 101 * MS), ("A", 99 * MS)])
    assert sync.counters.dropped == {"duplicate": 2, "late": 1}
    assert sync.counters.complete_sets == 1


def test_pictures_out_of_order_still_make_their_set() -> None:
    sync: Synchroniser[int] = Synchroniser(("A", "B"))
    sets = feed(sync, [("A", 200 * MS), ("A", 100 * MS), ("B", 100 * MS), ("B", 200 * MS)])
    assert [s.stamp_ns for s in sets] == [100 * MS, 200 * MS]
    assert sync.counters.reordered == 1


def test_an_incomplete_set_is_given_up_after_the_deadline() -> None:
    sync: Synchroniser[int] = Synchroniser(("A", "B"), deadline_s=0.3)
    assert not feed(sync, [("A", 0), ("A", 250 * MS)])
    assert [s.missing for s in feed(sync, [("A", 310 * MS)])] == [("B",)]


def test_time_going_back_resets_once_and_the_next_set_is_whole() -> None:
    sync: Synchroniser[int] = Synchroniser(CAMERAS)
    images = pictures(500, 6)
    sets = feed(sync, images * 3)
    assert [s.stamp_ns for s in sets] == [(1_000_000 + i * 500) * MS for i in range(6)] * 3
    assert sync.counters.resets == {"time_back": 2}


def test_last_pictures_of_the_old_pass_do_not_poison_the_new_one() -> None:
    """Topics are not ordered among each other: the old pass may end after the new one has begun."""
    sync: Synchroniser[int] = Synchroniser(CAMERAS)
    images = pictures(500, 6)
    mixed = [*images[:-2], *images[:2], *images[-2:], *images[2:]]
    sets = [s for s in feed(sync, mixed) if not s.missing]
    assert [s.stamp_ns for s in sets[5:]] == [(1_000_000 + i * 500) * MS for i in range(6)]
    assert sync.counters.resets == {"time_back": 1}
    assert sync.counters.dropped["before_jump"] == 2


def test_a_silent_camera_does_not_let_the_others_pile_up() -> None:
    sync: Synchroniser[int] = Synchroniser(CAMERAS, max_waiting=4)
    for camera, stamp in pictures(10, 100):
        if camera != "CAM_FRONT":
            sync.add(camera, stamp, stamp)
    assert sync.waiting <= 5 * 4
    assert sync.counters.complete_sets == 0
    assert sync.counters.missing["CAM_FRONT"] + sync.counters.dropped["overflow"] > 0


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        Synchroniser(("A", "A"))
    with pytest.raises(ConfigError, match="deadline"):
        Synchroniser(("A",), max_spread_s=0.3, deadline_s=0.2)


@settings(max_examples=150, deadline=None)
@given(
    period_ms=st.sampled_from([50, 83, 100, 500]),
    lost=st.sets(st.integers(0, 59), max_size=20),
    repeated=st.sets(st.integers(0, 59), max_size=10),
    seed=st.integers(0, 2**16),
    jump_at=st.integers(0, 60),
)
def test_whatever_arrives_sets_are_sound_and_nothing_vanishes_uncounted(
    period_ms: int, lost: set[int], repeated: set[int], seed: int, jump_at: int
) -> None:
    rng = random.Random(seed)
    images = pictures(period_ms, 10)
    arrivals = [entry for i, entry in enumerate(images) for _ in range((i not in lost) + (i in repeated))]
    arrivals = [*arrivals, *arrivals[jump_at % (len(arrivals) + 1) :]]
    for i in range(len(arrivals) - 3):  # a little disorder
        j = i + rng.randrange(3)
        arrivals[i], arrivals[j] = arrivals[j], arrivals[i]
    sync: Synchroniser[int] = Synchroniser(CAMERAS)
    sets, resets = [], 0
    newest = -1
    for camera, stamp in arrivals:
        for frame in sync.add(camera, stamp, stamp):
            sets.append(frame)
            assert sorted([*frame.images, *frame.missing]) == sorted(CAMERAS)
            assert frame.spread_s < 0.060001
            assert all(i.payload == i.stamp_ns for i in frame.images.values())
            if not frame.missing:
                if resets == sum(sync.counters.resets.values()):
                    assert frame.stamp_ns > newest
                newest, resets = frame.stamp_ns, sum(sync.counters.resets.values())
        assert sync.waiting <= 10 * len(CAMERAS)
        assert accounted(sync, sets)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**16), period_ms=st.sampled_from([83, 100, 500]))
def test_disorder_within_a_set_loses_nothing(seed: int, period_ms: int) -> None:
    rng = random.Random(seed)
    images = pictures(period_ms, 8)
    groups = [images[i : i + 6] for i in range(0, len(images), 6)]
    shuffled = [entry for group in groups for entry in rng.sample(group, 6)]
    sets = feed(sync := Synchroniser(CAMERAS), shuffled)
    assert [s.stamp_ns for s in sets if not s.missing] == [(1_000_000 + i * period_ms) * MS for i in range(8)]
    assert not sync.counters.dropped
