"""The same problems told differently: reworded, with other numbers, with a sentence that does not matter, with typos.

A model that reasons does not care; one that remembers does (https://arxiv.org/abs/2410.05229). Every variant keeps what the problem
asks, so its reference is the original's, except with other numbers, where it is computed again: from the story itself in the embedded
task, from the `<<a*b=c>>` calculator marks of a worked solution in GSM8K, and only where both reproduce the original's answer first.
Everything is a function of the seed and the problem's id.
"""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from data.records import Problem
from data.stories import GAINS, HE, ITEMS, LARGEST, LOSSES, MULTIPLES, SHE, Event, Operator, Story, split_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A problem, with how it was changed and from which one."""

    kind: str
    origin: str
    problem: Problem


def perturb(problems: Sequence[Problem], kinds: Sequence[str], *, seed: int) -> list[Variant]:
    """Every variant that each problem has of each kind; a kind that cannot be made of a problem is left out.

    Raises:
        ValueError: for an unknown kind.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(f"unknown perturbation {kind!r}; known: {', '.join(KINDS)}")
    variants = []
    for kind in kinds:
        for problem in problems:
            changed = KINDS[kind](problem, random.Random(f"{seed}-{kind}-{problem.id}"))
            if changed is not None:
                named = dataclasses.replace(changed, id=f"{problem.id}~{kind}")
                variants.append(Variant(kind=kind, origin=problem.id, problem=named))
    return variants


# ------------------------------------------------------------------------------------------------------------------- text at all

# A dollar sign before a digit opens a sum of money, so it closes no formula.
_MATHEMATICS = re.compile(
    r"\$\$.*?\$\$|\$[^$]+\$(?!\d)|\\\[.*?\\\]|\\\(.*?\\\)|\[asy\].*?\[/asy\]|\\begin\{.*?\\end\{\w+\*?\}", re.DOTALL
)


def _outside_mathematics(text: str, change: Callable[[str], str]) -> str:
    """`change` applied to the prose between formulas."""
    parts, position = [], 0
    for formula in _MATHEMATICS.finditer(text):
        parts += [change(text[position : formula.start()]), formula[0]]
        position = formula.end()
    return "".join([*parts, change(text[position:])])


def _last_sentence(text: str) -> int:
    """Where the last sentence of a text starts: 0 when there is only one, or formulas make it hard to tell."""
    if "\\" in text or _MATHEMATICS.search(text):
        return 0
    starts = [m.end() for m in re.finditer(r"(?<!Mr)(?<!Mrs)(?<!Ms)(?<!Dr)(?<!St)(?<! [A-Z])[.!?]\s+(?=[A-Z])", text)]
    return starts[-1] if starts else 0


# --------------------------------------------------------------------------------------------------------------------- reworded

_SYNONYMS = (
    (r"\bHow many\b", "What number of"),
    (r"\bhow many\b", "what number of"),
    (r"\bHow long\b", "How much time"),
    (r"\bHow much money\b", "What amount of money"),
    (r"\bhow much money\b", "what amount of money"),
    (r"\bFind\b", "Determine"),
    (r"\bCompute\b", "Calculate"),
    (r"\bEvaluate\b", "Work out"),
    (r"\bSuppose\b", "Assume"),
    (r"\bIn total, ", "Altogether, "),
    (r"\bin total\b", "altogether"),
    (r"\bbuys\b", "purchases"),
    (r"\bbought\b", "purchased"),
    (r"\breceives\b", "gets"),
    (r"\bneeds to\b", "has to"),
    (r"\bstarts with\b", "begins with"),
    (r"\bExpress your answer\b", "Give your answer"),
)
_FRAMES = (
    "Here is a problem. {}",
    "Read this carefully. {}",
    "{} Work it out.",
    "Please solve the following. {}",
)


def reword(problem: Problem, rng: random.Random) -> Problem:
    """Other words for the same: the embedded task with other names, things and verbs, other problems with synonyms and a frame."""
    story = read_story(problem)
    if story is not None:
        return dataclasses.replace(problem, question=_retell(problem.question, story, rng))

    def replace(prose: str) -> str:
        for pattern, other in _SYNONYMS:
            prose = re.sub(pattern, other, prose)
        return prose

    return dataclasses.replace(
        problem, question=rng.choice(_FRAMES).format(_outside_mathematics(problem.question, replace))
    )


