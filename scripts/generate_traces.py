"""Demonstrations from a stronger policy's completions. `accelerate launch scripts/generate_traces.py --config recipes/distillation/traces.yaml`

Writes traces.jsonl (records `Demonstration`, for train_sft), completions.jsonl (every completion with its verdict, score and finish reason, by
problem) and manifest.json. Killed and started again it goes on with the chunk it was at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from samples.chunks import Chunks, Work, verdicts_of, work_off
from samples.completions import (
    Completions,
    Judge,
    Judged,
    chosen_problems,
    prepare_prompts,
    sampling_work,
    write_completions,
)
from samples.manifest import sampler_of, write_manifest

from data.chat import ChatRenderer
from data.records import Demonstration, Problem, write_records
from data.traces import FATES, KEPT, Rules, Trace, choose_traces
from reward_models.grading import GraderPool
from reward_models.process import TOKENS_PER_BATCH, ProcessModel, aggregate
from rlhf.card import fingerprint
from rlhf.config import GenerateTraces
from rlhf.run import Run, format_table, run_stage, say
from rlhf.types import Rollout

TRACES, COMPLETIONS = "traces.jsonl", "completions.jsonl"


def generate_traces(config: GenerateTraces, run: Run) -> None:
    from rlhf.models import check_model_path

    problems = chosen_problems(config)
    if config.process_model is not None:
        check_model_path(config.process_model.path, "process_model.path")
    renderer, prompts = prepare_prompts(config, problems)
    others = [fingerprint(config.process_model.path)] if config.process_model else []
    chunks = Chunks.of(run, prompts, config, *others)

    def build(engine: Any, graders: GraderPool) -> Work:
        return sampling_work(config, renderer, engine, judge_of(config, renderer, graders))

    def describe(records: Sequence[Completions], counts: Counter[str]) -> str:
        return f"{counts['correct']:,} of {counts['completions']:,} completions right, {counts['completion_tokens']:,} tokens"

    if work_off(chunks, config, renderer, build, describe):
        finish(config, run, chunks, problems)


def judge_of(config: GenerateTraces, renderer: ChatRenderer, graders: GraderPool) -> Judge:
    """Verdicts, and the process model's score of what is right and ended by itself."""
    block = config.process_model
    score = None
    if block is not None:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
        score = ProcessModel.load(block.path, device=device).scorer(tokens_per_batch=TOKENS_PER_BATCH)

    def judge(rollouts: Sequence[Rollout]) -> list[Judged]:
        verdicts = verdicts_of(rollouts, [r.token_ids for r in rollouts], graders, renderer)
        judged: list[Judged] = [(verdict, None, {}) for verdict in verdicts]
        if score is not None and block is not None:
            right = [i for i, verdict in enumerate(verdicts) if verdict == "correct"]
            for i, steps in zip(right, score([rollouts[i] for i in right]) if right else [], strict=True):
                judged[i] = ("correct", aggregate([step.value for step in steps], block.aggregate), {})
        return judged

    return judge


def rules_of(config: GenerateTraces) -> Rules:
    return Rules(
        require_thoughts=config.require_thoughts,
        min_score=config.process_model.min_score if config.process_model else None,
        near_threshold=config.near_threshold,
        shingle_words=config.shingle_words,
        max_per_problem=config.max_per_problem,
        prefer=config.prefer,
    )


def to_record(problem: Problem, number: int, trace: Trace, sampler: str) -> Demonstration:
    thoughts = trace.thoughts
    assert thoughts is not None
    return Demonstration(
        id=f"{problem.id}-{number}",
        question=problem.question,
        scratchpad=thoughts,
        answer=problem.answer,
        response=trace.text,
        subject=problem.subject,
        think=problem.think,
        sampler=sampler,
    )


def finish(config: GenerateTraces, run: Run, chunks: Chunks, problems: Sequence[Problem]) -> None:
    """The traces, all completions, and what became of every completion and every problem.

    Raises:
        ValueError: when no trace is left.
    """
    rows, counts, seconds = chunks.collect()
    found = [Completions.from_row(row) for row in rows]
    places = [(p, n, c) for p, of in zip(problems, found, strict=True) for n, c in enumerate(of.candidates)]
    traces = [
        Trace(
            problem=p.id,
            question=p.question,
            text=c.text,
            num_tokens=c.num_tokens,
            finish_reason=c.finish_reason,
            verdict=c.verdict,
            score=c.score,
        )
        for p, _, c in places
    ]
    fates = choose_traces(traces, rules_of(config), seed=config.seed)
    sampler = sampler_of(config)
    records = [
        to_record(p, n, trace, sampler)
        for (p, n, _), trace, fate in zip(places, traces, fates, strict=True)
        if fate == KEPT
    ]
    by_fate = Counter[str](fates)
    if not records:
        raise ValueError(
            f"none of {len(traces):,} completions became a trace ({dict(by_fate)}); relax what they fail by"
        )
    skipped = skipped_problems(traces, fates)
    write_completions(found, run.folder / COMPLETIONS)
    write_records(records, run.folder / TRACES)
    with_traces = len(problems) - sum(skipped.values())
    write_manifest(
        config,
        run,
        files=[TRACES, COMPLETIONS],
        problems={"in": len(problems), "with_traces": with_traces, "skipped": skipped},
        completions={"in": len(traces), **by_fate},
        process_model=config.process_model
        and {**config.process_model.model_dump(mode="json"), "weights": fingerprint(config.process_model.path)},
        rules=config.model_dump(
            mode="json", include={"require_thoughts", "near_threshold", "shingle_words", "max_per_problem", "prefer"}
        ),
    )
    table = [(f"completions: {fate}", f"{by_fate[fate]:,}") for fate in FATES if by_fate[fate]]
    table += [(f"problems skipped: {reason}", f"{num:,}") for reason, num in skipped.items()]
    say(format_table([*table, (TRACES, f"{len(records):,} traces of {with_traces:,} of {len(problems):,} problems")]))
    run.finish(
        traces=len(records), problems=len(problems), problems_with_traces=with_traces, skipped=skipped, completions=dict(by_fate),
        sampled_tokens=counts["completion_tokens"], sampling_seconds=round(seconds, 1),
    )  # fmt: skip
    chunks.remove()


def skipped_problems(traces: Sequence[Trace], fates: Sequence[str]) -> dict[str, int]:
    """Problems without a trace, by what became of that one of their completions which got furthest."""
    best: dict[str, str] = {}
    for trace, fate in zip(traces, fates, strict=True):
        before = best.get(trace.problem, fate)
        best[trace.problem] = fate if FATES.index(fate) > FATES.index(before) else before
    return dict(Counter(fate for fate in best.values() if fate != KEPT))


if __name__ == "__main__":
    run_stage(GenerateTraces, generate_traces)
