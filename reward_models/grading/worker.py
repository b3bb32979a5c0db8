"""A grading process: one JSON line in, one JSON line out. Started by `GraderPool`, killed by it without ado."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import asdict

from reward_models.grading.grade import Grade, grade


def _end_with_parent(parent: int) -> None:
    """Not PR_SET_PDEATHSIG: that fires when the thread that started the process ends, not the process it belongs to."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(0)


def main(memory_bytes: int) -> None:
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    for line in requests:
        try:
            request = json.loads(line)
            judged = grade(request["completion"], request["reference"], accept=request["accept"])
        except MemoryError:
            judged = Grade("undecided", "memory")
        except Exception as error:  # a fault of the grader's: it costs this verdict and is reported as what it is
            judged = Grade("undecided", f"crashed: {type(error).__name__}")
        replies.write(json.dumps(asdict(judged)).encode() + b"\n")
        replies.flush()
        if judged.reason == "memory":
            return  # a new process starts clean