def _retell(question: str, story: Story, rng: random.Random) -> str:
    """A story with another name, thing and verbs of the same meaning, none of them twice."""
    name = next(n for n in (*SHE, *HE) if f" {n} has" in question)
    item = next(i for i in ITEMS if f" {i}" in question)
    told = question.replace(f" {name} ", f" {rng.choice([n for n in (SHE if name in SHE else HE) if n != name])} ")
    told = told.replace(f" {item}", f" {rng.choice([i for i in ITEMS if i != item])}")
    swaps: dict[str, str] = {}
    for verbs, operator in ((GAINS, "+"), (LOSSES, "-")):
        used = [e.telling.split()[3] for e in story.events if e.operator == operator]
        swaps |= dict(zip(used, rng.sample(verbs, len(used)), strict=True))
    return re.sub(r"\b(s?he) (\w+)", lambda m: f"{m[1]} {swaps.get(m[2], m[2])}", told)


# ---------------------------------------------------------------------------------------------------------------------- numbers


def read_story(problem: Problem) -> Story | None:
    """The embedded task's story behind a question; None when it is no such story or its answer is not the reference."""
    start = re.match(r"On Monday \w+ has (\d+) \w+\. ", problem.question)
    tellings = re.findall(r"On \w+ s?he \w+ (?:\d+|them)", problem.question)
    if start is None or not tellings:
        return None
    multiples = {verb: key for key, verb in MULTIPLES.items()}
    events = []
    for telling in tellings:
        verb, operand = telling.split()[3:5]
        operator: Operator
        if verb in multiples and operand == "them":
            operator, number = multiples[verb]  # type: ignore[assignment]
        elif operand != "them" and verb in (*GAINS, *LOSSES):
            operator, number = "+" if verb in GAINS else "-", int(operand)
        else:
            return None
        events.append(Event(operator, number, telling))
    story = Story(problem.question, int(start[1]), tuple(events))
    told = [problem.question.split(". ")[0], *tellings, problem.question.split(". ")[-1]]
    return story if ". ".join(told) == problem.question and story.answer == problem.answer else None


def change_numbers(problem: Problem, rng: random.Random) -> Problem | None:
    """The problem with other numbers and the answer they lead to; None where that answer cannot be known."""
    story = read_story(problem)
    if story is not None:
        return _change_story(problem, story, rng)
    return _change_annotated(problem, rng) if "<<" in problem.solution else None


def _change_story(problem: Problem, story: Story, rng: random.Random) -> Problem | None:
    """Other numbers that stay in range, lead elsewhere, and belong to the same split, so that no training problem comes out."""
    for _ in range(1000):
        start = value = rng.randint(2, min(12, LARGEST))
        events = []
        for event in story.events:
            operand = rng.randint(2, 9) if event.operator in "+-" else event.operand
            telling = (
                event.telling.replace(str(event.operand), str(operand)) if event.operator in "+-" else event.telling
            )
            events.append(Event(event.operator, operand, telling))
            if not events[-1].is_possible(value):
                break
            value = events[-1].apply(value)
        else:
            changed = Story("", start, tuple(events))
            if changed.answer != story.answer and split_of(changed.key()) == split_of(story.key()):
                question = problem.question.replace(f" has {story.start} ", f" has {start} ")
                for old, new in zip(story.events, events, strict=True):
                    question = question.replace(old.telling, new.telling)
                return dataclasses.replace(problem, question=question, answer=changed.answer, solution="")
    return None


_MARK = re.compile(r"<<([^<>=]+)=([^<>=]+)>>")
_NUMBER = re.compile(r"\d+(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+")
_WORDS = {
    1: "one once single a",
    2: "two twice half double doubled doubles pair couple both second",
    3: "three triple tripled thrice third yard yards",
    4: "four quarter quarters fourth",
    5: "five fifth nickel nickels",
    6: "six sixth",
    7: "seven week weeks weekly daily",
    8: "eight eighth",
    9: "nine",
    11: "eleven",
    15: "fifteen quarter",
    16: "sixteen pound pounds ounce ounces",
    20: "twenty score",
    25: "quarter quarters",
    28: "february",
    31: "month months",
    36: "yard yards",
    40: "forty",
    50: "fifty half",
    52: "year years yearly weekly",
    90: "ninety",
}
"""Numbers that a solution may mean without the question writing them in digits."""
_CONSTANTS = {1, 2, 10, 12, 24, 30, 60, 100, 360, 365, 1000}
"""Never changed: dozens, hours, per cent and the like are not told from counts."""


