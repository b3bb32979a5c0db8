"""The online loop: sample a rollout batch, score it, take optimizer steps on it, push the weights, repeat.

    prompts ─engine.generate─▶ rollouts ─reward_fn─▶ scores ─group_relative─▶ advantages
      ─pack─▶ micro-batches ─policy─▶ logprobs ─policy_loss─▶ per token ─▶ sum of weight x loss

Notation: a rollout batch has P prompts x G samples, all sampled by one policy version; it is trained on in `minibatches_per_batch`
optimizer steps, `passes_per_batch` times. Each optimizer step has one denominator, fixed before its first backward pass and summed
over ranks and micro-batches (rlhf/masking.py::token_weights), so how a step is cut never changes its gradient.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import get_scheduler

from rlhf.advantages import ADVANTAGES, normalised_components
from rlhf.attention import can_share_prefix
from rlhf.checkpoint import load_newest, save_checkpoint
from rlhf.config import GRPO
from rlhf.distributed import clip_and_step, gather, global_max, micro_batch, unwrap
from rlhf.kl import KL, k3
from rlhf.losses import (
    cispo_loss,
    clipped_policy_loss,
    is_clipped,
    sampler_correction,
    sapo_loss,
    sequence_ratio,
    token_ratio,
)
from rlhf.masking import token_weights
from rlhf.metrics import Metrics, append_jsonl, console_line, read_jsonl, reduce_metrics, truncate_jsonl
from rlhf.packing import pack_padded, pack_shared, padded_chunks, shared_chunks
from rlhf.rollout.engine import RolloutEngine
from rlhf.run import Run, say
from rlhf.scorer import Scorer
from rlhf.types import Batch, Prompt, RewardFn, Rollout, Score
from rlhf.weight_sync import Probe, WeightSync


def prompts_of_batch(num_prompts: int, batch: int, size: int, *, seed: int) -> list[int]:
    """Which prompts a rollout batch takes: epochs of fresh permutations, a function of (seed, batch) alone, so a resume repeats it."""
    indices = []
    for position in range(batch * size, (batch + 1) * size):
        epoch, offset = divmod(position, num_prompts)
        indices.append((epoch, offset))
    orders = {
        epoch: random.Random(f"{seed}-{epoch}").sample(range(num_prompts), num_prompts)
        for epoch in {epoch for epoch, _ in indices}
    }
    return [orders[epoch][offset] for epoch, offset in indices]


@dataclass(frozen=True, slots=True)
class Experience:
    """A scored rollout batch of this rank: `rollouts` lists the G samples of each prompt next to each other."""

    rollouts: list[Rollout]
    scores: list[Score]
    advantages: Tensor
    """[B]"""
    trained: Tensor
    """[B] False for what stays out of the loss: undecided groups, masked truncated completions."""


def advantages_of(scores: Sequence[Score], config: GRPO) -> Tensor:
    """[B] advantages of the scores of all ranks; 0 in groups that hold an undecided completion.

    Such a group is left out of the batch's mean and standard deviation as well.
    """
    algorithm, size = config.algorithm, config.rollout.samples_per_prompt
    decided = ~torch.tensor([score.value is None for score in scores]).view(-1, size).any(1)
    advantages = torch.zeros(len(scores)).view(-1, size)
    if not decided.any():
        return advantages.flatten()
    if algorithm.normalise_components:
        weights = torch.tensor([reward.weight for reward in config.rewards])
        rows = [
            [score.components[r.name] if score.value is not None else 0.0 for r in config.rewards] for score in scores
        ]
        components = torch.tensor(rows).view(-1, size, len(config.rewards))
        advantages[decided] = normalised_components(components[decided], weights)
    else:
        rewards = torch.tensor([score.value or 0.0 for score in scores]).view(-1, size)
        estimator = ADVANTAGES[algorithm.advantage]
        advantages[decided] = estimator(rewards[decided], scale_by_std=algorithm.scale_by_std)
    return advantages.flatten()


def score_rollouts(
    rollouts: Sequence[Rollout], scores: Sequence[Score], config: GRPO, advantages: Tensor | None = None
) -> Experience:
    """Advantages of whole groups, computed before anything is left out.

    A group with an undecided completion is dropped as a whole: a grader's failure is neither a 0 nor a smaller group.

    Args:
        rollouts: of this rank.
        scores: of these rollouts.
        config: the recipe.
        advantages: [B] of these rollouts, when they were computed over all ranks.
    """
    size = config.rollout.samples_per_prompt
    undecided = torch.tensor([score.value is None for score in scores]).view(-1, size)
    advantages = advantages_of(scores, config) if advantages is None else advantages
    trained = ~undecided.any(1, keepdim=True).expand(-1, size)
    if config.algorithm.truncated == "mask":
        trained = trained & torch.tensor([r.finish_reason == "stop" for r in rollouts]).view(-1, size)
    trained = trained.reshape(-1)
    return Experience(list(rollouts), list(scores), torch.where(trained, advantages.reshape(-1), 0.0), trained)


class OnlineTrainer:
    """Trains a policy with group-relative policy optimisation (https://arxiv.org/abs/2402.03300).

    Args:
        config: the recipe.
        accelerator: as `rlhf.distributed.start` made it.
        policy: causal language model with float weights.
        reference: frozen model for the KL penalty, or None.
        engine: holds the same weights as `policy`.
        prompts: every problem, rendered.
        reward_fn: scores rollouts; runs on every rank on that rank's rollouts.
        probes: sequences for the freshness check.
        pad_token_id: of the tokenizer.
        run: where metrics and checkpoints go.
    """

    def __init__(
        self,
        config: GRPO,
        accelerator: Accelerator,
        *,
        policy: Any,
        reference: Any | None,
        engine: RolloutEngine,
        prompts: Sequence[Prompt],
        reward_fn: RewardFn,
        probes: Sequence[Probe],
        pad_token_id: int,
        run: Run,
    ) -> None:
        self.config, self.accelerator, self.engine = config, accelerator, engine
        self.prompts, self.reward_fn, self.pad_token_id, self.run = prompts, reward_fn, pad_token_id, run
        o = config.optimizer
        optimizer = torch.optim.AdamW(
            policy.parameters(), lr=o.learning_rate, betas=(o.beta1, o.beta2), weight_decay=o.weight_decay
        )
        steps = config.training.num_batches * self.steps_per_batch
        scheduler = get_scheduler(
            "constant_with_warmup" if o.schedule == "constant" else o.schedule,
            optimizer,
            num_warmup_steps=o.warmup_steps,
            num_training_steps=steps,
        )
        obstacle = can_share_prefix(policy.config)
        self.shares_prompts = config.training.layout == "shared" and obstacle is None
        if config.training.layout == "shared" and obstacle is not None:
            say(f"prompts are computed once for each sample, not once for each group: the model has {obstacle}")
        scorer = Scorer(policy, share_prompts=self.shares_prompts)
        self.policy, self.optimizer = accelerator.prepare(scorer, optimizer)
        self.scheduler = scheduler
        accelerator.register_for_checkpointing(scheduler)
        self.reference = None
        if reference is not None:
            self.reference = Scorer(reference.to(accelerator.device), share_prompts=self.shares_prompts).eval()
        self.policy_version, self.first_batch = 0, 0
        saved = load_newest(accelerator, self.checkpoints)
        if saved is not None:
            self.policy_version, self.first_batch = saved["policy_version"], saved["batch"]
            say(f"resuming after batch {self.first_batch}, policy version {self.policy_version}")
        truncate_jsonl(self.metrics_file, key="batch", below=self.first_batch + 1)
        self.policy.eval()  # dropout would make the trainer's policy another one than the sampler's
        if saved is not None:
            engine.load_weights(
                ((n, p.detach()) for n, p in self.unwrapped.named_parameters()), policy_version=self.policy_version
            )
        self.sync = WeightSync(engine, self.unwrapped, probes, tolerance=config.guards.freshness_tolerance)

    @property
    def unwrapped(self) -> Any:
        """The model inside the scorer inside whatever accelerate put around it."""
        return unwrap(self.accelerator, self.policy).model

    @property
    def checkpoints(self) -> Path:
        return self.run.folder / "checkpoints"

    @property
    def metrics_file(self) -> Path:
        return self.run.folder / "metrics.jsonl"

    @property
    def steps_per_batch(self) -> int:
        return self.config.training.minibatches_per_batch * self.config.training.passes_per_batch

    # ---------------------------------------------------------------------------------------------------------------- the loop

    def train(self) -> list[dict[str, float]]:
        """All rollout batches that are left; returns the metrics of each.

        Raises:
            RuntimeError: when a guard's bound is breached; the last checkpoint stays valid.
            FloatingPointError: when a loss or gradient is not finite.
        """
        training = self.config.training
        history = []
        for batch in range(self.first_batch, training.num_batches):
            metrics = Metrics()
            with self._timed(metrics, "rollout"):
                rollouts = self.sample(batch)
            with self._timed(metrics, "reward"):
                experience = self.score(rollouts)
            self._describe(experience, metrics)
            with self._timed(metrics, "train"):
                self.update(experience, metrics)
            with self._timed(metrics, "sync"):
                freshness = self.sync.push(policy_version=self.policy_version)
            self._require_one_policy(freshness.level)
            metrics.add("sync/error", total=freshness.error, count=1)
            row = {
                "batch": batch + 1,
                "step": self.policy_version,
                **reduce_metrics(gather(self.accelerator, [metrics.pairs()])),
            }
            history.append(row)
            if self.accelerator.is_main_process:
                append_jsonl(self.metrics_file, row)
            say(console_line(row, training.num_batches))
            if (batch + 1) % training.checkpoint_every == 0 and batch + 1 < training.num_batches:
                save_checkpoint(
                    self.accelerator,
                    self.checkpoints,
                    batch=batch + 1,
                    keep=training.keep_checkpoints,
                    state={"policy_version": self.policy_version},
                )
        return history

    def save(self, tokenizer: Any) -> None:
        """The trained policy and its tokenizer, in the run's folder."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.unwrapped.save_pretrained(self.run.folder)
            tokenizer.save_pretrained(self.run.folder)

    def summary(self) -> dict[str, Any]:
        """What the whole run, resumed or not, comes to."""
        rows = read_jsonl(self.metrics_file)
        measured = [row["policy/kl_sampler"] for row in rows if "policy/kl_sampler" in row]
        return {
            "rollout_engine": self.engine.name,
            "max_kl_sampler": max(measured, default=None),
            "policy_version": self.policy_version,
        }

    def sample(self, batch: int) -> list[Rollout]:
        """This rank's share of a rollout batch."""
        rollout, ranks, rank = self.config.rollout, self.accelerator.num_processes, self.accelerator.process_index
        chosen = prompts_of_batch(len(self.prompts), batch, rollout.prompts_per_batch, seed=self.config.seed)
        rollouts = self.engine.generate(
            [self.prompts[i] for i in chosen[rank::ranks]],
            samples_per_prompt=rollout.samples_per_prompt,
            temperature=rollout.temperature,
            max_new_tokens=rollout.max_new_tokens,
            seed=hash((self.config.seed, batch, rank)) & 0x7FFFFFFF,
        )
        stale = {r.policy_version for r in rollouts} - {self.policy_version}
        if stale:
            raise RuntimeError(
                f"rollouts come from policy version {min(stale)} while the trainer is at {self.policy_version}; the engine missed a weight push"
            )
        return rollouts

    def score(self, rollouts: Sequence[Rollout]) -> Experience:
        """Scores of this rank's rollouts, with advantages over those of all ranks."""
        scores = self.reward_fn(rollouts)
        advantages = advantages_of(gather(self.accelerator, list(scores)), self.config)
        start = self.accelerator.process_index * len(scores)
        return score_rollouts(rollouts, scores, self.config, advantages[start : start + len(scores)])

    def update(self, experience: Experience, metrics: Metrics) -> None:
        """The optimizer steps of one rollout batch."""
        training, size = self.config.training, self.config.rollout.samples_per_prompt
        num_groups = len(experience.rollouts) // size
        per_minibatch = num_groups // training.minibatches_per_batch
        minibatches = [
            [g * size + s for g in range(m * per_minibatch, (m + 1) * per_minibatch) for s in range(size)]
            for m in range(training.minibatches_per_batch)
        ]
        plans = [self._plan(experience, rows) for rows in minibatches]
        # The first step is on policy: its old log-probabilities are its own. Later ones need them before the weights move.
        old = [[self._logprobs(micro) for micro, _ in plan] if m else None for m, plan in enumerate(plans)]
        for _ in range(training.passes_per_batch):
            for m, plan in enumerate(plans):
                old[m] = self._optimizer_step(plan, old[m], metrics)

    # ------------------------------------------------------------------------------------------------------- one optimizer step

    def _plan(self, experience: Experience, rows: list[int]) -> list[tuple[Batch, Tensor]]:
        """Micro-batches of one optimizer step, each with the weight of its tokens; the same number on every rank.

        Sequences without advantage have no gradient unless a KL penalty or an entropy bonus gives them one, so they are not
        computed; the denominator counts them all the same.
        """
        lengths = torch.tensor([len(experience.rollouts[i].token_ids) if experience.trained[i] else 0 for i in rows])
        all_lengths = torch.tensor(gather(self.accelerator, lengths.tolist()))
        weights = token_weights(
            all_lengths, self.config.algorithm.aggregation, max_length=self.config.rollout.max_new_tokens
        )
        offset = self.accelerator.process_index * len(rows)
        weight_of = dict(zip(rows, weights[offset : offset + len(rows)].tolist(), strict=True))
        everything = self.reference is not None or self.config.algorithm.entropy_coefficient > 0
        needed = [i for i in rows if experience.trained[i] and (experience.advantages[i] != 0 or everything)]
        chunks = (shared_chunks if self.shares_prompts else padded_chunks)(
            experience.rollouts, needed, self.config.training.tokens_per_micro_batch
        )
        nothing = torch.zeros_like(experience.trained)
        plan = [self._pack(experience, chunk, experience.trained, weight_of) for chunk in chunks]
        idle = global_max(self.accelerator, max(1, len(chunks))) - len(chunks)
        return plan + [self._pack(experience, rows[:1], nothing, weight_of) for _ in range(idle)]

    def _pack(
        self, experience: Experience, rows: list[int], trained: Tensor, weight_of: dict[int, float]
    ) -> tuple[Batch, Tensor]:
        if self.shares_prompts:
            batch = pack_shared(experience.rollouts, rows, experience.advantages, trained)
        else:
            batch = pack_padded(
                experience.rollouts, rows, experience.advantages, trained, pad_token_id=self.pad_token_id
            )
        return batch, torch.tensor([weight_of[i] for i in batch.rows])[batch.sequences]

    @torch.no_grad()
    def _logprobs(self, batch: Batch, model: Any | None = None) -> Tensor:
        """[N] log-probabilities of the trained targets, without gradient."""
        return (model or self.policy)(batch, self.config.rollout.temperature)[0]

    def _optimizer_step(
        self, plan: list[tuple[Batch, Tensor]], old: list[Tensor] | None, metrics: Metrics
    ) -> list[Tensor]:
        """One optimizer step; returns the old log-probabilities it used, for later passes."""
        algorithm = self.config.algorithm
        used: list[Tensor] = []
        total_loss = 0.0
        local = Metrics()
        for i, (batch, weights) in enumerate(plan):
            last = i == len(plan) - 1
            with micro_batch(self.accelerator, self.policy, last=last):
                logprobs, entropy = self.policy(batch, self.config.rollout.temperature)
                device = logprobs.device
                old_logprobs = logprobs.detach() if old is None else old[i]
                advantages, sequences = batch.advantages.to(device), batch.sequences.to(device)
                sampler_logprobs = batch.sampler_logprobs.to(device)
                ratio = (
                    sequence_ratio(logprobs, old_logprobs, sequences)
                    if algorithm.loss == "sequence_clipped"
                    else token_ratio(logprobs, old_logprobs)
                )
                per_token = self._policy_loss(ratio, logprobs, advantages)
                if algorithm.sampler_correction != "none":
                    correction = sampler_correction(
                        old_logprobs,
                        sampler_logprobs,
                        sequences,
                        level=algorithm.sampler_correction_level,
                        mode=algorithm.sampler_correction,
                        max_ratio=algorithm.sampler_correction_max,
                    )
                    per_token = per_token * correction
                    local.add("policy/sampler_correction", total=correction.sum().item(), count=correction.numel())
                if algorithm.entropy_coefficient > 0:
                    per_token = per_token - algorithm.entropy_coefficient * entropy
                if self.reference is not None:
                    kl = KL[algorithm.kl_estimator](logprobs, self._logprobs(batch, self.reference))
                    per_token = per_token + algorithm.kl_coefficient * kl
                    local.add("policy/kl_reference", total=kl.sum().item(), count=kl.numel())
                loss = (per_token * weights.to(device)).sum()  # 0, with a gradient of 0, on an idle pass
                self._describe_tokens(local, ratio, advantages, entropy, k3(sampler_logprobs, old_logprobs))
                local.add("train/tokens", total=batch.num_tokens, count=1)
                self._require_finite(loss)
                total_loss += loss.item()
                if last:
                    self._check_kl(local)
                # Ranks average their gradients; the weights already carry the denominator of all of them.
                self.accelerator.backward(loss * self.accelerator.num_processes)
            used.append(old_logprobs)
        norm = clip_and_step(
            self.accelerator, self.policy, self.optimizer, self.scheduler, self.config.optimizer.max_grad_norm
        )
        self.policy_version += 1
        metrics.add("policy/grad_norm", total=norm, count=1)
        metrics.add("policy/loss", total=total_loss * self.accelerator.num_processes, count=1)
        for key, (total, count) in local.pairs().items():
            metrics.add(key, total=total, count=count)
        return used

    # ------------------------------------------------------------------------------------------------------- metrics and guards

    def _policy_loss(self, ratio: Tensor, logprobs: Tensor, advantages: Tensor) -> Tensor:
        algorithm = self.config.algorithm
        match algorithm.loss:
            case "clipped" | "sequence_clipped":
                return clipped_policy_loss(
                    ratio,
                    advantages,
                    clip_low=algorithm.clip_low,
                    clip_high=algorithm.clip_high,
                    ceiling=algorithm.ratio_ceiling,
                )
            case "cispo":
                return cispo_loss(ratio, logprobs, advantages, max_ratio=1 + algorithm.clip_high)
            case "sapo":
                return sapo_loss(
                    ratio,
                    advantages,
                    temperature_positive=algorithm.sapo_temperature_positive,
                    temperature_negative=algorithm.sapo_temperature_negative,
                )

    @torch.no_grad()
    def _describe_tokens(
        self, metrics: Metrics, ratio: Tensor, advantages: Tensor, entropy: Tensor, kl_sampler: Tensor
    ) -> None:
        algorithm = self.config.algorithm
        clipped = is_clipped(ratio, advantages, clip_low=algorithm.clip_low, clip_high=algorithm.clip_high)
        for name, values in (
            ("clip_fraction", clipped),
            ("ratio", ratio),
            ("entropy", entropy),
            ("kl_sampler", kl_sampler),
        ):
            metrics.add(f"policy/{name}", total=values.sum().item(), count=values.numel())

    def _check_kl(self, metrics: Metrics) -> None:
        """Before the step is taken: the engine and the trainer must be the same policy."""
        kl = reduce_metrics(gather(self.accelerator, [metrics.pairs()])).get("policy/kl_sampler", 0.0)
        bound = self.config.guards.max_kl_sampler
        if not kl <= bound:
            raise RuntimeError(
                f"policy/kl_sampler is {kl:.3g} nats per token, above guards.max_kl_sampler {bound:g}: the engine that samples is not the policy "
                "that is trained. Look at sync/error in metrics.jsonl (stale weights), at rollout.temperature, at rollout.dtype against the "
                "trainer's, and for MoE models at router disagreement"
            )

    def _require_one_policy(self, level: float) -> None:
        levels = gather(self.accelerator, [level])
        if max(levels) - min(levels) > 1e-5:
            raise RuntimeError(
                f"the ranks hold different policies: the mean log-probability of the same tokens is {min(levels):.6f} on one and {max(levels):.6f} on "
                "another after the same steps, so gradients were not shared; check the accelerate configuration against recipes/accelerate/"
            )

    def _require_finite(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()}; the step is not taken and nothing is saved: lower optimizer.learning_rate or look at the rewards"
            )

    def _describe(self, experience: Experience, metrics: Metrics) -> None:
        """Metrics of the rollouts; stops the run when too many could not be judged."""
        size = self.config.rollout.samples_per_prompt
        for rollout, score in zip(experience.rollouts, experience.scores, strict=True):
            metrics.add("rollout/length", total=len(rollout.token_ids), count=1)
            metrics.add("rollout/truncated", total=rollout.finish_reason == "length", count=1)
            metrics.add("rollout/undecided", total=score.value is None, count=1)
            if score.value is not None:
                metrics.add("reward/total", total=score.value, count=1)
                metrics.add("reward/correctness", total=score.verdict == "correct", count=1)
                for name, value in score.components.items():
                    if name != "correctness":
                        metrics.add(f"reward/{name}", total=value, count=1)
        for start in range(0, len(experience.scores), size):
            values = torch.tensor(
                [s.value if s.value is not None else float("nan") for s in experience.scores[start : start + size]]
            )
            if not values.isnan().any():
                metrics.add("reward/group_std", total=values.std().item(), count=1)
                metrics.add("reward/groups_with_signal", total=bool((values != values[0]).any()), count=1)
        share = reduce_metrics(gather(self.accelerator, [metrics.pairs()]))["rollout/undecided"]
        if share > self.config.guards.max_undecided_share:
            reasons = sorted({score.reason for score in experience.scores if score.value is None})
            raise RuntimeError(
                f"{share:.0%} of the completions could not be judged, above guards.max_undecided_share {self.config.guards.max_undecided_share:.0%} "
                f"(reasons here: {'; '.join(reasons[:3])}); repair the references or the grader, nothing was learnt from this batch"
            )

    @contextmanager
    def _timed(self, metrics: Metrics, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        metrics.add(f"seconds/{name}", total=time.perf_counter() - started, count=1)
