"""PPO in the loop: the critic, the KL in the reward, and what else moves besides the policy."""

import dataclasses

import numpy as np
import pytest
import torch
from online_helpers import G, assert_same, count_of_a_token, ppo, sample
from torch.testing import assert_close

from rlhf.config import load_config
from rlhf.experience import Ranks, estimate
from rlhf.kl import k1
from rlhf.metrics import Metrics, read_jsonl
from rlhf.types import Score, StepReward


def experience(trainer, values=None, steps=None):
    rollouts = sample(trainer)
    scores = count_of_a_token(rollouts)
    if values is not None:
        scores = [Score(verdict="undecided" if v is None else "wrong", value=v) for v in values]
    if steps is not None:
        scores = [dataclasses.replace(s, steps=steps) for s in scores]
    return trainer.judge(rollouts, scores, Metrics())


def give_values(trainer):
    """A head that is not 0, so that values differ."""
    torch.manual_seed(1)
    head = trainer.updater.critic.unwrapped.model.score.weight
    with torch.no_grad():
        head.copy_(torch.randn_like(head) * 0.3)


def plain_values(trainer, rollout):
    """The critic's predictions from one unpadded sequence."""
    tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:-1]]])
    model = trainer.updater.critic.unwrapped.model
    with torch.no_grad():
        states = model.base_model(input_ids=tokens).last_hidden_state[0, len(rollout.prompt.token_ids) - 1 :]
        return model.score(states).squeeze(-1)


