"""Preference pairs from a policy's own completions. `accelerate launch scripts/make_pairs.py --config recipes/tiny/make_pairs.yaml`

Writes pairs.jsonl (records `PreferencePair`, for train_reward_model, train_dpo and train_orpo), completions.jsonl (every completion with its
verdict, score and finish reason, by problem) and manifest.json. Killed and started again it goes on with the chunk it was at.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from samples.chunks import Chunks, Work, verdicts_of, work_off
from samples.completions import (
    Completions,
    Judge,
    chosen_problems,
    prepare_prompts,
    sampling_work,
    write_completions,
)
from samples.manifest import sampler_of, write_manifest

from data.chat import ChatRenderer
from data.records import PreferencePair, Problem, write_records
from reward_models.composite import build_composite
from reward_models.grading import GraderPool
from reward_models.pairing import Pairing, best_worst, correct_wrong
from rlhf.card import fingerprint
from rlhf.config import MakePairs, ModelReward
from rlhf.run import Run, format_table, run_stage, say

PAIRS, COMPLETIONS = "pairs.jsonl", "completions.jsonl"


def make_pairs(config: MakePairs, run: Run) -> None:
    from rlhf.models import check_model_path

    problems = chosen_problems(config)
    models = [(r.name, r.path) for r in config.rewards if isinstance(r, ModelReward)]
    for name, path in models:
        check_model_path(path, f"rewards.{name}.path")
    renderer, prompts = prepare_prompts(config, problems)
    chunks = Chunks.of(run, prompts, config, *(fingerprint(path) for _, path in models))

    def build(engine: Any, graders: GraderPool) -> Work:
        return sampling_work(config, renderer, engine, judge_of(config, renderer, graders))

    def describe(records: Sequence[Completions], counts: Counter[str]) -> str:
        pairs = sum(len(choose(config, r).pairs) for r in records)
        return f"{pairs} pairs of {len(records)} problems, {counts['completion_tokens']:,} tokens"

    if work_off(chunks, config, renderer, build, describe):
        finish(config, run, chunks, problems)


def judge_of(config: MakePairs, renderer: ChatRenderer, graders: GraderPool) -> Judge:
    """Verdicts, and where the recipe has rewards a score: the whole completion's and its steps'."""
    if not config.rewards:
        return lambda rollouts: [
            (verdict, None, {}) for verdict in verdicts_of(rollouts, [r.token_ids for r in rollouts], graders, renderer)
        ]
    import torch

    reward = build_composite(
        config.rewards,
        config.grader,
        max_new_tokens=config.rollout.max_new_tokens,
        truncated_is_wrong=True,
        prefill=renderer.prefill,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    return lambda rollouts: [
        (s.verdict, None if s.value is None else sum(s.weighted.values()), dict(s.components)) for s in reward(rollouts)
    ]


def choose(config: MakePairs, problem: Completions) -> Pairing:
    """A function of the recipe and the completions, so that the pairs can be chosen again from what is stored."""
    if config.pairing == "best_worst":
        return best_worst(problem.candidates, min_margin=config.min_margin, truncated=config.truncated)
    rng = random.Random(f"{config.seed} {problem.id}")
    return correct_wrong(problem.candidates, num_pairs=config.pairs_per_problem, truncated=config.truncated, rng=rng)


def to_record(
    config: MakePairs, problem: Problem, of: Completions, pair: tuple[int, int], sampler: str
) -> PreferencePair:
    chosen, rejected = (of.candidates[i] for i in pair)
    margin = None if chosen.score is None or rejected.score is None else chosen.score - rejected.score
    over = (
        "truncated" if rejected.finish_reason == "length" else "wrong" if config.pairing == "correct_wrong" else "worst"
    )
    return PreferencePair(
        id=f"{problem.id}-{pair[0]}-{pair[1]}",
        question=problem.question,
        chosen=chosen.text,
        rejected=rejected.text,
        margin=margin,
        source=f"{config.pairing.split('_')[0]} over {over}",
        chosen_finish=chosen.finish_reason,
        rejected_finish=rejected.finish_reason,
        sampler=sampler,
        think=problem.think,
    )


def finish(config: MakePairs, run: Run, chunks: Chunks, problems: Sequence[Problem]) -> None:
    """The pairs, all completions, and what became of every problem.

    Raises:
        ValueError: when there is no pair.
    """
    rows, counts, seconds = chunks.collect()
    found = [Completions.from_row(row) for row in rows]
    sampler = sampler_of(config)
    pairs: list[PreferencePair] = []
    skipped: dict[str, list[str]] = defaultdict(list)
    for problem, of in zip(problems, found, strict=True):
        assert problem.id == of.id
        chosen = choose(config, of)
        if not chosen.pairs:
            skipped[chosen.reason].append(problem.id)
        pairs += [to_record(config, problem, of, pair, sampler) for pair in chosen.pairs]
    fates = {reason: len(ids) for reason, ids in sorted(skipped.items())}
    if not pairs:
        raise ValueError(
            f"none of {len(problems):,} problems gave a pair ({fates}); more rollout.samples_per_prompt or a higher rollout.temperature gives "
            "completions that differ"
        )
    write_completions(found, run.folder / COMPLETIONS)
    write_records(pairs, run.folder / PAIRS)
    with_pairs = len(problems) - sum(fates.values())
    write_manifest(
        config,
        run,
        files=[PAIRS, COMPLETIONS],
        problems={"in": len(problems), "with_pairs": with_pairs, "skipped": fates},
        examples={reason: ids[:3] for reason, ids in skipped.items()},
        pairs=dict(Counter(pair.source for pair in pairs)),
        counts=dict(counts),
        rules=config.model_dump(
            mode="json", include={"pairing", "rewards", "pairs_per_problem", "min_margin", "truncated"}
        ),
    )
    table = [(name.replace("_", " "), f"{counts[name]:,}") for name in sorted(counts)]
    table += [(f"problems skipped: {reason}", f"{num:,}") for reason, num in fates.items()]
    say(format_table([*table, (PAIRS, f"{len(pairs):,} pairs of {with_pairs:,} of {len(problems):,} problems")]))
    run.finish(
        pairs=len(pairs), problems=len(problems), problems_with_pairs=with_pairs, skipped=fates, **counts,
        sampling_seconds=round(seconds, 1),
    )  # fmt: skip
    chunks.remove()


if __name__ == "__main__":
    run_stage(MakePairs, make_pairs)
