# SPDX-License-Identifier: Apache-2.0
"""The synchroniser: sets of one moment, in order and in time, and a reason for every picture that is dropped."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from qdbev_ros.core.errors import ConfigError
from qdbev_ros.core.synchroniser import PATIENCE, FrameSet, Synchroniser, SyncSettings
from qdbev_ros.core.variant import CAMERAS

MS = 1_000_000
START_MS = 1_000_000
DEADLINE_S = SyncSettings().deadline_s
# nuScenes' shutter order, relative to the last camera of a set.
OFFSETS_MS = {
    "CAM_FRONT_LEFT": -42,
    "CAM_FRONT": -35,
    "CAM_FRONT_RIGHT": -27,
    "CAM_BACK_RIGHT": -19,
    "CAM_BACK": -10,
    "CAM_BACK_LEFT": 0,
}
Sync = Synchroniser[int]


class Arrival(NamedTuple):
    """A picture of `camera` stamped `stamp_ms` that arrives at `at_ms`, both of one clock."""

    at_ms: float
    camera: str
    stamp_ms: int


def arrivals(period_ms: int, count: int, delay_ms: float = 5) -> list[Arrival]:
    """`count` sets of six, each picture `delay_ms` after its stamp, in order of arrival."""
    stamps = [
        (START_MS + index * period_ms + offset, camera)
        for index in range(count)
        for camera, offset in OFFSETS_MS.items()
    ]
    return [Arrival(stamp + delay_ms, camera, stamp) for stamp, camera in sorted(stamps)]


class Given(NamedTuple):
    """A set with the time at which it was given out."""

    at_ms: float
    frame: FrameSet[int]


def feed(sync: Sync, pictures: Iterable[Arrival], tick_ms: float = 5) -> list[Given]:
    """Every set that came out, with `expire` called every `tick_ms` and once more after the last picture."""
    sets: list[Given] = []
    now = None
    for at, camera, stamp in pictures:
        while now is not None and now + tick_ms < at:
            now += tick_ms
            sets += [Given(now, frame) for frame in sync.expire(now / 1e3)]
        now = at if now is None else max(now, at)
        # The payload is the stamp, to see that pictures are not mixed up.
        sets += [Given(now, frame) for frame in sync.add(camera, stamp * MS, stamp * MS, now / 1e3)]
    return sets + [Given(now or 0, frame) for frame in sync.expire((now or 0) / 1e3 + 2 * DEADLINE_S)]


def stamps_ms(sets: Iterable[Given]) -> list[int]:
    return [given.frame.stamp_ns // MS for given in sets]


def assert_sound(sync: Sync, sets: Sequence[Given]) -> None:
    """Each set holds pictures of one moment; every picture is in a set, dropped with a reason, or waiting."""
    for _, frame in sets:
        assert sorted([*frame.images, *frame.missing]) == sorted(CAMERAS)
        assert frame.spread_s <= sync.settings.max_spread_s + 1e-9
        assert frame.stamp_ns == max(image.stamp_ns for image in frame.images.values())
        assert all(image.payload == image.stamp_ns for image in frame.images.values())
    used = sum(len(frame.images) for _, frame in sets)
    assert sync.counters.received == used + sum(sync.counters.dropped.values()) + sync.waiting
    assert sync.waiting <= 2 * sync.settings.max_waiting * len(CAMERAS)


@pytest.mark.parametrize("period_ms", [500, 83, 50])
def test_every_moment_becomes_one_set_named_by_its_newest_stamp(period_ms: int) -> None:
    sync = Sync(CAMERAS)
    sets = feed(sync, arrivals(period_ms, 5))
    assert stamps_ms(sets) == [START_MS + i * period_ms for i in range(5)]
    assert_sound(sync, sets)
    for at, frame in sets:
        assert tuple(frame.images) == CAMERAS
        assert frame.spread_s == pytest.approx(0.042)
        assert at == frame.stamp_ns / MS + 5, "a set is there with its last picture"
    assert not sync.counters.dropped
    assert sync.waiting == 0


@pytest.mark.parametrize("lost", CAMERAS)
def test_whichever_camera_dies_every_moment_is_answered_and_only_two_sets_wait(lost: str) -> None:
    sync = Sync(CAMERAS)
    pictures = [p for p in arrivals(83, 10) if p.camera != lost or p.stamp_ms < START_MS + 100]
    sets = feed(sync, pictures)
    assert [frame.missing for _, frame in sets] == [()] * 2 + [(lost,)] * 8
    assert sync.counters.missing == {lost: 8}
    first_ms = -42 if lost != "CAM_FRONT_LEFT" else -35
    for index, (at, frame) in enumerate(sets):
        moment = START_MS + index * 83
        if index in range(2, 2 + PATIENCE):
            assert at - (moment + first_ms + 5) == pytest.approx(DEADLINE_S * 1e3, abs=5)
        else:
            assert at == frame.stamp_ns / MS + 5


@pytest.mark.parametrize("lost", CAMERAS)
def test_at_twelve_hertz_a_set_without_a_camera_is_there_within_a_period_the_first_ones_too(
    lost: str,
) -> None:
    """With deadlines looked at as seldom as the node does."""
    pictures = [p for p in arrivals(83, 30) if p.camera != lost or p.stamp_ms < START_MS + 12 * 83 - 50]
    sets = feed(Sync(CAMERAS), pictures, tick_ms=20)
    assert [frame.missing for _, frame in sets] == [()] * 12 + [(lost,)] * 18
    for at, frame in sets:
        assert at - min(image.arrived_s for image in frame.images.values()) * 1e3 <= 83.001


@pytest.mark.parametrize("period_ms", [500, 83])
@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("order", [1, -1])
def test_however_many_cameras_die_at_once_no_moment_is_lost(period_ms: int, count: int, order: int) -> None:
    sync = Sync(CAMERAS)
    lost = tuple(camera for camera in CAMERAS if camera in list(OFFSETS_MS)[::order][:count])
    seen = START_MS + 20 * period_ms - 42  # by then the cameras' periods are known
    sets = feed(sync, [p for p in arrivals(period_ms, 28) if p.camera not in lost or p.stamp_ms < seen])
    assert_sound(sync, sets)
    assert [frame.missing for _, frame in sets] == [()] * 20 + [lost] * 8
    assert not sync.counters.dropped
    waits = [at - frame.stamp_ns / MS for at, frame in sets]
    assert max(waits) <= 0.5 * period_ms + 2 * DEADLINE_S * 1e3
    assert waits[-5:] == [5] * 5, "who is gone is not waited for"


def test_a_camera_that_returns_is_in_the_sets_again() -> None:
    sync = Sync(CAMERAS)
    away = range(START_MS + 100, START_MS + 600)
    pictures = [p for p in arrivals(83, 14) if p.camera != "CAM_BACK_LEFT" or p.stamp_ms not in away]
    sets = feed(sync, pictures)
    # Its first picture is the last of its set and too late for that, but from then on it is waited for.
    assert [frame.missing for _, frame in sets] == [()] * 2 + [("CAM_BACK_LEFT",)] * 7 + [()] * 5


def test_a_lost_picture_costs_its_set_nothing_but_the_camera() -> None:
    sync = Sync(CAMERAS)
    sets = feed(sync, [p for p in arrivals(83, 4) if p[1:] != ("CAM_BACK", START_MS + 83 - 10)])
    assert [frame.missing for _, frame in sets] == [(), ("CAM_BACK",), (), ()]
    assert not sync.counters.dropped


def test_a_frozen_camera_that_repeats_one_stamp_is_missing() -> None:
    sync = Sync(CAMERAS)
    frozen = START_MS - 10
    pictures = [p._replace(stamp_ms=frozen) if p.camera == "CAM_BACK" else p for p in arrivals(83, 6)]
    sets = feed(sync, pictures)
    assert [frame.missing for _, frame in sets] == [(), *[("CAM_BACK",)] * 5]
    assert sum(sync.counters.dropped.values()) == 5


def test_pictures_further_apart_than_the_spread_are_never_one_set() -> None:
    sync = Sync(("A", "B"), SyncSettings(max_spread_s=0.06))
    assert not sync.add("A", 0, 0, 0.0)
    assert not sync.add("B", 61 * MS, 0, 0.061)
    assert [frame.stamp_ns for frame in sync.add("A", 100 * MS, 0, 0.1)][-1] == 100 * MS


def test_duplicates_and_late_pictures_are_dropped_and_counted() -> None:
    sync = Sync(("A", "B"))
    feed(
        sync,
        [Arrival(i, c, s) for i, (c, s) in enumerate([("A", 9), ("A", 9), ("B", 10), ("B", 10), ("A", 8)])],
    )
    assert sync.counters.dropped == {"duplicate": 2, "late": 1}
    assert sync.counters.complete_sets == 1


def test_pictures_out_of_order_still_make_their_set() -> None:
    sync = Sync(("A", "B"))
    order = [("A", 200), ("A", 100), ("B", 100), ("B", 200)]
    sets = feed(sync, [Arrival(200 + i, camera, stamp) for i, (camera, stamp) in enumerate(order)])
    assert stamps_ms(sets) == [100, 200]
    assert sync.counters.reordered == 1


def test_an_incomplete_set_is_made_around_the_anchors_picture() -> None:
    """B runs half a period before A and C; D is dead. Without the anchor a set would begin with B's picture."""
    offsets = {"B": -50, "A": 0, "C": 40}
    pictures = [
        Arrival(1000 + 100 * i + o, camera, 1000 + 100 * i + o)
        for i in range(4)
        for camera, o in offsets.items()
    ]
    sync = Sync(("A", "B", "C", "D"), SyncSettings(max_spread_s=0.05, deadline_s=0.1, anchor="A"))
    sets = feed(sync, pictures)
    assert sets
    assert all("A" in frame.images for _, frame in sets)