def test_advantages_and_returns_are_those_of_a_plain_loop_over_sequences(make_trainer, model_folder):
    trainer = make_trainer(
        f"reference={{path: {model_folder}}}", "algorithm.kl_coefficient=0.2", "algorithm.whiten=false", recipe=ppo
    )
    give_values(trainer)
    exp = experience(trainer, steps=(StepReward(2, 0.5),))
    reference = trainer.updater.reference.scorer.model
    for i, (rollout, score) in enumerate(zip(exp.rollouts, exp.scores, strict=True)):
        values = plain_values(trainer, rollout).numpy()
        tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = reference(input_ids=tokens[:, :-1]).logits[0, len(rollout.prompt.token_ids) - 1 :]
        reference_logprobs = torch.log_softmax(logits, -1)[range(len(rollout.token_ids)), list(rollout.token_ids)]
        rewards = (-0.2 * k1(torch.tensor(rollout.logprobs), reference_logprobs)).numpy()
        rewards[-1] += score.value
        rewards[2] += 0.5
        advantage, following, expected = 0.0, 0.0, np.zeros_like(rewards)
        for t in reversed(range(len(rewards))):
            advantage = rewards[t] + following - values[t] + 0.95 * advantage
            expected[t], following = advantage, values[t]
        assert_close(exp.advantages[i], torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
        assert_close(exp.returns[i], torch.from_numpy(expected + values), atol=1e-5, rtol=1e-4)


def test_whitened_advantages_have_mean_0_and_deviation_1_over_the_tokens_of_all_ranks(make_trainer):
    trainer = make_trainer(recipe=ppo)
    give_values(trainer)
    values = [0.0, 1.0, None] + [1.0, 0.0, 0.0] * 3
    exp = experience(trainer, values)
    real = torch.cat([a for a, t in zip(exp.advantages, exp.trained, strict=True) if t])
    assert real.mean().item() == pytest.approx(0, abs=1e-5)
    assert real.std(unbiased=False).item() == pytest.approx(1, abs=1e-3)
    assert all(not a.any() for a in exp.advantages[:G])  # an undecided completion takes its group out
    seen = []
    ranks = Ranks(lambda items: (seen.append(items), items * 2)[1])
    twice = estimate(exp.rollouts, exp.scores, trainer.config, ranks=ranks, values=exp.values)
    assert seen, "the moments of the other ranks were not asked for"
    assert_close(torch.cat(twice.advantages), torch.cat(exp.advantages))  # two equal ranks have the moments of one


@pytest.mark.parametrize("budget", [120, 250])
def test_how_a_step_is_cut_changes_neither_the_policys_gradient_nor_the_critics(make_trainer, captured, budget):
    for folder, tokens in (("whole", 10_000), ("cut", budget)):
        trainer = make_trainer(
            f"training.tokens_per_micro_batch={tokens}", "training.passes_per_batch=2", recipe=ppo, folder=folder
        )
        give_values(trainer)
        trainer.updater.update(experience(trainer), Metrics())
    steps = len(captured) // 2
    assert steps == 4  # two passes, policy and critic each
    for whole, cut in zip(captured[:steps], captured[steps:], strict=True):
        assert_same(cut, whole, atol=1e-6)
        assert any(gradient.abs().max() > 0 for gradient in whole.values())


def test_padded_rows_give_the_gradients_of_packed_ones(make_trainer, captured):
    for layout in ("shared", "padded"):
        trainer = make_trainer(f"training.layout={layout}", recipe=ppo, folder=layout)
        give_values(trainer)
        trainer.updater.update(experience(trainer), Metrics())
    for packed, padded in zip(captured[:2], captured[2:], strict=True):
        assert_same(padded, packed, atol=1e-6)  # whitening makes advantages larger, and rounding with them


def test_the_first_batches_of_a_warm_up_move_the_critic_and_nothing_of_the_policy(make_trainer):
    trainer = make_trainer(
        "critic.warmup_batches=2", "training.num_batches=3", "optimizer.weight_decay=0.1", recipe=ppo
    )
    policy = [p.clone() for p in trainer.unwrapped.parameters()]
    critic = [p.clone() for p in trainer.updater.critic.unwrapped.parameters()]
    for batch in range(2):
        trainer.updater.update(experience(trainer), Metrics(), batch=batch)
    assert trainer.policy_version == 0
    assert all(torch.equal(a, b) for a, b in zip(policy, trainer.unwrapped.parameters(), strict=True))
    assert any(
        not torch.equal(a, b) for a, b in zip(critic, trainer.updater.critic.unwrapped.parameters(), strict=True)
    )
    trainer.updater.update(experience(trainer), Metrics(), batch=2)
    assert trainer.policy_version == 1
    assert any(not torch.equal(a, b) for a, b in zip(policy, trainer.unwrapped.parameters(), strict=True))


def test_a_value_that_left_its_place_at_sampling_is_held_there_by_the_clip(make_trainer):
    heads = []
    for clip in ("1.0e-6", "null"):
        trainer = make_trainer(
            f"critic.value_clip={clip}", "training.passes_per_batch=2", recipe=ppo, folder=f"clip-{clip}"
        )
        give_values(trainer)
        trainer.updater.update(experience(trainer), Metrics())
        heads.append(trainer.updater.critic.unwrapped.model.score.weight.clone())
    assert (heads[0] - heads[1]).abs().max() > 1e-5  # the second pass has fewer tokens that pull


def test_policy_and_critic_have_learning_rates_of_their_own(make_trainer):
    trainer = make_trainer("optimizer.learning_rate=0.01", "critic.optimizer.learning_rate=0.03", recipe=ppo)
    rates = {name: learner.optimizer.param_groups[0]["lr"] for name, learner in trainer.updater.learners.items()}
    assert rates == {"policy": 0.01, "critic": 0.03}


def test_the_critic_learns_to_predict_the_reward(make_trainer):
    trainer = make_trainer(
        "training.num_batches=8", "critic.warmup_batches=7", "critic.optimizer.learning_rate=0.01", recipe=ppo
    )
    history = trainer.train()
    assert history[6]["critic/error"] < history[0]["critic/error"] / 2


def test_ppo_learns_what_is_rewarded(make_trainer):
    trainer = make_trainer(
        "training.num_batches=12", "optimizer.learning_rate=0.01", "critic.optimizer.learning_rate=0.01",
        "rollout.prompts_per_batch=32", "rollout.samples_per_prompt=2", recipe=ppo,
    )  # fmt: skip
    history = trainer.train()
    assert history[-1]["reward/total"] > history[0]["reward/total"] + 0.3


def test_a_resumed_ppo_run_with_everything_that_moves_equals_the_uninterrupted_one_bit_for_bit(make_trainer):
    options = (
        "reference={kind: moving_average, every_steps: 1, mix: 0.5}", "algorithm.kl_coefficient=0.1", "algorithm.kl_target=0.01",
        "algorithm.kl_horizon=20", "algorithm.entropy_target=9", "critic.warmup_batches=1", "optimizer.learning_rate=0.01",
    )  # fmt: skip
    clock = ("seconds/", "share/", "memory/", "rollout/tokens_per_second", "train/tokens_per_second")
    whole = make_trainer(*options, folder="whole", recipe=ppo)
    whole.train()
    interrupted = make_trainer(*options, folder="interrupted", recipe=ppo)
    interrupted.config.training.__dict__["num_batches"] = 3
    interrupted.train()
    resumed = make_trainer(*options, folder="interrupted", recipe=ppo)
    assert (resumed.first_batch, resumed.policy_version) == (2, 1)
    resumed.train()
    for module in (
        lambda t: t.unwrapped,
        lambda t: t.updater.critic.unwrapped,
        lambda t: t.updater.reference.scorer,
    ):
        for a, b in zip(module(whole).parameters(), module(resumed).parameters(), strict=True):
            assert torch.equal(a, b)
    assert whole.updater.state() == resumed.updater.state()
    assert whole.updater.kl_coefficient != 0.1  # it did move
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(clock)} for row in read_jsonl(t.metrics_file)]
        for t in (whole, resumed)
    ]
    assert rows[0] == rows[1]


