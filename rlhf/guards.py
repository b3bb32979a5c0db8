"""Checks that stop a run with a sentence before a silent fault is trained on. Each raises or returns nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rlhf.config import Guards
from rlhf.types import Rollout, Score


def require_finite(loss: Tensor, name: str = "loss") -> None:
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"{name} is {loss.item()}; the step is not taken and nothing is saved: lower optimizer.learning_rate or look at the rewards"
        )


def require_fresh(rollouts: Sequence[Rollout], policy_version: int, *, max_age: int = 0) -> None:
    """No rollout may come from weights more than `max_age` optimizer steps older than the trainer's, nor from weights it never had."""
    versions = {r.policy_version for r in rollouts}
    odd = {version for version in versions if not policy_version - max_age <= version <= policy_version}
    if odd:
        allowed = f" and at most {max_age} optimizer steps of age are allowed" if max_age else ""
        raise RuntimeError(
            f"rollouts come from policy version {min(odd)} while the trainer is at {policy_version}{allowed}; the engine missed a weight push"
        )


def require_same_policy(kl_sampler: float, guards: Guards, *, stale: bool = False) -> None:
    """The engine that sampled and the trainer must be the same policy, before the trainer moves; or near, when it was sampled by an older one."""
    bound = guards.max_kl_stale if stale else guards.max_kl_sampler
    if not kl_sampler <= bound and stale:
        raise RuntimeError(
            f"policy/kl_sampler is {kl_sampler:.3g} nats per token, above guards.max_kl_stale {bound:g}: the policy has moved too far since these rollouts "
            "were sampled; lower optimizer.learning_rate, training.max_staleness or replay.max_age_batches"
        )
    if not kl_sampler <= bound:
        raise RuntimeError(
            f"policy/kl_sampler is {kl_sampler:.3g} nats per token, above guards.max_kl_sampler {bound:g}: the engine that samples is not the policy "
            "that is trained. Look at sync/error in metrics.jsonl (stale weights), at rollout.temperature, at rollout.dtype against the "
            "trainer's, and for MoE models at router disagreement"
        )


def require_same_experts(means: Mapping[str, float], bound: float) -> None:
    """The sampler's and the trainer's routers must send tokens to the same experts, before the trainer moves; where that was measured."""
    disagreement = means.get("moe/disagreement", 0.0)
    if not disagreement <= bound:
        raise RuntimeError(
            f"moe/disagreement is {disagreement:.3g}: that share of (token, layer) went to other experts in the sampler than in the trainer, above "
            f"guards.max_router_disagreement {bound:g}, and runs in which routers drift apart collapse. Look at sync/error in metrics.jsonl (stale "
            "weights), at rollout.dtype against the trainer's, or set policy.router_replay to true"
        )


def require_experts(rollouts: Sequence[Rollout]) -> None:
    """Replay needs the sampler's experts."""
    missing = sum(rollout.routed_experts is None for rollout in rollouts)
    if missing:
        raise RuntimeError(
            f"{missing} of {len(rollouts)} rollouts do not say which experts the engine used, and policy.router_replay is set; use an engine that "
            "records them (rollout.engine vllm with rollout.record_experts) or set policy.router_replay to false"
        )


def require_one_policy(levels: Sequence[float]) -> None:
    """Every rank's mean log-probability of the same tokens must be the same."""
    of_ranks = torch.tensor(levels, dtype=torch.float64)  # its extremes are nan when one of them is, Python's are not
    if not (of_ranks.max() - of_ranks.min()).item() <= 1e-5:
        raise RuntimeError(
            f"the ranks hold different policies: the mean log-probability of the same tokens is {min(levels):.6f} on one and {max(levels):.6f} on "
            "another after the same steps, so gradients were not shared; check the accelerate configuration against recipes/accelerate/"
        )


def require_judged(share_undecided: float, bound: float, scores: Sequence[Score]) -> None:
    if share_undecided > bound:
        reasons = sorted({score.reason for score in scores if score.value is None})
        raise RuntimeError(
            f"{share_undecided:.0%} of the completions could not be judged, above guards.max_undecided_share {bound:.0%} "
            f"(reasons here: {'; '.join(reasons[:3])}); repair the references or the grader, nothing was learnt from this batch"
        )