def test_time_going_back_resets_once_and_the_next_set_is_whole() -> None:
    sync = Sync(CAMERAS)
    one = arrivals(500, 6)
    passes = [p._replace(at_ms=p.at_ms + 4000 * k) for k in range(3) for p in one]
    sets = feed(sync, passes)
    assert stamps_ms(sets) == [START_MS + i * 500 for i in range(6)] * 3
    assert all(not frame.missing for _, frame in sets)
    assert sync.counters.resets == {"time_back": 2}


def test_last_pictures_of_the_old_pass_do_not_poison_the_new_one() -> None:
    """Topics are not ordered among each other: the old pass may end after the new one has begun."""
    sync = Sync(CAMERAS)
    one = arrivals(500, 6)
    order = [*one[:-2], *one[:4], *one[-2:], *one[4:]]
    sets = feed(sync, [p._replace(at_ms=START_MS + 10.0 * i) for i, p in enumerate(order)])
    whole = [START_MS + i * 500 for i in range(6)]
    assert stamps_ms(sets) == [*whole[:5], *whole]
    assert sync.counters.resets == {"time_back": 1}
    assert sync.counters.dropped["before_jump"] == 2


def test_a_bag_looped_a_hundred_times_loses_no_set_and_keeps_nothing() -> None:
    sync = Sync(CAMERAS)
    one = arrivals(83, 12)
    sets = feed(sync, (p._replace(at_ms=p.at_ms + 1500 * k) for k in range(100) for p in one), tick_ms=50)
    assert stamps_ms(sets) == [START_MS + i * 83 for i in range(12)] * 100
    assert all(not frame.missing for _, frame in sets)
    assert sync.counters.resets == {"time_back": 99}
    assert sync.waiting == 0


