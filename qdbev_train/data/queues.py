# SPDX-License-Identifier: Apache-2.0
"""BEVFormer's way of training: short queues of frames drawn at random; only the last frame is learned from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from qdbev_ros.core.errors import DataError
from qdbev_ros.core.memory import TemporalMemory
from qdbev_ros.core.variant import Variant
from qdbev_train.data.augment import Augmentation
from qdbev_train.data.dataset import NO_MAP, Batch, Ticket, assemble, frame_targets
from qdbev_train.data.frames import Frame, mirrored, turned

AHEAD = 2  # queues that are being decoded while one is learned from
REDRAWS = 1000  # in vain, and there is nothing to learn from


class QueueDataset:
    """Endless queues of `variant.temporal.queue_length` batches, oldest first; row b of a queue is one drive.

    Of the frames before a target one is dropped at random, so that the time between frames varies; motion is that
    between the frames kept. Where a scene has too few frames before the target, its first one fills up the queue, each
    time as a beginning. A queue with a frame that has no box to learn is drawn again, from anywhere. Every epoch takes
    each other frame once as target; the order depends on `seed` alone, and `start_step` skips queues without decoding
    them. Of `processes`, number `rank` takes its `batch` rows of the `processes * batch` that there are.
    """

    def __init__(
        self,
        frames_by_scene: Mapping[str, Sequence[Frame]],
        variant: Variant,
        batch: int,
        seed: int,
        start_step: int = 0,
        augmentation: Augmentation | None = None,
        workers: int = 2,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if not frames_by_scene:
            raise DataError("no scene to train on")
        self._scenes = [frames_by_scene[name] for name in sorted(frames_by_scene)]
        self._ends = np.cumsum([len(scene) for scene in self._scenes])
        self._variant, self._batch, self._seed = variant, batch, seed
        self._start_step, self._workers = start_step, workers
        self._rank, self._processes = rank, processes
        self._augmentation = augmentation or Augmentation()
        self._order: tuple[int, np.ndarray[tuple[int], np.dtype[np.int64]]] | None = (
            None  # of the last epoch asked for
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        number = self._start_step
        pending: deque[list[Future[Batch]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(pending) < AHEAD:
                    steps = zip(*self._tickets(number), strict=True)
                    pending.append(
                        [pool.submit(assemble, list(s), self._variant, self._augmentation) for s in steps]
                    )
                    number += 1
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tickets(self, number: int) -> list[list[Ticket]]:
        """The queues of step `number`, one a row."""
        begin = (number * self._processes + self._rank) * self._batch
        return [self._drawn(position) for position in range(begin, begin + self._batch)]

    def _drawn(self, position: int) -> list[Ticket]:
        """The queue of a position in the endless sequence of samples, whoever takes it."""
        total = int(self._ends[-1])
        epoch, index = divmod(position, total)
        if self._order is None or self._order[0] != epoch:
            order = np.random.default_rng([self._seed, 0, epoch]).permutation(total)
            self._order = (epoch, order)
        target = int(self._order[1][index])
        rng = np.random.default_rng([self._seed, 1, position])
        for _ in range(REDRAWS):
            queue = self._queue(target, rng)
            if queue is not None:
                return self._ticketed(queue, rng)
            target = int(rng.integers(total))
        raise DataError(f"no box to learn in {REDRAWS} queues drawn at random; are these frames annotated?")

    def _queue(self, target: int, rng: np.random.Generator) -> list[Frame] | None:
        """The frames of one queue; None where one of them has no box."""
        s = int(np.searchsorted(self._ends, target, side="right"))
        scene = self._scenes[s]
        last = target - (int(self._ends[s]) - len(scene))
        length = self._variant.temporal.queue_length
        # The frame to drop may be one before the scene's first.
        dropped = last - length + int(rng.integers(length))
        kept = [scene[i] for i in range(max(0, last - length), last + 1) if i != dropped]
        queue = [kept[0]] * (length - len(kept)) + kept
        return queue if all(len(frame_targets(frame, self._variant)[1]) for frame in kept) else None

    def _ticketed(self, queue: list[Frame], rng: np.random.Generator) -> list[Ticket]:
        augmentation = self._augmentation
        flip = bool(rng.random() < augmentation.mirror)
        yaw = float(rng.uniform(-np.pi, np.pi)) if augmentation.turn else None
        masked = bool(rng.random() < augmentation.grid_mask)
        memory = TemporalMemory(self._variant.temporal)
        tickets = []
        for number, frame in enumerate(queue, start=1):
            if flip:
                frame = mirrored(frame)
            if yaw is not None:
                frame = turned(frame, yaw)
            step = memory.step(frame.stamp_ns, frame.ego2global, frame.scene, frame.can_dynamics)
            memory.store(NO_MAP)
            picture_seed = int(rng.integers(2**31)) if augmentation.varies_pictures else None
            mask_seed = int(rng.integers(2**31)) if masked and number == len(queue) else None
            tickets.append(Ticket(frame, step.can_bus, step.prev_bev is None, flip, picture_seed, mask_seed))
        return tickets
