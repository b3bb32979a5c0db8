"""Two optimizer steps on stored rollouts, for some members of the family, under `accelerate launch` with any number of ranks.

OUTPUT NAME=MODEL ...: the members whose model is among the names.
"""

import os
import random
import sys
from pathlib import Path

import torch
from accelerate.utils import set_seed
from loop_on_ranks import follow_the_past
from safetensors.torch import load_file, save_file

from reward_models.outcome import OutcomeModel
from reward_models.process import ProcessModel, Solution
from rlhf.config import PPO, load_config
from rlhf.critic import load_critic
from rlhf.distributed import gather, is_sharded, leave, optimizer_state, start, whole, zero_stage
from rlhf.experience import Ranks, estimate
from rlhf.lora import adapt
from rlhf.metrics import Metrics
from rlhf.models import load_causal_lm
from rlhf.retention import Remembered
from rlhf.shapes import moe_blocks
from rlhf.types import Prompt, Rollout, Score
from rlhf.updater import Updater

ROOT = Path(__file__).parents[1]
GROUPS, SAMPLES = 6, 3
FAMILY = {
    "grpo": ("base", "grpo", "algorithm.advantage=batch_normalised", "optimizer.warmup_steps=2"),
    "entropy": (
        "base",
        "grpo",
        "algorithm.top_entropy_share=0.3",
        "algorithm.entropy_coefficient=0.1",
        "policy.lora={rank: 4}",
    ),
    "four bits": ("four_bits", "grpo", "policy.lora={rank: 4}", "policy.quantization=nf4"),
    "average": (
        "base",
        "grpo",
        "reference={kind: moving_average, mix: 0.5, every_steps: 1}",
        "algorithm.kl_coefficient=0.1",
    ),
    "frozen": ("base", "grpo", "reference={kind: frozen, path: the model}", "algorithm.kl_coefficient=0.1"),
    "retained": (
        "retained",
        "grpo",
        "retention.elastic={fisher: made here, coefficient: 10}",
        "retention.ptx={demonstrations: some rollouts, coefficient: 0.5, tokens_per_step: 60}",
    ),
    "ptx": ("base", "grpo", "retention.ptx={demonstrations: some rollouts, coefficient: 0.5, tokens_per_step: 60}"),
    "moe": ("moe", "grpo", "optimizer.warmup_steps=2", "policy.router_aux_coefficient=1"),
    "mixtral": (
        "mixtral",
        "grpo",
        "policy.router_aux_coefficient=1",
        "policy.router_replay=true",
        "rollout.record_experts=true",
    ),
    "ppo": (
        "base",
        "ppo",
        "reference=null",
        "algorithm.kl_coefficient=0",
        "critic.warmup_batches=0",
        "critic.optimizer.max_grad_norm=0.01",  # another than the policy's
    ),
}


def stored_rollouts():
    """Groups of uneven lengths, one without signal and one that could not be judged, so that ranks need different numbers of passes."""
    draw = random.Random(0)
    rollouts, scores = [], []
    for g in range(GROUPS):
        tokens = tuple(draw.randrange(5, 200) for _ in range(10 + 5 * g))
        prompt = Prompt(id=str(g), token_ids=tokens, question="", reference="")
        for s in range(SAMPLES):
            length = draw.randrange(1, 30)
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    token_ids=tuple(draw.randrange(5, 200) for _ in range(length)),
                    logprobs=tuple(draw.uniform(-6, -5) for _ in range(length)),
                    finish_reason="stop",
                    text="",
                    policy_version=0,
                    routed_experts=torch.tensor(
                        [[draw.sample(range(4), 2) for _ in range(2)] for _ in range(len(tokens) + length - 1)]
                    ),
                )
            )
            value = None if (g, s) == (4, 1) else 1.0 if g == 2 else float(draw.random() < 0.5)
            scores.append(Score(verdict="undecided" if value is None else "wrong", value=value))
    return rollouts, scores


