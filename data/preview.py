"""Records as a model will be trained on them: every token, coloured by whether the loss is on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.chat import ChatRenderer
from data.records import AnyRecord, Demonstration, LabelledSteps, PreferencePair

TRAINED, MASKED, WRONG, PLAIN = "\x1b[1;32m", "\x1b[2m", "\x1b[1;31m", "\x1b[0m"


@dataclass(frozen=True, slots=True)
class Part:
    """Token ids that are treated alike."""

    token_ids: Sequence[int]
    trained: bool
    good: bool = True
    """False for what the model learns to avoid, or a step labelled as wrong."""


def parts_of(record: AnyRecord, renderer: ChatRenderer) -> list[list[Part]]:
    """The sequences a record is trained as, each in parts; for a problem, the prompt that completions are sampled for."""
    if isinstance(record, Demonstration):
        prompt, response = renderer.demonstration_ids(record)
        return [[Part(prompt, False), Part(response, True)]]
    if isinstance(record, PreferencePair):
        prompt, chosen, rejected = renderer.pair_ids(record)
        return [[Part(prompt, False), Part(chosen, True)], [Part(prompt, False), Part(rejected, True, good=False)]]
    prompt = [Part(renderer.prompt_ids(record.question), False)]
    if isinstance(record, LabelledSteps):
        steps = zip(record.steps, record.labels, strict=True)
        encode = renderer.tokenizer.encode
        prompt += [Part(encode(f"{s}\n", add_special_tokens=False), True, good=right) for s, right in steps]
    return [prompt]


def show(parts: Sequence[Part], renderer: ChatRenderer, *, colour: bool) -> str:
    """One sequence as text: green where the loss is, red where it says to avoid, dim where nothing is learnt.

    Without colour the trained parts stand between `[+ … +]` or `[- … -]`. Special tokens are visible; control characters are shown, not obeyed.
    """
    shown = []
    for part in parts:
        text = renderer.tokenizer.decode(
            list(part.token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
        mark = "+" if part.good else "-"
        if not part.trained:
            shown.append(f"{MASKED}{text}{PLAIN}" if colour else text)
        elif colour:
            shown.append(f"{TRAINED if part.good else WRONG}{text}{PLAIN}")
        else:
            shown.append(f"[{mark}{text}{mark}]")
    trained, total = sum(len(p.token_ids) for p in parts if p.trained), sum(len(p.token_ids) for p in parts)
    return f"{''.join(shown)}\n({trained} of {total} tokens trained on)"
