"""Label the steps of a policy's own solutions. `accelerate launch scripts/label_steps.py --config recipes/tiny/label_steps.yaml`

Killed and started again it goes on with the chunk it was at, on as many ranks as it is given, and ends with the same labels.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from samples.chunks import Chunks, Work, seed_of, verdicts_of, work_off
from samples.completions import prepare_prompts

from data.chat import ChatRenderer
from data.records import LabelledSteps, Problem, parse_record, read_records, write_records
from reward_models.grading import GraderPool
from reward_models.step_labels import (
    Prefix,
    SampledSolution,
    Tally,
    balanced,
    expected_completion_tokens,
    label_solutions,
)
from reward_models.steps import Step, find_steps
from rlhf.config import LabelSteps
from rlhf.run import Run, format_table, run_stage, say
from rlhf.types import Prompt, Rollout

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
        verdicts = verdicts_of(rollouts, [r.token_ids for r in rollouts], self._graders, self._renderer)
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
        whole = [(*begun[j // n][1], *c.token_ids) for j, c in enumerate(completions)]
        verdicts = verdicts_of(completions, whole, self._graders, self._renderer)
        tallies = [Tally.of(verdicts[j : j + n]) for j in range(0, len(verdicts), n)]
        counts.update(
            prefixes=len(begun),
            completions=len(completions),
            completion_tokens=sum(len(c.token_ids) for c in completions),
            undecided_completions=sum(t.undecided for t in tallies),
            prompt_tokens=sum(len(p.token_ids) for p in prompts),
        )
        return tallies


def label_steps(config: LabelSteps, run: Run) -> None:
    problems = read_records(Problem, config.problems)[: config.num_problems]
    renderer, prompts = prepare_prompts(config, problems, called="solutions", remark=" before their steps are known")
    chunks = Chunks.of(run, prompts, config)

    def build(engine: Any, graders: GraderPool) -> Work:
        return label_chunks(Labeller(config, engine, renderer, graders), config, len(chunks.prompts))

    def describe(records: Sequence[Any], counts: Counter[str]) -> str:
        return f"{len(records)} solutions labelled with {counts['completion_tokens']:,} tokens"

    if work_off(chunks, config, renderer, build, describe):
        finish(run, chunks)


def label_chunks(labeller: Labeller, config: LabelSteps, num_chunks: int) -> Work:
    """Labels one chunk after the other; what all will cost is said as soon as the first one's solutions are there."""
    said = False

    def work(prompts: Sequence[Prompt], number: int) -> tuple[list[LabelledSteps], Counter[str]]:
        nonlocal said
        kept, counts = labeller.solve(prompts, seed_of(config.seed, number, 0))
        if not said:
            say(expected_cost(config, [k.solution for k in kept], counts, num_chunks))
            said = True
        records, more = labeller.label(kept, seed_of(config.seed, number, 1))
        counts.update(more)  # adding them would drop what is 0
        return records, counts

    return work


def expected_cost(
    config: LabelSteps, solutions: Sequence[SampledSolution], counts: Counter[str], num_chunks: int
) -> str:
    """What all chunks will sample, from the first one's solutions, before their completions."""
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
    rows_found, counts, seconds = chunks.collect()
    records = [parse_record(LabelledSteps, row) for row in rows_found]
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
    run.finish(
        **counts, records=len(records), right_steps=right, sampled_tokens=tokens, labelling_seconds=round(seconds, 1)
    )
    chunks.remove()


if __name__ == "__main__":
    run_stage(LabelSteps, label_steps)
