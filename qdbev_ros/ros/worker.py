# SPDX-License-Identifier: Apache-2.0
"""A thread that works through jobs; when it falls behind, the newest job wins."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Worker(Generic[T]):
    """Runs `work` on each submitted job in one thread. `work` must not raise."""

    def __init__(self, work: Callable[[T], None], queue_size: int) -> None:
        self._work = work
        self.queue_size = queue_size
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
            if len(self._jobs) > self.queue_size:
                self._jobs.popleft()
                self.dropped += 1
            self._changed.notify()

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
            self._work(job)
