"""What keeps a policy from forgetting: elastic weight consolidation, PTX, and coefficients that follow a held-out ability.

Each adds to the loss of an optimizer step once, whatever its micro-batches and ranks. KL to the reference is part of the algorithm
(rlhf/updater.py); here only its coefficient may be steered.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from rlhf.config import Online
from rlhf.controllers import adapted_retention_factor
from rlhf.distributed import gather
from rlhf.elastic import Anchor
from rlhf.guards import require_judged
from rlhf.metrics import Metrics
from rlhf.rollout.engine import RolloutEngine, Sampling
from rlhf.types import Prompt, RewardFn, Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class Remembered:
    """What the recipe's controls are about, read and rendered; empty where it has none."""

    fisher: Mapping[str, Tensor] | None = None
    """Of elastic weight consolidation."""
    demonstrations: Sequence[Rollout] = ()
    """Of PTX, as if the policy had written them."""
    prompts: Sequence[Prompt] = ()
    """Of the held-out ability."""
    grade: RewardFn | None = None
    """Judges completions of these prompts."""


NOTHING = Remembered()


def take_demonstrations(lengths: Sequence[int], start: int, tokens: int, *, seed: int) -> list[int]:
    """The demonstrations after the first `start` of endless epochs of fresh permutations that fit into a budget, and one at least.

    A function of its arguments, so a resume repeats it.

    Args:
        lengths: response tokens of each demonstration.
        start: how many were taken before.
        tokens: response tokens there is room for.
        seed: of the permutations.
    """
    taken: list[int] = []
    order: dict[int, list[int]] = {}
    while True:
        epoch, offset = divmod(start + len(taken), len(lengths))
        if epoch not in order:
            order[epoch] = random.Random(f"{seed}-demonstrations-{epoch}").sample(range(len(lengths)), len(lengths))
        tokens -= lengths[order[epoch][offset]]
        if taken and tokens < 0:
            return taken
        taken.append(order[epoch][offset])


class Retention:
    """The controls of one run, with their state.

    Args:
        config: the recipe.
        model: the policy's, at the weights it starts from, before anything wraps it.
        remembered: what the controls are about.
    """

    def __init__(self, config: Online, model: Any, remembered: Remembered) -> None:
        self._config, self._seed, self._remembered = config.retention, config.seed, remembered
        self._max_undecided_share = config.guards.max_undecided_share
        self._sampling = replace(Sampling.of(config.rollout), samples_per_prompt=1)
        self._anchor: Anchor | None = None
        if self._config.elastic is not None:
            assert remembered.fisher is not None
            self._anchor = Anchor(model, remembered.fisher)
        assert (self._config.ptx is None) == (not remembered.demonstrations)
        self._lengths = [len(d.token_ids) for d in remembered.demonstrations]
        self._demonstrations_used = 0
        self._factor = 1.0
        self._ability_before: float | None = None

    def state(self) -> dict[str, Any]:
        return {
            "demonstrations_used": self._demonstrations_used,
            "factor": self._factor,
            "ability_before": self._ability_before,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._demonstrations_used, self._factor = state["demonstrations_used"], state["factor"]
        self._ability_before = state["ability_before"]

    def factor(self, control: str) -> float:
        """What the coefficient of `kl`, `elastic` or `ptx` is multiplied with now."""
        adaptive = self._config.adaptive
        return self._factor if adaptive is not None and adaptive.steers == control else 1.0

    # ------------------------------------------------------------------------------------------------- in every optimizer step

    @property
    def demonstrations(self) -> Sequence[Rollout]:
        return self._remembered.demonstrations

    def next_demonstrations(self) -> tuple[list[int], float]:
        """(demonstrations of this optimizer step over all ranks, what each of their response tokens counts); the first empty without PTX."""
        ptx = self._config.ptx
        if ptx is None:
            return [], 0.0
        taken = take_demonstrations(self._lengths, self._demonstrations_used, ptx.tokens_per_step, seed=self._seed)
        self._demonstrations_used += len(taken)
        return taken, self.factor("ptx") * ptx.coefficient / sum(self._lengths[i] for i in taken)

    def penalty(self, metrics: Metrics) -> Tensor | float:
        """What elastic weight consolidation adds to the loss of the whole optimizer step, 0 without it."""
        if self._anchor is None or self._config.elastic is None:
            return 0.0
        penalty = self._anchor.penalty()
        metrics.add("retention/elastic", total=penalty.item(), count=1)
        return self.factor("elastic") * self._config.elastic.coefficient * penalty

    # ------------------------------------------------------------------------------------------------------ the held-out ability

    def is_due(self, batch: int) -> bool:
        """Whether the ability is measured after `batch` rollout batches; before the first one always, and not twice."""
        adaptive = self._config.adaptive
        return adaptive is not None and (
            self._ability_before is None if batch == 0 else batch % adaptive.every_batches == 0
        )

    def look(self, engine: RolloutEngine, accelerator: Accelerator, metrics: Metrics) -> None:
        """Measure the ability, always with the same problems and seed, and let the coefficient follow; the first time gives the level to be held.

        Raises:
            RuntimeError: when too many completions could not be judged.
        """
        adaptive, grade = self._config.adaptive, self._remembered.grade
        assert adaptive is not None
        assert grade is not None
        rank = accelerator.process_index
        prompts = self._remembered.prompts[rank :: accelerator.num_processes]
        seed = hash((self._seed, rank)) & 0x7FFFFFFF
        scores = grade(engine.generate(prompts, self._sampling, seed=seed)) if prompts else []
        verdicts = gather(accelerator, [score.verdict for score in scores])
        undecided = verdicts.count("undecided")
        require_judged(undecided / len(verdicts), self._max_undecided_share, scores)
        ability = verdicts.count("correct") / (len(verdicts) - undecided)
        if self._ability_before is None:
            self._ability_before = ability
        self._factor = adapted_retention_factor(
            self._factor,
            self._ability_before - ability,
            allowed=adaptive.max_fall,
            rate=adaptive.rate,
            maximum=adaptive.max_factor,
        )
        metrics.add("retention/ability", total=ability, count=1)
        metrics.add("retention/factor", total=self._factor, count=1)
