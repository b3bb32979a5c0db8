"""One answer out of several samples of a problem: reward models score the samples, and every way to choose is compared."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.chat import ChatRenderer
from rlhf.config import Chat, Evaluate, Selection
from rlhf.evaluation import GradedProblem
from rlhf.run import Run, say
from rlhf.selection import draw_selection, selection_table, summarise_selection
from rlhf.types import Rollout


def require_reward_models(selection: Selection) -> None:
    """Raise before anything is sampled when what is to choose is no reward model.

    Raises:
        ValueError: naming the key and the script that trains one.
    """
    from reward_models.outcome import STATISTICS
    from reward_models.process import DESCRIPTION
    from rlhf.models import check_model_path

    for key, path, beside, script in (
        ("outcome_model", selection.outcome_model, STATISTICS, "train_reward_model"),
        ("process_model", selection.process_model, DESCRIPTION, "train_process_reward_model"),
    ):
        if path is None:
            continue
        check_model_path(path, f"selection.{key}")
        if not (Path(path) / beside).is_file():
            raise ValueError(f"selection.{key} is {path}, which has no {beside}; train it with scripts/{script}.py")


def score_samples(problems: Sequence[GradedProblem], selection: Selection, chat: Chat) -> list[GradedProblem]:
    """The same samples with every reward model's scores, each model reading them through its own tokenizer and template.

    Where the engine told log-probabilities, the policy's own confidence is one of the scores: a reward model should beat it.
    """
    import torch

    from reward_models.outcome import OutcomeModel
    from reward_models.process import TOKENS_PER_BATCH, ProcessModel, aggregate
    from rlhf.models import load_tokenizer

    if any(not p.question for p in problems):
        raise ValueError("the kept samples have no questions, which a reward model must see; sample them again")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorers: dict[str, tuple[str, Callable[[Sequence[Rollout]], list[float]]]] = {}
    if selection.outcome_model is not None:
        outcome = OutcomeModel.load(selection.outcome_model, device=device)
        scorers["outcome model"] = (selection.outcome_model, outcome.chances(batch_size=selection.batch_size))
    if selection.process_model is not None:
        judge_steps = ProcessModel.load(selection.process_model, device=device).scorer(
            tokens_per_batch=TOKENS_PER_BATCH
        )

        def of_steps(rollouts: Sequence[Rollout]) -> list[float]:
            return [aggregate([step.value for step in steps], selection.aggregate) for steps in judge_steps(rollouts)]

        scorers["process model"] = (selection.process_model, of_steps)
    told = all(p.weights for p in problems)
    scores: list[dict[str, tuple[float, ...]]] = [{"confidence": p.weights} if told else {} for p in problems]
    for name, (path, score) in scorers.items():
        renderer = ChatRenderer(load_tokenizer(path), chat.system_prompt)
        prompts = [renderer.prompt(p.id, p.question, p.reference) for p in problems]
        values = iter(
            score(
                [
                    renderer.rollout(prompt, p.prefill + text, truncated=cut)
                    for prompt, p in zip(prompts, problems, strict=True)
                    for text, cut in zip(p.texts, p.truncated, strict=True)
                ]
            )
        )
        for of_problem, problem in zip(scores, problems, strict=True):
            of_problem[name] = tuple(next(values) for _ in problem.texts)
    return [dataclasses.replace(p, scores=s) for p, s in zip(problems, scores, strict=True)]


def choose(
    config: Evaluate, run: Run, graded: Mapping[str, list[GradedProblem]]
) -> tuple[dict[str, list[GradedProblem]], dict[str, Any]]:
    """(problems with their samples' scores, accuracy of every way to choose among them) of each model; a picture beside them."""
    assert config.selection is not None
    started = time.perf_counter()
    scored = {label: score_samples(problems, config.selection, config.chat) for label, problems in graded.items()}
    say(f"reward models scored all samples in {time.perf_counter() - started:.1f} s")
    selections = {
        label: summarise_selection(problems, ns=config.selection.ns, seed=config.seed)
        for label, problems in scored.items()
    }
    for label, selection in selections.items():
        say(f"\n{selection_table(label, selection)}")
    draw_selection(selections, run.folder / "selection.png")
    return scored, selections
