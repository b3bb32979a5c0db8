"""A byte-level BPE trained on our own text: any string survives a round trip, digits stay single tokens."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data.chat import CHATML, THINK_CLOSE, THINK_OPEN

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer of at most `vocab_size` tokens with ChatML markers and `<think>` tags.

    The pad token is not the end-of-sequence token: masking one must never mask the other.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r" ?\d"), "isolated"
            ),  # one digit a token, so that numbers are written place by place
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    roles = ["user", "assistant", "system"] * 1000  # as frequent as they are in rendered conversations
    tokenizer.train_from_iterator([*texts, *roles], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side="right")
    # Ordinary tokens, not special ones: they are what the policy writes, and decoding keeps them.
    fast.add_tokens([THINK_OPEN, THINK_CLOSE])
    fast.chat_template = CHATML
    return fast
