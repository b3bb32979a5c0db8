"""Past correct completions of problems that are all wrong now: a group without signal gets one back, corrected for its age.

A completion keeps the log-probabilities of the sampler that drew it. In the update the trainer's policy is compared with those
(algorithm.sampler_correction): its tokens are weighted by min(pi / pi_then, sampler_correction_max), as those of a batch sampled ahead
are. What stays biased is the comparison within the group: its mean and standard deviation are no longer those of samples of one policy
(https://arxiv.org/abs/2504.14945 and https://arxiv.org/abs/2510.02245 mix groups likewise).

All ranks hold the same, because they share what they add.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from rlhf.config import Replay as Settings
from rlhf.metrics import Metrics
from rlhf.rollout_buffer import from_files, to_files, unjudged
from rlhf.types import Prompt, Rollout, Score


@dataclass(frozen=True, slots=True)
class Success:
    """A correct completion and the rollout batch, from 0, it was sampled for."""

    batch: int
    rollout: Rollout
    score: Score


def successes(rollouts: Sequence[Rollout], scores: Sequence[Score], *, size: int, batch: int) -> list[Success]:
    """The correct completions of groups in which another one is wrong: problems that the policy may lose again."""
    found = []
    for start in range(0, len(scores), size):
        group = range(start, start + size)
        if any(scores[i].verdict == "wrong" for i in group):
            found += [Success(batch, rollouts[i], scores[i]) for i in group if scores[i].verdict == "correct"]
    return found


@dataclass(slots=True)
class ReplayBuffer:
    """The newest correct completions of each problem, oldest problem first.

    Args:
        config: section `replay` of the recipe.
        size: samples of a prompt.
    """

    config: Settings
    size: int
    kept: dict[Prompt, list[Success]] = field(default_factory=dict)

    def add(self, found: Sequence[Success]) -> None:
        """Successes of all ranks, in rank order; the oldest leave when there is no room."""
        for success in found:
            of_problem = [*self.kept.pop(success.rollout.prompt, []), success]
            self.kept[success.rollout.prompt] = of_problem[-self.config.per_problem :]
        while len(self) > self.config.capacity:
            oldest = next(iter(self.kept))
            del self.kept[oldest][0]
            if not self.kept[oldest]:
                del self.kept[oldest]

    def __len__(self) -> int:
        return sum(map(len, self.kept.values()))

    def rescue(
        self, rollouts: Sequence[Rollout], scores: Sequence[Score], *, batch: int, metrics: Metrics
    ) -> tuple[list[Rollout], list[Score]]:
        """This rank's groups, those that are wrong from end to end with past successes in place of their last samples."""
        rollouts, scores = list(rollouts), list(scores)
        metrics.add("replay/size", total=len(self), count=1)
        metrics.add("replay/rescued", total=0, count=len(scores) // self.size)
        for start in range(0, len(scores), self.size):
            if any(score.verdict != "wrong" for score in scores[start : start + self.size]):
                continue
            prompt, weight = rollouts[start].prompt, rollouts[start].weight
            young = [s for s in self.kept.get(prompt, []) if batch - s.batch <= self.config.max_age_batches]
            for place, success in enumerate(reversed(young[-self.config.per_group :])):
                at = start + self.size - 1 - place
                rollouts[at] = replace(success.rollout, prompt=prompt, weight=weight)
                scores[at] = success.score
                metrics.add("replay/age", total=batch - success.batch, count=1)
            metrics.add("replay/rescued", total=bool(young), count=0)
        return rollouts, scores

    # ------------------------------------------------------------------------------------------------------------------ checkpoint

    def to_files(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON; `restore` makes the very same buffer of them."""
        everything = [success for of_problem in self.kept.values() for success in of_problem]
        if not everything:
            return {}, {"batches": []}
        buffer = unjudged([s.rollout for s in everything], [s.score for s in everything], Metrics(), {})
        tensors, document = to_files(buffer)
        return tensors, {**document, "batches": [s.batch for s in everything]}

    def restore(self, tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
        """The inverse of `to_files`."""
        self.kept = {}
        if not document["batches"]:
            return
        experience = from_files(tensors, document).experience
        for batch, rollout, score in zip(document["batches"], experience.rollouts, experience.scores, strict=True):
            self.kept.setdefault(rollout.prompt, []).append(Success(batch, rollout, score))
