"""Any server that speaks OpenAI's completions or chat protocol, as a source of samples for evaluation.

One request a sample, each with a seed that depends on the problem and not on the order of arrival. What a server answers is untrusted:
every field is checked before it is used.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from rlhf.config import Server
from rlhf.report import printable
from rlhf.rollout.engine import Decode, Sampling
from rlhf.sampling import Completion, Question, confidence

TRANSIENT = {408, 409, 425, 429, 500, 502, 503, 504}
"""HTTP statuses after which the same request may succeed."""
LONGEST_WAIT = 30.0


class OpenAIServer:
    """Samples from a server.

    Raises:
        ValueError: where the server is not there, refuses, does not know the model, or reads another prompt than ours.
    """

    name = "openai server"

    def __init__(
        self,
        server: Server,
        sampling: Sampling,
        *,
        system_prompt: str | None,
        prompt_text: Callable[[str], str] | None,
        decode: Decode | None,
        stop_token_id: int | None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._server, self._samples, self._wait = server, sampling.samples_per_prompt, wait
        self._sampling = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
        }
        self._system_prompt, self._prompt_text, self._decode = system_prompt, prompt_text, decode
        self._stop_token_id = stop_token_id
        key = os.environ.get(server.key_variable) if server.key_variable else None
        if server.key_variable and not key:
            raise ValueError(f"server.key_variable names {server.key_variable}, which is not set in the environment")
        self._client = httpx2.Client(
            base_url=server.url.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=server.timeout_seconds,
            limits=httpx2.Limits(max_connections=server.concurrency),
        )
        self._model = self._choose_model()

    def close(self) -> None:
        self._client.close()

    @property
    def version(self) -> str:
        """What the server says it is; `unknown` where it says nothing."""
        try:
            answer = self._client.get(str(self._client.base_url.join("../version")))
            return f"vllm {printable(str(answer.json()['version']))[:40]}" if answer.status_code == 200 else "unknown"
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            return "unknown"

    def generate(self, questions: Sequence[Question], seed: int) -> list[list[Completion]]:
        """The samples of each question; the same seed asks the server for the same draws."""
        tasks = [(question, sample) for question in questions for sample in range(self._samples)]
        pool = ThreadPoolExecutor(self._server.concurrency)
        try:
            done = list(pool.map(lambda task: self._sample(task[0], request_seed(seed, task[0].id, task[1])), tasks))
        finally:
            pool.shutdown(cancel_futures=True)
        return [done[i : i + self._samples] for i in range(0, len(done), self._samples)]

    def _sample(self, question: Question, seed: int) -> Completion:
        path, body = self._request(question)
        answer = self._call("POST", path, {**body, **self._sampling, "model": self._model, "seed": seed, "n": 1})
        try:
            return self._completion(question, answer)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{self._server.url} answered something else than a completion ({type(error).__name__}: {printable(str(error))[:80]}); "
                "check that server.url ends in /v1 and speaks the OpenAI protocol"
            ) from None

    def _request(self, question: Question) -> tuple[str, dict[str, Any]]:
        if self._server.prompts == "messages":
            system = [{"role": "system", "content": self._system_prompt}] if self._system_prompt else []
            messages = [*system, {"role": "user", "content": question.text}]
            return "chat/completions", {
                "messages": messages,
                **({"logprobs": True} if self._server.logprobs else {}),
            }
        body: dict[str, Any] = {"logprobs": 0} if self._server.logprobs else {}
        if self._server.prompts == "text":
            assert self._prompt_text is not None
            # The template has written every special token already; vLLM reads the field, others add a BOS, which is found out below.
            return "completions", {**body, "prompt": self._prompt_text(question.text), "add_special_tokens": False}
        return "completions", {
            **body,
            "prompt": list(question.token_ids or ()),
            "return_token_ids": True,
            "stop_token_ids": [self._stop_token_id],
        }

    def _completion(self, question: Question, answer: Mapping[str, Any]) -> Completion:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if self._server.prompts == "messages" else choice["text"]
        if text is None:
            text = ""
        if not isinstance(text, str):
            raise TypeError(f"the completion is a {type(text).__name__}")
        usage = answer.get("usage") or {}
        self._require_our_prompt(question, usage.get("prompt_tokens"))
        token_ids = choice.get("token_ids")
        if token_ids and self._decode is not None and self._server.prompts == "tokens":
            text = self._decode([int(token) for token in token_ids])
        logprobs = _logprobs(choice.get("logprobs"))
        length = len(token_ids) if token_ids else usage.get("completion_tokens")
        if not isinstance(length, int):
            raise KeyError("usage.completion_tokens")
        return Completion(
            text=text,
            num_tokens=length,
            finish_reason="length" if choice.get("finish_reason") == "length" else "stop",
            confidence=confidence(logprobs) if logprobs else None,
        )

    def _require_our_prompt(self, question: Question, counted: object) -> None:
        """Raise when the server read another number of tokens than our renderer wrote.

        Raises:
            ValueError: naming what usually makes the difference.
        """
        if question.token_ids is None or not isinstance(counted, int) or counted == len(question.token_ids):
            return
        cause = (
            "it adds a beginning-of-sequence token of its own" if counted == len(question.token_ids) + 1 else
            "its chat template is another one" if self._server.prompts == "messages" else
            "its tokenizer is another one"
        )  # fmt: skip
        raise ValueError(
            f"the server read the prompt of {question.id!r} as {counted} tokens and training would write {len(question.token_ids)}: {cause}; "
            "set server.prompts to tokens, or serve the model with the tokenizer and template at models.<label>.path"
        )

    def _choose_model(self) -> str:
        """The name to ask for.

        Raises:
            ValueError: when it is not among those the server lists.
        """
        listed = self._call("GET", "models", None).get("data")
        names = [
            str(m["id"]) for m in (listed if isinstance(listed, list) else []) if isinstance(m, dict) and "id" in m
        ]
        shown = printable(", ".join(names))[:300] or "none"
        if self._server.name is None:
            if len(names) != 1:
                raise ValueError(f"{self._server.url} lists the models {shown}; set server.name to one of them")
            return names[0]
        if names and self._server.name not in names:
            raise ValueError(f"server.name is {self._server.name!r} and {self._server.url} lists {shown}")
        return self._server.name

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The decoded answer to a request, tried again after a fault that may pass.

        Raises:
            ValueError: when the server refuses, or every attempt failed.
        """
        reason = ""
        for attempt in range(self._server.attempts):
            if attempt:
                self._wait(min(LONGEST_WAIT, 2.0 ** (attempt - 1)))
            try:
                response = self._client.request(method, path, json=body)
                if response.status_code == 200:
                    answer = response.json()
                    if isinstance(answer, dict):
                        return answer
                    raise ValueError(f"a {type(answer).__name__}")
                reason = f"HTTP {response.status_code}: {printable(response.text)[:200]}"
                if response.status_code not in TRANSIENT:
                    break
            except httpx2.TransportError as error:
                reason = f"{type(error).__name__}: {printable(str(error))[:200]}"
            except ValueError as error:  # not JSON, or not an object
                reason = f"not a JSON object ({printable(str(error))[:100]})"
                break
        raise ValueError(
            f"{self._server.url} gave no answer to {method} {path} ({reason}); start the server, or correct server.url"
        )


def request_seed(seed: int, id: str, sample: int) -> int:
    """31 bits that depend on the run's seed, the problem and the number of the sample, never on the order of requests."""
    return int.from_bytes(hashlib.sha256(f"{seed} {sample} {id}".encode()).digest()[:4], "big") >> 1


def _logprobs(reported: Any) -> list[float]:
    """Log-probabilities of the sampled tokens in either protocol's form; empty where there are none."""
    if not isinstance(reported, Mapping):
        return []
    if isinstance(reported.get("token_logprobs"), list):
        return [float(x) for x in reported["token_logprobs"] if x is not None]
    content = reported.get("content")
    return [float(token["logprob"]) for token in content] if isinstance(content, list) else []