def whole_parameters(module):
    for key, parameter in module.named_parameters():
        with whole([parameter]):
            yield key, parameter.detach()


def build(recipe, model, *overrides):
    """Config, accelerator and updater of a member."""
    config = load_config(
        ROOT / f"recipes/tiny/{recipe}.yaml",
        [
            f"rollout.prompts_per_batch={GROUPS}", f"rollout.samples_per_prompt={SAMPLES}", "rollout.max_new_tokens=30", "rollout.max_prompt_tokens=40",
            "training.minibatches_per_batch=1", "training.passes_per_batch=2", "training.tokens_per_micro_batch=80", "optimizer.warmup_steps=0",
            "rewards=[{name: correctness}]", "guards.max_kl_sampler=1e9", "guards.max_router_disagreement=1",
            *overrides,
        ],
    )  # fmt: skip
    accelerator = start(config.seed)
    policy = load_causal_lm(model, revision=None, dtype="float32")
    set_seed(1)
    if config.policy.lora:
        adapt(policy, config.policy)
    critic = None
    if isinstance(config, PPO):
        critic = load_critic(config.critic.model_copy(update={"path": model}))
        with whole([critic.score.weight], write=True):
            torch.nn.init.normal_(critic.score.weight, std=0.3)
    frozen = config.reference is not None and config.reference.kind == "frozen"
    reference = load_causal_lm(model, revision=None, dtype="float32") if frozen else None
    torch.manual_seed(2)
    remembered = Remembered(
        fisher={name: torch.rand(p.shape) for name, p in policy.named_parameters()}
        if config.retention.elastic
        else None,
        demonstrations=stored_rollouts()[0][:5] if config.retention.ptx else (),
    )
    updater = Updater(
        config, accelerator, policy=policy, reference=reference, critic=critic, pad_token_id=0, remembered=remembered
    )
    return config, accelerator, updater


def experience_of(config, accelerator, updater):
    """This rank's share of the stored rollouts, judged."""
    rollouts, scores = stored_rollouts()
    share = len(rollouts) // accelerator.num_processes
    own = slice(accelerator.process_index * share, (accelerator.process_index + 1) * share)
    values = updater.values(rollouts[own]) if updater.critic is not None else None
    ranks = Ranks(lambda items: gather(accelerator, items), accelerator.process_index)
    return estimate(rollouts[own], scores[own], config, ranks=ranks, values=values)


def weights_of(updater):
    return {
        f"{name}.{key}": tensor.float().clone()
        for name, learner in updater.learners.items()
        for key, tensor in whole_parameters(learner.unwrapped)
    }


def take_steps(recipe, model, *overrides):
    """Weights of everything trained, and gradient norms, after the steps."""
    config, accelerator, updater = build(recipe, model, *overrides)
    if zero_stage(accelerator) == 3:
        for learner in updater.learners.values():
            assert all(block._z3_leaf for _, block in moe_blocks(learner.unwrapped)), "a block of experts is no leaf"
    for name, learner in updater.learners.items():
        bound = (config.optimizer if name == "policy" else config.critic.optimizer).max_grad_norm
        engine_bound = learner.module.gradient_clipping() if hasattr(learner.module, "gradient_clipping") else bound
        assert engine_bound == bound, f"{name} is clipped at {engine_bound} and not at {bound}"
    metrics = Metrics()
    updater.update(experience_of(config, accelerator, updater), metrics)
    # AdamW's first steps are as large whatever the gradient's scale; its norm tells.
    norms = {key: torch.tensor(v) for key, (v, _) in metrics.pairs().items() if key.endswith("grad_norm")}
    return weights_of(updater) | norms


def largest_error_of_masters(model):
    """Of the float32 weights that an optimizer starts to step, against the file's."""
    _, accelerator, updater = build("grpo", model)
    masters, _ = optimizer_state(accelerator, updater.unwrapped, updater.policy.optimizer)
    file = load_file(Path(model) / "model.safetensors")
    return (
        {"masters.error": torch.stack([(masters[name].float() - file[name]).abs().max() for name in masters]).max()}
        if masters
        else {}
    )


