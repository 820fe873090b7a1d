# SPDX-License-Identifier: Apache-2.0
"""Groups the cameras' pictures into sets of one moment. Knows stamps and arrival times only: no threads, no ROS.

A set is named by its reference, the newest stamp in it: every camera gives its newest picture that is not younger than
the reference, and none may be older than `max_spread`. The smallest reference that every awaited camera can serve
comes first, so a set is there with its last picture. A set that stays incomplete is given out without the missing
cameras when its first picture has waited for the deadline; a camera that missed PATIENCE sets is not awaited any more
until it delivers in time again, so a lost camera delays two answers, not all.

Clocks: one camera whose stamps jump, ahead or back, is only missing. When most of the delivering cameras step back it
is time itself (a recording that started again): everything waiting is dropped and the new pass begins.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from qdbev_ros.core.errors import ConfigError

T = TypeVar("T")

PATIENCE = 2  # sets that a camera may miss and still be waited for
JUMP_BACK_NS = 300_000_000  # a camera's stamps that step back further are another time, no reordering
FIRST_PERIOD_S, LONGEST_PERIOD_S = 1.0, 3.0  # taken for a camera's period while it is unknown, and at most


class Stamped(NamedTuple, Generic[T]):
    """A picture, or whatever stands for one: its stamp in nanoseconds, and when it arrived (monotonic seconds)."""

    stamp_ns: int
    payload: T
    arrived_s: float


@dataclass(frozen=True)
class FrameSet(Generic[T]):
    """Pictures of one moment. images: camera -> picture, in camera order; missing: cameras without one."""

    stamp_ns: int  # the reference: newest stamp in `images`
    images: dict[str, Stamped[T]]
    missing: tuple[str, ...]

    @property
    def spread_s(self) -> float:
        """Seconds between the oldest and the newest picture."""
        return (self.stamp_ns - min(image.stamp_ns for image in self.images.values())) * 1e-9


@dataclass(frozen=True)
class SyncSettings:
    """max_spread_s bounds the stamps of one set; deadline_s is how long its first picture waits for the others;
    max_waiting bounds the pictures kept for each camera. `anchor` is the camera around whose pictures incomplete sets
    are made where it has one; empty: the first camera. Raises ConfigError.
    """

    max_spread_s: float = 0.06
    deadline_s: float = 0.08  # less than a period at 12 Hz
    max_waiting: int = 10
    anchor: str = ""

    def __post_init__(self) -> None:
        if not (self.max_spread_s > 0 and self.deadline_s > 0) or self.max_waiting < 1:
            raise ConfigError(
                f"the synchroniser needs a positive max_spread ({self.max_spread_s} s) and deadline "
                f"({self.deadline_s} s) and at least one waiting picture (got {self.max_waiting})"
            )


@dataclass
class SyncCounters:
    """What happened since the start. Pictures: received = in sets + sum(dropped) + waiting."""

    received: int = 0
    complete_sets: int = 0
    incomplete_sets: int = 0
    reordered: int = 0  # accepted though older than the camera's last one
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> pictures
    missing: Counter[str] = field(default_factory=Counter)  # camera -> incomplete sets that lacked it
    resets: Counter[str] = field(default_factory=Counter)  # reason -> resets


@dataclass
class _Camera(Generic[T]):
    """One camera's pictures and what is known of its clock."""

    waiting: list[Stamped[T]] = field(default_factory=list)  # by stamp
    stepped_back: list[Stamped[T]] = field(
        default_factory=list
    )  # of another time, until most cameras are there
    last: int | None = None  # newest stamp accepted
    used: int | None = None  # stamp in the last set
    missed: int = 0  # sets in a row
    arrived_s: float | None = None
    period_s: float = (
        FIRST_PERIOD_S  # between arrivals: the longest of late, for they come in bunches at times
    )

    def count_until(self, stamp_ns: int) -> int:
        return bisect_right(self.waiting, stamp_ns, key=lambda image: image.stamp_ns)

    def arrive(self, now_s: float) -> None:
        if self.arrived_s is not None:
            self.period_s = min(max(now_s - self.arrived_s, 0.8 * self.period_s), LONGEST_PERIOD_S)
        self.arrived_s = now_s

    def delivers(self, now_s: float, deadline_s: float) -> bool:
        """Whether its next picture is not overdue by more than the deadline and half a period."""
        return self.arrived_s is not None and now_s - self.arrived_s <= 1.5 * self.period_s + deadline_s


