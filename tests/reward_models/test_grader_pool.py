"""Whatever a completion does to a grader costs one verdict."""

import asyncio
import multiprocessing
import os
import signal
import threading
import time

import pytest

from reward_models.grading import Grade, GraderPool

GOOD = ("\\boxed{1/2}", "0.5")
BAD = ("\\boxed{3}", "0.5")


@pytest.fixture
def pool():
    with GraderPool(workers=2, timeout=20.0) as pool:
        yield pool


def faulty(monkeypatch, tmp_path, body):
    """A pool whose workers run `body` (python) for the completion `poison`."""
    start = (
        "import sys; sys.path.insert(0, sys.argv[1]); import reward_models.grading.worker as w; real = w.grade\n"
        f"def grade(completion, reference, **k):\n    if completion == 'poison':\n        {body}\n    return real(completion, reference, **k)\n"
        "w.grade = grade; w.main(int(sys.argv[2]))"
    )
    monkeypatch.setattr("reward_models.grading.pool._START", start)
    return GraderPool(workers=1, timeout=4.0, memory_mb=512)


def test_grades_come_back_in_order(pool):
    cases = [GOOD if i % 3 else BAD for i in range(600)]
    assert [g.verdict for g in pool.grade_many(cases)] == ["correct" if i % 3 else "wrong" for i in range(600)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("import time; time.sleep(60)", "timeout"),
        ("while True: pass", "timeout"),
        ("x = 'a' * (2 << 30)", "memory"),
        ("import os; os._exit(3)", "crashed"),
        ("import os; os.kill(os.getpid(), 11)", "crashed"),
        ("raise ZeroDivisionError", "crashed: ZeroDivisionError"),
    ],
)
def test_a_worker_that_hangs_swells_or_dies_costs_one_verdict_and_no_other(monkeypatch, tmp_path, body, reason):
    with faulty(monkeypatch, tmp_path, body) as pool:
        grades = pool.grade_many([GOOD, ("poison", "1"), GOOD, BAD])
    assert [g.verdict for g in grades] == ["correct", "undecided", "correct", "wrong"]
    assert grades[1].reason == reason


def test_a_completion_whose_worker_is_killed_from_outside_is_graded_by_another_one(monkeypatch, tmp_path):
    """Twice in a row, at each worker's first sight of it."""
    seen = f"import os, pathlib; seen = pathlib.Path({str(tmp_path)!r}) / str(len(os.listdir({str(tmp_path)!r})))"
    with faulty(
        monkeypatch, tmp_path, f"{seen}; int(seen.name) > 1 or seen.touch() or os.kill(os.getpid(), 9)"
    ) as pool:
        grades = pool.grade_many([GOOD, ("poison", "1"), BAD])
    assert [g.verdict for g in grades] == ["correct", "wrong", "wrong"]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_grader_that_takes_its_time_is_killed_close_to_the_limit(monkeypatch, tmp_path):
    with faulty(monkeypatch, tmp_path, "import time; time.sleep(60)") as pool:
        pool.grade_many([GOOD])
        started = time.monotonic()
        pool.grade_many([("poison", "1")])
        assert 3.9 < time.monotonic() - started < 50.0  # of 60 it asked for


def test_it_works_from_threads_and_from_async_code(pool):
    results: dict[int, list[Grade]] = {}
    threads = [
        threading.Thread(target=lambda i=i: results.update({i: pool.grade_many([GOOD, BAD] * 20)})) for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all([g.verdict for g in results[i]] == ["correct", "wrong"] * 20 for i in range(4))
    assert asyncio.run(pool.grade_async([GOOD]))[0].verdict == "correct"


def _in_child(pool, queue):
    queue.put([g.verdict for g in pool.grade_many([GOOD, BAD])])


def test_a_forked_child_does_not_share_its_parents_workers(pool):
    pool.grade_many([GOOD])
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_child, args=(pool, queue))
    child.start()
    assert queue.get(timeout=60) == ["correct", "wrong"]
    child.join()
    assert [g.verdict for g in pool.grade_many([GOOD, BAD])] == ["correct", "wrong"]


def test_a_worker_is_replaced_after_its_share_and_dies_with_the_pool():
    with GraderPool(workers=1, recycle_after=3) as pool:
        pool.grade_many([GOOD] * 3)
        worker = pool._idle.get()
        first = worker.process.pid
        pool._idle.put(worker)
        pool.grade_many([GOOD])
        worker = pool._idle.get()
        second = worker.process.pid
        pool._idle.put(worker)
        assert first != second
    with pytest.raises(ProcessLookupError):
        os.kill(second, 0)


def test_a_worker_killed_from_outside_while_idle_is_replaced(pool):
    pool.grade_many([GOOD] * 8)
    for _ in range(2):
        worker = pool._idle.get()
        if worker is not None:
            os.kill(worker.process.pid, signal.SIGKILL)
            worker.process.wait()
        pool._idle.put(worker)
    assert [g.verdict for g in pool.grade_many([GOOD, BAD])] == ["correct", "wrong"]


def test_large_and_strange_completions_pass_through_the_pipe(pool):
    cases = [("x" * 3_000_000 + "\\boxed{7}", "7"), ("\ud800\x00\n\\boxed{7}", "7"), (None, "7"), ("\\boxed{7}", None)]
    assert [g.verdict for g in pool.grade_many(cases)] == ["correct", "correct", "wrong", "undecided"]


def test_workers_do_not_see_the_environment_of_the_run(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with faulty(monkeypatch, tmp_path, "import os; assert 'HF_TOKEN' not in os.environ") as pool:
        assert pool.grade_many([("poison", "1")])[0].verdict == "wrong"
