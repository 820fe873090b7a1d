# SPDX-License-Identifier: Apache-2.0
"""A thread that works through jobs; when it falls behind, the newest job wins."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs `work` on each submitted job in one thread. What it raises goes to `failed`, and the thread goes on."""

    def __init__(
        self, work: Callable[[T], None], queue_size: int, failed: Callable[[Exception], None]
    ) -> None:
        self._work = work
        self._failed = failed
        self._queue_size = queue_size
        self._jobs: deque[T] = deque()
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self.dropped = 0  # jobs that a newer one pushed out
        self._thread = threading.Thread(target=self._loop, name="inference", daemon=True)
        self._thread.start()

    def submit(self, job: T) -> None:
        """Queues a job; the oldest waiting one goes when the queue is full."""
        with self._changed:
            self._jobs.append(job)
            self._trim()
            self._changed.notify()

    def resize(self, queue_size: int) -> None:
        """So many jobs may wait from now on; of those that do, the oldest go."""
        with self._changed:
            self._queue_size = queue_size
            self._trim()

    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._changed:
            return not self._jobs and not self._busy

    def close(self) -> None:
        """Lets the running job end, forgets the others, ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _trim(self) -> None:
        while len(self._jobs) > self._queue_size:
            self._jobs.popleft()
            self.dropped += 1

    def _loop(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                while not self._jobs and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                job = self._jobs.popleft()
                self._busy = True
            try:
                self._work(job)
            except Exception as error:  # an end of this thread would be noticed by nobody
                with suppress(Exception):  # telling may fail, too
                    self._failed(error)
