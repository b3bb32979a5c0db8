"""A run resumed at any optimizer step ends as the uninterrupted one, bit for bit."""

import shutil

import pytest
import torch
from online_helpers import config, ppo

from rlhf.metrics import CLOCK, read_jsonl

EVERY_STEP = (
    "training.num_batches=2", "training.minibatches_per_batch=2", "training.passes_per_batch=2",
    "training.checkpoint_every_steps=1", "training.keep_checkpoints=100", "optimizer.warmup_steps=3",
)  # fmt: skip
FAMILY = {
    "grpo": (config, ()),
    "grpo with all that adapts": (
        config,
        (
            "algorithm.kl_coefficient=0.1", "algorithm.kl_target=0.01", "algorithm.entropy_target=1.0",
            "reference={kind: moving_average, every_steps: 1, mix: 0.5}", "algorithm.top_entropy_share=0.3", "algorithm.sampler_correction=truncate",
        ),
    ),
    "grpo with adapters, padded": (config, ("policy.lora={rank: 2}", "training.layout=padded", "training.tokens_per_micro_batch=200")),
    "ppo": (ppo, ("critic.warmup_batches=1",)),
}  # fmt: skip


def rows_of(trainer):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_jsonl(trainer.metrics_file)]


def weights_of(trainer):
    return [
        *(p.detach() for learner in trainer.updater.learners.values() for p in learner.unwrapped.parameters()),
        *(p for module in trainer.updater.followers.values() for p in module.parameters()),
    ]


@pytest.mark.parametrize("member", FAMILY)
def test_resumed_at_any_optimizer_step_a_run_ends_bit_for_bit_as_the_uninterrupted_one(make_trainer, member):
    recipe, options = FAMILY[member]
    whole = make_trainer(*EVERY_STEP, *options, folder="whole", recipe=recipe)
    whole.train()
    checkpoints = sorted(path.name for path in whole.checkpoints.iterdir())
    assert checkpoints == [f"step-{step:06d}" for step in range(1, 8)]
    rows, weights = rows_of(whole), weights_of(whole)
    for name in checkpoints:
        torch.manual_seed(1)  # what the new process makes of its generators is overwritten
        killed = whole.run.folder.with_name(name)
        shutil.copytree(whole.checkpoints / name, killed / "checkpoints" / name)
        shutil.copy(whole.metrics_file, killed)
        resumed = make_trainer(*EVERY_STEP, *options, folder=name, recipe=recipe)
        assert 4 * resumed.first_batch + (resumed.under_way.steps_taken if resumed.under_way else 0) == int(name[5:])
        resumed.train()
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True)), name
        assert rows_of(resumed) == rows, name
