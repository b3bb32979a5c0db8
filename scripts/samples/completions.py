"""Completions of a policy with their verdicts and scores, problem by problem: what pairs and traces are chosen from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.chat import ChatRenderer
from data.records import Problem, read_records
from reward_models.pairing import Candidate
from rlhf.run import say
from rlhf.types import Prompt, Rollout, Verdict
from samples.chunks import Work, seed_of

Judged = tuple[Verdict, float | None, dict[str, float]]
"""(verdict, score, what it is made of) of one completion."""
Judge = Callable[[Sequence[Rollout]], Sequence[Judged]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """All completions of a problem, a line of completions.jsonl."""

    id: str
    """The problem's."""
    candidates: list[Candidate]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> Completions:
        return cls(id=row["id"], candidates=[Candidate(**c) for c in row["candidates"]])


def chosen_problems(config: Any) -> list[Problem]:
    """Those that a recipe is about.

    Raises:
        ValueError: when there is none.
    """
    last = None if config.num_problems is None else config.first_problem + config.num_problems
    problems = read_records(Problem, config.problems)
    if config.first_problem >= len(problems):
        raise ValueError(
            f"first_problem is {config.first_problem} and {config.problems} has {len(problems):,} problems; lower it"
        )
    return problems[config.first_problem : last]


def prepare_prompts(
    config: Any, problems: Sequence[Problem], *, called: str = "completions", remark: str = ""
) -> tuple[ChatRenderer, list[Prompt]]:
    """The policy's renderer and the problems as it sees them; what is sampled at most, and what it is `called`, is said.

    Raises:
        ValueError: when there is no such policy, or a prompt is too long for the recipe.
    """
    from rlhf.models import check_model_path, load_tokenizer
    from rlhf.rollout.engine import require_prompts_fit

    policy, rollout = config.policy, config.rollout
    check_model_path(policy.path, "policy.path")
    renderer = ChatRenderer(
        load_tokenizer(policy.path, revision=policy.revision), config.chat.system_prompt, config.chat.think
    )
    prompts = [renderer.problem_prompt(p) for p in problems]
    require_prompts_fit(prompts, rollout)
    most = len(prompts) * rollout.samples_per_prompt * rollout.max_new_tokens
    say(
        f"{len(prompts):,} problems x {rollout.samples_per_prompt} {called} of at most {rollout.max_new_tokens:,} tokens: "
        f"at most {most:,} tokens{remark}"
    )
    return renderer, prompts


def sampling_work(config: Any, renderer: ChatRenderer, engine: Any, judge: Judge) -> Work:
    """Samples and judges the completions of a chunk."""
    from rlhf.rollout.engine import Sampling

    sampling = Sampling.of(config.rollout)

    def work(prompts: Sequence[Prompt], number: int) -> tuple[list[Completions], Counter[str]]:
        rollouts = engine.generate(prompts, sampling, seed=seed_of(config.seed, number))
        candidates = [
            Candidate(
                text=renderer.prefill + rollout.text,
                num_tokens=len(rollout.token_ids),
                finish_reason=rollout.finish_reason,
                verdict=verdict,
                score=score,
                components=components,
            )
            for rollout, (verdict, score, components) in zip(rollouts, judge(rollouts), strict=True)
        ]
        n = sampling.samples_per_prompt
        records = [Completions(id=p.id, candidates=candidates[i * n : (i + 1) * n]) for i, p in enumerate(prompts)]
        counts = Counter[str](c.verdict for c in candidates)
        counts.update(
            completions=len(candidates),
            completion_tokens=sum(c.num_tokens for c in candidates),
            truncated=sum(c.finish_reason == "length" for c in candidates),
        )
        return records, counts

    return work


def write_completions(found: Sequence[Completions], file: Path) -> None:
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(asdict(of), ensure_ascii=False) + "\n" for of in found)
