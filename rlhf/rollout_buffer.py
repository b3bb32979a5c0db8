"""A rollout batch under way on this rank, in memory and in a checkpoint: what the optimizer steps left on it need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from rlhf.experience import Experience, PerRollout
from rlhf.metrics import Metrics
from rlhf.types import Prompt, Rollout, Score, StepReward

PER_TOKEN = ("advantages", "values", "returns", "old_logprobs", "entropies")


@dataclass(slots=True)
class RolloutBuffer:
    """A judged rollout batch and how far training on it has come."""

    experience: Experience
    metrics: Metrics
    seconds: dict[str, float] = field(default_factory=dict)
    """Spent so far, by part of the loop."""
    steps_taken: int = 0
    """Optimizer steps on this batch."""


def unjudged(
    rollouts: Sequence[Rollout], scores: Sequence[Score], metrics: Metrics, seconds: dict[str, float]
) -> RolloutBuffer:
    """A rollout batch as sampled, whose advantages the policy of the update has yet to say."""
    nothing = tuple(torch.zeros(0) for _ in rollouts)
    experience = Experience(list(rollouts), list(scores), nothing, torch.zeros(len(rollouts), dtype=torch.bool))
    return RolloutBuffer(experience, metrics, seconds)


def to_files(buffer: RolloutBuffer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, of all rollouts end to end, and JSON; `from_files` makes the very same buffer of them."""
    experience = buffer.experience
    prompts = list(dict.fromkeys(r.prompt for r in experience.rollouts))
    index = {prompt: i for i, prompt in enumerate(prompts)}
    tensors = {
        "lengths": torch.tensor([len(r.token_ids) for r in experience.rollouts]),
        "token_ids": torch.tensor([t for r in experience.rollouts for t in r.token_ids]),
        "sampler_logprobs": torch.tensor([x for r in experience.rollouts for x in r.logprobs], dtype=torch.float64),
        "trained": experience.trained,
    }
    experts = [r.routed_experts for r in experience.rollouts if r.routed_experts is not None]
    if len(experts) == len(experience.rollouts):
        tensors["routed_experts"] = torch.cat(experts)
    for name in PER_TOKEN:
        per_rollout: PerRollout | None = getattr(experience, name)
        if per_rollout is not None:
            tensors[f"{name}.lengths"] = torch.tensor([len(t) for t in per_rollout])
            tensors[name] = torch.cat(per_rollout)
    document = {
        "prompts": [asdict(prompt) for prompt in prompts],
        "rollouts": [
            {"prompt": index[r.prompt], "finish_reason": r.finish_reason, "text": r.text, "policy_version": r.policy_version,
             "weight": r.weight}
            for r in experience.rollouts
        ],
        "scores": [asdict(score) for score in experience.scores],
        "metrics": buffer.metrics.pairs(),
        "seconds": buffer.seconds,
        "steps_taken": buffer.steps_taken,
    }  # fmt: skip
    return tensors, document


def from_files(tensors: dict[str, Tensor], document: dict[str, Any]) -> RolloutBuffer:
    """The inverse of `to_files`."""
    prompts = [Prompt(**{**p, "token_ids": tuple(p["token_ids"])}) for p in document["prompts"]]
    lengths = tensors["lengths"].tolist()
    token_ids, logprobs = (tensors[name].split(lengths) for name in ("token_ids", "sampler_logprobs"))
    experts: Sequence[Tensor | None] = [None] * len(lengths)
    if "routed_experts" in tensors:
        computed = [
            len(prompts[r["prompt"]].token_ids) + n - 1 for r, n in zip(document["rollouts"], lengths, strict=True)
        ]
        experts = tensors["routed_experts"].split(computed)
    rollouts = [
        Rollout(
            **{**r, "prompt": prompts[r["prompt"]]},
            token_ids=tuple(tokens.tolist()),
            logprobs=tuple(of_tokens.tolist()),
            routed_experts=of_rollout,
        )
        for r, tokens, of_tokens, of_rollout in zip(document["rollouts"], token_ids, logprobs, experts, strict=True)
    ]
    scores = [Score(**{**s, "steps": tuple(StepReward(**step) for step in s["steps"])}) for s in document["scores"]]
    per_token = {
        name: tensors[name].split(tensors[f"{name}.lengths"].tolist()) for name in PER_TOKEN if name in tensors
    }
    metrics = Metrics()
    for key, (total, count) in document["metrics"].items():
        metrics.add(key, total=total, count=count)
    experience = Experience(rollouts, scores, trained=tensors["trained"], **per_token)
    return RolloutBuffer(experience, metrics, document["seconds"], document["steps_taken"])


def share_of(buffers: Sequence[RolloutBuffer], rank: int, num_ranks: int, *, minibatches: int) -> RolloutBuffer:
    """One rank's part of the rollout batch that the ranks of `buffers` had, which may have been more or fewer.

    Every optimizer step keeps its rollouts: of each mini-batch, the ranks' rows in rank order are dealt out anew in equal runs.
    """
    old = len(buffers[0].experience.rollouts) // minibatches
    step = len(buffers) * old
    own = [divmod(row, old) for row in range(rank * step // num_ranks, (rank + 1) * step // num_ranks)]
    rows = [(k, m * old + i) for m in range(minibatches) for k, i in own]
    metrics = Metrics()
    for buffer in buffers[rank::num_ranks]:
        metrics.update(buffer.metrics)

    def pick(name: str) -> Any:
        columns = [getattr(buffer.experience, name) for buffer in buffers]
        return None if columns[0] is None else tuple(columns[k][i] for k, i in rows)

    experience = Experience(
        list(pick("rollouts")),
        list(pick("scores")),
        trained=torch.stack(pick("trained")),
        **{name: pick(name) for name in PER_TOKEN},
    )
    nearest = buffers[min(rank, len(buffers) - 1)]
    return RolloutBuffer(experience, metrics, dict(nearest.seconds), nearest.steps_taken)
