# SPDX-License-Identifier: Apache-2.0
"""The transform tree: static frames and moving ones, looked up at a stamp by interpolation, never by guessing."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

from qdbev_ros.core.errors import DataError, QdbevError
from qdbev_ros.core.geometry import Pose, interpolate

JUMP_BACK_NS = 500_000_000  # a larger step back in a frame's stamps is a recording that started again
MAX_HZ = 400  # of a faster sender fewer seconds are kept


class TransformUnavailable(QdbevError):
    """A transform cannot be given; the text names the frames.

    `wait` says whether it may still arrive, `late_s` by how many seconds the newest one is too old; 0: there is none.
    """

    def __init__(self, text: str, wait: bool, late_s: float = 0.0) -> None:
        super().__init__(text)
        self.wait = wait
        self.late_s = late_s


@dataclass
class PoseTrack:
    """Poses of one moving frame in its parent, by stamp. Bounded to `keep_s` seconds of MAX_HZ poses each."""

    keep_s: float = 10.0
    max_gap_s: float = 1.0  # no interpolation across a longer hole
    stamps: list[int] = field(default_factory=list)
    poses: list[Pose] = field(default_factory=list)

    def insert(self, stamp_ns: int, pose: Pose) -> None:
        """Adds a pose; one of the same stamp replaces the old one."""
        index = bisect_left(self.stamps, stamp_ns)
        if index < len(self.stamps) and self.stamps[index] == stamp_ns:
            self.poses[index] = pose
            return
        self.stamps.insert(index, stamp_ns)
        self.poses.insert(index, pose)
        oldest = self.stamps[-1] - round(self.keep_s * 1e9)
        excess = max(bisect_left(self.stamps, oldest), len(self.stamps) - round(self.keep_s * MAX_HZ))
        del self.stamps[:excess], self.poses[:excess]

    def nearest(self, stamp_ns: int) -> Pose:
        """The pose that is nearest in time."""
        right = min(bisect_left(self.stamps, stamp_ns), len(self.stamps) - 1)
        left = max(right - 1, 0)
        nearer = right if self.stamps[right] - stamp_ns < stamp_ns - self.stamps[left] else left
        return self.poses[nearer]

    def lookup(self, stamp_ns: int, name: str) -> Pose:
        """The pose at `stamp_ns`; no extrapolation. `name` is for the message of TransformUnavailable."""
        index = bisect_left(self.stamps, stamp_ns)
        if index < len(self.stamps) and self.stamps[index] == stamp_ns:
            return self.poses[index]
        if index == len(self.stamps):
            late = (stamp_ns - self.stamps[-1]) * 1e-9
            raise TransformUnavailable(f"the newest {name} is {late:.3f} s older than asked for", True, late)
        if index == 0:
            early = (self.stamps[0] - stamp_ns) * 1e-9
            raise TransformUnavailable(
                f"the oldest {name} is {early:.3f} s younger than asked for", wait=False
            )
        before, after = self.stamps[index - 1], self.stamps[index]
        gap = (after - before) * 1e-9
        if gap > self.max_gap_s:
            raise TransformUnavailable(
                f"{name} has a hole of {gap:.3f} s around the stamp asked for", wait=False
            )
        return interpolate(self.poses[index - 1], self.poses[index], (stamp_ns - before) / (after - before))


class TransformTree:
    """Frames by name. Each has one parent; edges are static (calibration) or moving (a PoseTrack)."""

    def __init__(self, keep_s: float = 10.0) -> None:
        self._keep_s = keep_s
        self._parents: dict[str, str] = {}
        self._static: dict[str, Pose] = {}
        self._tracks: dict[str, PoseTrack] = {}
        self.resets = 0  # how often time went back

    def set_static(self, parent: str, child: str, pose: Pose) -> None:
        """The fixed pose of `child` in `parent`."""
        self._parents[child] = parent
        self._static[child] = pose
        self._tracks.pop(child, None)

    def insert(self, parent: str, child: str, stamp_ns: int, pose: Pose) -> None:
        """The pose of moving `child` in `parent` at `stamp_ns`. Time going back empties every track."""
        track = self._tracks.get(child)
        if track is not None and track.stamps and stamp_ns < track.stamps[-1] - JUMP_BACK_NS:
            self.forget_moving()
            track = None
        if track is None or self._parents.get(child) != parent:
            track = self._tracks[child] = PoseTrack(self._keep_s)
        self._parents[child] = parent
        self._static.pop(child, None)
        track.insert(stamp_ns, pose)

    def forget_moving(self) -> None:
        """Empties every track: their stamps belong to another pass of the recording."""
        self._tracks = {}
        self.resets += 1

    def forget_after(self, stamp_ns: int) -> None:
        """Time went back to `stamp_ns` elsewhere: poses well after it are of the pass before, and all go."""
        if any(t.stamps and t.stamps[-1] > stamp_ns + JUMP_BACK_NS for t in self._tracks.values()):
            self.forget_moving()

    def has(self, frame: str) -> bool:
        """Whether any transform names this frame."""
        return frame in self._parents or frame in self._parents.values()

    def lookup(self, target: str, source: str, stamp_ns: int, rigid: bool = False) -> Pose:
        """source -> target at `stamp_ns`. Raises TransformUnavailable, which names the frames.

        `rigid` says that the two are bolted together: where some tool sends their transforms on /tf again and again,
        the one nearest in time holds, and nothing waits for the next.
        """
        for frame in (target, source):
            if not self.has(frame) and target != source:
                raise TransformUnavailable(f"no transform names the frame {frame!r}", wait=True)
        target_chain, source_chain = self._chain(target), self._chain(source)
        common = next((frame for frame in source_chain if frame in target_chain), None)
        if common is None:
            raise TransformUnavailable(f"frames {target!r} and {source!r} are not connected", wait=True)
        try:
            up = self._to_ancestor(source_chain[: source_chain.index(common)], stamp_ns, rigid)
            down = self._to_ancestor(target_chain[: target_chain.index(common)], stamp_ns, rigid)
            return down.inverse() @ up
        except DataError as error:
            text = f"the transforms between {target!r} and {source!r} add up to no pose"
            raise TransformUnavailable(text, wait=False) from error

    def _chain(self, frame: str) -> list[str]:
        """The frame and its ancestors, nearest first."""
        chain = [frame]
        while (parent := self._parents.get(chain[-1])) is not None and parent not in chain:
            chain.append(parent)
        return chain

    def _to_ancestor(self, frames: list[str], stamp_ns: int, rigid: bool) -> Pose:
        """The pose of frames[0] in the parent of frames[-1]."""
        pose = Pose.identity()
        for child in frames:
            static = self._static.get(child)
            if static is None:
                name = f"transform {self._parents[child]} -> {child}"
                track = self._tracks.get(child)
                if track is None:
                    raise TransformUnavailable(f"no {name} since time went back", wait=True)
                static = track.nearest(stamp_ns) if rigid else track.lookup(stamp_ns, name)
            pose = static @ pose
        return pose