def test_a_critic_with_lora_trains_its_adapters_and_its_head(make_trainer):
    trainer = make_trainer("critic.lora={rank: 2}", "policy.lora={rank: 2}", recipe=ppo)
    give_values(trainer)
    for name, learner in trainer.updater.learners.items():
        trained = {n for n, p in learner.module.named_parameters() if p.requires_grad}
        assert all("lora_" in n or "score" in n for n in trained), name
        assert ("model.score.weight" in trained) == (name == "critic")  # the head itself, not an adapter on it
    trainer.train()


def test_a_critic_from_a_reward_model_keeps_its_head_and_one_from_a_policy_starts_at_zero(
    make_trainer, model_folder, tmp_path
):
    from transformers import AutoModelForSequenceClassification

    from rlhf.config import Critic, Optimizer
    from rlhf.critic import load_critic

    saved = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    saved.save_pretrained(tmp_path / "reward")
    loaded = load_critic(Critic(path=str(tmp_path / "reward"), optimizer=Optimizer(learning_rate=1e-3)))
    assert torch.equal(loaded.score.weight, saved.score.weight)
    fresh = load_critic(Critic(path=model_folder, optimizer=Optimizer(learning_rate=1e-3)))
    assert not fresh.score.weight.any()


def test_a_reward_model_without_its_head_is_no_critic(model_folder, tmp_path):
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForSequenceClassification

    from rlhf.config import Critic, Optimizer
    from rlhf.critic import load_critic

    AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is a reward model without its head"):
        load_critic(Critic(path=str(tmp_path), optimizer=Optimizer(learning_rate=1e-3)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("critic.warmup_batches=20", "critic.warmup_batches is 20 of training.num_batches 20"),
        ("rollout.refill_rounds=1", "set it to 0"),
        ("algorithm.kl_target=0.1", None),
        ("reference={kind: lora_base}", "reference.kind is lora_base and policy.lora is not set"),
        ("reference={kind: frozen}", "has no path"),
    ],
)
def test_relations_are_checked_before_a_model_is_loaded(override, message):
    recipe = "recipes/tiny/ppo.yaml"
    if message is None:
        load_config(recipe, [override])
        return
    overrides = (
        [override] if "reference" not in override else ["reference=null", "algorithm.kl_coefficient=0.1", override]
    )
    with pytest.raises(ValueError, match=message):
        load_config(recipe, overrides)
