"""Which part of a completion is its answer. Every search is linear in the length of the text, whatever is in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Accept = Literal["boxed", "marked", "bare", "last_number"]
"""How plainly a completion must say what its answer is; each step takes what the ones before it take.

boxed        `\\boxed{}`, `\\fbox{}` or `<answer>` after the thoughts: what training and evaluation ask for.
marked       also `#### 7`, `the final answer is 7`, `Answer: 7`.
bare         also a text of one line that is the answer, or ends in its only piece of mathematics.
last_number  also the last number of whatever was written. It rewards truncated completions: declare it knowingly.
"""
ACCEPT: tuple[Accept, ...] = ("boxed", "marked", "bare", "last_number")

MAX_LENGTH = 200_000
"""Characters looked at, from the end; a completion may be hostile."""
MAX_SENTENCE = 600
"""Characters after a marker, or of a bare text."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s{0,3}(?=[{\d])")
_HASHES = re.compile(r"####[ \t]*([^\n]*?[\d\\$][^\n]{0,300})")
_MARKER = re.compile(
    r"(?:final\s+answer|\banswer(?:\s+to\s+(?:this|the)\s+(?:question|problem))?)\b[*_ \t]{0,4}(?:\n{0,2}(?:is\b|[:=])[*_ \t]{0,4}){1,2}(?:that\b)?"
    r"|final answer\**[ \t]*\n+"
    r"|\banswer\s+(?=\\\(|\$)|(?:^|\n)[ \t]*A:",
    re.IGNORECASE,
)
_IS_ANSWER = re.compile(r"([^\n.]{1,200})\s+is\s+(?:our|the|my)\s+(?:final\s+)?answer\b", re.IGNORECASE)
_MATH = re.compile(
    r"\$\$((?:[^$\\]|\\.){1,600})\$\$|(?<!\\)\$((?:[^$\\]|\\.){1,600})\$|\\\((.{1,600}?)\\\)|\\\[(.{1,600}?)\\\]",
    re.DOTALL,
)
_SENTENCE_END = re.compile(
    r"\n|[.!?](?=\s+[A-Z<]|\s*$)|<\|im_|</s>|(?<!\d),(?=\s+(?:as|which means|so)\b)|,?\s(?=(?:since|because)\b)"
)
_GAP = r"(?:[\s$.]|\\[()\[\]]|\\q?quad)*"
_JOINS = re.compile(
    rf"{_GAP}(?:,|,?\s*\b(?:and|or)\b|,?\s*\\text\{{\s*(?:and|or)\s*\}})(?:{_GAP}[a-zA-Z]_?\{{?\d?\}}?\s*=)?{_GAP}"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_DIGITS = re.compile(r"\d+")
_PLACEHOLDER = re.compile(r"\s*(?:\.{2,}|\\[lc]?dots|(?:your |final )?answer|result)?\s*", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![\w:.])[-−]?\$?\d[\d,]*(?:\.\d+)?(?:\s?/\s?\d+)?%?(?![\w])")
_PLACES = re.compile(r"[€£$¥%°²³]|(?:cm|mm|km|m|kg|g|ml)\b[²³]?")
_FINAL_NUMBER = re.compile(
    r"(?<![\w.,/^:*+=])(?<![-+*/^=:]\s)([-−]?\$?\d[\d,]*(?:\.\d+|/\d+)?%?)\s?(?:[€£$¥°]|[a-zA-Z]{1,10}[²³]?)?[.!]?$"
)
_SIGNED = re.compile(r"[=$:(][^\S\n]*[-−]\s*\\?$")
"""What stands before `-\\boxed{7}`."""
_VAGUE = re.compile(r"(?:between|at least|at most|less|more|greater|fewer|either|over|under)\b", re.IGNORECASE)
_DENIES = re.compile(r"\s*(?:not\b|neither\b|n't\b|unknown\b|unclear\b|never\b)", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Extracted:
    """The answer and the rule that found it; `answer` is None where there is none."""

    answer: str | None
    rule: str


def extract(completion: str, accept: Accept = "boxed") -> Extracted:
    """The answer of a completion: of explicit ones the last, after the thoughts only."""
    text = completion[-MAX_LENGTH:]
    opened, closed = text.rfind("<think>"), text.rfind("</think>")
    if closed >= 0:
        text = text[closed + len("</think>") :]
    elif opened >= 0:
        return Extracted(None, "still_thinking")
    explicit = [found for found in (_last_box(text), _last_tag(text)) if found is not None]
    if explicit:
        return max(explicit)[1]
    level = ACCEPT.index(accept)
    if level >= 1 and (found := _marked(text)) is not None:
        return found
    if level >= 2 and (found := _bare(text)) is not None:
        return found
    if level >= 3 and (numbers := _NUMBER.findall(text)):
        return Extracted(numbers[-1], "last_number")
    return Extracted(None, "no_answer")


def reference_answer(reference: str) -> str:
    """The answer inside a reference, which may be one, or a sentence or a whole solution that boxes or marks it."""
    found = _last_box(reference, reference=True)
    if found is not None:
        return found[1].answer or ""
    if len(reference) > 40 or re.match(r"(?i)\s*the (?:final )?answer", reference):
        marked = _marked(reference)
        if marked is not None and marked.answer:
            return marked.answer
    return reference


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of every closed box that is not inside another, in order, braces nested as they come.

    One pass with a stack of open braces, so a box that never closes costs nothing and hides none that follows it.
    """
    starts = {match.end(): match.start() for match in _BOX.finditer(text)}
    found: list[tuple[int, int, str]] = []
    for place, start in starts.items():
        if text[place] != "{":
            digits = _DIGITS.match(text, place)
            assert digits is not None
            found.append((start, digits.end(), digits.group()))
    stack: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace.group() == "{":
            stack.append(brace.start())
        elif brace.group() == "}" and stack:
            opened = stack.pop()
            if opened in starts:
                found.append((starts[opened], brace.end(), text[opened + 1 : brace.start()]))
    outermost: list[tuple[int, int, str]] = []
    for box in sorted(found, key=lambda box: (box[0], -box[1])):
        if not outermost or box[0] >= outermost[-1][1]:
            outermost.append(box)
    return outermost


def _last_box(text: str, *, reference: bool = False) -> tuple[int, Extracted] | None:
    """The last box that holds something, with those that it continues: `\\boxed{2} and \\boxed{3}` is one answer of two parts.

    In a reference a few words may stand between the parts.
    """
    closed = boxes(text)
    found = [box for box in closed if not _PLACEHOLDER.fullmatch(box[2])] or closed
    if not found:
        return None
    parts = [found[-1]]
    for box in reversed(found[:-1]):
        between = text[box[1] : parts[0][0]]
        loosely = (
            reference
            and len(between) <= 40
            and re.search(r",|\band\b|\bor\b", between)
            and not re.search(r"=|\.\s", between)
        )
        if len(between) > 60 or not (loosely or _JOINS.fullmatch(between)):
            break
        parts.insert(0, box)
    contents = list(dict.fromkeys(part[2] for part in parts))
    if len(parts) == 1 and _SIGNED.search(text[max(0, parts[0][0] - 12) : parts[0][0]]):
        contents = ["-" + contents[0]]
    answer = ", ".join(contents)
    inner = boxes(answer) if len(contents) == 1 else []  # \\boxed{\\boxed{7}}
    return found[-1][0], Extracted(inner[-1][2] if inner else answer, "boxed")


def _last_tag(text: str) -> tuple[int, Extracted] | None:
    lowered = text.lower()
    end = lowered.rfind("</answer>")
    start = lowered.rfind("<answer>", 0, end) if end >= 0 else -1
    if start < 0 or end - start > 5_000:
        return None
    content = text[start + len("<answer>") : end].strip()
    inner = _last_box(content)
    return start, Extracted(content if inner is None else inner[1].answer, "answer_tag")


def _marked(text: str) -> Extracted | None:
    hashes = _HASHES.findall(text)
    if hashes:
        return Extracted(hashes[-1].strip(), "hashes")
    markers = list(_MARKER.finditer(text))
    if not markers:
        said = _IS_ANSWER.findall(text[-MAX_SENTENCE:])
        return Extracted(_core(said[-1]), "marker") if said else None
    for marker in reversed(markers):
        after = text[marker.end() : marker.end() + MAX_SENTENCE].lstrip(" \t*:\n")
        if not after:
            continue
        if _DENIES.match(after):
            return Extracted(None, "answer_denied")
        return Extracted(_core(sentence(after)), "marker")
    return None


def sentence(text: str) -> str:
    """The text up to the end of its first sentence; mathematics is not cut."""
    protected = _MATH.sub(lambda m: "\x01" * len(m.group()), text)
    end = _SENTENCE_END.search(protected)
    return text[: end.start()] if end else text


def _core(said: str) -> str:
    """The answer within a sentence: the sentence itself where it is short, its mathematics, else the number it is about."""
    said = said.strip().strip("*").strip()
    pieces = [next(g for g in m.groups() if g is not None) for m in _MATH.finditer(said)]
    outside = _MATH.sub(" ", said).strip(" .,:")
    tail = said[max((m.end() for m in _MATH.finditer(said)), default=0) :]
    stated = re.search(r"\b(?:is|are|was|equals)\s+(?=[-−$\d])", tail)
    if pieces and stated and (after := _NUMBER.match(tail, stated.end())):  # "the coefficient of $x$ is 15"
        return after.group()
    if _VAGUE.match(said):
        return said
    if pieces:
        joined = re.fullmatch(r"(?:\s|,|and|or|\.)*", outside)
        return ", ".join(pieces) if joined and len(pieces) > 1 and re.search(r",|and|or", outside) else pieces[-1]
    if len(said.split()) <= 2 or not re.search(r"[A-Za-z]{3,}", said):
        return said
    numbers = [m for m in _NUMBER.finditer(_PLACES.sub(lambda m: m.group()[0] if m.group()[0] in "$%" else " ", said))]
    if not numbers:
        return said
    if numbers[0].start() == 0:
        return said if len(numbers) == 1 and len(said) < 40 else numbers[0].group()
    restated = re.search(r"\b(?:which|that) (?:is|makes|equals|means)\s[^,;]*$|=[^=]*$", said)
    after = [n for n in numbers if restated is not None and n.start() > restated.start()]
    return (after or numbers)[0].group()  # "it takes 9 minutes to blink 459 times"


def _bare(text: str) -> Extracted | None:
    line = re.split(r"<\|im_|</s>", text, maxsplit=1)[0].strip()
    if not line or len(line) > MAX_SENTENCE or "\n\n" in line:
        return None
    pieces = [next(g for g in m.groups() if g is not None) for m in _MATH.finditer(line)]
    outside = _MATH.sub(" ", line)
    if pieces and re.search(r"[A-Za-z]{2,}", outside) and len(outside.split()) > 2 and "$" not in outside:
        return Extracted(pieces[-1], "bare_mathematics")
    if not pieces and len(line.split()) > 2 and " or " not in line and (ending := _FINAL_NUMBER.search(line)):
        return Extracted(ending.group(1), "bare_number")
    return Extracted(line, "bare")
