"""Rollout batches that are sampled by a thread while the trainer is busy with older ones."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

from rlhf.rollout_buffer import RolloutBuffer


class Ahead:
    """Samples batches in their order, one at a time.

    Example, with one batch of lead:
        ahead.go_to(1)                 # batches 0 and 1 are under way
        buffer = ahead.take(0)         # waits for it
        ...                            # train on it while batch 1 is sampled
        with ahead.between_batches():  # waits until batch 1 is there: one policy sampled all of it
            push()

    Args:
        sample: rollout batch number so and so, sampled and scored.
        first: the first batch that is wanted.
        ready: batches that a checkpoint brought.
    """

    def __init__(self, sample: Callable[[int], RolloutBuffer], *, first: int, ready: dict[int, RolloutBuffer]) -> None:
        self._sample, self._pool = sample, ThreadPoolExecutor(1, thread_name_prefix="sampling")
        self._batches: dict[int, Future[RolloutBuffer]] = {}
        self._turn = threading.Condition()
        self._sampling = self._wanted = False
        for batch, buffer in ready.items():
            self._batches[batch] = Future()
            self._batches[batch].set_result(buffer)
        self._next = max([first, *(batch + 1 for batch in ready)])

    def go_to(self, batch: int) -> None:
        """Sample everything up to this batch, in the background."""
        for number in range(self._next, batch + 1):
            self._batches[number] = self._pool.submit(self._sample_whole, number)
        self._next = max(self._next, batch + 1)

    def take(self, batch: int) -> RolloutBuffer:
        """A batch, once it is there; whatever sampling it raised is raised here."""
        return self._batches.pop(batch).result()

    def all_that_wait(self) -> dict[int, RolloutBuffer]:
        """Every batch that was begun and not taken, once all of them are there."""
        return {batch: future.result() for batch, future in sorted(self._batches.items())}

    def close(self) -> None:
        """Begin no more batches."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """No batch is sampled inside; the one under way is waited for, and those in the queue wait."""
        with self._turn:
            self._wanted = True
            self._turn.wait_for(lambda: not self._sampling)
            yield
            self._wanted = False
            self._turn.notify_all()

    def _sample_whole(self, batch: int) -> RolloutBuffer:
        with self._turn:
            self._turn.wait_for(lambda: not self._wanted)
            self._sampling = True
        try:
            return self._sample(batch)
        finally:
            with self._turn:
                self._sampling = False
                self._turn.notify_all()
