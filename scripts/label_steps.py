"""Label the steps of a policy's own solutions. `accelerate launch scripts/label_steps.py --config recipes/tiny/label_steps.yaml`

Killed and started again it goes on with the chunk it was at, on as many ranks as it is given, and ends with the same labels.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat import ChatRenderer
from data.records import LabelledSteps, Problem, parse_record, read_records, write_records
from reward_models.grading import VERSION, GraderPool
from reward_models.step_labels import (
    Prefix,
    SampledSolution,
    Tally,
    balanced,
    expected_completion_tokens,
    label_solutions,
)
from reward_models.steps import Step, find_steps
from rlhf.card import fingerprint
from rlhf.config import LabelSteps
from rlhf.run import Run, format_table, run_stage, say, write_json
from rlhf.types import Prompt, Rollout, Verdict

LABELS = "labelled_steps.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """A solution that is labelled."""

    id: str
    rollout: Rollout
    steps: list[str]
    solution: SampledSolution


class Labeller:
    """Solves problems, then completes prefixes of the solutions, with the same engine and graders."""

    def __init__(self, config: LabelSteps, engine: Any, renderer: ChatRenderer, graders: GraderPool) -> None:
        from rlhf.rollout.engine import Sampling

        self._config, self._engine, self._renderer, self._graders = config, engine, renderer, graders
        self._solving = Sampling.of(config.rollout)
        # One sample a request: each prefix is then asked for as often as it is completed, and found in the cache but once.
        self._completing = dataclasses.replace(
            self._solving, samples_per_prompt=1, temperature=config.rollout.completion_temperature
        )

    def solve(self, prompts: Sequence[Prompt], seed: int) -> tuple[list[Kept], Counter[str]]:
        """Solutions to label, and what became of the others."""
        rollouts = self._engine.generate(prompts, self._solving, seed=seed)
        verdicts = self._grade(rollouts, [r.token_ids for r in rollouts])
        counts: Counter[str] = Counter(solutions=len(rollouts), solution_tokens=sum(len(r.token_ids) for r in rollouts))
        solved = {r.prompt.id for r, verdict in zip(rollouts, verdicts, strict=True) if verdict == "correct"}
        usable: list[Kept] = []
        seen: set[tuple[str, str]] = set()
        for i, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True)):
            steps = find_steps(rollout.token_ids, rollout.text, self._renderer.tokenizer, self._config.separator)
            fate = (
                "undecided_solutions" if verdict == "undecided"
                else "truncated_solutions" if rollout.finish_reason == "length"
                else "repeated_solutions" if (rollout.prompt.id, rollout.text) in seen
                else "of_problems_never_solved" if rollout.prompt.id not in solved
                else "of_too_few_steps" if len(steps) < self._config.min_steps
                else None
            )  # fmt: skip
            seen.add((rollout.prompt.id, rollout.text))
            if fate is None:
                name = f"{rollout.prompt.id}-{i % self._solving.samples_per_prompt}"
                usable.append(self._kept(name, rollout, steps, correct=verdict == "correct"))
            else:
                counts[fate] += 1
        chosen = balanced([k.solution.correct for k in usable], self._config.correct_share)
        counts["beyond_correct_share"] += len(usable) - len(chosen)
        return [usable[i] for i in chosen], counts

    def _kept(self, name: str, rollout: Rollout, steps: list[Step], *, correct: bool) -> Kept:
        ends = tuple(step.position + 1 for step in steps)
        return Kept(
            id=name,
            rollout=rollout,
            steps=[step.text for step in steps],
            solution=SampledSolution(
                ends=ends,
                num_tokens=len(rollout.token_ids),
                finished=not self._renderer.decode(rollout.token_ids[ends[-1] :]).strip(),
                correct=correct,
            ),
        )

    def label(self, kept: Sequence[Kept], seed: int) -> tuple[list[LabelledSteps], Counter[str]]:
        """Labelled solutions; one whose completions could not be judged is left out and counted."""
        counts: Counter[str] = Counter()
        before = getattr(self._engine, "reused_prompt_tokens", None)

        def complete(prefixes: Sequence[Prefix]) -> list[Tally]:
            counts["rounds"] += 1
            return self._complete([kept[n] for n, _ in prefixes], [i for _, i in prefixes], counts, seed)

        found = label_solutions([k.solution for k in kept], complete, estimate=self._config.estimate)
        if before is not None:
            counts["reused_prompt_tokens"] = self._engine.reused_prompt_tokens - before
        records = []
        for k, labels in zip(kept, found, strict=True):
            if labels is None:
                counts["unjudged_solutions"] += 1
                continue
            counts["labelled_correct" if k.solution.correct else "labelled_wrong"] += 1
            records.append(
                LabelledSteps(
                    id=k.id,
                    question=k.rollout.prompt.question,
                    steps=k.steps,
                    labels=list(labels.labels),
                    values=list(labels.values),
                )
            )
        return records, counts

    def _complete(self, kept: Sequence[Kept], steps: Sequence[int], counts: Counter[str], seed: int) -> list[Tally]:
        """What becomes of completions of each solution after the given step of it."""
        n = self._config.rollout.completions_per_prefix
        begun = [
            (k.rollout.prompt, k.rollout.token_ids[: k.solution.ends[i]]) for k, i in zip(kept, steps, strict=True)
        ]
        prompts = [
            dataclasses.replace(prompt, token_ids=(*prompt.token_ids, *prefix))
            for prompt, prefix in begun
            for _ in range(n)
        ]
        completions = self._engine.generate(prompts, self._completing, seed=seed_of(seed, counts["rounds"]))
        verdicts = self._grade(completions, [(*begun[j // n][1], *c.token_ids) for j, c in enumerate(completions)])
        tallies = [Tally.of(verdicts[j : j + n]) for j in range(0, len(verdicts), n)]
        counts.update(
            prefixes=len(begun),
            completions=len(completions),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            undecided_completions=sum(t.undecided for t in tallies),
            prompt_tokens=sum(len(p.token_ids) for p in prompts),
        )
        return tallies

    def _grade(self, rollouts: Sequence[Rollout], token_ids: Sequence[Sequence[int]]) -> list[Verdict]:
        """Verdicts of whole completions; one that was cut off is wrong, whatever it boxed, as in training."""
        prefill = self._renderer.prefill
        cases = [
            (prefill + self._renderer.decode(ids), r.prompt.reference)
            for r, ids in zip(rollouts, token_ids, strict=True)
        ]
        return [
            "wrong" if r.finish_reason == "length" and grade.verdict == "correct" else grade.verdict
            for r, grade in zip(rollouts, self._graders.grade_many(cases), strict=True)
        ]


def seed_of(*numbers: int) -> int:
    """31 bits, another for each tuple of numbers."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True, slots=True)
