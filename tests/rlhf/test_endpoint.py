"""Requests to servers that fail: every request ends as an answer or as a reason, in its own place."""

import threading
import time
from datetime import UTC, datetime

import pytest
from scripted_server import Reply, free_url, serving

import rlhf.endpoint as endpoint
from rlhf.config import Endpoint as EndpointConfig
from rlhf.endpoint import Endpoint, Unanswered, backoff, seconds_to_wait


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def client(url, **changes):
    return Endpoint(EndpointConfig(url=url, **({"timeout_seconds": 5.0} | changes)), "rewards.judge")


def post(url, bodies=({"n": 1},), **changes):
    return client(url, **changes).post("ask", list(bodies))


@pytest.mark.parametrize(
    "fault",
    [
        Reply({}, status=500),
        Reply(b"<html>", status=503),
        Reply({}, status=429),
        Reply(b'{"n": ', status=200),
        Reply([1]),
        Reply({"n": 1}, cut=True),
        Reply({"n": 1}, delay=60.0),
        Reply({"n": 1}, drip=10.0),
    ],
    ids=["500", "503", "429", "half_json", "a_list", "cut", "60_s", "drip"],
)
def test_a_fault_that_passes_costs_a_retry_and_nothing_else(fault):
    with serving(lambda body, attempt: fault if attempt < 2 else {"n": body["n"] + 1}) as server:
        started = time.monotonic()
        asked = client(server.url, timeout_seconds=3.0)
        assert asked.post("ask", [{"n": 1}]) == [{"n": 2}]
        assert asked.num_retried == 2
        assert time.monotonic() - started < 50.0


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Reply({"e": "no \x1b[2J"}, status=500), "HTTP 500"),
        (Reply({}, delay=10.0), "no whole answer in timeout_seconds 1"),
        (Reply({"n": 100_000}, drip=0.3), "no whole answer in timeout_seconds 1"),
        (Reply(b'{"n": '), "HTTP 200 without JSON"),
        (Reply([1]), "HTTP 200 with a JSON list"),
        (Reply({"n": 1}, cut=True), "Error"),
    ],
)
def test_a_fault_that_stays_is_a_reason_after_as_many_attempts_as_the_recipe_says(fault, reason):
    with serving(lambda body, attempt: fault) as server:
        (answer,) = post(server.url, attempts=3, timeout_seconds=1.0)
        assert isinstance(answer, Unanswered)
        assert reason in answer.reason
        assert "\x1b" not in answer.reason
        assert not answer.refused
        assert len(server.requests) == 3


def test_a_refusal_is_not_repeated_and_the_others_are_answered():
    def script(body, attempt):
        return Reply({"error": "too long"}, status=400) if body["n"] == 2 else {"n": body["n"]}

    with serving(script) as server:
        answers = post(server.url, [{"n": n} for n in range(5)])
        assert len(server.requests) == 5
    assert [a if isinstance(a, dict) else a.refused for a in answers] == [{"n": 0}, {"n": 1}, True, {"n": 3}, {"n": 4}]


def test_a_server_that_is_gone_is_found_out_once_and_not_for_every_request():
    asked = client(free_url(), attempts=4, concurrency=4)
    answers = asked.post("ask", [{"n": n} for n in range(500)])
    assert all(isinstance(a, Unanswered) and "Connect" in a.reason for a in answers)
    assert asked.num_retried <= (3 + 4) * 3  # until the third has failed for good, four at a time; and not 1,500


def test_one_request_that_the_server_never_answers_does_not_make_it_count_as_gone():
    with serving(lambda body, attempt: Reply({}, status=500) if body["n"] < 2 else {"n": body["n"]}) as server:
        answers = post(server.url, [{"n": n} for n in range(6)], attempts=2, concurrency=1)
    assert [isinstance(a, Unanswered) for a in answers] == [True, True, False, False, False, False]


def test_a_server_that_counts_as_gone_is_still_tried_by_the_requests_under_way():
    down = threading.Event()

    def script(body, attempt):
        if body["n"] > 0:
            return Reply({}, status=500)
        if attempt == 0:
            down.wait(60.0)
            return Reply({}, status=500)
        return {"n": 0}

    with serving(script) as server:
        asked = client(server.url, attempts=2, concurrency=4, timeout_seconds=120.0)
        answers = asked.post("ask", [{"n": n} for n in range(10)], lambda i, answer: down.set() if i == 9 else None)
    assert [isinstance(a, Unanswered) for a in answers] == [False] + [True] * 9


def test_no_more_requests_are_under_way_than_the_recipe_says():
    with serving(lambda body, attempt: Reply({}, delay=0.05)) as server:
        post(server.url, [{"n": n} for n in range(30)], concurrency=7)
        assert server.most_under_way == 7


def test_what_a_server_asks_for_in_retry_after_is_waited_for():
    def script(body, attempt):
        return {} if attempt else Reply({}, status=429, headers={"Retry-After": "0.6"})

    with serving(script) as server:
        assert post(server.url) == [{}]
        first, second = server.times
        assert 0.6 <= second - first < 10.0


def test_retry_after_is_seconds_or_a_date_and_has_a_bound():
    now = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)
    assert seconds_to_wait("7") == 7.0
    assert seconds_to_wait("Thu, 01 Jan 2026 12:00:30 GMT", now) == 30.0
    assert seconds_to_wait("Thu, 01 Jan 2026 11:00:00 GMT", now) == 0.0
    assert seconds_to_wait("86400") == 120.0
    assert [seconds_to_wait(text) for text in ("", "soon", "-3", "nan", "inf")] == [0.0] * 5


def test_waits_double_up_to_a_bound_and_are_spread(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 1.0)
    drawn = [[backoff(attempt) for _ in range(200)] for attempt in range(8)]
    for waits, longest in zip(drawn, [1, 2, 4, 8, 16, 30, 30, 30], strict=True):
        assert longest / 2 <= min(waits) < 0.6 * longest
        assert 0.9 * longest < max(waits) <= longest


def test_the_key_comes_from_the_environment_and_appears_in_no_message(monkeypatch):
    with pytest.raises(ValueError, match=r"rewards.judge.key_variable names SCRATCHPAD_TEST_KEY, which is not set"):
        client("http://h/v1", key_variable="SCRATCHPAD_TEST_KEY")
    monkeypatch.setenv("SCRATCHPAD_TEST_KEY", "k-secret")
    with serving(lambda body, attempt: Reply({"error": "wrong key k-secret"}, status=401)) as server:
        asked = client(server.url, key_variable="SCRATCHPAD_TEST_KEY")
        (answer,) = asked.post("ask", [{}])
        assert server.sent_headers[0]["Authorization"] == "Bearer k-secret"
    assert "wrong key ***" in answer.reason
    assert "k-secret" not in repr(asked) + repr(answer) + asked.config.model_dump_json()


def test_a_url_with_a_password_in_it_is_refused():
    with pytest.raises(ValueError, match="url"):
        EndpointConfig(url="https://user:password@host/v1")


def test_answers_are_told_as_they_come_and_a_fault_there_ends_the_call():
    came = []
    with serving(lambda body, attempt: Reply({"n": body["n"]}, delay=0.3 if body["n"] == 0 else 0.0)) as server:
        client(server.url).post("ask", [{"n": 0}, {"n": 1}], lambda i, answer: came.append((i, answer["n"])))
        assert came == [(1, 1), (0, 0)]

        def full(i, answer):
            raise OSError("no space left on device")

        with pytest.raises(OSError, match="no space left"):
            client(server.url).post("ask", [{"n": 5}], full)