def calculate(expression: str) -> Fraction:
    """The exact value of an arithmetic expression of numbers, + - * / ( ) and a trailing %; nothing is evaluated as code.

    Raises:
        ValueError: for anything else, and for a division by zero.
    """
    tokens = re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?|\.\d+|[-+*/()%]", expression.replace(" ", ""))
    if "".join(tokens) != expression.replace(" ", "") or len(tokens) > 100:
        raise ValueError(f"{expression!r:.80} is not plain arithmetic")
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def take() -> str:
        nonlocal position
        position += 1
        return tokens[position - 1] if position <= len(tokens) else ""

    def atom() -> Fraction:
        symbol = take()
        if symbol == "-":
            return -atom()
        if symbol == "(":
            value = total()
            if take() != ")":
                raise ValueError(f"{expression!r:.80} is not plain arithmetic")
        elif symbol and symbol not in "+*/)%":
            value = Fraction(symbol.replace(",", ""))
        else:
            raise ValueError(f"{expression!r:.80} is not plain arithmetic")
        while peek() == "%":
            take()
            value /= 100
        return value

    def product() -> Fraction:
        value = atom()
        while peek() in ("*", "/"):
            divide, other = take() == "/", atom()
            if divide and not other:
                raise ValueError(f"{expression!r:.80} divides by zero")
            value = value / other if divide else value * other
        return value

    def total() -> Fraction:
        value = product()
        while peek() in ("+", "-"):
            value = value + product() if take() == "+" else value - product()
        return value

    result = total()
    if position != len(tokens):
        raise ValueError(f"{expression!r:.80} is not plain arithmetic")
    return result


def _show(value: Fraction) -> str | None:
    """A positive number as people write it, None when it needs more than two decimals or is not positive."""
    if value <= 0 or value > 10**7 or (value * 100).denominator != 1:
        return None
    return str(value) if value.denominator == 1 else f"{float(value):.2f}".rstrip("0")


def changeable(problem: Problem) -> list[Fraction]:
    """Whole numbers of an annotated question that its solution uses and that nothing else in it can be mistaken for.

    Empty unless every mark is right, every result in the solution carries one, and the last is the reference.
    """
    marks = _MARK.findall(problem.solution)
    try:
        steps = [(calculate(left), calculate(right)) for left, right in marks]
        reference = calculate(problem.answer)
    except ValueError:
        return []
    without_marks = re.sub(r"<<[^<>]*>>\s*\$?[\d.,]+", "", problem.solution.split("####")[0])
    if (
        not steps
        or any(a != b for a, b in steps)
        or steps[-1][1] != reference
        or re.search(r"=\s*\$?\d", without_marks)
    ):
        return []
    results = {result for _, result in steps}
    operands = [calculate(n) for left, _ in marks for n in _NUMBER.findall(left)]
    told = [calculate(n[0]) for n in _NUMBER.finditer(problem.question)]
    words = set(re.findall(r"[a-z]+", problem.question.lower()))
    chosen = []
    for match in _NUMBER.finditer(problem.question):
        before, after = problem.question[: match.start()][-1:], problem.question[match.end() :][:2]
        value = calculate(match[0])
        alone = not before or before in " $("
        alone = alone and not re.match(r"[%/:\w]|-\d|[.,]\d| %", after) and after[:1] not in "-"
        if (
            alone
            and value.denominator == 1
            and value not in _CONSTANTS
            and told.count(value) == 1
            and value in operands
            and value not in results
            and not words & set(_WORDS.get(int(value), "").split())
        ):
            chosen.append(value)
    return chosen