class Chunks:
    """What is labelled so far, a file a chunk, whole or not at all."""

    folder: Path
    prompts: list[list[Prompt]]
    basis: str
    """What labels depend on besides the recipe and the prompts: weights and grader."""

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:06}.json"

    def _key(self, number: int) -> str:
        asked = [[p.id, p.token_ids, p.reference] for p in self.prompts[number]]
        return hashlib.sha256(json.dumps([self.basis, asked]).encode()).hexdigest()[:24]

    def read(self, number: int) -> dict[str, Any] | None:
        """None where it was not labelled, or from other weights or problems."""
        if not self._file(number).is_file():
            return None
        found = json.loads(self._file(number).read_text(encoding="utf-8"))
        return found if found["key"] == self._key(number) else None

    def write(self, number: int, records: Sequence[LabelledSteps], counts: Counter[str], seconds: float) -> None:
        rows = [dataclasses.asdict(record) for record in records]
        self.folder.mkdir(exist_ok=True)
        write_json(
            self._file(number), {"key": self._key(number), "records": rows, "counts": counts, "seconds": seconds}
        )


def label_steps(config: LabelSteps, run: Run) -> None:
    from rlhf.distributed import start
    from rlhf.models import check_model_path, load_tokenizer
    from rlhf.rollout.engine import build_engine, require_prompts_fit

    rollout, policy = config.rollout, config.policy
    problems = read_records(Problem, config.problems)[: config.num_problems]
    check_model_path(policy.path, "policy.path")
    renderer = ChatRenderer(load_tokenizer(policy.path, revision=policy.revision), config.chat.system_prompt)
    prompts = [renderer.prompt(p.id, p.question, p.answer) for p in problems]
    require_prompts_fit(prompts, rollout)
    size = rollout.problems_per_chunk
    parts = [prompts[i : i + size] for i in range(0, len(prompts), size)]
    chunks = Chunks(run.folder / "chunks", parts, f"{fingerprint(policy.path)} {VERSION}")
    most = len(prompts) * rollout.samples_per_prompt
    say(
        f"{len(prompts):,} problems x {rollout.samples_per_prompt} solutions of at most {rollout.max_new_tokens:,} tokens: "
        f"at most {most * rollout.max_new_tokens:,} tokens before their steps are known"
    )
    accelerator = start(config.seed)
    todo = [n for n in range(len(parts)) if chunks.read(n) is None]
    if len(todo) < len(parts):
        say(f"{len(parts) - len(todo)} of {len(parts)} chunks were labelled before; going on")
    mine = todo[accelerator.process_index :: accelerator.num_processes]
    if mine:
        graders = GraderPool(
            workers=config.grader.workers, timeout=config.grader.timeout_seconds, memory_mb=config.grader.memory_mb,
            accept=config.grader.accept,
        )  # fmt: skip
        stop = renderer.stop_token_id
        engine = build_engine(
            rollout, policy.path, revision=policy.revision, stop_token_id=stop, decode=renderer.decode
        )
        with closing(engine), graders:
            label_chunks(Labeller(config, engine, renderer, graders), config, chunks, mine)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish(run, chunks)