@pytest.mark.parametrize("jump_ms", [-3_600_000, -10_000, -400, 400, 10_000, 3_600_000])
@pytest.mark.parametrize("camera", ["CAM_FRONT", "CAM_BACK_LEFT"])
def test_one_camera_whose_clock_jumps_is_only_missing_until_it_comes_back(camera: str, jump_ms: int) -> None:
    sync = Sync(CAMERAS)
    wrong = range(START_MS + 100, START_MS + 1000)
    pictures = [
        p._replace(stamp_ms=p.stamp_ms + jump_ms) if p.camera == camera and p.stamp_ms in wrong else p
        for p in arrivals(83, 24)
    ]
    sets = feed(sync, pictures)
    assert len(sets) == 24
    assert_sound(sync, sets)
    assert all(set(frame.missing) <= {camera} for _, frame in sets)
    assert [frame.missing for _, frame in sets[3:11]] == [(camera,)] * 8
    assert [frame.missing for _, frame in sets[-8:]] == [()] * 8
    assert not sync.counters.resets


@pytest.mark.parametrize("jump_ms", [-3_600_000, -10_000, -400, 400, 10_000, 3_600_000])
def test_when_the_clock_of_all_jumps_sets_go_on_at_the_new_time(jump_ms: int) -> None:
    sync = Sync(CAMERAS)
    pictures = [
        p._replace(stamp_ms=p.stamp_ms + jump_ms) if p.stamp_ms > START_MS + 430 else p
        for p in arrivals(83, 12)
    ]
    sets = feed(sync, pictures)
    assert_sound(sync, sets)
    assert [frame.missing for _, frame in sets] == [()] * 12
    assert stamps_ms(sets)[-6:] == [START_MS + jump_ms + i * 83 for i in range(6, 12)]


