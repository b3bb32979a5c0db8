"""The embedded task: little stories of gaining and losing things, long enough that thinking pays.

    On Monday Mia has 7 coins. On Tuesday she finds 5. On Wednesday she loses 3. On Thursday she doubles
    them. How many coins does she have?

    <think>
    On Tuesday she finds 5: 7 + 5 = 12
    On Wednesday she loses 3: 12 - 3 = 9
    On Thursday she doubles them: 9 * 2 = 18
    </think>
    \\boxed{18}

A problem of level n has n events. Answering at once asks a small model for all of them in one forward pass, which it cannot do;
writing the scratchpad needs one at a time. That gap is what reinforcement learning discovers.

Everything is a function of the seed. Train, validation and test are disjoint by construction: the split of a problem is a hash of
its numbers and events, so that a story is not even retold with another name and another thing in another split.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple

from data.chat import render_response
from data.records import Demonstration, LabelledSteps, PreferencePair, Prepared, Problem

Split = Literal["train", "validation", "test"]
Budget = Literal["off", "short", "long"]
Operator = Literal["+", "-", "*", "/"]

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SHE, HE = ("Ana", "Eve", "Fay", "Ida", "Mia", "Zoe"), ("Ben", "Cal", "Dan", "Gus", "Leo", "Tom")
ITEMS = ("coins", "books", "pens", "eggs", "cards", "shells")
GAINS = ("finds", "buys", "wins", "gets", "earns", "takes")
LOSSES = ("loses", "sells", "drops", "gives", "lends", "uses")
MULTIPLES: dict[tuple[Operator, int], str] = {("*", 2): "doubles", ("*", 3): "triples", ("/", 2): "halves"}
LARGEST = 20
SHORT = 3
"""Sums that a short scratchpad has room for."""


@dataclass(frozen=True, slots=True)
class Event:
    operator: Operator
    operand: int
    telling: str
    """As the story tells it: "On Tuesday she finds 5"."""

    def apply(self, value: int) -> int:
        match self.operator:
            case "+":
                return value + self.operand
            case "-":
                return value - self.operand
            case "*":
                return value * self.operand
            case "/":
                return value // self.operand

    def is_possible(self, value: int) -> bool:
        """Whether it leaves a whole number between 1 and LARGEST."""
        return 1 <= self.apply(value) <= LARGEST and (self.operator != "/" or value % self.operand == 0)


@dataclass(frozen=True, slots=True)
class Story:
    """A problem; `values[i]` is what there is after i events."""

    question: str
    start: int
    events: tuple[Event, ...]

    @property
    def level(self) -> int:
        return len(self.events)

    @property
    def values(self) -> list[int]:
        values = [self.start]
        for event in self.events:
            values.append(event.apply(values[-1]))
        return values

    @property
    def answer(self) -> str:
        return str(self.values[-1])

    def key(self) -> str:
        """The same for every telling of the same numbers and events."""
        plot = f"{self.start}" + "".join(f" {e.operator}{e.operand}" for e in self.events)
        return hashlib.sha256(plot.encode()).hexdigest()


def write_steps(events: tuple[Event, ...], values: list[int]) -> list[str]:
    """One line an event; `values` is what the scratchpad claims, right or wrong."""
    return [
        f"{event.telling}: {values[i]} {event.operator} {event.operand} = {values[i + 1]}"
        for i, event in enumerate(events)
    ]


def draw_event(rng: random.Random, value: int, *, day: str, pronoun: str, used: set[str]) -> Event:
    """A random event that is possible at `value`, told with a verb that is not `used` yet; its verb joins them."""
    while True:
        operator: Operator = rng.choice(("+", "+", "-", "-", "*", "/"))
        operand = {"*": rng.choice((2, 3)), "/": 2}.get(operator, rng.randint(2, 9))
        multiple = MULTIPLES.get((operator, operand)) if operator in "*/" else None
        verb = multiple or rng.choice(GAINS if operator == "+" else LOSSES)
        event = Event(operator, operand, f"On {day} {pronoun} {verb} {'them' if multiple else operand}")
        if verb not in used and event.is_possible(value):
            used.add(verb)
            return event


def draw_story(rng: random.Random, *, min_level: int, max_level: int) -> Story:
    """One random problem of a level in [min_level, max_level]."""
    people, pronoun = rng.choice(((SHE, "she"), (HE, "he")))
    item = rng.choice(ITEMS)
    start = value = rng.randint(2, 12)
    events: list[Event] = []
    used: set[str] = set()
    for day in DAYS[1 : 1 + rng.randint(min_level, max_level)]:
        events.append(draw_event(rng, value, day=day, pronoun=pronoun, used=used))
        value = events[-1].apply(value)
    told = [
        f"On {DAYS[0]} {rng.choice(people)} has {start} {item}",
        *(event.telling for event in events),
        f"How many {item} does {pronoun} have?",
    ]
    return Story(". ".join(told), start, tuple(events))


def split_of(key: str) -> Split:
    bucket = int(key[:8], 16) % 20
    return "test" if bucket < 2 else "validation" if bucket < 3 else "train"


def generate_stories(split: Split, *, seed: int, min_level: int, max_level: int) -> Iterator[Story]:
    """Endless distinct problems of one split; stops with an error when the task has no more to give."""
    rng = random.Random(f"{split}-{seed}")
    seen: set[str] = set()
    misses = 0
    while True:
        story = draw_story(rng, min_level=min_level, max_level=max_level)
        key = story.key()
        if key in seen or split_of(key) != split:
            misses += 1
            if misses > 20_000:
                raise ValueError(
                    f"levels {min_level}-{max_level} have no more than {len(seen)} {split} problems; raise max_level or ask for fewer"
                )
            continue
        misses = 0
        seen.add(key)
        yield story


def to_problem(story: Story, *, think: str = "") -> Problem:
    return Problem(
        id=f"story-{story.key()[:16]}", question=story.question, answer=story.answer, level=story.level, think=think
    )


def to_budgeted_demonstration(story: Story, think: Budget) -> Demonstration:
    """A demonstration that keeps to its thinking budget: no scratchpad, the first SHORT sums and the rest in the head, or every sum."""
    match think:
        case "off":
            lines = []
        case "short":
            lines = write_steps(story.events, story.values)[:SHORT]
        case "long":
            lines = write_steps(story.events, story.values)
    return Demonstration(
        id=f"story-{story.key()[:16]}",
        question=story.question,
        scratchpad="\n".join(lines),
        answer=story.answer,
        think=think,
    )


def to_demonstration(story: Story, *, answers_at_once: bool) -> Demonstration:
    scratchpad = "" if answers_at_once else "\n".join(write_steps(story.events, story.values))
    return Demonstration(
        id=f"story-{story.key()[:16]}", question=story.question, scratchpad=scratchpad, answer=story.answer
    )


Slip = Literal["result", "operand", "operator", "omission", "guess"]
GUESSES = 0.2
"""Share of the preference pairs whose rejected response answers at once, and wrong, as a policy of this task does."""


class Spoiled(NamedTuple):
    """A solution with one error, carried on to the end."""

    step: int
    """Index of the first wrong step."""
    steps: list[str]
    answer: str
    slip: Slip


def guess(rng: random.Random, story: Story) -> Spoiled:
    """No scratchpad, and a wrong answer not far from the right one."""
    right = story.values[-1]
    near = [n for n in range(max(1, right - 6), min(LARGEST, right + 6) + 1) if n != right]
    return Spoiled(0, [], str(rng.choice(near)), "guess")


def spoil(rng: random.Random, story: Story) -> Spoiled:
    """A worked solution with a wrong result, an operand misread from the story, the opposite operation, or a step left out."""
    while True:
        slip: Slip = rng.choice(("result", "operand", "operator", "omission"))
        step = rng.randrange(story.level - (slip == "omission"))  # an omitted last step would leave nothing to see
        events, offset = list(story.events), 0
        event = events[step]
        match slip:
            case "result":
                offset = rng.choice((-3, -2, -1, 1, 2, 3))
            case "operand" if event.operator in "+-":
                other = rng.choice([n for n in range(2, 10) if n != event.operand])
                events[step] = Event(event.operator, other, event.telling.replace(str(event.operand), str(other)))
            case "operator" if event.operator in "+-":
                events[step] = Event("-" if event.operator == "+" else "+", event.operand, event.telling)
            case "omission":
                del events[step]
            case _:
                continue
        values = [story.start]
        possible = True
        for i, event in enumerate(events):
            possible = possible and event.is_possible(values[-1])
            values.append(event.apply(values[-1]) + (offset if i == step else 0))
        if possible and all(1 <= value <= LARGEST for value in values) and values[-1] != story.values[-1]:
            return Spoiled(step, write_steps(tuple(events), values), str(values[-1]), slip)


def to_preference_pair(story: Story, rng: random.Random) -> PreferencePair:
    spoiled = guess(rng, story) if rng.random() < GUESSES else spoil(rng, story)
    return PreferencePair(
        id=f"story-{story.key()[:16]}",
        question=story.question,
        chosen=render_response("\n".join(write_steps(story.events, story.values)), story.answer),
        rejected=render_response("\n".join(spoiled.steps), spoiled.answer),
        error_step=spoiled.step,
        source=spoiled.slip,
    )


def to_labelled_steps(story: Story, rng: random.Random) -> LabelledSteps:
    """A scratchpad, every other one spoiled: the steps before the error are right, the error and all that builds on it is not."""
    wrong, steps = story.level, write_steps(story.events, story.values)
    if rng.random() < 0.5:
        wrong, steps, *_ = spoil(rng, story)
    labels = [i < wrong for i in range(len(steps))]
    return LabelledSteps(id=f"story-{story.key()[:16]}", question=story.question, steps=steps, labels=labels)


_SENTENCE = re.compile(r"On (\w+) \w+ (\w+) (\d+|them)")


def read_story(question: str) -> Story:
    """The story behind a question of this task.

    Raises:
        ValueError: when it is no such question.
    """
    first, *told = question.split(". ")[:-1]
    start = _SENTENCE.match(first)
    events = []
    for telling in told:
        match = _SENTENCE.fullmatch(telling)
        if match is None:
            raise ValueError(f"{telling!r:.80} is no sentence of the embedded task")
        verb, operand = match[2], match[3]
        multiple = next((pair for pair, word in MULTIPLES.items() if word == verb), None)
        operator, number = multiple or ("+" if verb in GAINS else "-", int(operand))
        events.append(Event(operator, number, telling))
    if start is None:
        raise ValueError(f"{question!r:.80} is no question of the embedded task")
    return Story(question, int(start[3]), tuple(events))


def judge_steps(story: Story, steps: Sequence[str]) -> list[bool]:
    """Whether each step of any scratchpad is right, the boxed answer among them; nothing is after the first that is not.

    What counts is its sum; another verb beside the right numbers does no harm.
    """
    sums = [_sum_of(step) for step in write_steps(story.events, story.values)]
    labels, right = [], True
    for i, step in enumerate(steps):
        right = right and (_sum_of(step) in sums[i : i + 1] or step.endswith(f"\\boxed{{{story.answer}}}"))
        labels.append(right)
    return labels


def _sum_of(step: str) -> str:
    """`5 + 6 = 11` of `On Tuesday she gets 6: 5 + 6 = 11`."""
    return step.rpartition(": ")[2]


def prepare(
    *,
    seed: int,
    min_level: int,
    max_level: int,
    answers_at_once: float,
    budgets: Mapping[Budget, float] = {},
    demonstrations: int,
    train_problems: int,
    test_problems: int,
    train_pairs: int,
    heldout_pairs: int,
) -> Prepared:
    """All records of the task; demonstrations, training problems and training pairs are different problems."""
    rng = random.Random(f"prepare-{seed}")
    train = generate_stories("train", seed=seed, min_level=min_level, max_level=max_level)
    test = generate_stories("test", seed=seed, min_level=min_level, max_level=max_level)
    drawn = random.Random(f"budgets-{seed}")

    def budget() -> Budget | Literal[""]:
        return drawn.choices(list(budgets), list(budgets.values()))[0] if budgets else ""

    def demonstrate(story: Story) -> Demonstration:
        think = budget()
        return (
            to_budgeted_demonstration(story, think)
            if think
            else to_demonstration(story, answers_at_once=rng.random() < answers_at_once)
        )

    return Prepared(
        demonstrations=[demonstrate(story) for story in islice(train, demonstrations)],
        train_problems=[to_problem(story, think=budget()) for story in islice(train, train_problems)],
        test_problems=[to_problem(story) for story in islice(test, test_problems)],
        train_pairs=[to_preference_pair(story, rng) for story in islice(train, train_pairs)],
        heldout_pairs=[to_preference_pair(story, rng) for story in islice(test, heldout_pairs)],
        labelled_steps=[to_labelled_steps(story, rng) for story in islice(train, train_pairs)],
        heldout_steps=[to_labelled_steps(story, rng) for story in islice(test, heldout_pairs)],
    )
