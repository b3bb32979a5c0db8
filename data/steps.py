"""Solutions whose steps are labelled: PRM800K, Math-Shepherd, ProcessBench, PRMBench, and the form of TRL's step data.

Labels become booleans by looking at the values the source defines, one by one. Anything else (-100, 1.0, "yes", a missing rating)
refuses the row or ends it before that step: a cast would have made it True.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data.records import LabelledSteps
from data.sources import Source, text

STEP_END = "ки"
"""What Math-Shepherd writes at the end of each step."""


def step_texts(row: Mapping[str, Any], name: str) -> list[str]:
    steps = row.get(name)
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
        raise ValueError(f"field {name!r} must be a list of texts, got {steps!r:.80}")
    return [step.strip() for step in steps]


# ------------------------------------------------------------------------------------------------------------------- PRM800K

RATINGS = {1: True, 0: True, -1: False}
"""Good, neutral and bad. Neutral counts as right, as in https://arxiv.org/abs/2305.20050, section 2.4."""


def rating_of(completion: Mapping[str, Any]) -> bool | None:
    """None where the labeller gave none.

    Raises:
        ValueError: for a rating that PRM800K does not have.
    """
    rating = completion.get("rating")
    if rating is None:
        return None
    if type(rating) is not int or rating not in RATINGS:
        raise ValueError(f"a rating must be -1, 0, 1 or null, got {rating!r:.40}")
    return RATINGS[rating]


def from_prm800k(row: Mapping[str, Any], key: str) -> list[LabelledSteps]:
    """The path the labeller followed, and one record for each alternative that was rated: the path up to it, then it.

    A step written by the labeller is right. The path ends where nothing was chosen, with the first completion that is rated there.

    Raises:
        ValueError: for problems marked as bad, beside rows that are malformed.
    """
    question, label = row.get("question"), row.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping) or not isinstance(label.get("steps"), list):
        raise ValueError("expected 'question' with 'problem' and 'label' with 'steps'")
    if label.get("finish_reason") == "bad_problem":
        raise ValueError("the labeller marked the problem as bad")
    problem = text(question, "problem")
    path: list[tuple[str, bool]] = []
    branches: list[list[tuple[str, bool]]] = []
    for step in label["steps"]:
        rated, chosen = _rated_completions(step)
        if chosen is None:
            branches = [[*path, completion] for completion in rated] + branches
            break
        branches.extend([*path, completion] for completion in rated if completion != chosen)
        path.append(chosen)
    if not branches or len(branches[0]) <= len(
        path
    ):  # it did not end with rated completions: the path is a record itself
        branches.insert(0, path)
    unique = [list(b) for b in dict.fromkeys(tuple(branch) for branch in branches if branch)]
    if not unique:
        raise ValueError("no step has a rating")
    return [
        LabelledSteps(
            id=f"{key}-{i}" if i else key,
            question=problem,
            steps=[said for said, _ in branch],
            labels=[right for _, right in branch],
        )
        for i, branch in enumerate(unique)
    ]


def _rated_completions(step: Any) -> tuple[list[tuple[str, bool]], tuple[str, bool] | None]:
    """(completions with a rating, the one that the path goes on with)."""
    if not isinstance(step, Mapping):
        raise ValueError(f"expected a step, got {step!r:.80}")
    completions = step.get("completions") or []
    if not isinstance(completions, list) or not all(isinstance(c, Mapping) for c in completions):
        raise ValueError(f"field 'completions' must be a list of objects, got {completions!r:.80}")
    ratings = [rating_of(completion) for completion in completions]
    rated = [(text(c, "text"), r) for c, r in zip(completions, ratings, strict=True) if r is not None]
    if (human := step.get("human_completion")) is not None:
        return rated, (text(human, "text"), True)
    index = step.get("chosen_completion")
    if index is None:
        return rated, None
    if type(index) is not int or not 0 <= index < len(completions):
        raise ValueError(f"chosen_completion is {index!r:.40}, but the step has {len(completions)} completions")
    rating = ratings[index]
    return rated, None if rating is None else (text(completions[index], "text"), rating)


# -------------------------------------------------------------------------------------------------------------- Math-Shepherd


