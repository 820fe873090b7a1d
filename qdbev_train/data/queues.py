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
from qdbev_train.data.dataset import NO_MAP, Batch, Ticket, assemble
from qdbev_train.data.frames import Frame


class QueueDataset:
    """Endless queues of `variant.temporal.queue_length` batches, oldest first; row b of a queue is one drive.

    Of the frames before a target one is dropped at random, so that the time between frames varies; motion is that
    between the frames kept. Where a scene has too few frames before the target, its first one fills up the queue, each
    time as a beginning. Every epoch takes each frame once as target; the order depends on `seed` alone, and
    `start_step` skips queues without decoding them.
    """

    def __init__(
        self,
        frames_by_scene: Mapping[str, Sequence[Frame]],
        variant: Variant,
        batch: int,
        seed: int,
        start_step: int = 0,
        workers: int = 2,
    ) -> None:
        if not frames_by_scene:
            raise DataError("no scene to train on")
        self._scenes = [tuple(frames_by_scene[name]) for name in sorted(frames_by_scene)]
        self._targets = [(s, i) for s, scene in enumerate(self._scenes) for i in range(len(scene))]
        self._variant, self._batch, self._seed = variant, batch, seed
        self._start_step, self._workers = start_step, workers

    def __iter__(self) -> Iterator[list[Batch]]:
        number = self._start_step
        pending: deque[list[Future[Batch]]] = deque()
        pool = ThreadPoolExecutor(self._workers, thread_name_prefix="decode")
        try:
            while True:
                while len(pending) < self._workers:
                    steps = zip(*self._tickets(number), strict=True)
                    pending.append([pool.submit(assemble, list(step), self._variant, 0.0) for step in steps])
                    number += 1
                yield [future.result() for future in pending.popleft()]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _tickets(self, number: int) -> list[list[Ticket]]:
        """The queues of step `number`, one a row."""
        rows = []
        for position in range(number * self._batch, (number + 1) * self._batch):
            epoch, index = divmod(position, len(self._targets))
            order = np.random.default_rng([self._seed, 0, epoch]).permutation(len(self._targets))
            scene, target = self._targets[order[index]]
            rng = np.random.default_rng([self._seed, 1, position])
            rows.append(self._queue(self._scenes[scene], target, rng))
        return rows

    def _queue(self, scene: tuple[Frame, ...], target: int, rng: np.random.Generator) -> list[Ticket]:
        length = self._variant.temporal.queue_length
        before = list(range(max(0, target - length), target))
        if len(before) == length:
            del before[int(rng.integers(length))]
        kept = [scene[i] for i in (*before, target)]
        memory = TemporalMemory(self._variant.temporal)
        tickets = []
        for frame in [kept[0]] * (length - len(kept)) + kept:
            step = memory.step(frame.stamp_ns, frame.ego2global, frame.scene, frame.can_dynamics)
            memory.store(NO_MAP)
            tickets.append(Ticket(frame, step.can_bus, step.prev_bev is None, flip=False, light_seed=None))
        return tickets