@pytest.mark.parametrize("factor", [2, 3])
def test_a_faster_camera_makes_no_sets_of_its_own(factor: int) -> None:
    sync = Sync(CAMERAS)
    extra = [
        p._replace(at_ms=p.at_ms + 83 * k / factor, stamp_ms=p.stamp_ms + 83 * k // factor)
        for p in arrivals(83, 8)
        if p.camera == "CAM_BACK"
        for k in range(1, factor)
    ]
    sets = feed(sync, sorted([*arrivals(83, 8), *extra]))
    assert_sound(sync, sets)
    assert [frame.missing for _, frame in sets] == [()] * 8


def test_a_slower_camera_is_in_the_sets_that_it_has_a_picture_for() -> None:
    sync = Sync(CAMERAS)
    odd = [START_MS + 83 * i - 10 for i in range(1, 9, 2)]
    sets = feed(sync, [p for p in arrivals(83, 8) if p.camera != "CAM_BACK" or p.stamp_ms not in odd])
    assert [frame.missing for _, frame in sets] == [(), ("CAM_BACK",)] * 4


def test_the_last_camera_alive_still_makes_sets() -> None:
    sync = Sync(CAMERAS)
    sets = feed(sync, [p for p in arrivals(83, 40) if p.camera == "CAM_BACK" or p.stamp_ms < START_MS + 100])
    assert [tuple(frame.images) for _, frame in sets[-20:]] == [("CAM_BACK",)] * 20


@pytest.mark.parametrize("dead", [CAMERAS[:3], CAMERAS[1:]])
@pytest.mark.parametrize("period_ms", [83, 500])
def test_cameras_that_die_together_cost_a_few_moments_at_most(period_ms: int, dead: tuple[str, ...]) -> None:
    sync = Sync(CAMERAS)
    pictures = [
        p
        for p in arrivals(period_ms, 40)
        if p.camera not in dead or p.stamp_ms < START_MS + 20 * period_ms - 50
    ]
    missing = [frame.missing for _, frame in feed(sync, pictures)]
    assert missing[:20] == [()] * 20
    assert len(missing) >= 40 - 4
    assert set(missing[20:]) == {dead}


def test_a_reset_forgets_what_waits_and_which_stamps_were_seen() -> None:
    sync = Sync(CAMERAS)
    pictures = arrivals(83, 2)
    feed(sync, pictures[:6])
    for at, camera, stamp in pictures[6:9]:
        sync.add(camera, stamp * MS, 0, at / 1e3)
    sync.reset("service")
    assert sync.waiting == 0
    assert sync.counters.dropped == {"reset": 3}
    assert len(feed(sync, pictures[:6])) == 1


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="distinct"):
        Sync(("A", "A"))
    with pytest.raises(ConfigError, match="deadline"):
        SyncSettings(deadline_s=0)
    with pytest.raises(ConfigError, match="'C' is none of A, B"):
        Sync(("A", "B"), SyncSettings(anchor="C"))


