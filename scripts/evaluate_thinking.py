"""Accuracy against thinking tokens. `accelerate launch scripts/evaluate_thinking.py --config recipes/thinking/evaluate.yaml`

Every model answers the same problems under every thinking budget in the prompt, and the last one with its thoughts cut at every limit of
`forcing`. Writes results.json, thinking.md and thinking.png. Killed and started again it samples only what is missing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from samples.thinking import draw_thinking, thinking_table

from data.chat import THINK_CLOSE, THINK_OPEN, ChatRenderer
from data.records import Problem, read_records
from reward_models.grading import VERSION, GraderPool
from rlhf.card import fingerprint
from rlhf.config import BudgetForcing, EvaluateThinking, Weights
from rlhf.rollout.engine import RolloutEngine, Sampling, build_engine, require_prompts_fit
from rlhf.rollout.forcing import Forcing, thoughts_end
from rlhf.run import Run, git_revision, run_stage, say, write_json
from rlhf.sampling import Generate, Question, Sampled, from_engine, from_forced, sample_all
from rlhf.types import Rollout, Verdict
from rlhf.uncertainty import difference, share

OPENING = f"{THINK_OPEN}\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """One way to let a model think."""

    name: str
    think: str
    """Budget in the prompt; empty for none."""
    limit: int | None = None
    """Thinking tokens after which thoughts are cut; None where they are not."""

    @property
    def file_name(self) -> str:
        return (self.think or "none") + ("" if self.limit is None else f".{self.limit}")


def conditions_of(config: EvaluateThinking, *, is_last: bool) -> list[Condition]:
    """Those that a model is measured under; the last model's thoughts are cut, too."""
    found = [Condition(name=f"think: {think}", think=think) for think in config.budgets]
    if config.forcing is not None and is_last:
        think = config.forcing.think or config.chat.think or ""
        found += [
            Condition(name=f"forced: {limit}", think=think, limit=limit) for limit in config.forcing.thinking_tokens
        ]
    return found


def forcing_of(block: BudgetForcing, limit: int, renderer: ChatRenderer) -> Forcing:
    """What a recipe puts in, as this tokenizer writes it."""

    def ids(text: str) -> tuple[int, ...]:
        return tuple(renderer.tokenizer.encode(text, add_special_tokens=False))

    return Forcing(
        thinking_tokens=limit,
        answer_tokens=block.answer_tokens,
        close_tag=THINK_CLOSE,
        opening=() if renderer.prefill else ids(OPENING),
        closing=ids(block.closing),
        line_break=ids("\n"),
        wait=ids(block.wait) if block.num_waits else (),
        num_waits=block.num_waits,
    )


def require_room(config: EvaluateThinking, renderer: ChatRenderer) -> None:
    """Raise when forced thoughts and their answer are longer than the engine's context.

    Raises:
        ValueError: naming the limit.
    """
    if config.forcing is None:
        return
    limit = max(config.forcing.thinking_tokens)
    forcing = forcing_of(config.forcing, limit, renderer)
    put_in = (
        len(forcing.opening) + len(forcing.line_break) + len(forcing.closing) + forcing.num_waits * len(forcing.wait)
    )
    needed = limit + forcing.answer_tokens + put_in
    if needed > config.rollout.max_new_tokens:
        raise ValueError(
            f"forcing.thinking_tokens {limit}, answer_tokens {forcing.answer_tokens} and {put_in} tokens that are put in are more than "
            f"rollout.max_new_tokens {config.rollout.max_new_tokens}; set it to {needed} or more"
        )


def counter_of(renderer: ChatRenderer) -> Any:
    """Counts the tokens of a completion's thoughts, without those of the opening tag; all where the thoughts never end."""
    opening = () if renderer.prefill else tuple(renderer.tokenizer.encode(OPENING, add_special_tokens=False))

    def count(rollout: Rollout) -> int:
        end = thoughts_end(rollout.token_ids, THINK_CLOSE, renderer.decode)
        end = len(rollout.token_ids) if end is None else end
        return end - len(opening) if rollout.token_ids[: len(opening)] == opening and end >= len(opening) else end

    return count


def evaluate_thinking(config: EvaluateThinking, run: Run) -> None:
    from rlhf.distributed import gather, start
    from rlhf.models import check_model_path, load_tokenizer

    problems = read_records(Problem, config.problems)[: config.num_problems]
    renderers = {}
    for label, model in config.models.items():
        check_model_path(model.path, f"models.{label}.path")
        renderers[label] = ChatRenderer(
            load_tokenizer(model.path, revision=model.revision), config.chat.system_prompt, config.chat.think
        )
        require_room(config, renderers[label])
        for think in (*config.budgets, config.forcing.think if config.forcing else None):
            prompts = [renderers[label].problem_prompt(with_think(p, think)) for p in problems]
            require_prompts_fit(prompts, config.rollout)
    accelerator = start(config.seed)
    mine = problems[accelerator.process_index :: accelerator.num_processes]
    rows: list[dict[str, Any]] = []
    for label, model in config.models.items():
        conditions = conditions_of(config, is_last=label == list(config.models)[-1])
        measured = measure(config, run, label, model, renderers[label], conditions, mine, accelerator.process_index)
        for condition, of_mine in zip(conditions, measured, strict=True):
            by_id = {m.id: m for m in gather(accelerator, of_mine)}
            rows.append(summarise(label, condition, [by_id[p.id] for p in problems]))
    if accelerator.is_main_process:
        finish(config, run, rows)


