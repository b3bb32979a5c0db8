"""Rollouts that look like those of known tasks, their file, and the arithmetic of the work they hold."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.config import Architecture

VOCABULARY = 16384
PAD, EOS = 0, 1
FIRST_WORD = 4
"""Token ids below it are special."""

MODEL = Architecture(
    hidden_size=512, intermediate_size=1536, num_layers=8, num_heads=8, num_kv_heads=4, head_dim=64, max_positions=8192
)
TINY_MODEL = Architecture(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=8192
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Lengths of a rollout batch. Completions are log-normal, cut at `longest`; prompts are uniform around their mean."""

    prompts: int
    samples: int
    prompt: int
    """Mean tokens of a prompt."""
    prompt_spread: float = 0.25
    """Half the width of the prompts' range, as a share of the mean."""
    completion: int
    """Mean tokens of a completion before the cut."""
    longest: int
    sigma: float = 0.6
    """Of the logarithm of the lengths; 0 makes all completions `completion` long."""
    tokens: int = 2048
    """Of our micro-batches; a long prompt should not be computed for each piece of its group, so they hold a whole group there."""


CASES = {
    "gsm8k": Case(prompts=4, samples=8, prompt=120, completion=150, longest=512),
    "math": Case(prompts=2, samples=16, prompt=150, completion=450, longest=2048, sigma=0.75),
    "fewshot": Case(prompts=2, samples=8, prompt=2000, prompt_spread=0.05, completion=300, longest=768, tokens=5120),
    "short": Case(prompts=4, samples=8, prompt=32, prompt_spread=0.0, completion=128, longest=129, sigma=0.0),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A prompt, its completions, what they earned and how likely the sampler found their tokens."""

    prompt: list[int]
    completions: list[list[int]]
    rewards: list[float]
    logprobs: list[list[float]]
    """Per completion and token, natural logarithms at temperature 1."""

    @property
    def has_signal(self) -> bool:
        return len(set(self.rewards)) > 1


def make_groups(case: Case, *, zero_share: float, scale: float = 1.0, seed: int = 0) -> list[Group]:
    """Groups of random tokens, without log-probabilities yet.

    Args:
        case: the lengths.
        zero_share: share of the groups whose completions all earn the same; of the others every second completion earns 1.
        scale: all lengths are multiplied by it.
        seed: of tokens, lengths and rewards.
    """
    draw = random.Random(f"{case}-{zero_share}-{seed}")
    without_signal = set(draw.sample(range(case.prompts), round(zero_share * case.prompts)))
    lengths = random.Random(f"{case}-{seed}")  # the same for every share
    mu = math.log(case.completion) - case.sigma**2 / 2
    groups = []
    for g in range(case.prompts):
        size = case.prompt * (1 + lengths.uniform(-case.prompt_spread, case.prompt_spread))
        prompt = [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(max(4, round(scale * size)))]
        completions = []
        for _ in range(case.samples):
            drawn = lengths.lognormvariate(mu, case.sigma) if case.sigma else case.completion
            length = max(4, round(scale * min(max(drawn, 8), case.longest)))
            tokens = [draw.randrange(FIRST_WORD, VOCABULARY) for _ in range(length)]
            if drawn < case.longest:
                tokens[-1] = EOS
            completions.append(tokens)
        rewards = [float(s % 2) for s in range(case.samples)]
        if g in without_signal:
            rewards = [float(draw.randrange(2))] * case.samples
        groups.append(Group(prompt=prompt, completions=completions, rewards=rewards, logprobs=[]))
    return groups


def write_groups(groups: list[Group], path: Path) -> None:
    path.write_text(json.dumps([asdict(group) for group in groups]))


def read_groups(path: Path) -> list[Group]:
    return [Group(**group) for group in json.loads(path.read_text())]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """How many tokens a training step over the groups could compute, from the most to the fewest."""

    padded: int
    """Every sequence as long as the longest prompt and the longest completion."""
    real: int
    """Every sequence by itself."""
    unique: int
    """Every prompt once."""
    trained: int
    """Every prompt once, of groups with signal only, without last tokens, which predict nothing."""
    scored: int
    """Completion tokens of groups with signal."""


def count_tokens(groups: list[Group]) -> Tokens:
    prompts = [len(g.prompt) for g in groups]
    lengths = [[len(c) for c in g.completions] for g in groups]
    live = [i for i, g in enumerate(groups) if g.has_signal]
    longest = max(prompts) + max(n for group in lengths for n in group)
    return Tokens(
        padded=longest * sum(map(len, lengths)),
        real=sum(p * len(n) + sum(n) for p, n in zip(prompts, lengths, strict=True)),
        unique=sum(prompts) + sum(map(sum, lengths)),
        trained=sum(prompts[i] + sum(lengths[i]) - len(lengths[i]) for i in live),
        scored=sum(sum(lengths[i]) for i in live),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Floating point operations of one forward and backward pass."""

    body: float
    attention: float
    head: float

    @property
    def total(self) -> float:
        return self.body + self.attention + self.head


def body_parameters(model: Architecture) -> int:
    """Weights of the matrices of all layers, without embedding and head."""
    heads = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim + model.num_heads * model.head_dim
    return model.num_layers * model.hidden_size * (heads + 3 * model.intermediate_size)


def useful_work(groups: list[Group], model: Architecture, vocabulary: int) -> Work:
    """What no exact method can avoid, for groups with signal: causal attention, each prompt once, no padding, nothing twice.

    A product of [m, k] and [k, n] is 2mkn forward and twice that backward. In the last layer only keys and values of a prompt
    are needed, except at its last token.
    """
    a = model.num_heads * model.head_dim
    pairs = pruned_pairs = tokens = pruned = scored = 0
    for group in groups:
        if not group.has_signal:
            continue
        p, lengths = len(group.prompt), [len(c) - 1 for c in group.completions]
        tokens += p + sum(lengths)
        scored += sum(lengths) + len(lengths)
        pairs += p * (p + 1) // 2 + sum(n * p + n * (n + 1) // 2 for n in lengths)
        pruned += p - 1
        pruned_pairs += (p - 1) * p // 2
    size = body_parameters(model)
    kept = model.hidden_size * 2 * model.num_kv_heads * model.head_dim
    return Work(
        body=6.0 * (size * tokens - (size // model.num_layers - kept) * pruned),
        attention=12.0 * a * (model.num_layers * pairs - pruned_pairs),
        head=6.0 * vocabulary * model.hidden_size * scored,
    )


def padded_work(
    groups: list[Group], model: Architecture, vocabulary: int, *, checkpointing: bool, all_positions: bool
) -> Work:
    """What TRL's GRPOTrainer executes on the same groups: padded rows, a dense attention mask, the head computed again in its backward pass.

    Args:
        groups: the rollout batch.
        model: its architecture.
        vocabulary: its size.
        checkpointing: the body computed again in the backward pass.
        all_positions: logits of prompts and padding too, as it does where Triton is missing.
    """
    sequences = sum(len(g.completions) for g in groups)
    tokens = count_tokens(groups).padded
    width = tokens // sequences
    scored = tokens if all_positions else sum(len(c) for g in groups for c in g.completions)
    passes = 8.0 if checkpointing else 6.0
    a = model.num_heads * model.head_dim
    return Work(
        body=passes * body_parameters(model) * tokens,
        attention=2 * passes * a * model.num_layers * sequences * width**2,
        head=8.0 * vocabulary * model.hidden_size * scored,
    )


def describe(value: Any) -> dict[str, Any]:
    return asdict(value)
