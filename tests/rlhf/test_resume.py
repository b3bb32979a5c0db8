"""A run resumed at any optimizer step ends as the uninterrupted one, bit for bit."""

import resource
import shutil
from dataclasses import replace

import pytest
import torch
from online_helpers import config, count_of_a_token, ppo
from safetensors.torch import load_file

from rlhf.checkpoint import read_state
from rlhf.metrics import CLOCK, read_jsonl, truncate_jsonl
from rlhf.models import load_causal_lm
from rlhf.retention import NOTHING
from rlhf.run import git_revision

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
    "grpo that remembers": (
        config,
        (
            "retention.elastic={fisher: given, coefficient: 1000}", "retention.ptx={demonstrations: given, coefficient: 0.5, tokens_per_step: 150}",
            "retention.adaptive={steers: ptx, problems: given, every_batches: 1, max_fall: 0.001}",
        ),
    ),
}  # fmt: skip


def rows_of(trainer):
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_jsonl(trainer.metrics_file)]


def weights_of(trainer):
    return [
        *(p.detach() for learner in trainer.updater.learners.values() for p in learner.unwrapped.parameters()),
        *(p for follower in trainer.updater.followers.values() for p in follower.state_dict().values()),
    ]


@pytest.mark.parametrize("member", FAMILY)
def test_resumed_at_any_optimizer_step_a_run_ends_bit_for_bit_as_the_uninterrupted_one(
    make_trainer, remembered, member
):
    recipe, options = FAMILY[member]
    given = {"recipe": recipe, "remembered": remembered if "remembers" in member else NOTHING}
    whole = make_trainer(*EVERY_STEP, *options, folder="whole", **given)
    whole.train()
    checkpoints = sorted(path.name for path in whole.checkpoints.iterdir())
    assert checkpoints == [f"step-{step:06d}" for step in range(1, 8)]
    rows, weights = rows_of(whole), weights_of(whole)
    for name in checkpoints:
        torch.manual_seed(1)  # what the new process makes of its generators is overwritten
        killed = whole.run.folder.with_name(name)
        shutil.copytree(whole.checkpoints / name, killed / "checkpoints" / name)
        shutil.copy(whole.metrics_file, killed)
        resumed = make_trainer(*EVERY_STEP, *options, folder=name, **given)
        assert 4 * resumed.first_batch + (resumed.under_way.steps_taken if resumed.under_way else 0) == int(name[5:])
        resumed.train()
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True)), name
        assert rows_of(resumed) == rows, name


def test_a_run_whose_disk_fills_up_stops_and_goes_on_once_there_is_room(make_trainer):
    whole = make_trainer(*EVERY_STEP, folder="whole")
    whole.train()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    batches = []

    def full_in_the_second_batch(rollouts):
        batches.append(len(rollouts))
        if len(batches) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))  # metrics fit, weights do not
        return count_of_a_token(rollouts)

    stopped = make_trainer(*EVERY_STEP, folder="stopped", reward_fn=full_in_the_second_batch)
    try:
        with pytest.raises(
            OSError, match=r"checkpoint of step 5 could not be written.*make room.*resume from step-000004"
        ):
            stopped.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    resumed = make_trainer(*EVERY_STEP, folder="stopped")
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights_of(whole), weights_of(resumed), strict=True))
    assert rows_of(resumed) == rows_of(whole)


def test_a_newest_checkpoint_that_is_damaged_costs_a_step_and_changes_nothing(make_trainer, capsys):
    whole = make_trainer(*EVERY_STEP)
    whole.train()
    rows, weights = rows_of(whole), weights_of(whole)
    file = whole.checkpoints / "step-000007/policy.optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 4
    file.write_bytes(content)
    resumed = make_trainer(*EVERY_STEP)
    said = capsys.readouterr().out
    assert "checkpoint step-000007 is damaged, policy.optimizer.safetensors has SHA-256" in said
    assert "resuming after batch 1 and 2 optimizer steps of the next" in said
    resumed.train()
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True))
    assert rows_of(resumed) == rows


def test_the_best_policy_is_kept_and_saved(make_trainer, renderer):
    falling = iter([1.0, 3.0, 2.0, 1.5])

    def reward(rollouts):
        level = next(falling)
        return [replace(score, value=score.value + level) for score in count_of_a_token(rollouts)]

    trainer = make_trainer(
        "training.checkpoint_every=1",
        "training.keep_checkpoints=1",
        "training.keep_best=reward/total",
        reward_fn=reward,
    )
    trainer.train()
    assert [path.name for path in sorted(trainer.checkpoints.iterdir())] == ["step-000002", "step-000003"]
    trained = [p.clone() for p in trainer.unwrapped.parameters()]
    trainer.save(renderer.tokenizer)
    best = load_file(trainer.checkpoints / "step-000002/policy.weights.safetensors")
    saved = load_causal_lm(str(trainer.run.folder / "best"), revision=None, dtype="float32")
    assert all(torch.equal(p, best[f"model.{name}"]) for name, p in saved.named_parameters())
    last = load_causal_lm(str(trainer.run.folder), revision=None, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(last.parameters(), trained, strict=True))


def test_a_checkpoint_holds_no_pickle_and_says_what_made_it(make_trainer):
    trainer = make_trainer(*EVERY_STEP)
    trainer.train()
    checkpoint = trainer.checkpoints / "step-000006"
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    state = read_state(checkpoint)
    assert state["recipe"] == trainer.config.model_dump(mode="json")
    assert (state["batch"], state["step"], state["policy_version"], state["ranks"]) == (1, 6, 6, 1)
    assert state["git"] == git_revision()
    assert state["prompts_used"] == 2 * trainer.config.rollout.prompts_per_batch


def test_rows_after_the_checkpoint_and_one_that_a_kill_cut_off_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"batch": 1}\n{"batch": 2}\n{"batch": 3}\n{"bat')
    truncate_jsonl(path, key="batch", below=3)
    assert read_jsonl(path) == [{"batch": 1}, {"batch": 2}]