class Synchroniser(Generic[T]):
    """Feed it with `add`, call `expire` now and then; both answer with sets, oldest first.

    Every picture that gets into no set is counted with the reason: duplicate; late (of a moment that was decided);
    unused (its camera gave a newer one); stray (too few cameras share its moment); clock_back (its camera alone stepped
    back); before_jump (of the time before a step back); overflow; reset. Times are seconds of a monotonic clock.
    """

    def __init__(self, cameras: Sequence[str], settings: SyncSettings | None = None) -> None:
        if not cameras or len(set(cameras)) != len(cameras):
            raise ConfigError(f"the synchroniser needs distinct cameras, got {list(cameras)}")
        self.cameras = tuple(cameras)
        self.counters = SyncCounters()
        self.configure(settings or SyncSettings())
        # After time went back: cameras still to follow, and the stamp above which their pictures are of before.
        self._to_follow: set[str] = set()
        self._old_above = 0
        self._states: dict[str, _Camera[T]] = {camera: _Camera() for camera in self.cameras}
        self._horizon: int | None = None  # stamps up to here are decided

    def configure(self, settings: SyncSettings) -> None:
        """Takes other settings; what waits is kept. Raises ConfigError for an unknown anchor."""
        if settings.anchor and settings.anchor not in self.cameras:
            raise ConfigError(f"the anchor {settings.anchor!r} is none of {', '.join(self.cameras)}")
        self.settings = settings
        self._spread = round(settings.max_spread_s * 1e9)
        self._anchor = settings.anchor or self.cameras[0]

    @property
    def waiting(self) -> int:
        """Number of pictures kept."""
        return sum(len(state.waiting) + len(state.stepped_back) for state in self._states.values())

    def reset(self, reason: str) -> None:
        """Drops everything that waits, and forgets which stamps were seen."""
        self.counters.resets[reason] += 1
        self._drop("reset", self.waiting)
        self._to_follow.clear()
        self._forget()

    def add(self, camera: str, stamp_ns: int, payload: T, now_s: float) -> list[FrameSet[T]]:
        """Takes one picture; returns the sets that it completed, and those that expired."""
        self.counters.received += 1
        state = self._states[camera]
        state.arrive(now_s)
        image = Stamped(stamp_ns, payload, now_s)
        if self._steps_back(state, stamp_ns):
            self._hold_back(state, image, now_s)
        else:
            self._drop("clock_back", len(state.stepped_back))
            state.stepped_back = []
            self._accept(camera, image)
        return [*self._complete_sets(now_s), *self.expire(now_s)]

    def expire(self, now_s: float) -> list[FrameSet[T]]:
        """The sets whose deadline is over."""
        sets: list[FrameSet[T]] = []
        while True:
            overdue = [
                image.stamp_ns
                for state in self._states.values()
                for image in state.waiting
                if now_s - image.arrived_s >= self.settings.deadline_s
            ]
            if not overdue or self._undecided(pivot := self._pivot(min(overdue)), now_s):
                return sets
            sets += self._give_up(pivot, now_s)

    def _forget(self) -> None:
        for state in self._states.values():
            state.waiting, state.stepped_back, state.last, state.used = [], [], None, None
        self._horizon = None

    def _steps_back(self, state: _Camera[T], stamp_ns: int) -> bool:
        """Whether the camera's stamps left the time in which sets are made; returning from ahead is no step back."""
        if state.last is None:
            return False
        before = state.last if self._horizon is None else min(state.last, self._horizon)
        return stamp_ns < before - JUMP_BACK_NS

    def _hold_back(self, state: _Camera[T], image: Stamped[T], now_s: float) -> None:
        """Keeps a picture of an earlier time; once most cameras are there it is everybody's time."""
        if any(kept.stamp_ns == image.stamp_ns for kept in state.stepped_back):
            self._drop("duplicate")
            return
        insort(state.stepped_back, image, key=lambda kept: kept.stamp_ns)
        self._bound(state.stepped_back)
        back = {name for name, other in self._states.items() if other.stepped_back}
        if 2 * len(back) <= len(self._delivering(now_s)):
            return
        held = {name: self._states[name].stepped_back for name in self.cameras if name in back}
        newest_held = max(images[-1].stamp_ns for images in held.values())
        newest = max(other.last for other in self._states.values() if other.last is not None)
        for name in back:
            self._states[name].stepped_back = []
        self.reset("time_back")
        # Topics are not ordered among each other: the other cameras' last pictures of before may still be on their
        # way, and must not be taken for the future of the new pass.
        self._old_above = (newest_held + newest) // 2
        self._to_follow = set(self.cameras) - back
        for name, images in held.items():
            for kept in images:
                self._accept(name, kept)

    def _accept(self, camera: str, image: Stamped[T]) -> None:
        """Puts a picture among the waiting ones, or counts why not."""
        state, stamp_ns = self._states[camera], image.stamp_ns
        refusal = self._refuse(camera, state, stamp_ns)
        if refusal is not None:
            self._drop(refusal)
            return
        if stamp_ns > self._old_above:
            self._to_follow.clear()
        if state.last is not None and stamp_ns < state.last:
            self.counters.reordered += 1
        state.last = stamp_ns if state.last is None else max(stamp_ns, state.last)
        insort(state.waiting, image, key=lambda kept: kept.stamp_ns)
        self._bound(state.waiting)

    def _refuse(self, camera: str, state: _Camera[T], stamp_ns: int) -> str | None:
        """Why this picture is not taken, or None."""
        if camera in self._to_follow:
            if stamp_ns > self._old_above:
                return "before_jump"
            self._to_follow.discard(camera)
        if stamp_ns == state.used or any(kept.stamp_ns == stamp_ns for kept in state.waiting):
            return "duplicate"
        if self._horizon is None:
            return None
        if abs(stamp_ns - self._horizon) < JUMP_BACK_NS:
            state.missed = 0  # it delivers, be it too late for the last set: the next one waits for it
        return "late" if stamp_ns <= self._horizon else None

    def _complete_sets(self, now_s: float) -> list[FrameSet[T]]:
        """Every set that no awaited camera is missing from, with the incomplete ones before it."""
        sets: list[FrameSet[T]] = []
        while (reference := self._next_reference()) is not None:
            chosen = self._newest_until(reference)
            for name, image in chosen.items():
                self._states[name].waiting.remove(image)
            while older := [s.waiting[0].stamp_ns for s in self._states.values() if s.count_until(reference)]:
                sets += self._give_up(self._pivot(min(older), reference), now_s, reference)
            sets.append(self._emit(chosen))
        return sets

    def _next_reference(self) -> int | None:
        """The smallest reference that every awaited camera can serve now."""
        awaited = [state for state in self._states.values() if state.missed < PATIENCE]
        if not awaited or not all(state.waiting for state in awaited):
            return None
        first = max(state.waiting[0].stamp_ns for state in awaited)
        stamps = {image.stamp_ns for state in awaited for image in state.waiting if image.stamp_ns >= first}
        for reference in sorted(stamps):
            newest = (state.waiting[state.count_until(reference) - 1].stamp_ns for state in awaited)
            if all(reference - stamp <= self._spread for stamp in newest):
                return reference
        return None

    def _newest_until(self, reference: int) -> dict[str, Stamped[T]]:
        """Each camera's newest picture in the window that ends at `reference`."""
        chosen = {}
        for name, state in self._states.items():
            count = state.count_until(reference)
            if count and reference - state.waiting[count - 1].stamp_ns <= self._spread:
                chosen[name] = state.waiting[count - 1]
        return chosen

    def _pivot(self, oldest: int, until: int | None = None) -> int:
        """Where an incomplete set is made: at the anchor's stamp near `oldest`, up to `until`, or at that itself."""
        waiting = (image.stamp_ns for image in self._states[self._anchor].waiting)
        anchors = [stamp for stamp in waiting if until is None or stamp <= until]
        return next((stamp for stamp in anchors if abs(stamp - oldest) <= self._spread), oldest)

    def _give_up(self, pivot: int, now_s: float, until: int | None = None) -> list[FrameSet[T]]:
        """Makes the fullest set around `pivot` of what is there (up to `until`), unless too few cameras share it.

        Either way the picture at `pivot` waits no more. A minority makes no set: it must not decide what time it is.
        """
        chosen = self._fullest(pivot, until)
        if 2 * len(chosen) <= len(self._delivering(now_s)):
            for state in self._states.values():
                kept = [image for image in state.waiting if image.stamp_ns != pivot]
                self._drop("stray", len(state.waiting) - len(kept))
                state.waiting = kept
            return []
        for name, image in chosen.items():
            self._states[name].waiting.remove(image)
        return [self._emit(chosen)]

    def _fullest(self, pivot: int, until: int | None = None) -> dict[str, Stamped[T]]:
        """The earliest of the fullest sets around `pivot`, of stamps up to `until`."""
        last = pivot + self._spread if until is None else min(pivot + self._spread, until)
        stamps = {i.stamp_ns for s in self._states.values() for i in s.waiting if pivot <= i.stamp_ns <= last}
        return max((self._newest_until(stamp) for stamp in sorted(stamps)), key=len)

    def _undecided(self, pivot: int, now_s: float) -> bool:
        """Whether only time can tell if the set around `pivot` is a minority's.

        That is so where half of the cameras or more fell silent at once: they are dead, or between two pictures.
        """
        chosen, alive = self._fullest(pivot), self._delivering(now_s)
        since = min(image.arrived_s for image in chosen.values())
        silent = [
            name for name in alive if name not in chosen and (self._states[name].arrived_s or 0.0) < since
        ]
        return 2 * len(chosen) <= len(alive) < 2 * len(chosen) + len(silent)

    def _delivering(self, now_s: float) -> list[str]:
        """The cameras that deliver."""
        deadline = self.settings.deadline_s
        return [name for name, state in self._states.items() if state.delivers(now_s, deadline)]

    def _emit(self, chosen: dict[str, Stamped[T]]) -> FrameSet[T]:
        """The set of pictures already taken from the waiting ones; decides every stamp up to its reference."""
        missing = tuple(camera for camera in self.cameras if camera not in chosen)
        reference = max(image.stamp_ns for image in chosen.values())
        for name, state in self._states.items():
            count = state.count_until(reference)
            self._drop("unused", count)
            del state.waiting[:count]
            state.missed = state.missed + 1 if name in missing else 0
            if name in chosen:
                state.used = chosen[name].stamp_ns
        self._horizon = reference if self._horizon is None else max(self._horizon, reference)
        if missing:
            self.counters.incomplete_sets += 1
            self.counters.missing.update(missing)
        else:
            self.counters.complete_sets += 1
        return FrameSet(reference, {name: chosen[name] for name in self.cameras if name in chosen}, missing)

    def _bound(self, images: list[Stamped[T]]) -> None:
        while len(images) > self.settings.max_waiting:
            del images[0]
            self._drop("overflow")

    def _drop(self, reason: str, count: int = 1) -> None:
        if count:
            self.counters.dropped[reason] += count