def from_math_shepherd(row: Mapping[str, Any], key: str) -> list[LabelledSteps]:
    """`input` ends each step with ки; `label` is the same text with + (a rollout from here can be right) or - in its place."""
    written, labelled = text(row, "input"), text(row, "label")
    pieces = written.split(STEP_END)
    labels, position = [], 0
    for piece in pieces[:-1]:
        position += len(piece)
        mark = labelled[position : position + 1]
        if labelled[position - len(piece) : position] != piece or mark not in ("+", "-"):
            raise ValueError(
                f"'label' is not 'input' with + or - for each {STEP_END}: {labelled[position : position + 20]!r}"
            )
        labels.append(mark == "+")
        position += 1
    question, opening, first = pieces[0].partition("Step 1:")
    if not labels or not opening:
        raise ValueError(f"'input' has no 'Step 1:' or no {STEP_END}")
    steps = [opening + first, *pieces[1:-1]]
    return [LabelledSteps(id=key, question=text({"q": question}, "q"), steps=[s.strip() for s in steps], labels=labels)]


# ------------------------------------------------------------------------------------------------------ ProcessBench, PRMBench


def from_processbench(row: Mapping[str, Any], key: str) -> list[LabelledSteps]:
    """`label` is the index of the first wrong step, -1 where all are right; what builds on a wrong step is not right either."""
    steps, label = step_texts(row, "steps"), row.get("label")
    if type(label) is not int or not -1 <= label < len(steps):
        raise ValueError(f"field 'label' must be a whole number from -1 to {len(steps) - 1}, got {label!r:.40}")
    own = row.get("id")
    return [
        LabelledSteps(
            id=f"processbench-{own}" if isinstance(own, str) else key,
            question=text(row, "problem", "question"),
            steps=steps,
            labels=[label == -1 or i < label for i in range(len(steps))],
        )
    ]


def from_prmbench(row: Mapping[str, Any], key: str) -> list[LabelledSteps]:
    """`error_steps` (before classification: `hallucination_steps`) counts from 1 in `modified_process`; the other steps are right."""
    steps = step_texts(row, "modified_process")
    wrong = row.get("error_steps", row.get("hallucination_steps"))
    if not isinstance(wrong, list) or any(type(i) is not int or not 1 <= i <= len(steps) for i in wrong):
        raise ValueError(f"the error steps must be whole numbers from 1 to {len(steps)}, got {wrong!r:.80}")
    return [
        LabelledSteps(
            id=key,  # its own idx is not unique
            question=text(row, "modified_question", "question"),
            steps=steps,
            labels=[i not in wrong for i in range(1, len(steps) + 1)],
        )
    ]


def from_stepwise(row: Mapping[str, Any], key: str) -> list[LabelledSteps]:
    """TRL's stepwise supervision, `{prompt, completions, labels}`; only true and false are labels."""
    steps: Sequence[str] = step_texts(row, "completions" if "completions" in row else "steps")
    labels = row.get("labels")
    if not isinstance(labels, list) or any(type(label) is not bool for label in labels):
        raise ValueError(f"field 'labels' must be a list of bool, got {labels!r:.80}")
    return [LabelledSteps(id=key, question=text(row, "prompt", "question"), steps=list(steps), labels=labels)]


PRM800K = Source(
    name="prm800k",
    kind=LabelledSteps,
    convert=from_prm800k,
    licence="MIT",
    files={
        split: (f"phase2_{split}.jsonl", f"prm800k/data/phase2_{split}.jsonl", f"*phase*{split}*.json*")
        for split in ("train", "test")
    },
    note=": prm800k/data/phase2_train.jsonl and phase2_test.jsonl of openai/prm800k on GitHub (Git LFS)",
)
MATH_SHEPHERD = Source(
    name="math_shepherd",
    kind=LabelledSteps,
    convert=from_math_shepherd,
    licence="Apache-2.0",
    files={"train": ("math-shepherd.jsonl", "*.jsonl", "*.parquet")},
    repository="peiyi9979/Math-Shepherd",
)
PROCESSBENCH = Source(
    name="processbench",
    kind=LabelledSteps,
    convert=from_processbench,
    licence="Apache-2.0",
    files={
        split: (f"{split}.json", f"processbench_{split}.json", f"data/{split}-*.parquet")
        for split in ("gsm8k", "math", "olympiadbench", "omnimath")
    },
    repository="Qwen/ProcessBench",
    revision="3bdcd5371ed567559a78f559c01c13a6deee7604",
)
PRMBENCH = Source(
    name="prmbench",
    kind=LabelledSteps,
    convert=from_prmbench,
    licence="Apache-2.0",
    files={"test": ("prmtest_classified.jsonl", "target_data.jsonl", "prmbench_subset400.jsonl")},
    repository="hitsmy/PRMBench_Preview",
)
STEPWISE = Source(
    name="steps",
    kind=LabelledSteps,
    convert=from_stepwise,
    licence="as the file's owner states it",
    files={"train": ("*.jsonl", "*.parquet", "*.json")},
    note=" with the fields prompt, completions and labels",
)