def label_chunks(labeller: Labeller, config: LabelSteps, chunks: Chunks, numbers: Sequence[int]) -> None:
    """The chunks of this rank, one after the other; what they will cost is said as soon as the first one's solutions are there."""
    began = time.perf_counter()
    for done, number in enumerate(numbers):
        started = time.perf_counter()
        kept, counts = labeller.solve(chunks.prompts[number], seed_of(config.seed, number, 0))
        if done == 0:
            say(expected_cost(config, [k.solution for k in kept], counts, len(numbers)))
        records, more = labeller.label(kept, seed_of(config.seed, number, 1))
        counts.update(more)  # adding them would drop what is 0
        chunks.write(number, records, counts, time.perf_counter() - started)
        left = (time.perf_counter() - began) / (done + 1) * (len(numbers) - done - 1)
        say(
            f"  chunk {done + 1} of {len(numbers)}: {len(records)} solutions labelled with {more['completion_tokens']:,} tokens, about {left:.0f} s left"
        )


def expected_cost(
    config: LabelSteps, solutions: Sequence[SampledSolution], counts: Counter[str], num_chunks: int
) -> str:
    """What this rank will sample, from its first chunk's solutions, before their completions."""
    n = config.rollout.completions_per_prefix
    prefixes, tokens = expected_completion_tokens(solutions, estimate=config.estimate, completions_per_prefix=n)
    solving = counts["solution_tokens"] * num_chunks
    return (
        f"expected cost: {solving + tokens * num_chunks:,.0f} tokens = {solving:,} for {counts['solutions'] * num_chunks:,} solutions + "
        f"{tokens * num_chunks:,.0f} for {n} completions of {prefixes * num_chunks:,.0f} prefixes"
    )


def finish(run: Run, chunks: Chunks) -> None:
    """One file of all labels, and what they took.

    Raises:
        ValueError: when nothing could be labelled.
    """
    found = [chunks.read(n) for n in range(len(chunks.prompts))]
    counts: Counter[str] = Counter()
    records: list[LabelledSteps] = []
    for part in found:
        assert part is not None
        counts.update(part["counts"])
        records += [parse_record(LabelledSteps, row) for row in part["records"]]
    if not records:
        raise ValueError(
            f"none of {counts['solutions']:,} solutions was labelled ({dict(counts)}); a higher rollout.temperature gives more wrong ones, "
            "min_steps and correct_share leave out others"
        )
    write_records(records, run.folder / LABELS)
    right = sum(sum(r.labels) for r in records) / sum(len(r.labels) for r in records)
    rows = [(name.replace("_", " "), f"{counts[name]:,}") for name in sorted(counts)]
    if "reused_prompt_tokens" in counts:
        share = counts["reused_prompt_tokens"] / max(counts["prompt_tokens"], 1)
        rows.append(("prompt tokens from the cache", f"{share:.1%}"))
    say(format_table([*rows, (LABELS, f"{len(records):,} solutions, {right:.1%} of their steps right")]))
    tokens = counts["solution_tokens"] + counts["completion_tokens"]
    seconds = sum(part["seconds"] for part in found if part is not None)
    run.finish(
        **counts, records=len(records), right_steps=right, sampled_tokens=tokens, labelling_seconds=round(seconds, 1)
    )
    shutil.rmtree(chunks.folder)


if __name__ == "__main__":
    run_stage(LabelSteps, label_steps)