def survives_a_poisoned_gradient(model):
    """How many ranks stopped when the first rank's gradient was not a number, and how many weights had changed by then."""
    config, accelerator, updater = build("grpo", model)
    before, stopped = weights_of(updater), False
    if accelerator.is_main_process:
        next(updater.unwrapped.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    try:
        updater.update(experience_of(config, accelerator, updater), Metrics())
    except FloatingPointError:
        stopped = True
    changed = sum(int((after != before[name]).sum()) for name, after in weights_of(updater).items())
    return {
        "poisoned.running": torch.tensor(gather(accelerator, [stopped]).count(False)),
        "poisoned.changed": torch.tensor(changed),
    }


def scores_of_a_sharded_judge(model):
    """By a frozen reward model in pieces: of 5 sequences the first rank has all, then the last one, and then every rank the 5."""
    accelerator = start(0)
    judge = OutcomeModel.load(model, device=str(accelerator.device)).shard(accelerator)
    if zero_stage(accelerator) == 3:
        assert any(is_sharded(p) and p.numel() == 0 for p in judge._model.parameters()), "the reward model is whole"
    draw = random.Random(0)
    sequences = [[draw.randrange(5, 200) for _ in range(length)] for length in (3, 9, 4, 17, 6)]
    first, last = accelerator.process_index == 0, accelerator.process_index == accelerator.num_processes - 1
    counts = (5 if first else 0, 5 if last else 0, 5)
    scores = [judge.raw_scores(sequences[:count], batch_size=2) for count in counts]
    one, other = (torch.tensor(gather(accelerator, of_rank.tolist())) for of_rank in scores[:2])
    return {"judge.first": one, "judge.last": other, "judge.every": scores[2]}


def steps_judged_in_pieces(model):
    """By a frozen process model in pieces: of 5 solutions the first rank has all, then the last one, and then every rank the 5."""
    accelerator = start(0)
    judge = ProcessModel.load(model, device=str(accelerator.device)).shard(accelerator)
    if zero_stage(accelerator) == 3:
        assert any(is_sharded(p) and p.numel() == 0 for p in judge._model.parameters()), "the process model is whole"
    draw = random.Random(0)
    solutions = [
        Solution(input_ids=[draw.randrange(5, 200) for _ in range(length)], start=1, ends=[length // 2, length - 1])
        for length in (4, 9, 5, 17, 6)
    ]
    first, last = accelerator.process_index == 0, accelerator.process_index == accelerator.num_processes - 1
    counts = (5 if first else 0, 5 if last else 0, 5)
    found = [judge.probabilities(solutions[:count], tokens_per_batch=20) for count in counts]  # 3 or 4 passes
    one, other = (torch.tensor(gather(accelerator, of_rank)) for of_rank in found[:2])
    return {"process.first": one, "process.last": other, "process.every": torch.tensor(found[2])}


def main(output, *named_models):
    models = dict(pair.split("=", 1) for pair in named_models)
    weights = {
        f"{name}.{key}": value
        for name, (model, recipe, *overrides) in FAMILY.items()
        if model in models
        for key, value in take_steps(recipe, models[model], *overrides).items()
    }
    if "masters" in models:
        weights |= largest_error_of_masters(models["masters"])
    if "base" in models:
        weights |= survives_a_poisoned_gradient(models["base"])
    if "judge" in models:
        weights |= scores_of_a_sharded_judge(models["judge"])
    if "process" in models:
        weights |= steps_judged_in_pieces(models["process"])
    if "past" in models:
        weights |= follow_the_past(models["base"], Path(models["past"]), Path(output).with_name("past"))
    if int(os.environ.get("RANK", "0")) == 0:
        save_file(weights, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
