"""Which problems the next rollout batch is sampled from, and what is known of each.

Choices are a function of the seed, of how many problems were chosen before, and of what was measured until then. All ranks measure the
same, because they share their outcomes, and so choose the same. A resumed run has the measurements from the checkpoint and chooses what
the uninterrupted one does. With training.max_staleness batches are sampled one after the other too, and a choice rests on all batches
sampled before it, whether or not they have been trained on.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf.config import Curriculum as Settings
from rlhf.config import (
    DifficultyCurriculum,
    MeasuredCurriculum,
    Pools,
    ReplayCurriculum,
    SignalCurriculum,
    UniformCurriculum,
)
from rlhf.learning_signal import (
    Array,
    beta_posterior,
    draw,
    effective_number,
    expected_signal,
    faded,
    histogram,
    importance_weights,
    kind_rates,
    normalised,
    paced_share,
    replay_probabilities,
    with_floor,
)
from rlhf.metrics import PASS_RATE_BINS, POOLS, Metrics
from rlhf.types import Prompt, Score


class Outcome(NamedTuple):
    """What the completions of a problem in one rollout batch came to; undecided ones are in neither number."""

    problem: int
    correct: int
    wrong: int


class Choice(NamedTuple):
    problem: int
    weight: float
    """What its advantages are multiplied with."""


def outcomes(problems: Sequence[int], scores: Sequence[Score]) -> list[Outcome]:
    """Of P problems, from the scores of P groups that lie one after the other."""
    size = len(scores) // max(len(problems), 1)
    groups = [scores[i * size : (i + 1) * size] for i in range(len(problems))]
    return [
        Outcome(problem, *(sum(score.verdict == verdict for score in group) for verdict in ("correct", "wrong")))
        for problem, group in zip(problems, groups, strict=True)
    ]


def prompt_stream(num_prompts: int, start: int, count: int, *, seed: int) -> list[int]:
    """Prompts number `start` to `start + count` of endless epochs of fresh permutations: a function of its arguments, so a resume repeats it."""
    places = [divmod(position, num_prompts) for position in range(start, start + count)]
    orders = {
        epoch: random.Random(f"{seed}-{epoch}").sample(range(num_prompts), num_prompts)
        for epoch in {e for e, _ in places}
    }
    return [orders[epoch][offset] for epoch, offset in places]


class Curriculum:
    """Chooses problems and keeps their pass rates.

    Example, of one rollout batch:
        chosen = curriculum.choose(0, 32, batch=0)
        ...                                            # sample and score
        curriculum.observe(outcomes_of_all_ranks, batch=0)

    Args:
        config: section `curriculum` of the recipe.
        prompts: every problem.
        seed: of the recipe.

    Raises:
        ValueError: when a column that the recipe names is missing or, for a difficulty, no number.
    """

    def __init__(self, config: Settings, prompts: Sequence[Prompt], *, seed: int) -> None:
        self.config, self._seed, self._size = config, seed, len(prompts)
        self.measures = not isinstance(config, UniformCurriculum) or config.measure
        self._beliefs = config if isinstance(config, MeasuredCurriculum) else MeasuredCurriculum()
        self._correct, self._wrong = np.zeros(self._size), np.zeros(self._size)
        self._last = np.full(self._size, -1.0)
        """Rollout batch, from 0, in which a problem was sampled last."""
        self._drawn: list[int] = []
        """In the rollout batch under way."""
        self._kinds = np.zeros(self._size, dtype=np.int64)
        if isinstance(config, DifficultyCurriculum):
            self._easiest_first = np.argsort(_numbers(prompts, config.column), kind="stable")
        elif isinstance(config, MeasuredCurriculum) and config.prior_column is not None:
            self._kinds = _kinds(prompts, config.prior_column)

    # ------------------------------------------------------------------------------------------------------------------- choosing

    def choose(self, start: int, count: int, *, batch: int) -> list[Choice]:
        """`count` problems for rollout batch number `batch` from 0, when `start` were chosen before."""
        if isinstance(self.config, UniformCurriculum):
            chosen = prompt_stream(self._size, start, count, seed=self._seed)
            weights = np.ones(count)
        else:
            probabilities = self.probabilities(batch)
            chosen = draw(probabilities, count, seed=f"{self._seed}-{start}")
            weights = importance_weights(probabilities, chosen, self._beliefs.importance)
        self._drawn += chosen
        return [Choice(*pair) for pair in zip(chosen, weights.tolist(), strict=True)]

    def probabilities(self, batch: int) -> Array:
        """[N] of each problem to be the next."""
        config = self.config
        if isinstance(config, UniformCurriculum):
            return np.full(self._size, 1 / self._size)
        if isinstance(config, DifficultyCurriculum):
            pacing = config.pacing
            share = paced_share(batch, start=pacing.start, batches=pacing.batches, power=pacing.power)
            probabilities = np.zeros(self._size)
            probabilities[self._easiest_first[: max(round(share * self._size), 1)]] = 1.0
            return normalised(probabilities)
        alpha, beta = self.posterior(batch)
        may_come = self._may_come(config, batch)
        signal = expected_signal(alpha, beta) * may_come
        if isinstance(config, SignalCurriculum):
            weights = signal**config.sharpness
            if config.band is not None:
                low, high = config.band
                rates = alpha / (alpha + beta)
                weights = weights * ((low <= rates) & (rates <= high))
            return with_floor(normalised(weights), config.floor)
        assert isinstance(config, ReplayCurriculum)
        probabilities = replay_probabilities(
            signal,
            batch - self._last,
            self._last >= 0,
            temperature=config.rank_temperature,
            stale_share=config.stale_share,
            new_share=config.new_share,
        )
        return with_floor(normalised(probabilities * may_come), config.floor)

    def posterior(self, batch: int) -> tuple[Array, Array]:
        """(alpha, beta) [N] of each problem's pass rate, at rollout batch `batch`."""
        config, ages = self._beliefs, batch - self._last
        correct, wrong = (faded(counts, ages, config.half_life) for counts in (self._correct, self._wrong))
        rates = kind_rates(correct, wrong, self._kinds, rate=config.prior_rate, strength=config.prior_strength)
        if config.prior_column is None:
            rates = np.full(self._size, config.prior_rate)
        return beta_posterior(correct, wrong, rates=rates, strength=config.prior_strength)

    # ------------------------------------------------------------------------------------------------------------------ measuring

    def observe(self, found: Sequence[Outcome], *, batch: int) -> None:
        """What all ranks' completions of rollout batch `batch` came to."""
        for problem, correct, wrong in found:
            age = np.array(batch - max(self._last[problem], 0.0))
            for counts, more in ((self._correct, correct), (self._wrong, wrong)):
                counts[problem] = faded(counts[problem], age, self._beliefs.half_life) + more
            self._last[problem] = batch

    def pools(self, config: Pools) -> dict[str, Any]:
        """[N] masks: each problem is in one of POOLS."""
        judged = self._correct + self._wrong
        rates = self._correct / np.maximum(judged, 1e-12)
        enough = judged >= config.min_completions
        unseen = self._last < 0
        solved, impossible = enough & (rates >= config.solved_at), enough & (rates <= config.impossible_at)
        return dict(zip(POOLS, (unseen, ~unseen & ~solved & ~impossible, solved, impossible), strict=True))

    def _may_come(self, config: MeasuredCurriculum, batch: int) -> Any:
        """[N] False for problems that rest, and for those retired or shelved whose time to come back has not come."""
        ages = batch - self._last
        may_come = (self._last < 0) | (ages >= config.rest_batches)
        if config.pools is not None:
            pools = self.pools(config.pools)
            may_come &= ~(pools["solved"] | pools["impossible"]) | (ages >= config.pools.revisit_batches)
        return may_come

    def describe(self, metrics: Metrics, *, batch: int) -> None:
        """Metrics of rollout batch `batch`, once it is sampled; the same on all ranks."""
        drawn, self._drawn = self._drawn, []
        if not self.measures:
            return
        pools = self.pools(self._beliefs.pools or Pools())
        seen = (self._correct + self._wrong) > 0
        rates = self._correct / np.maximum(self._correct + self._wrong, 1e-12)
        values = {f"curriculum/{name}": float(pool.sum()) for name, pool in pools.items()}
        values["curriculum/effective"] = effective_number(self.probabilities(batch))
        for key, some in (("rates", rates[seen]), ("chosen", rates[[i for i in drawn if seen[i]]])):
            for number, share in enumerate(histogram(some, PASS_RATE_BINS)):
                values[f"curriculum/{key}_{number}"] = share
        if seen.any():
            values["curriculum/pass_rate"] = float(rates[seen].mean())
        for key, value in values.items():
            metrics.add(key, total=value, count=1)

    # ------------------------------------------------------------------------------------------------------------------ checkpoint

    def state(self) -> dict[str, Any]:
        """For a checkpoint: of each problem sampled so far, what was measured."""
        seen = np.flatnonzero(self._last >= 0).tolist()
        rows = zip(
            seen, self._correct[seen].tolist(), self._wrong[seen].tolist(), self._last[seen].tolist(), strict=True
        )
        return {"problems": self._size, "measured": [list(row) for row in rows]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: when what was measured is of other problems.
        """
        if state["measured"] and state["problems"] != self._size:
            raise ValueError(
                f"the checkpoint's curriculum knows {state['problems']} problems and there are {self._size} now; give the run the problems it began "
                "with, or another output_dir"
            )
        for problem, correct, wrong, last in state["measured"]:
            self._correct[problem], self._wrong[problem], self._last[problem] = correct, wrong, last


def _numbers(prompts: Sequence[Prompt], column: str) -> Array:
    for prompt in prompts:
        if not isinstance(prompt.columns.get(column), int | float):
            raise ValueError(
                f"curriculum.column is {column!r} and problem {prompt.id!r} has {prompt.columns.get(column)!r} there, which is no number; name a column "
                f"that has one in every problem (it has {', '.join(prompt.columns) or 'none'})"
            )
    return np.array([float(prompt.columns[column]) for prompt in prompts])


def _kinds(prompts: Sequence[Prompt], column: str) -> Any:
    """[N] number of the value that each problem has in a column."""
    if not any(column in prompt.columns for prompt in prompts):
        known = dict.fromkeys(name for prompt in prompts for name in prompt.columns)
        raise ValueError(
            f"curriculum.prior_column is {column!r}, which no problem has; they have {', '.join(known) or 'none'}"
        )
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(prompt.columns.get(column), len(numbers)) for prompt in prompts])
