"""Where the steps of a completion are: one cut for training, for automatic labels and for live rollouts.

    <think>\\nOn Tuesday she finds 5: 7 + 5 = 12\\n</think>\\n\\\\boxed{12}        separator "\\n"

has two steps, `<think>\\nOn Tuesday she finds 5: 7 + 5 = 12` and `</think>\\n\\boxed{12}`: blank pieces and bare think tags belong to the
step after them, so that steps with the separator between them are what the policy wrote, and a completion that answers at once has one.

A process model reads a question and its steps, each tokenized by itself with the separator behind it, and judges a step at that last
token. So no token of what it reads lies in two steps, whatever the tokenizer merges, and a step reads the same as the last one of a
solution and in the middle of it. In the policy's own tokens a step ends with the token that holds its last character: that token may
hold the separator too, or the beginning of the next step, or all of a short one; two steps may then end in the same token.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

_NO_STEP = re.compile(r"(?:\s|</?think>)*")
"""White space and think tags."""


@dataclass(frozen=True, slots=True)
class Step:
    """A step of a completion that was sampled."""

    text: str
    position: int
    """Index, among the completion's tokens, of the one that holds its last character."""


def split_steps(text: str, separator: str) -> list[tuple[str, int]]:
    """(step, characters of `text` up to its end) for each step of a completion."""
    found, begin, offset = [], 0, 0
    for piece in text.split(separator):
        end = offset + len(piece.rstrip())
        offset += len(piece) + len(separator)
        if not _NO_STEP.fullmatch(piece):
            found.append((text[begin:end].lstrip(), end))
            begin = offset
    return found


def find_steps(token_ids: Sequence[int], text: str, tokenizer: Any, separator: str) -> list[Step]:
    """The steps of a completion, given as the policy's tokens, its stop token included or not.

    A completion that holds no step is one empty step, which ends where it does.

    Args:
        token_ids: [T] at least one.
        text: what the policy's side decoded them to.
        tokenizer: the policy's, a fast one.
        separator: what ends a step.

    Raises:
        ValueError: when the tokenizer reads the tokens as another text, and so is another one.
    """
    own = token_ids[:-1] if token_ids[-1] == tokenizer.eos_token_id else token_ids
    pieces = decode_pieces(own, tokenizer)
    read = "".join(pieces)
    if read != text.rstrip("\ufffd"):  # half a character at the end is no text yet
        raise ValueError(
            f"the process model's tokenizer reads a completion as {read!r:.80}, and the policy's as {text!r:.80}; a process model must have the "
            "tokenizer of the policy: train it from the same model"
        )
    ends = list(accumulate(map(len, pieces)))
    steps = [Step(step, bisect_left(ends, end)) for step, end in split_steps(read, separator)]
    return steps or [Step("", len(token_ids) - 1)]


def decode_pieces(token_ids: Sequence[int], tokenizer: Any) -> list[str]:
    """The text that each token completes; a character of several tokens belongs to its last one."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=False)
    return [stream.step(tokenizer.backend_tokenizer, token) or "" for token in token_ids]


def encode_steps(
    prompt_ids: Sequence[int], steps: Sequence[str], tokenizer: Any, *, separator: str, opening: str = ""
) -> tuple[list[int], list[int]]:
    """What a process model reads, and the index in it of each step's last token, where it judges.

    `opening` is what the policy writes before its first step, and is put there where a record does without: a language model that has
    never seen a step without it reads badly.
    """
    input_ids, ends = list(prompt_ids), []
    for i, step in enumerate(steps):
        before = opening if i == 0 and not step.startswith(opening) else ""
        input_ids += tokenizer.encode(before + step + separator, add_special_tokens=False)
        ends.append(len(input_ids) - 1)
    return input_ids, ends
