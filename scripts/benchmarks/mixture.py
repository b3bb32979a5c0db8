"""The task mixture of scripts/benchmark_curriculum.py: stories that are too easy, too hard, or worth learning from.

easy         one event, demonstrated with a scratchpad only: right from the beginning
impossible   amounts in the hundreds, which no demonstration has: always wrong
learnable    three to five events: right with a scratchpad, wrong without one in nine of ten
"""

from __future__ import annotations

import dataclasses
import random
import re
from itertools import islice

from data.records import Demonstration, Problem
from data.stories import Story, draw_story, generate_stories, to_demonstration, to_problem

MIXTURE = {"easy": 280, "impossible": 80, "learnable": 40}
"""Training problems: 70 %, 20 %, 10 %."""
HELDOUT = 100
"""Unseen learnable problems that the policy is measured on."""
ANSWERS_AT_ONCE = {"easy": 0.0, "learnable": 0.6}
EASY_DEMONSTRATIONS = 0.35
SFT_DEMONSTRATIONS = 6400


def easy(rng: random.Random) -> Story:
    return draw_story(rng, min_level=1, max_level=1)


def impossible(problem: Problem, rng: random.Random) -> Problem:
    """The same story with hundreds more at its start, and so at its end."""
    more = 100 * rng.randint(2, 8)
    question = re.sub(r"has (\d+)", lambda found: f"has {int(found[1]) + more}", problem.question, count=1)
    answer = f"{int(problem.answer) + more}"
    return dataclasses.replace(problem, id=f"{problem.id}-hundreds", question=question, answer=answer)


def demonstrations(seed: int = 0) -> list[Demonstration]:
    """What the policy learns before: one event, and three to five, with and without a scratchpad."""
    rng = random.Random(f"mixture-sft-{seed}")
    learnable = generate_stories("train", seed=seed, min_level=3, max_level=5)
    found = []
    for number in range(SFT_DEMONSTRATIONS):
        kind = "easy" if rng.random() < EASY_DEMONSTRATIONS else "learnable"
        story = easy(rng) if kind == "easy" else next(learnable)
        demonstration = to_demonstration(story, answers_at_once=rng.random() < ANSWERS_AT_ONCE[kind])
        found.append(dataclasses.replace(demonstration, id=f"{demonstration.id}-{number}"))
    return found


def training_problems(seed: int = 0) -> list[Problem]:
    """The mixture, shuffled; `subject` says which kind a problem is, for the report only."""
    rng = random.Random(f"mixture-{seed}")
    # behind the stories of the demonstrations, so that no problem was one
    stories = islice(generate_stories("train", seed=seed, min_level=3, max_level=5), SFT_DEMONSTRATIONS, None)
    of_kind = {
        "easy": lambda: to_problem(easy(rng)),
        "learnable": lambda: to_problem(next(stories)),
        "impossible": lambda: impossible(to_problem(next(stories)), rng),
    }
    problems = [
        dataclasses.replace(problem, id=f"{kind}-{number}", subject=kind)
        for kind, count in MIXTURE.items()
        for number, problem in enumerate(of_kind[kind]() for _ in range(count))
    ]
    rng.shuffle(problems)
    return problems


def heldout_problems(seed: int = 0) -> list[Problem]:
    stories = generate_stories("test", seed=seed, min_level=3, max_level=5)
    return [to_problem(story) for story in islice(stories, HELDOUT)]
