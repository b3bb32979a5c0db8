"""Problems in chunks, each sampled, graded and stored as a whole, so that a killed stage goes on with the chunk it was at, on any number of ranks."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat import ChatRenderer, with_budget
from reward_models.grading import VERSION, GraderPool
from rlhf.card import fingerprint
from rlhf.rollout.engine import Sampling
from rlhf.run import Run, say, write_json
from rlhf.sampling import Question
from rlhf.types import Prompt, Rollout, Verdict

Counts = Counter[str]
Work = Callable[[Sequence[Prompt], int], tuple[Sequence[Any], Counts]]
"""(prompts of a chunk, its number) → its records, dataclasses all, and what was counted on the way."""


def seed_of(*numbers: int) -> int:
    """31 bits, another for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big") >> 1


def verdicts_of(
    rollouts: Sequence[Rollout], token_ids: Sequence[Sequence[int]], graders: GraderPool, renderer: ChatRenderer
) -> list[Verdict]:
    """Verdicts of whole completions, given as tokens; one that was cut off is wrong, whatever it boxed, as in training."""
    cases = [
        (renderer.prefill + renderer.decode(ids), r.prompt.reference)
        for r, ids in zip(rollouts, token_ids, strict=True)
    ]
    return [
        "wrong" if r.finish_reason == "length" and grade.verdict == "correct" else grade.verdict
        for r, grade in zip(rollouts, graders.grade_many(cases), strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Chunks:
    """What is done so far, a file a chunk, whole or not at all."""

    folder: Path
    prompts: list[list[Prompt]]
    basis: str
    """What the records depend on besides the recipe and the prompts: weights and grader."""

    @classmethod
    def of(cls, run: Run, prompts: Sequence[Prompt], config: Any, *others: str) -> Chunks:
        """The prompts of a stage; `others` are fingerprints of further models that its records depend on."""
        size = config.rollout.problems_per_chunk
        parts = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
        basis = " ".join([fingerprint(config.policy.path), VERSION, *others])
        return cls(run.folder / "chunks", parts, basis)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _key(self, number: int) -> str:
        asked = [[p.id, p.token_ids, p.reference] for p in self.prompts[number]]
        return hashlib.sha256(json.dumps([self.basis, asked]).encode()).hexdigest()[:24]

    def read(self, number: int) -> dict[str, Any] | None:
        """None where it was not done, or from other weights or problems."""
        if not self._file(number).is_file():
            return None
        found = json.loads(self._file(number).read_text(encoding="utf-8"))
        return found if found["key"] == self._key(number) else None

    def write(self, number: int, records: Sequence[Any], counts: Counts, seconds: float) -> None:
        rows = [dataclasses.asdict(record) for record in records]
        self.folder.mkdir(exist_ok=True)
        write_json(
            self._file(number), {"key": self._key(number), "records": rows, "counts": counts, "seconds": seconds}
        )

    def collect(self) -> tuple[list[dict[str, Any]], Counts, float]:
        """(records, counts, seconds) of all chunks, once they are there."""
        rows: list[dict[str, Any]] = []
        counts: Counts = Counter()
        seconds = 0.0
        for number in range(len(self.prompts)):
            part = self.read(number)
            assert part is not None, f"chunk {number} is missing"
            rows += part["records"]
            counts.update(part["counts"])
            seconds += part["seconds"]
        return rows, counts, seconds

    def remove(self) -> None:
        shutil.rmtree(self.folder)


def work_off(
    chunks: Chunks,
    config: Any,
    renderer: ChatRenderer,
    build: Callable[[Any, GraderPool], Work],
    describe: Callable[[Sequence[Any], Counts], str],
) -> bool:
    """Do the chunks that are not done; whether this is the process that collects them.

    Args:
        chunks: of all ranks; each takes its share of what is left.
        config: of the stage: seed, policy, rollout, grader.
        renderer: the policy's.
        build: makes the work from the engine and the graders, which are opened only when something is left.
        describe: what a chunk brought, for the progress line.
    """
    from rlhf.distributed import start

    accelerator = start(config.seed)
    todo = [n for n in range(len(chunks.prompts)) if chunks.read(n) is None]
    if len(todo) < len(chunks.prompts):
        say(f"{len(chunks.prompts) - len(todo)} of {len(chunks.prompts)} chunks were done before; going on")
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    if mine:
        graders = GraderPool(
            workers=config.grader.workers, timeout=config.grader.timeout_seconds, memory_mb=config.grader.memory_mb,
            accept=config.grader.accept,
        )  # fmt: skip
        engine = open_policy(config, renderer)
        with closing(engine), graders:
            work = build(engine, graders)
            began = time.perf_counter()
            for done, number in enumerate(mine, 1):
                started = time.perf_counter()
                records, counts = work(chunks.prompts[number], number)
                chunks.write(number, records, counts, time.perf_counter() - started)
                left = (time.perf_counter() - began) / done * (len(mine) - done)
                say(f"  chunk {done} of {len(mine)}: {describe(records, counts)}, about {left:.0f} s left")
    accelerator.wait_for_everyone()
    return accelerator.is_main_process


class ServedPolicy:
    """A policy behind an OpenAI-compatible server, as far as it is sampled from: its completions come as text and are tokenized here."""

    def __init__(self, config: Any, renderer: ChatRenderer) -> None:
        from rlhf.rollout.openai_server import OpenAIServer

        self._renderer = renderer
        self._server = OpenAIServer(
            config.policy.server,
            Sampling.of(config.rollout),
            system_prompt=config.chat.system_prompt,
            prompt_text=dataclasses.replace(renderer, think=None).prompt_text,
            decode=renderer.decode,
            stop_token_id=renderer.stop_token_id,
        )

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """As a `RolloutEngine`; `sampling` is the recipe's."""
        think = [str(p.columns.get("think", "")) for p in prompts]
        questions = [
            Question(id=p.id, text=with_budget(p.question, t), token_ids=p.token_ids)
            for p, t in zip(prompts, think, strict=True)
        ]
        return [
            self._renderer.rollout(prompt, self._renderer.prefill + c.text, truncated=c.finish_reason == "length")
            for prompt, completions in zip(prompts, self._server.generate(questions, seed), strict=True)
            for c in completions
        ]

    def close(self) -> None:
        self._server.close()


def open_policy(config: Any, renderer: ChatRenderer) -> Any:
    """The engine of the recipe with the policy's weights, or the server that has them."""
    from rlhf.rollout.engine import build_engine

    if getattr(config.policy, "server", None) is not None:
        return ServedPolicy(config, renderer)
    return build_engine(
        config.rollout,
        config.policy.path,
        revision=config.policy.revision,
        stop_token_id=renderer.stop_token_id,
        decode=renderer.decode,
    )
