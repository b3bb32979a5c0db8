"""A run of the online loop whose past decides what comes next: a curriculum, a replay buffer and a coefficient that follows a held-out ability."""

import random
import shutil
import zlib
from pathlib import Path

import torch

from rlhf.config import load_config
from rlhf.distributed import gather, loaded_whole, start, whole
from rlhf.models import load_causal_lm
from rlhf.retention import Remembered
from rlhf.rollout.transformers import TransformersEngine
from rlhf.run import Run, num_ranks
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import Prompt, Rollout, Score
from rlhf.weight_sync import Probe

RECIPE = Path(__file__).parents[1] / "recipes/tiny/grpo.yaml"
MIDDLE = "step-000005"
"""A checkpoint inside a rollout batch, of two steps each."""
OPTIONS = (
    "curriculum={kind: replay, rest_batches: 0, pools: {min_completions: 3, revisit_batches: 2}}", "replay={}", "algorithm.sampler_correction=truncate",
    "retention.ptx={demonstrations: some rollouts, coefficient: 0.5, tokens_per_step: 20}",
    "retention.adaptive={steers: ptx, problems: some, every_batches: 1, max_fall: 0.01}", "rewards=[{name: correctness}]",
    "rollout.engine=transformers", "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=3", "rollout.refill_rounds=1",
    "rollout.max_new_tokens=6", "rollout.max_prompt_tokens=20", "training.num_batches=4", "training.minibatches_per_batch=1",
    "training.passes_per_batch=2", "training.tokens_per_micro_batch=80", "training.checkpoint_every_steps=1", "training.keep_checkpoints=100",
    "optimizer.warmup_steps=0", "guards.max_kl_stale=100", "guards.max_kl_sampler=1e-6",
)  # fmt: skip


class EngineOfProblems(TransformersEngine):
    """Completions depend on the problem and the policy, and not on which rank samples them beside which others."""

    def generate(self, prompts, sampling, *, seed):
        found = []
        for prompt in prompts:
            own = zlib.crc32(f"{prompt.id} {self.policy_version}".encode())
            found += super().generate([prompt], sampling, seed=own)
        return found


def judge(rollouts):
    """Problem 5 is always right; of the others a third of the completions, until the policy has taken four steps."""
    right = [r.prompt.id == "5" or (r.token_ids[0] % 3 == 0 and r.policy_version < 4) for r in rollouts]
    return [Score(verdict="correct" if r else "wrong", value=float(r)) for r in right]


def grade(rollouts):
    return [
        Score(verdict="correct" if r.token_ids[0] % 2 and r.policy_version < 6 else "wrong", value=0.0)
        for r in rollouts
    ]


def build(model, folder):
    draw = random.Random(0)

    def tokens(count):
        return tuple(draw.randrange(5, 200) for _ in range(count))

    prompts = [Prompt(id=str(i), token_ids=tokens(6 + i), question="", reference="") for i in range(8)]
    demonstrations = [
        Rollout(prompt=p, token_ids=tokens(7), logprobs=(0.0,) * 7, finish_reason="stop", text="", policy_version=0)
        for p in prompts[:5]
    ]
    config = load_config(RECIPE, OPTIONS)
    accelerator = start(config.seed)
    with loaded_whole(accelerator):
        engine = EngineOfProblems(config.rollout, model, revision=None, stop_token_id=0, decode=str)
    return OnlineTrainer(
        config,
        accelerator,
        policy=load_causal_lm(model, revision=None, dtype="float32"),
        engine=engine,
        prompts=prompts,
        reward_fn=judge,
        probes=[Probe(prompts[0].token_ids, (7, 8))],
        pad_token_id=0,
        run=Run(folder),
        remembered=Remembered(demonstrations=demonstrations, prompts=prompts[:5], grade=grade),
    )


def outcome(trainer):
    """What a run came to: its weights, its last row, and all that it remembers, of which every rank must hold the same."""
    row = trainer.train()[-1]
    of_buffer, document = trainer.replay.to_files()
    measured, retention = trainer.curriculum.state()["measured"], trainer.updater.retention.state()
    held = {
        **{f"replay.{name}": tensor.double() for name, tensor in of_buffer.items()},
        "replay.batches": torch.tensor(document["batches"]),
        "replay.problems": torch.tensor([int(p["id"]) for p in document["prompts"]]),
        "curriculum.measured": torch.tensor(measured),
        "curriculum.prompts_used": torch.tensor(trainer.prompts_used),
        "retention": torch.tensor([retention[key] for key in sorted(retention)]),
    }
    everywhere = gather(trainer.accelerator, [held])
    assert all(torch.equal(other[key], held[key]) for other in everywhere for key in held), "ranks remember differently"
    keys = ("policy/grad_norm", "curriculum/pass_rate", "curriculum/effective", "replay/rescued", "replay/size", "retention/factor",
            "rollout/refilled", "rollout/length")  # fmt: skip
    held |= {key: torch.tensor(row[key]) for key in keys}
    for name, parameter in trainer.unwrapped.named_parameters():
        with whole([parameter]):
            held[f"weights.{name}"] = parameter.detach().clone()
    return held


def follow_the_past(model, of_one_rank, own):
    """The outcomes of a run in the folder `own`, which one rank has in `of_one_rank`, and of one that goes on from the middle of one rank's."""
    trainer = build(model, of_one_rank if num_ranks() == 1 else own)
    whole_run = outcome(trainer)
    if trainer.accelerator.is_main_process:
        shutil.copytree(of_one_rank / "checkpoints" / MIDDLE, own / "resumed/checkpoints" / MIDDLE)
    trainer.accelerator.wait_for_everyone()
    rest = outcome(build(model, own / "resumed"))
    return {f"past.{k}": v for k, v in whole_run.items()} | {f"past resumed.{k}": v for k, v in rest.items()}