def _recompute(
    marks: Sequence[tuple[str, str]], changes: dict[Fraction, Fraction], told: set[Fraction]
) -> Fraction | None:
    """The last result with some numbers changed; None when a result stops being such a number, or a number could mean two things."""
    new_results: dict[Fraction, Fraction] = {}
    value = Fraction(0)
    for left, right in marks:
        ambiguous = False

        def replace(match: re.Match[str]) -> str:
            nonlocal ambiguous
            number = calculate(match[0])
            if number in changes:
                return str(changes[number])
            if number in new_results and new_results[number] != number:
                ambiguous = ambiguous or number in told
                return f"({new_results[number]})"
            return match[0]

        try:
            value = calculate(_NUMBER.sub(replace, left))
        except ValueError:
            return None
        old = calculate(right)
        if ambiguous or _show(value) is None or (old.denominator == 1 and value.denominator != 1):
            return None
        if new_results.get(old, value) != value:
            return None  # two steps had the same result, and now they have not
        new_results[old] = value
    return value


def _change_annotated(problem: Problem, rng: random.Random) -> Problem | None:
    """Other numbers in a question, followed through the calculator marks of its solution to the new answer."""
    marks, values = _MARK.findall(problem.solution), changeable(problem)
    told = {calculate(n) for n in _NUMBER.findall(problem.question)}
    reference = calculate(problem.answer) if values else Fraction(0)
    attempts = [values] * 30 + [[value] for value in values for _ in range(10)]
    for chosen in attempts if values else []:
        changes = {v: Fraction(rng.randint(max(3, int(v) // 2), max(5, int(v) * 2))) for v in chosen}
        fresh = set(changes.values())
        if any(v == w for v, w in changes.items()) or len(fresh) < len(changes) or fresh & told:
            continue
        answer = _recompute(marks, changes, told)
        if answer is None or answer == reference:
            continue

        def renumber(match: re.Match[str], changes: dict[Fraction, Fraction] = changes) -> str:
            number = calculate(match[0])
            return (
                f"{int(changes[number]):,}"
                if number in changes and "," in match[0]
                else str(changes.get(number, match[0]))
            )

        question = _NUMBER.sub(renumber, problem.question)
        return dataclasses.replace(problem, question=question, answer=str(_show(answer)), solution="")
    return None


# ------------------------------------------------------------------------------------------------------- distraction and typos

_ASIDES = (
    "A poster on the wall says that the museum opens at {} o'clock.",
    "The bus that goes by outside is number {}.",
    "A neighbor's bicycle has {} stickers on it.",
    "The page of the newspaper on the table is page {}.",
    "It was {} degrees outside.",
)


def distract(problem: Problem, rng: random.Random) -> Problem:
    """A sentence with a number that has nothing to do with the question, put before the question itself."""
    aside = rng.choice(_ASIDES).format(rng.randint(3, 19))
    at = _last_sentence(problem.question)
    return dataclasses.replace(problem, question=f"{problem.question[:at]}{aside} {problem.question[at:]}")


def misspell(problem: Problem, rng: random.Random) -> Problem | None:
    """Two neighbouring letters swapped inside about one word in six; numbers, formulas, names and the answer's words stay."""
    spared = {w for words in _WORDS.values() for w in words.split()} | set(re.findall(r"\w+", problem.answer.lower()))

    def is_spared(word: re.Match[str]) -> bool:
        sentence_start = word.start() == 0 or word.string[: word.start()].rstrip()[-1:] in (".", "?", "!")
        return word[0].lower() in spared or (word[0][0].isupper() and not sentence_start)

    def swap(word: re.Match[str], share: float) -> str:
        text = word[0]
        inner = [i for i in range(1, len(text) - 2) if text[i] != text[i + 1]]
        if not inner or is_spared(word) or rng.random() > share:
            return text
        i = rng.choice(inner)
        return text[:i] + text[i + 1] + text[i] + text[i + 2 :]

    def misspelt(share: float) -> str:
        words = re.compile(r"(?<![\\\w{])[A-Za-z]{4,}(?![\w}])")
        return _outside_mathematics(problem.question, lambda prose: words.sub(lambda word: swap(word, share), prose))

    for question in (misspelt(1 / 6), misspelt(1.0)):  # a short question gets at least one
        if question != problem.question:
            return dataclasses.replace(problem, question=question)
    return None


KINDS: dict[str, Callable[[Problem, random.Random], Problem | None]] = {
    "reworded": reword,
    "numbers": change_numbers,
    "distraction": distract,
    "typos": misspell,
}
