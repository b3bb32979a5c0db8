"""Requests to a server that may be busy, slow or gone: several at once, each with a deadline and tried again after a fault that may pass.

What cannot be had is an `Unanswered` in the place of the answer, never a value that looks like one.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import ssl
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any

import httpx2

from rlhf.config import Endpoint as EndpointConfig
from rlhf.report import printable

TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses after which the same request may succeed."""
FIRST_WAIT, LONGEST_WAIT, LONGEST_RETRY_AFTER = 1.0, 30.0, 120.0
"""Seconds before the second attempt, which then double, up to the second number; what a server may ask for at most."""
CONNECT_SECONDS = 10.0
GIVE_UP_AFTER = 3
"""Requests in a row that fail in all their attempts, after which the server counts as down for the rest of the call."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """What stands in the place of an answer."""

    reason: str
    """Without control characters, and without the API key."""
    refused: bool
    """The server was there and would refuse the same request again."""


Answer = dict[str, Any] | Unanswered


@dataclass(slots=True)
class _Call:
    """What the requests of one call know of each other."""

    client: httpx2.AsyncClient
    failed_in_a_row: int = 0
    down: str | None = None
    """Why no request is begun any more."""


@dataclass(slots=True)
class Endpoint:
    """A server that answers JSON to JSON.

    Raises:
        ValueError: when the variable that should hold the API key is not set.
    """

    config: EndpointConfig
    key: str = ""
    """Of the recipe's section, for messages."""
    num_retried: int = field(default=0, init=False)
    """Requests made again, so far."""
    _secret: str | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        variable = self.config.key_variable
        self._secret = os.environ.get(variable) if variable else None
        if variable and not self._secret:
            raise ValueError(
                f"{self.key}.key_variable names {variable}, which is not set in the environment; export it"
            )

    def get(self, path: str) -> Answer:
        return self._run("GET", path, [None], lambda i, answer: None)[0]

    def post(
        self, path: str, bodies: Sequence[Any], arrived: Callable[[int, Answer], None] | None = None
    ) -> list[Answer]:
        """The answers, in order. `arrived` is told each one's place when it comes, in this thread."""
        return self._run("POST", path, bodies, arrived or (lambda i, answer: None))

    def _run(
        self, method: str, path: str, bodies: Sequence[Any], arrived: Callable[[int, Answer], None]
    ) -> list[Answer]:
        async def everything() -> list[Answer]:
            gate = asyncio.Semaphore(self.config.concurrency)

            async def one(i: int, body: Any) -> Answer:
                async with gate:
                    answer = await self._ask(call, method, path, body)
                arrived(i, answer)
                return answer

            async with self._client() as client, asyncio.TaskGroup() as group:
                call = _Call(client)
                tasks = [group.create_task(one(i, body)) for i, body in enumerate(bodies)]
            return [task.result() for task in tasks]

        try:
            return asyncio.run(everything())
        except BaseExceptionGroup as group:  # of faults of ours, such as a full disk: one of them says it
            raise group.exceptions[0] from None

    def _client(self) -> httpx2.AsyncClient:
        # The deadline is of the whole request, below: a timeout here is of each read, which a server that drips never misses.
        return httpx2.AsyncClient(
            base_url=self.config.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {self._secret}"} if self._secret else {},
            timeout=httpx2.Timeout(None, connect=min(CONNECT_SECONDS, self.config.timeout_seconds)),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=None),
            verify=_certificates(),
        )

    async def _ask(self, call: _Call, method: str, path: str, body: Any) -> Answer:
        reason = ""
        for attempt in range(self.config.attempts):
            if attempt == 0 and call.down is not None:  # those under way are not held back by the failures of others
                return Unanswered(call.down, refused=False)
            if attempt:
                self.num_retried += 1
            retry_after = 0.0
            try:
                async with asyncio.timeout(self.config.timeout_seconds):
                    response = await call.client.request(method, path, json=body)
                if response.status_code == 200:
                    answer = response.json()
                    if isinstance(answer, dict):
                        call.failed_in_a_row, call.down = 0, None
                        return answer
                    reason = f"HTTP 200 with a JSON {type(answer).__name__}"
                else:
                    reason = f"HTTP {response.status_code}: {self._shown(response.text)}"
                    retry_after = seconds_to_wait(response.headers.get("Retry-After", ""))
                    if response.status_code not in TRANSIENT:
                        call.failed_in_a_row = 0
                        return Unanswered(reason, refused=True)
            except TimeoutError:
                reason = f"no whole answer in timeout_seconds {self.config.timeout_seconds:g}"
            except httpx2.HTTPError as error:
                reason = f"{type(error).__name__}: {self._shown(str(error))}"
            except ValueError as error:  # half of a JSON, or none
                reason = f"HTTP 200 without JSON ({self._shown(str(error))})"
            if attempt + 1 < self.config.attempts:
                await asyncio.sleep(max(retry_after, backoff(attempt)))
        call.failed_in_a_row += 1
        if call.failed_in_a_row >= GIVE_UP_AFTER:
            call.down = reason
        return Unanswered(reason, refused=False)

    def _shown(self, text: str) -> str:
        text = text.replace(self._secret, "***") if self._secret else text  # some servers repeat the key they refuse
        return printable(text)[:200]


@cache
def _certificates() -> ssl.SSLContext:
    """Read once: a client of every call would read them again, 0.2 s each."""
    return httpx2.create_ssl_context()


def backoff(attempt: int) -> float:
    """Seconds after the attempt of this number, from 0: doubling, and drawn from the upper half so that clients do not come back together."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempt) * random.uniform(0.5, 1.0)


def seconds_to_wait(header: str, now: datetime | None = None) -> float:
    """What a Retry-After header asks for (RFC 9110, section 10.2.3: seconds or a date), at most LONGEST_RETRY_AFTER; 0 where it cannot be read."""
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(header) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER) if math.isfinite(seconds) else 0.0