def with_think(problem: Problem, think: str | None) -> Problem:
    return dataclasses.replace(problem, think=think or "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One problem under one condition."""

    id: str
    verdicts: tuple[Verdict, ...]
    sampled: Sampled


def measure(
    config: EvaluateThinking,
    run: Run,
    label: str,
    model: Weights,
    renderer: ChatRenderer,
    conditions: Sequence[Condition],
    problems: Sequence[Problem],
    rank: int,
) -> list[list[Measured]]:
    """A model under all its conditions with one engine, which is opened only when something is missing."""
    sampling = Sampling.of(config.rollout)
    engines: list[RolloutEngine] = []

    def generate(condition: Condition) -> Generate:
        if not engines:
            engines.append(
                build_engine(
                    config.rollout, model.path, revision=model.revision, stop_token_id=renderer.stop_token_id, decode=renderer.decode,
                )
            )  # fmt: skip
        if condition.limit is None:
            return from_engine(engines[0], sampling, thoughts=counter_of(renderer))
        assert config.forcing is not None
        return from_forced(engines[0], sampling, forcing_of(config.forcing, condition.limit, renderer), renderer.decode)

    found = []
    graders = GraderPool(
        workers=config.grader.workers, timeout=config.grader.timeout_seconds, memory_mb=config.grader.memory_mb,
        accept=config.grader.accept,
    )  # fmt: skip
    try:
        with graders:
            for condition in conditions:
                say(f"{label}, {condition.name}: {len(problems):,} problems x {sampling.samples_per_prompt} samples")
                prompts = [renderer.problem_prompt(with_think(p, condition.think)) for p in problems]
                questions = [Question(id=p.id, text=p.question, token_ids=p.token_ids) for p in prompts]
                forcing = (
                    config.forcing.model_dump(mode="json") if config.forcing and condition.limit is not None else None
                )
                sampled = sample_all(
                    questions,
                    run.folder / f"generations.{label}.{condition.file_name}.{rank}.jsonl",
                    settings={**dataclasses.asdict(sampling), "dtype": config.rollout.dtype, "weights": fingerprint(model.path),
                              "limit": condition.limit, "forcing": forcing},
                    seed=config.seed + 1_000_003 * rank,
                    problems_per_chunk=config.rollout.problems_per_chunk,
                    build=lambda condition=condition: generate(condition),
                    say=say,
                )  # fmt: skip
                found.append(grade(config, renderer, problems, sampled, graders))
    finally:
        for engine in engines:
            engine.close()
    return found


def grade(
    config: EvaluateThinking,
    renderer: ChatRenderer,
    problems: Sequence[Problem],
    sampled: Sequence[Sampled],
    graders: GraderPool,
) -> list[Measured]:
    cases = [(renderer.prefill + text, p.answer) for p, s in zip(problems, sampled, strict=True) for text in s.texts]
    grades = iter(graders.grade_many(cases))
    measured = []
    for problem, s in zip(problems, sampled, strict=True):
        verdicts: list[Verdict] = [next(grades).verdict for _ in s.texts]
        for i, truncated in enumerate(s.truncated):
            if truncated and verdicts[i] == "correct" and config.truncated == "wrong":
                verdicts[i] = "wrong"
        measured.append(Measured(id=problem.id, verdicts=tuple(verdicts), sampled=s))
    return measured


def summarise(label: str, condition: Condition, measured: Sequence[Measured]) -> dict[str, Any]:
    """Accuracy with its interval over problems, and what it took; problems with an undecided sample are left out and counted."""
    judged = [m for m in measured if "undecided" not in m.verdicts]
    per_problem = [statistics.fmean(v == "correct" for v in m.verdicts) for m in judged]
    samples = [m.sampled for m in measured]
    return {
        "model": label,
        **dataclasses.asdict(condition),
        "accuracy": dataclasses.asdict(share(per_problem, samples=len(measured[0].verdicts))),
        "thinking_tokens": statistics.fmean(n for s in samples for n in s.thinking),
        "completion_tokens": statistics.fmean(n for s in samples for n in s.lengths),
        "was_cut": statistics.fmean(c for s in samples for c in s.was_cut),
        "truncated": statistics.fmean(t for s in samples for t in s.truncated),
        "undecided_problems": len(measured) - len(judged),
        "per_problem": {m.id: a for m, a in zip(judged, per_problem, strict=True)},
    }


def finish(config: EvaluateThinking, run: Run, rows: list[dict[str, Any]]) -> None:
    """The table, the picture, and how much each budget adds to the one before it, problem by problem."""
    gains = []
    for label in config.models:
        of_model = [row for row in rows if row["model"] == label and row["limit"] is None]
        for before, after in pairwise(of_model):
            common = before["per_problem"].keys() & after["per_problem"].keys()
            differences = [after["per_problem"][i] - before["per_problem"][i] for i in sorted(common)]
            gain = dataclasses.asdict(difference(differences))
            gains.append({"model": label, "from": before["name"], "to": after["name"], **gain})
    for row in rows:
        del row["per_problem"]
    results = {
        "conditions": rows,
        "gains": gains,
        "models": {
            label: {"path": model.path, "weights": fingerprint(model.path)} for label, model in config.models.items()
        },
        "problems": config.problems,
        "sampling": config.rollout.model_dump(mode="json"),
        "forcing": config.forcing and config.forcing.model_dump(mode="json"),
        "seed": config.seed,
        "grader": VERSION,
        "commit": git_revision(),
    }
    write_json(run.folder / "results.json", results)
    table = thinking_table(results)
    (run.folder / "thinking.md").write_text(table + "\n", encoding="utf-8")
    draw_thinking(results, run.folder / "thinking.png")
    say(f"\n{table}\n\npicture: {run.folder / 'thinking.png'}")
    run.finish(conditions=rows, gains=gains)


if __name__ == "__main__":
    run_stage(EvaluateThinking, evaluate_thinking)
