"""The optimizer steps on one rollout batch: micro-batches, losses, gradients, for policy and critic.

Each optimizer step has one denominator, fixed before its first backward pass and summed over ranks and micro-batches
(rlhf/masking.py::token_weights), so how a step is cut never changes its gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.attention import can_share_prefix
from rlhf.balance import expert_load
from rlhf.config import PPO, Algorithm, Online
from rlhf.controllers import adapted_entropy_coefficient, adapted_kl_coefficient, applied_entropy_coefficient
from rlhf.critic import Critic
from rlhf.distributed import beside, gather
from rlhf.experience import Experience, PerRollout
from rlhf.expert_balance import ExpertBalance, count_disagreement
from rlhf.guards import require_experts, require_finite, require_same_experts, require_same_policy
from rlhf.kl import KL, k3, off_policy
from rlhf.learner import Learner
from rlhf.losses import (
    cispo_loss,
    clipped_policy_loss,
    high_entropy_mask,
    high_entropy_threshold,
    is_clipped,
    sampler_correction,
    sapo_loss,
    sequence_ratio,
    token_ratio,
    value_loss,
    vespo_loss,
)
from rlhf.metrics import Metrics, reduce_metrics
from rlhf.micro_batches import MicroBatch, Packer, with_old_policy
from rlhf.models import ready
from rlhf.reference import ReferencePolicy
from rlhf.retention import NOTHING, Remembered, Retention
from rlhf.run import say
from rlhf.scorer import Scored, Scorer
from rlhf.types import Batch, Rollout


class Updater:
    """Policy, critic and reference, and the steps they take.

    Args:
        config: the recipe.
        accelerator: as `rlhf.distributed.start` made it.
        policy: causal language model with float weights, adapters already in it.
        reference: the frozen model of `reference.path`, or None.
        critic: value model as `rlhf.critic.load_critic` makes it, for PPO.
        pad_token_id: of the tokenizer.
        remembered: what the controls of forgetting are about.
    """

    def __init__(
        self,
        config: Online,
        accelerator: Accelerator,
        *,
        policy: Any,
        reference: Any | None = None,
        critic: Any | None = None,
        pad_token_id: int,
        remembered: Remembered = NOTHING,
    ) -> None:
        self.config, self.accelerator = config, accelerator
        training = config.training
        obstacle = can_share_prefix(policy.config)
        self.shares_prompts = training.layout == "shared" and obstacle is None
        if training.layout == "shared" and obstacle is not None:
            say(f"prompts are computed once for each sample, not once for each group: the model has {obstacle}")
        self._packer = Packer(config, accelerator, share_prompts=self.shares_prompts, pad_token_id=pad_token_id)
        self.steps_per_batch = training.minibatches_per_batch * training.passes_per_batch
        self.warmup_batches = config.critic.warmup_batches if isinstance(config, PPO) else 0
        policy = ready(policy, gradient_checkpointing=config.policy.gradient_checkpointing)
        needs_routers = {
            "router_aux_coefficient": config.policy.router_aux_coefficient,
            "router_replay": config.policy.router_replay,
        }
        scorer = Scorer(
            policy,
            share_prompts=self.shares_prompts,
            replay_experts=config.policy.router_replay,
            balances_experts=config.policy.router_aux_coefficient > 0,
            routers_needed_by=next((f"policy.{key}" for key, value in needs_routers.items() if value), None),
        ).train(policy.training)
        self.reference: ReferencePolicy | None = None
        if config.reference is not None:
            self.reference = ReferencePolicy(config.reference, accelerator, scorer, reference)
        self.retention = Retention(config, policy, remembered)
        num_steps = (training.num_batches - self.warmup_batches) * self.steps_per_batch
        self.policy = Learner(accelerator, scorer, config.optimizer, num_steps=num_steps)
        self.critic: Learner | None = None
        if isinstance(config, PPO):
            assert critic is not None
            value_model = ready(critic, gradient_checkpointing=config.critic.gradient_checkpointing)
            module = Critic(value_model, share_prompts=self.shares_prompts).train(value_model.training)
            num_steps = training.num_batches * self.steps_per_batch
            self.critic = Learner(beside(accelerator), module, config.critic.optimizer, num_steps=num_steps)
        self._plans: list[list[MicroBatch]] = []
        """Of the update under way."""
        self._stale = False
        """Whether it is on rollouts of an older policy."""
        self.policy_version = 0
        self.kl_coefficient = config.algorithm.kl_coefficient
        self.entropy_coefficient, self._last_entropy = config.algorithm.entropy_coefficient, math.inf
        self._temperature = config.rollout.temperature
        """Of the rollout batch at hand."""

    @property
    def unwrapped(self) -> Any:
        """The policy's model inside the scorer inside whatever accelerate put around it."""
        return self.policy.unwrapped.model

    @property
    def learners(self) -> dict[str, Learner]:
        return {"policy": self.policy} | ({"critic": self.critic} if self.critic is not None else {})

    @property
    def followers(self) -> dict[str, ReferencePolicy]:
        """What moves without being trained."""
        if self.reference is None or self.config.reference is None or self.config.reference.kind != "moving_average":
            return {}
        return {"reference": self.reference}

    def state(self) -> dict[str, Any]:
        """What a resume needs besides weights, optimizers and schedules."""
        return {
            "policy_version": self.policy_version,
            "kl_coefficient": self.kl_coefficient,
            "entropy_coefficient": self.entropy_coefficient,
            "last_entropy": self._last_entropy,
            "retention": self.retention.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        self.policy_version, self.kl_coefficient = state["policy_version"], state["kl_coefficient"]
        self.entropy_coefficient, self._last_entropy = state["entropy_coefficient"], state["last_entropy"]
        self.retention.restore(state["retention"])

    # ------------------------------------------------------------------------------------------- before the update, without gradient

    def kl_to_reference(self, rollouts: Sequence[Rollout], *, batch: int = 0) -> PerRollout:
        """Estimates of KL(sampler || reference) for each token; the sampler's own log-probabilities, so the policy is not run again."""
        assert self.reference is not None
        reference, estimator = self.reference, KL[self.config.algorithm.kl_estimator]
        temperature = self.config.rollout.temperature_at(batch)
        return self._packer.per_rollout(
            rollouts,
            lambda batch: estimator(batch.sampler_logprobs, reference.logprobs(batch, temperature).cpu()),
        )

    @torch.no_grad()
    def values(self, rollouts: Sequence[Rollout]) -> PerRollout:
        """The critic's predictions before each token."""
        assert self.critic is not None
        critic = self.critic.unwrapped
        return self._packer.per_rollout(rollouts, lambda batch: critic(batch).cpu())

    # ---------------------------------------------------------------------------------------------------------------- the update

    def update(
        self,
        experience: Experience,
        metrics: Metrics,
        *,
        batch: int = 0,
        steps_taken: int = 0,
        after_step: Callable[[int], None] = lambda steps_taken: None,
    ) -> None:
        """The optimizer steps on one rollout batch, number `batch` from 0, that are left after `steps_taken` of them.

        Args:
            experience: this rank's; from the second step on as `under_way` gave it after the step before.
            metrics: what is measured is added to.
            batch: how many rollout batches came before.
            steps_taken: on this one.
            after_step: called after each step with the number taken by then, unless it was the last.

        Raises:
            RuntimeError: when the sampler was not the policy.
            FloatingPointError: when a loss or gradient is not finite.
        """
        if self.config.policy.router_replay:
            require_experts(experience.rollouts)
        self._temperature = self.config.rollout.temperature_at(batch)
        if self.config.algorithm.entropy_schedule is not None:
            self.entropy_coefficient = self.config.algorithm.entropy_coefficient_at(batch)
            metrics.add("policy/entropy_coefficient", total=self.entropy_coefficient, count=1)
        training, size = self.config.training, self.config.rollout.samples_per_prompt
        rows_per_minibatch = len(experience.rollouts) // size // training.minibatches_per_batch * size
        minibatches = [
            range(m * rows_per_minibatch, (m + 1) * rows_per_minibatch) for m in range(training.minibatches_per_batch)
        ]
        everything = self._trains_everything
        plans = self._plans = [self._packer.plan(experience, rows, everything=everything) for rows in minibatches]
        older = any(r.policy_version < self.policy_version - steps_taken for r in experience.rollouts)
        self._stale = any(gather(self.accelerator, [older]))  # replay makes it so on some ranks only
        moves_policy = batch >= self.warmup_batches
        if moves_policy and steps_taken == 0:
            # The first step is on policy: its old log-probabilities are its own. Later ones need them before the weights move.
            first = 0 if self.config.algorithm.top_entropy_share < 1 else 1
            found = Metrics()
            for plan in plans[first:]:
                for micro in plan:
                    with torch.no_grad():
                        scored = self._forward(micro)
                    micro.old_logprobs = scored.logprobs
                    micro.entropies = scored.entropies if self.config.algorithm.top_entropy_share < 1 else None
                    count_disagreement(scored.routing, micro.batch, found)
            require_same_experts(self._means(found), self.config.guards.max_router_disagreement)
            metrics.update(found)
        for taken in range(steps_taken, self.steps_per_batch):
            plan = plans[taken % len(plans)]
            if moves_policy:
                self._policy_step(plan, metrics)
            if self.critic is not None:
                self._critic_step(plan, metrics)
            if taken + 1 < self.steps_per_batch:
                after_step(taken + 1)

    def under_way(self, experience: Experience) -> Experience:
        """The experience of the update under way, with what it found out about the policy that sampled before that policy moved."""
        return with_old_policy(experience, self._plans)

    @property
    def _trains_everything(self) -> bool:
        """Whether a KL term, an entropy bonus, the balance of the experts or a critic gives sequences without advantage a gradient."""
        algorithm = self.config.algorithm
        return (
            self.critic is not None
            or (self.reference is not None and algorithm.kl_in == "loss")
            or self.entropy_coefficient > 0
            or algorithm.entropy_target is not None
            or algorithm.top_entropy_share < 1
            or self.config.policy.router_aux_coefficient > 0
        )

    def _forward(self, micro: MicroBatch, expected: Tensor | None = None) -> Scored:
        return self.policy.module(micro.batch, self._temperature, expected)

    @torch.no_grad()
    def _expert_load(self, batch: Batch) -> Tensor:
        """[L, E] trained tokens of each expert: of the sampler's experts where they are replayed, else by the policy as it is now."""
        if self.config.policy.router_replay:
            assert batch.routed_experts is not None
            sampled = batch.routed_experts.index_select(0, batch.scored)
            return expert_load(sampled, self.policy.unwrapped.routers.num_experts)
        return self.policy.module(batch, self._temperature).routing.load

    def _policy_step(self, plan: Sequence[MicroBatch], metrics: Metrics) -> None:
        algorithm, local = self.config.algorithm, Metrics()
        threshold = -math.inf
        if algorithm.top_entropy_share < 1:
            entropies = torch.cat([micro.entropies.cpu() for micro in plan if micro.entropies is not None])
            threshold = high_entropy_threshold(
                torch.tensor(gather(self.accelerator, entropies.tolist())), algorithm.top_entropy_share
            )
        balance = ExpertBalance(self.accelerator, self.config.policy.router_aux_coefficient)
        if balance.must_count(len(plan)):
            num_tokens = sum(micro.batch.scored.numel() for micro in plan)
            balance.fix([self._expert_load(micro.batch) for micro in plan], num_tokens=num_tokens)
        imitation = self.retention.next_imitation(self._packer)
        total_loss, means = 0.0, {}
        for i, micro in enumerate(plan):
            last = i == len(plan) - 1
            with self.policy.micro_batch(last=last and not imitation.batches):
                # On policy every ratio is 1, and there each of the losses has the policy gradient.
                on_policy = micro.old_logprobs is None
                scored = self._forward(micro, -micro.advantages * micro.weights if on_policy else None)
                logprobs, entropy, routing = scored
                if micro.old_logprobs is None:
                    micro.old_logprobs = logprobs.detach()
                    count_disagreement(routing, micro.batch, local)
                focus = None if micro.entropies is None else high_entropy_mask(micro.entropies.to(logprobs), threshold)
                loss = (self._policy_loss(micro, logprobs, entropy, focus, local) * micro.weights.to(logprobs)).sum()
                local.add("train/tokens", total=micro.batch.num_tokens, count=1)
                require_finite(loss)
                total_loss += loss.item()
                if last:
                    means = self._means(local)
                    require_same_policy(means.get("policy/kl_sampler", 0.0), self.config.guards, stale=self._stale)
                    require_same_experts(means, self.config.guards.max_router_disagreement)
                loss = loss + balance.loss(routing)
                if last and not imitation.batches:
                    loss = loss + self._penalty(metrics)
                self.policy.backward(loss)  # 0, with a gradient of 0, on an idle pass
        for i, batch in enumerate(imitation.batches):
            last = i == len(imitation.batches) - 1
            with self.policy.micro_batch(last=last):
                loss = imitation.loss(self.policy.module, batch, metrics)
                self.policy.backward(loss + self._penalty(metrics) if last else loss)
        metrics.add("policy/grad_norm", total=self.policy.step(), count=1)
        self.policy_version += 1
        if self.reference is not None:
            self.reference.follow(self.policy_version)
        metrics.add("policy/loss", total=total_loss * self.accelerator.num_processes, count=1)
        balance.describe(metrics, replayed=self.config.policy.router_replay)
        metrics.update(local)
        self._adapt(means)

    def _penalty(self, metrics: Metrics) -> Tensor | float:
        """This rank's part of what elastic weight consolidation adds to the step's loss, which is that of all ranks together."""
        return self.retention.penalty(metrics) / self.accelerator.num_processes

    def follow_ability(self) -> None:
        """The KL's coefficient after the held-out ability was measured, where the recipe lets it follow."""
        adaptive, algorithm = self.config.retention.adaptive, self.config.algorithm
        if adaptive is not None and adaptive.steers == "kl":
            self.kl_coefficient = algorithm.kl_coefficient * self.retention.factor("kl")

    def _policy_loss(
        self, micro: MicroBatch, logprobs: Tensor, entropy: Tensor, focus: Tensor | None, local: Metrics
    ) -> Tensor:
        """[N] loss of each token, before its weight; its description goes to `local`."""
        algorithm, device = self.config.algorithm, logprobs.device
        old_logprobs, advantages, sequences = micro.old_logprobs, micro.advantages.to(device), micro.batch.sequences
        assert old_logprobs is not None
        old_logprobs = old_logprobs.to(device)
        sequences, sampler_logprobs = sequences.to(device), micro.batch.sampler_logprobs.to(device)
        if algorithm.loss == "sequence_clipped":
            ratio = sequence_ratio(logprobs, old_logprobs, sequences)
        else:
            ratio = token_ratio(logprobs, old_logprobs)
        correction = torch.ones_like(logprobs)
        if algorithm.sampler_correction != "none":
            correction = sampler_correction(
                old_logprobs,
                sampler_logprobs,
                sequences,
                level=algorithm.sampler_correction_level,
                mode=algorithm.sampler_correction,
                max_ratio=algorithm.sampler_correction_max,
            )
            local.add("policy/sampler_correction", total=correction.sum().item(), count=correction.numel())
        if algorithm.loss == "vespo":  # its weight of the sequence contains the correction
            per_token = vespo_loss(logprobs, old_logprobs - correction.log(), advantages, sequences)
        else:
            per_token = correction * surrogate(algorithm, ratio, logprobs, advantages)
        bonus = self._entropy_bonus()
        if bonus > 0:
            per_token = per_token - bonus * entropy
        if focus is not None:
            per_token = torch.where(focus, per_token, 0.0)
            local.add("policy/focus", total=focus.sum().item(), count=focus.numel())
        if self.reference is not None and algorithm.kl_in == "loss":
            reference_logprobs = self.reference.logprobs(micro.batch, self._temperature)
            kl = KL[algorithm.kl_estimator](logprobs, reference_logprobs)
            per_token = per_token + self.kl_coefficient * (off_policy(kl, ratio) if algorithm.kl_weighted else kl)
            local.add("policy/kl_reference", total=kl.sum().item(), count=kl.numel())
        with torch.no_grad():
            clipped = is_clipped(ratio, advantages, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
            kl_sampler = k3(sampler_logprobs, old_logprobs)
            seen = {"clip_fraction": clipped, "ratio": ratio, "entropy": entropy, "kl_sampler": kl_sampler}
            for name, values in seen.items():
                local.add(f"policy/{name}", total=values.sum().item(), count=values.numel())
        return per_token

    def _critic_step(self, plan: Sequence[MicroBatch], metrics: Metrics) -> None:
        assert self.critic is not None
        assert isinstance(self.config, PPO)
        total_loss = 0.0
        for i, micro in enumerate(plan):
            assert micro.values is not None
            assert micro.returns is not None
            with self.critic.micro_batch(last=i == len(plan) - 1):
                values = self.critic.module(micro.batch)
                old_values, returns = micro.values.to(values), micro.returns.to(values)
                per_token = value_loss(values, old_values, returns, clip=self.config.critic.value_clip)
                loss = (per_token * micro.weights.to(values)).sum()
                require_finite(loss, "the critic's loss")
                total_loss += loss.item()
                self.critic.backward(loss)
            error = (values.detach() - returns).square()
            metrics.add("critic/error", total=error.sum().item(), count=error.numel())
            metrics.add("critic/value", total=values.sum().item(), count=values.numel())
            metrics.add("critic/return", total=returns.sum().item(), count=returns.numel())
        metrics.add("critic/loss", total=total_loss * self.accelerator.num_processes, count=1)
        metrics.add("critic/grad_norm", total=self.critic.step(), count=1)

    # ------------------------------------------------------------------------------------------------------ adaptive coefficients

    def _means(self, local: Metrics) -> dict[str, float]:
        return reduce_metrics(gather(self.accelerator, [local.pairs()]))

    def _entropy_bonus(self) -> float:
        target = self.config.algorithm.entropy_target
        if target is None:
            return self.entropy_coefficient
        return applied_entropy_coefficient(self.entropy_coefficient, self._last_entropy, target=target)

    def _adapt(self, means: dict[str, float]) -> None:
        """The coefficients of the next optimizer step, from what this one measured."""
        algorithm = self.config.algorithm
        if algorithm.entropy_target is not None and "policy/entropy" in means:
            self._last_entropy = means["policy/entropy"]
            self.entropy_coefficient = adapted_entropy_coefficient(
                self.entropy_coefficient,
                self._last_entropy,
                target=algorithm.entropy_target,
                step=algorithm.entropy_step,
                maximum=algorithm.entropy_maximum,
            )
        if "policy/kl_reference" in means:
            rollout, training = self.config.rollout, self.config.training
            num_completions = rollout.prompts_per_batch * rollout.samples_per_prompt // training.minibatches_per_batch
            self.adapt_kl(means["policy/kl_reference"], num_completions=num_completions)

    def adapt_kl(self, measured: float, *, num_completions: int) -> None:
        """Steer the KL coefficient by `measured` nats per token, of `num_completions` completions."""
        algorithm = self.config.algorithm
        if algorithm.kl_target is not None:
            self.kl_coefficient = adapted_kl_coefficient(
                self.kl_coefficient,
                measured,
                target=algorithm.kl_target,
                horizon=algorithm.kl_horizon,
                samples=num_completions,
            )


def surrogate(algorithm: Algorithm, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """The recipe's policy loss of each token, of the losses that take a ratio: [N] -> [N]."""
    match algorithm.loss:
        case "cispo":
            return cispo_loss(ratio, logprobs, advantages, max_ratio=1 + algorithm.clip_high)
        case "sapo":
            return sapo_loss(
                ratio,
                advantages,
                temperature_positive=algorithm.sapo_temperature_positive,
                temperature_negative=algorithm.sapo_temperature_negative,
            )
        case _:
            return clipped_policy_loss(
                ratio,
                advantages,
                clip_low=algorithm.clip_low,
                clip_high=algorithm.clip_high,
                ceiling=algorithm.ratio_ceiling,
            )
