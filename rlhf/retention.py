"""What keeps a policy from forgetting: elastic weight consolidation, PTX (rlhf/ptx.py), and coefficients that follow a held-out ability.

Each adds to the loss of an optimizer step once, whatever its micro-batches and ranks. KL to the reference is part of the algorithm
(rlhf/updater.py); here only its coefficient may be steered.
"""

from __future__ import annotations

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
from rlhf.micro_batches import Packer
from rlhf.ptx import DemonstrationMix, Imitation
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


class Retention:
    """The controls of one run, with their state.

    Args:
        config: the recipe.
        model: the policy's, at the weights it starts from, before anything wraps it.
        remembered: what the controls are about.
    """

    def __init__(self, config: Online, model: Any, remembered: Remembered) -> None:
        self._config, self._seed = config.retention, config.seed
        self._prompts, self._grade = remembered.prompts, remembered.grade
        self._max_undecided_share = config.guards.max_undecided_share
        self._sampling = replace(Sampling.of(config.rollout), samples_per_prompt=1)
        self._anchor: Anchor | None = None
        if self._config.elastic is not None:
            assert remembered.fisher is not None
            self._anchor = Anchor(model, remembered.fisher)
        assert (self._config.ptx is None) == (not remembered.demonstrations)
        self._mix: DemonstrationMix | None = None
        if self._config.ptx is not None:
            self._mix = DemonstrationMix(self._config.ptx, remembered.demonstrations, seed=config.seed)
        self._factor = 1.0
        self._ability_before: float | None = None

    def state(self) -> dict[str, Any]:
        return {
            "demonstrations_used": self._mix.used if self._mix is not None else 0,
            "factor": self._factor,
            "ability_before": self._ability_before,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._factor, self._ability_before = state["factor"], state["ability_before"]
        if self._mix is not None:
            self._mix.used = state["demonstrations_used"]

    def factor(self, control: str) -> float:
        """What the coefficient of `kl`, `elastic` or `ptx` is multiplied with now."""
        adaptive = self._config.adaptive
        return self._factor if adaptive is not None and adaptive.steers == control else 1.0

    # ------------------------------------------------------------------------------------------------- in every optimizer step

    def next_imitation(self, packer: Packer) -> Imitation:
        """PTX's demonstrations of this optimizer step; none without it. A collective."""
        return self._mix.next(packer, self.factor("ptx")) if self._mix is not None else Imitation()

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
        adaptive, grade = self._config.adaptive, self._grade
        assert adaptive is not None
        assert grade is not None
        rank = accelerator.process_index
        prompts = self._prompts[rank :: accelerator.num_processes]
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
