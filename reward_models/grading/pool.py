"""Grading in processes that can be killed.

Model output is untrusted: whatever it does to a grader costs one verdict, `undecided`, and never the run. No signal is used, so a
pool works from any thread, from async code and on any rank.
"""

from __future__ import annotations

import asyncio
import json
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from reward_models.grading.extraction import Accept
from reward_models.grading.grade import Grade

_ROOT = Path(__file__).resolve().parents[2]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from reward_models.grading.worker import main; main(int(sys.argv[2]))"
)
ATTEMPTS = 3
"""At a completion whose worker dies: by someone else's hand, perhaps, that of a system short of memory; a completion that kills its worker
does so again."""
Case = tuple[str | None, str | None]
"""(completion, reference)"""


class _Worker:
    """One process and its pipes; used by one thread at a time."""

    def __init__(self, memory_mb: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(_ROOT), str(memory_mb << 20)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            close_fds=True,
            env={
                "PATH": os.environ.get("PATH", ""),
                "LANG": "C.UTF-8",
                "OMP_NUM_THREADS": "1",
            },  # no secrets of the parent
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        os.set_blocking(self.output.fileno(), False)
        os.set_blocking(self.input.fileno(), False)
        self.served = 0
        self.ready = False

    def ask(self, line: bytes, deadline: float) -> bytes | None:
        """The reply to a request; None when it did not come in time; empty when the process died."""
        reply, sent = b"", 0
        with selectors.DefaultSelector() as selector:
            selector.register(self.output, selectors.EVENT_READ)
            selector.register(self.input, selectors.EVENT_WRITE)
            while True:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                for key, _ in selector.select(left):
                    if key.fileobj is self.input:
                        with suppress(BrokenPipeError, BlockingIOError):
                            sent += os.write(self.input.fileno(), line[sent : sent + 65536])
                        if sent == len(line) or self.process.poll() is not None:
                            selector.unregister(self.input)
                    else:
                        piece = os.read(self.output.fileno(), 65536)
                        reply += piece
                        if not piece or reply.endswith(b"\n"):
                            return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.input.close()
        self.output.close()


class GraderPool:
    """Grades completions in processes of their own.

    Args:
        workers: processes; each costs about 40 MB.
        timeout: seconds of wall-clock time a completion may take before its worker is killed.
        memory_mb: address space of a worker.
        accept: how plainly a completion must say its answer (see `extraction.Accept`).
        recycle_after: completions after which a worker is replaced, against slow leaks.

    Example:
        with GraderPool(workers=2) as pool:
            grades = pool.grade_many([("\\\\boxed{1/2}", "0.5")])
    """

    def __init__(
        self,
        *,
        workers: int = 2,
        timeout: float = 5.0,
        memory_mb: int = 512,
        accept: Accept = "boxed",
        recycle_after: int = 20_000,
    ) -> None:
        self.workers, self.timeout, self.memory_mb = workers, timeout, memory_mb
        self.accept: Accept = accept
        self.recycle_after = recycle_after
        self._owner, self._starting = 0, threading.Lock()
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()

    def grade_many(self, cases: Sequence[Case]) -> list[Grade]:
        """Grades in the order of the cases."""
        return list(self.stream(cases))

    async def grade_async(self, cases: Sequence[Case]) -> list[Grade]:
        """The same from async code, without blocking the event loop."""
        return await asyncio.to_thread(self.grade_many, cases)

    def stream(self, cases: Iterable[Case], *, ahead: int = 512) -> Iterator[Grade]:
        """Grades in order, reading at most `ahead` cases before the first of them is out."""
        self._start()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="grader") as threads:
            pending: queue.SimpleQueue = queue.SimpleQueue()
            count = 0
            for case in cases:
                pending.put(threads.submit(self._grade, case))
                count += 1
                if count >= ahead:
                    yield pending.get().result()
                    count -= 1
            for _ in range(count):
                yield pending.get().result()

    def close(self) -> None:
        """Kill the workers; the pool starts new ones when it is used again."""
        while self._owner == os.getpid() and not self._idle.empty():
            worker = self._idle.get()
            if worker is not None:
                worker.close()
        self._owner = 0

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        """Places for workers. After a fork the child starts its own: two readers of one pipe would mix up verdicts."""
        with self._starting:
            if self._owner != os.getpid():
                self._owner, self._idle = os.getpid(), queue.SimpleQueue()
                for _ in range(self.workers):
                    self._idle.put(None)

    def _grade(self, case: Case) -> Grade:
        worker = self._idle.get()
        try:
            worker, judged = self._ask(worker, case)
            for _ in range(ATTEMPTS - 1):
                if judged.reason == "crashed":
                    worker, judged = self._ask(worker, case)
            return judged
        finally:
            self._idle.put(worker)

    def _ask(self, worker: _Worker | None, case: Case) -> tuple[_Worker | None, Grade]:
        """The verdict, and the worker if it can go on."""
        if worker is not None and (worker.served >= self.recycle_after or worker.process.poll() is not None):
            worker.close()
            worker = None
        if worker is None:
            worker = _Worker(self.memory_mb)
        started = time.monotonic()
        if not worker.ready:  # its start is not the completion's time
            worker.ask(_line(("\\boxed{1}", "1"), self.accept), started + 60)
            worker.ready, started = True, time.monotonic()
        reply = worker.ask(_line(case, self.accept), started + self.timeout)
        worker.served += 1
        if reply is not None and reply.endswith(b"\n"):
            judged = Grade(**json.loads(reply))
            if judged.reason != "memory":
                return worker, judged
        else:
            judged = Grade("undecided", "timeout" if reply is None else "crashed", None, time.monotonic() - started)
        worker.close()
        return None, judged


def _line(case: Case, accept: Accept) -> bytes:
    completion, reference = case
    return json.dumps({"completion": completion, "reference": reference, "accept": accept}).encode() + b"\n"
