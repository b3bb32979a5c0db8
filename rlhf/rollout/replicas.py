"""Replicas of one vLLM server: the least loaded takes the next request, a lost one's requests go to the others, and it returns at the right weights.

All of it runs in one event loop in a thread of its own, so nothing here is locked; the methods of `Replicas` may be called from any thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import httpx2

from rlhf.report import printable
from rlhf.run import say

T = TypeVar("T")

HEALTH_EVERY, HEALTH_SECONDS, MISSES = 1.0, 10.0, 3
"""Seconds between two looks at each replica and for an answer, and looks in a row without one after which it is lost; a refused connection is at once."""
ATTEMPTS = 8
"""Replicas that may fail one and the same request: then it is the request."""


class LostError(Exception):
    """A replica did not answer, or failed."""


class Replica:
    """One server."""

    def __init__(self, url: str, request_seconds: float) -> None:
        self.url, self.ready, self.tokens_in_flight, self.misses = url, False, 0, 0
        self.requests: set[asyncio.Task[Any]] = set()
        self.being_brought = asyncio.Lock()
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            base_url=url,
            timeout=httpx2.Timeout(request_seconds, connect=HEALTH_SECONDS),
            limits=limits,
            trust_env=False,
        )

    async def call(self, method: str, path: str, body: Any = None, *, seconds: float | None = None) -> dict[str, Any]:
        """The decoded answer.

        Raises:
            LostError: when there is none, or the server failed.
            ValueError: when the server refuses the request.
        """
        timeout = self._client.timeout if seconds is None else httpx2.Timeout(seconds)
        try:
            response = await self._client.request(method, path, json=body, timeout=timeout)
            answer = response.json() if response.content else {}
        except (httpx2.HTTPError, ValueError) as error:
            raise LostError(f"{type(error).__name__}: {printable(str(error))[:200]}") from None
        if response.status_code >= 500:
            raise LostError(f"HTTP {response.status_code}: {printable(response.text)[:300]}")
        if response.status_code != 200 or not isinstance(answer, dict):
            raise ValueError(
                f"{self.url} refused {path}: HTTP {response.status_code}: {printable(response.text)[:300]}"
            )
        return answer

    async def weights(self) -> str:
        """The label of the weights it holds."""
        return str((await self.call("GET", "/weight_info", seconds=HEALTH_SECONDS)).get("weight_version"))

    async def close(self) -> None:
        await self._client.aclose()


class Replicas:
    """The replicas of a run.

    Args:
        urls: of the servers, which may not have come up yet.
        label_prefix: how the labels of this run's weights begin.
        request_seconds: after which a request goes elsewhere.
        patience_seconds: to wait while no replica is ready.
        loader: brings a replica to the wanted weights; None on ranks that leave that to the main process.
        obstacle: why waiting longer is useless, or None.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        label_prefix: str,
        request_seconds: float,
        patience_seconds: float,
        loader: Callable[[Replica], Awaitable[None]] | None,
        obstacle: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._replicas = [Replica(url, request_seconds) for url in urls]
        self._patience, self._loader, self._obstacle = patience_seconds, loader, obstacle
        self.wanted: str | None = None
        """The label of the weights every replica should hold."""
        self.label_prefix = label_prefix
        self.num_retried = 0
        """Requests that had to be made again elsewhere, so far."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="replicas", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._watch_over(), self._loop)

    @property
    def num_ready(self) -> int:
        return sum(replica.ready for replica in self._replicas)

    def generate(self, bodies: Sequence[dict[str, Any]], costs: Sequence[int]) -> list[dict[str, Any]]:
        """Answers to requests, in their order. `costs` are tokens each may take, by which replicas are balanced.

        Raises:
            RuntimeError: when no replica is ready for `patience_seconds`, or a request fails on every one.
        """

        async def everything() -> list[dict[str, Any]]:
            tasks = [asyncio.ensure_future(self._one(body, cost)) for body, cost in zip(bodies, costs, strict=True)]
            try:
                return list(await asyncio.gather(*tasks))
            finally:
                for task in tasks:
                    task.cancel()

        return self._run(everything())

    def every(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The answers of all replicas that are ready to the same request; of at least one."""

        async def ask() -> list[dict[str, Any]]:
            while True:
                await self._least_loaded()
                asked = [replica for replica in self._replicas if replica.ready]
                answers = await asyncio.gather(*(r.call("POST", path, body) for r in asked), return_exceptions=True)
                found = []
                for replica, answer in zip(asked, answers, strict=True):
                    if isinstance(answer, LostError):
                        self._lose(replica, str(answer))
                    elif isinstance(answer, BaseException):
                        raise answer
                    else:
                        found.append(answer)
                if found:
                    return found

        return self._run(ask())

    def answering(self) -> list[str]:
        """URLs of the servers that answer, ready or not; of at least one.

        Raises:
            RuntimeError: when none does for `patience_seconds`.
        """

        async def ask() -> list[str]:
            waiting_since = time.monotonic()
            while True:
                answers = await asyncio.gather(
                    *(r.call("GET", "/health", seconds=HEALTH_SECONDS) for r in self._replicas), return_exceptions=True
                )
                found = [
                    r.url for r, a in zip(self._replicas, answers, strict=True) if not isinstance(a, BaseException)
                ]
                if found:
                    return found
                self._give_up_after(waiting_since)
                await asyncio.sleep(HEALTH_EVERY)

        return self._run(ask())

    def want(self, label: str) -> None:
        """Weights of this label from now on, on every replica that can be reached and on others as soon as they can.

        Raises:
            RuntimeError: when none comes to hold them for `patience_seconds`.
        """

        async def bring() -> None:
            self.wanted = label
            await asyncio.gather(*(self._bring(replica, anyway=True) for replica in self._replicas))
            await self._least_loaded()

        self._run(bring())

    def close(self) -> None:
        """End everything; a call that waits in another thread is cancelled there."""

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            for replica in self._replicas:
                await replica.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    # ---------------------------------------------------------------------------------------------------------- in the loop's thread

    async def _one(self, body: dict[str, Any], cost: int) -> dict[str, Any]:
        reason = ""
        for _ in range(ATTEMPTS):
            replica = await self._least_loaded()
            replica.tokens_in_flight += cost
            request = asyncio.ensure_future(replica.call("POST", "/inference/v1/generate", body))
            replica.requests.add(request)
            try:
                await asyncio.wait({request})
            finally:
                replica.tokens_in_flight -= cost
                replica.requests.discard(request)
                request.cancel()  # no effect on one that has ended
            if not request.cancelled():
                error = request.exception()
                if error is None and self._is_of_known_weights(request.result()):
                    return request.result()
                if error is not None and not isinstance(error, LostError):
                    raise error
                reason = str(error or "it sampled from weights that were never sent to it")
                self._lose(replica, reason)
            self.num_retried += 1
        raise RuntimeError(
            f"a request failed {ATTEMPTS} times on the vLLM servers, last with {reason}; look into their logs"
        )

    def _is_of_known_weights(self, answer: dict[str, Any]) -> bool:
        """A server that was started again between two looks samples from the weights it was started with, which have another label."""
        spans = [span for choice in answer["choices"] for span in choice["weight_versions"] or ()]
        return bool(spans) and all(span["version"].startswith(self.label_prefix) for span in spans)

    async def _least_loaded(self) -> Replica:
        waiting_since = time.monotonic()
        while True:
            ready = [replica for replica in self._replicas if replica.ready]
            if ready:
                return min(ready, key=lambda replica: replica.tokens_in_flight)
            self._give_up_after(waiting_since)
            await asyncio.sleep(0.05)

    def _give_up_after(self, waiting_since: float) -> None:
        obstacle = self._obstacle()
        if obstacle is not None:
            raise RuntimeError(obstacle)
        if time.monotonic() - waiting_since > self._patience:
            urls = ", ".join(replica.url for replica in self._replicas)
            raise RuntimeError(
                f"no vLLM server was ready for {self._patience:.0f} s ({urls}); look into their logs, or raise rollout.server.patience_seconds"
            )

    def _lose(self, replica: Replica, reason: str) -> None:
        if replica.ready:
            replica.ready = False
            say(
                f"the vLLM server {replica.url} is lost ({reason}); its {len(replica.requests)} other requests go elsewhere"
            )
            for request in replica.requests:
                request.cancel()

    async def _watch_over(self) -> None:
        while True:
            await asyncio.gather(*(self._look_at(replica) for replica in self._replicas))
            await asyncio.sleep(HEALTH_EVERY)

    async def _look_at(self, replica: Replica) -> None:
        try:
            await replica.call("GET", "/health", seconds=HEALTH_SECONDS)
            replica.misses = 0
            if not replica.ready and self.wanted is not None:
                await self._bring(replica)
                if replica.ready:
                    say(f"the vLLM server {replica.url} is ready, its weights are {self.wanted}")
        except (LostError, ValueError) as error:
            replica.misses += 1
            if replica.misses >= MISSES or "Connect" in str(error):
                self._lose(replica, str(error))

    async def _bring(self, replica: Replica, *, anyway: bool = False) -> None:
        """To the wanted weights, if it answers; then it is ready."""
        try:
            async with replica.being_brought:
                if self._loader is not None and (anyway or not await self._holds(replica)):
                    await self._loader(replica)
                replica.ready = await self._holds(replica)
        except LostError as error:
            self._lose(replica, str(error))

    async def _holds(self, replica: Replica) -> bool:
        return await replica.weights() == self.wanted
