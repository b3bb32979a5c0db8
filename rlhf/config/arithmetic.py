"""What one step of a training stage consists of."""

from __future__ import annotations

from rlhf.config.loading import Config
from rlhf.config.models import Model
from rlhf.config.offline import SFT, Offline, ProcessRewardModel
from rlhf.config.online import PPO, Online


def trained_model(config: Config) -> Model | None:
    """The block of the model that a training stage trains; a critic besides it is not quantised."""
    return config.policy if isinstance(config, Online) else config.model if isinstance(config, Offline) else None


def batch_arithmetic(config: Config, num_ranks: int) -> list[tuple[str, str]]:
    """What one step of a training stage consists of, as (quantity, value) rows; empty for the other stages.

    Raises:
        ValueError: when the numbers do not divide over `num_ranks`.
    """
    if isinstance(config, Offline):
        kinds = {SFT: "demonstrations", ProcessRewardModel: "solutions"}
        training, what = config.training, kinds.get(type(config), "pairs")
        accumulation = training.accumulation(num_ranks)
        return [
            ("ranks", f"{num_ranks}"),
            (
                f"{what} per optimizer step",
                f"{training.sequences_per_step:,} = {training.micro_batch_size} per micro-batch x {num_ranks} ranks x {accumulation} accumulated",
            ),
            ("longest sequence", f"{config.max_tokens:,} tokens"),
            ("optimizer steps", f"{training.num_steps:,}"),
            (f"{what} seen", f"{training.num_steps * training.sequences_per_step:,}"),
        ]
    if not isinstance(config, Online):
        return []
    rollout, training = config.rollout, config.training
    if rollout.prompts_per_batch % (num_ranks * training.minibatches_per_batch):
        raise ValueError(
            f"rollout.prompts_per_batch is {rollout.prompts_per_batch}, not a multiple of ranks x training.minibatches_per_batch = "
            f"{num_ranks} x {training.minibatches_per_batch}; change one of them"
        )
    completions = rollout.prompts_per_batch * rollout.samples_per_prompt
    warmup = config.critic.warmup_batches if isinstance(config, PPO) else 0
    moving = training.num_batches - warmup
    group = rollout.max_prompt_tokens + rollout.samples_per_prompt * rollout.max_new_tokens
    steps_per_batch = training.minibatches_per_batch * training.passes_per_batch
    policy = (
        "on policy"
        if steps_per_batch == 1
        else f"off policy by up to {steps_per_batch - 1} steps, corrected by the clipped ratio"
    )
    if training.max_staleness > 0:
        older = training.max_staleness * steps_per_batch
        before = (
            "the batch before is" if training.max_staleness == 1 else f"the {training.max_staleness} batches before are"
        )
        policy += f"; sampled while {before} trained on, {older} steps older, corrected by algorithm.sampler_correction"
    return [
        ("ranks", f"{num_ranks}"),
        (
            "completions per rollout batch",
            f"{completions:,} = {rollout.prompts_per_batch} prompts x {rollout.samples_per_prompt} samples",
        ),
        (
            "tokens sampled per rollout batch",
            f"at most {completions * rollout.max_new_tokens * (1 + rollout.refill_rounds):,}"
            + (f", refills of up to {rollout.refill_rounds} rounds included" if rollout.refill_rounds else ""),
        ),
        (
            "completions per optimizer step",
            f"{completions // training.minibatches_per_batch:,} ({completions // training.minibatches_per_batch // num_ranks:,} per rank)",
        ),
        ("micro-batch", f"at most {training.tokens_per_micro_batch:,} tokens per rank"),
        (
            "longest possible group",
            f"{group:,} tokens, "
            + (
                "fits into a micro-batch"
                if group <= training.tokens_per_micro_batch
                else "more than a micro-batch: its prompt is computed once for each piece"
            ),
        ),
        (
            "rollout batches",
            f"{training.num_batches:,}" + (f", the first {warmup} train the critic alone" if warmup else ""),
        ),
        (
            "optimizer steps",
            f"{moving * steps_per_batch:,} = {moving} batches x {training.minibatches_per_batch} mini-batches x {training.passes_per_batch} passes",
        ),
        ("data is", policy),
    ]