@example(period_ms=50, lost=set(), repeated=set(), wrong_stamps={13: 43}, seed=0, jump_at=0)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    period_ms=st.sampled_from([50, 83, 100, 500]),
    lost=st.sets(st.integers(0, 59), max_size=20),
    repeated=st.sets(st.integers(0, 59), max_size=10),
    wrong_stamps=st.dictionaries(st.integers(0, 59), st.integers(-20_000, 20_000), max_size=5),
    seed=st.integers(0, 2**16),
    jump_at=st.integers(0, 60),
)
def test_whatever_arrives_sets_are_sound_and_nothing_vanishes_uncounted(
    period_ms: int, lost: set[int], repeated: set[int], wrong_stamps: dict[int, int], seed: int, jump_at: int
) -> None:
    rng = random.Random(seed)
    whole = [
        p._replace(stamp_ms=p.stamp_ms + wrong_stamps.get(i, 0))
        for i, p in enumerate(arrivals(period_ms, 10))
    ]
    pictures = [p for i, p in enumerate(whole) for _ in range((i not in lost) + (i in repeated))]
    pictures = [*pictures, *pictures[jump_at % (len(pictures) + 1) :]]
    for i in range(len(pictures) - 3):  # a little disorder
        j = i + rng.randrange(3)
        pictures[i], pictures[j] = pictures[j], pictures[i]
    sync = Sync(CAMERAS)
    sets: list[Given] = []
    newest, resets = -1, 0
    for i, (_, camera, stamp) in enumerate(pictures):
        now = i * period_ms / 6
        for frame in sync.add(camera, stamp * MS, stamp * MS, now / 1e3):
            sets.append(Given(now, frame))
            if resets == sync.counters.resets["time_back"]:
                assert frame.stamp_ns > newest, "time goes on, but for a reset"
            newest, resets = frame.stamp_ns, sync.counters.resets["time_back"]
        assert_sound(sync, sets)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 2**16), period_ms=st.sampled_from([83, 100, 500]), jitter_ms=st.integers(0, 8))
def test_disorder_and_jitter_within_a_set_lose_nothing(seed: int, period_ms: int, jitter_ms: int) -> None:
    rng = random.Random(seed)
    pictures = []
    for index in range(8):
        group = arrivals(period_ms, 8)[6 * index : 6 * index + 6]
        times = sorted(p.at_ms + rng.uniform(0, 30) for p in group)
        pictures += [
            p._replace(at_ms=at, stamp_ms=p.stamp_ms + rng.randint(-jitter_ms, jitter_ms))
            for at, p in zip(times, rng.sample(group, 6), strict=True)
        ]
    sync = Sync(CAMERAS)
    sets = feed(sync, sorted(pictures))
    assert [frame.missing for _, frame in sets] == [()] * 8
    assert not sync.counters.dropped


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    lost=st.sampled_from(CAMERAS),
    begin=st.integers(0, 8),
    seed=st.integers(0, 2**16),
    period_ms=st.sampled_from([83, 100, 500]),
)
def test_a_lost_camera_never_costs_a_moment_nor_more_than_the_deadline(
    lost: str, begin: int, seed: int, period_ms: int
) -> None:
    rng = random.Random(seed)
    pictures = [
        p._replace(at_ms=p.at_ms + rng.uniform(0, 20))
        for p in arrivals(period_ms, 12)
        if p.camera != lost or p.stamp_ms < START_MS + begin * period_ms - 50
    ]
    sync = Sync(CAMERAS)
    sets = feed(sync, sorted(pictures))
    assert [frame.missing for _, frame in sets] == [()] * begin + [(lost,)] * (12 - begin)
    for at, frame in sets:
        first = min(image.arrived_s for image in frame.images.values())
        assert at <= (first + DEADLINE_S) * 1e3 + 5.001
