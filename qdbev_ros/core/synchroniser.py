# SPDX-License-Identifier: Apache-2.0
"""Groups the cameras' pictures into sets of one moment. Knows stamps only: no clock, no threads, no ROS.

A set is named by its reference, the newest stamp in it: every camera gives its newest picture that is not younger than
the reference, and none may be older than `max_spread`. The smallest reference that every camera can serve comes first.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from qdbev_ros.core.errors import ConfigError

T = TypeVar("T")


class Stamped(NamedTuple, Generic[T]):
    """A picture, or whatever stands for one, with its stamp in nanoseconds."""

    stamp_ns: int
    payload: T


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


class Synchroniser(Generic[T]):
    """Feed it with `add`; it answers with sets. Everything it drops is counted with the reason.

    max_spread_s bounds the stamps of one set; deadline_s is how much younger the newest picture may be before an
    incomplete set is given up; max_waiting bounds the pictures kept for each camera. A camera whose stamps step back by
    more than the deadline plays a recording that started again: everything is dropped, once for all cameras.
    """

    def __init__(
        self,
        cameras: Sequence[str],
        max_spread_s: float = 0.06,
        deadline_s: float = 0.3,
        max_waiting: int = 10,
    ) -> None:
        if not cameras or len(set(cameras)) != len(cameras):
            raise ConfigError(f"the synchroniser needs distinct cameras, got {list(cameras)}")
        if not 0 < max_spread_s < deadline_s or max_waiting < 1:
            raise ConfigError(
                f"the synchroniser needs 0 < max_spread ({max_spread_s} s) < deadline ({deadline_s} s) "
                f"and at least one waiting picture (got {max_waiting})"
            )
        self.cameras = tuple(cameras)
        self.counters = SyncCounters()
        self._spread = round(max_spread_s * 1e9)
        self._deadline = round(deadline_s * 1e9)
        self._max_waiting = max_waiting
        # After time went back: cameras still to follow, and the stamp above which their pictures are of before.
        self._to_follow: set[str] = set()
        self._old_above = 0
        self._clear()

    def _clear(self) -> None:
        self._waiting: dict[str, list[Stamped[T]]] = {camera: [] for camera in self.cameras}
        self._last: dict[str, int] = {}  # camera -> newest stamp received
        self._used: dict[str, int] = {}  # camera -> stamp in the last set
        self._horizon: int | None = None  # stamps up to here are decided

    @property
    def waiting(self) -> int:
        """Number of pictures kept."""
        return sum(len(queue) for queue in self._waiting.values())

    def reset(self, reason: str) -> None:
        """Drops everything that waits, and forgets which stamps were seen."""
        self.counters.resets[reason] += 1
        self.counters.dropped["reset"] += self.waiting
        self._clear()

    def add(self, camera: str, stamp_ns: int, payload: T) -> list[FrameSet[T]]:
        """Takes one picture; returns the sets that it completed or let expire, oldest first.

        A set with `missing` cameras is given up: nothing can complete it any more.
        """
        self.counters.received += 1
        refusal = self._refuse(camera, stamp_ns)
        if refusal is not None:
            self.counters.dropped[refusal] += 1
            return []
        if stamp_ns < self._last.get(camera, stamp_ns):
            self.counters.reordered += 1
        if stamp_ns > self._old_above:
            self._to_follow.clear()
        self._last[camera] = max(stamp_ns, self._last.get(camera, stamp_ns))
        insort(self._waiting[camera], Stamped(stamp_ns, payload), key=lambda image: image.stamp_ns)
        sets: list[FrameSet[T]] = []
        while (reference := self._next_reference()) is not None:
            complete = self._take(reference)
            sets += [*self._give_up(reference), complete]
        sets += self._give_up(max(self._last.values()) - self._deadline)
        self._bound(camera)
        return sets

    def _refuse(self, camera: str, stamp_ns: int) -> str | None:
        """Why this picture is not taken; resets where the camera's time went back."""
        if camera in self._to_follow:
            if stamp_ns > self._old_above:
                return "before_jump"
            self._to_follow.discard(camera)
        last = self._last.get(camera)
        if last is not None and stamp_ns < last - self._deadline:
            # Topics are not ordered among each other: the other cameras' last pictures of before may still be on
            # their way, and must not be taken for the future of the new pass.
            self._old_above = (stamp_ns + max(self._last.values())) // 2
            self._to_follow = set(self.cameras) - {camera}
            self.reset("time_back")
            return None
        if stamp_ns == self._used.get(camera) or any(i.stamp_ns == stamp_ns for i in self._waiting[camera]):
            return "duplicate"
        if self._horizon is not None and stamp_ns <= self._horizon:
            return "late"
        return None

    def _next_reference(self) -> int | None:
        """The smallest reference that every camera can serve now."""
        if not all(self._waiting.values()):
            return None
        first = max(queue[0].stamp_ns for queue in self._waiting.values())
        candidates = sorted(
            {i.stamp_ns for queue in self._waiting.values() for i in queue if i.stamp_ns >= first}
        )
        for reference in candidates:
            if all(reference - self._newest_until(c, reference) <= self._spread for c in self.cameras):
                return reference
        return None

    def _newest_until(self, camera: str, reference: int) -> int:
        return self._waiting[camera][self._count_until(camera, reference) - 1].stamp_ns

    def _count_until(self, camera: str, stamp_ns: int) -> int:
        return bisect_right([image.stamp_ns for image in self._waiting[camera]], stamp_ns)

    def _take(self, reference: int) -> FrameSet[T]:
        """Removes and returns the complete set at `reference`."""
        images = {c: self._waiting[c].pop(self._count_until(c, reference) - 1) for c in self.cameras}
        self._used = {c: image.stamp_ns for c, image in images.items()}
        self.counters.complete_sets += 1
        return FrameSet(reference, images, ())

    def _give_up(self, until_ns: int) -> list[FrameSet[T]]:
        """Decides every stamp up to `until_ns`: what still waits there becomes incomplete sets, oldest first."""
        old: list[tuple[int, str, Stamped[T]]] = []
        for camera in self.cameras:
            count = self._count_until(camera, until_ns)
            old += [(image.stamp_ns, camera, image) for image in self._waiting[camera][:count]]
            del self._waiting[camera][:count]
        self._horizon = until_ns if self._horizon is None else max(self._horizon, until_ns)
        sets: list[FrameSet[T]] = []
        group: dict[str, Stamped[T]] = {}
        for stamp, camera, image in sorted(old, key=lambda entry: entry[0]):
            if group and (camera in group or stamp - next(iter(group.values())).stamp_ns > self._spread):
                sets.append(self._incomplete(group))
                group = {}
            group[camera] = image
        return [*sets, self._incomplete(group)] if group else sets

    def _incomplete(self, group: dict[str, Stamped[T]]) -> FrameSet[T]:
        missing = tuple(camera for camera in self.cameras if camera not in group)
        self.counters.incomplete_sets += 1
        self.counters.missing.update(missing)
        self.counters.dropped["incomplete"] += len(group)
        images = {camera: group[camera] for camera in self.cameras if camera in group}
        return FrameSet(max(image.stamp_ns for image in images.values()), images, missing)

    def _bound(self, camera: str) -> None:
        queue = self._waiting[camera]
        while len(queue) > self._max_waiting:
            del queue[0]
            self.counters.dropped["overflow"] += 1
