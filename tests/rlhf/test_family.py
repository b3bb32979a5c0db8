"""What members of the family add to the loop: rewards of steps, KL in the reward, entropy, refilled groups, adapters, checkpointing."""

import dataclasses
import math

import pytest
import torch
from online_helpers import RECIPE, G, assert_same, config, count_of_a_token, expected_gradient, experience, sample
from torch.testing import assert_close

import rlhf.trainers.online as online
from rlhf.advantages import group_relative
from rlhf.experience import Ranks, estimate, has_signal
from rlhf.metrics import MEANING, Metrics
from rlhf.types import Score, StepReward

WITH_REFERENCE = "reference={path: nowhere}"


def wrong(value, *steps):
    return Score(verdict="wrong", value=value, steps=tuple(StepReward(*step) for step in steps))


RECIPES = sorted((RECIPE.parents[1] / "algorithms").glob("*.yaml"))


@pytest.mark.parametrize("path", [*RECIPES, RECIPE.with_name("ppo.yaml")], ids=lambda path: path.stem)
def test_every_recipe_of_the_family_moves_its_policy_and_explains_each_of_its_metrics(make_trainer, path):
    options = (
        "training.passes_per_batch=2",
        "training.minibatches_per_batch=2",
        "training.num_batches=1",
        "rollout.prompts_per_batch=8",
        "algorithm.truncated=wrong",  # a model drawn at random never ends
    )
    if path.stem == "ppo":
        options += ("critic.warmup_batches=0",)
    trainer = make_trainer(*options, recipe=lambda *overrides: config(*overrides, recipe=path))
    trainer.reward_fn = lambda rollouts: [
        dataclasses.replace(
            s,
            scaled={r.name: s.value for r in trainer.config.rewards},
            weights={r.name: r.weight for r in trainer.config.rewards},
        )
        for s in count_of_a_token(rollouts)
    ]
    before = [p.clone() for p in trainer.unwrapped.parameters()]
    [row] = trainer.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))
    assert {key for key in row if not key.startswith(("reward/", "weighted/", "variance_share/"))} <= MEANING.keys()
    assert sum(row[f"share/{part}"] for part in ("rollout", "reward", "train", "sync")) == pytest.approx(1)
    assert row["rollout/tokens_per_second"] > 0
    assert row["train/tokens_per_second"] > 0
    assert row["memory/peak_gb"] > 0.1


# ------------------------------------------------------------------------------------------------------------- rewards of steps


def test_a_reward_of_a_step_reaches_the_tokens_up_to_its_end_and_no_later_one(make_trainer):
    trainer = make_trainer("rollout.prompts_per_batch=1", "algorithm.scale_by_std=false")
    rollouts = sample(trainer)
    assert [len(r.token_ids) for r in rollouts] == [10] * 3
    exp = estimate(rollouts, [wrong(0.0, (3, 1.0)), wrong(0.0, (3, 0.0)), wrong(0.0, (9, 0.5))], trainer.config)
    # the three steps have mean 0.5; nothing else differs
    assert exp.advantages[0].tolist() == [0.5] * 4 + [0.0] * 6
    assert exp.advantages[1].tolist() == [-0.5] * 4 + [0.0] * 6
    assert exp.advantages[2].tolist() == [0.0] * 10


def test_rewards_of_steps_add_to_that_of_the_whole_and_leave_other_groups_alone(make_trainer):
    trainer = make_trainer(
        "rollout.prompts_per_batch=2", "algorithm.advantage=leave_one_out", "algorithm.scale_by_std=false"
    )
    scores = [wrong(1.0, (9, 3.0)), wrong(0.0, (9, 0.0)), wrong(0.0, (9, 0.0)), wrong(2.0), wrong(0.0), wrong(0.0)]
    exp = estimate(sample(trainer), scores, trainer.config)
    assert_close(torch.stack([a[0] for a in exp.advantages]), torch.tensor([4.0, -2.0, -2.0, 2.0, -1.0, -1.0]))


def test_rewards_of_steps_are_not_counted_a_second_time_as_a_component(make_trainer):
    trainer = make_trainer(
        "rollout.prompts_per_batch=1", "algorithm.normalise_components=true", "algorithm.scale_by_std=true"
    )
    scores = [
        dataclasses.replace(wrong(0.0, (3, r)), scaled={"correctness": 0.0}, weights={"correctness": 1.0})
        for r in (1.0, 0.0, 0.0)
    ]
    with pytest.raises(ValueError, match="a reward judges steps, which would count twice"):
        estimate(sample(trainer), scores, trainer.config)


def test_steps_of_an_undecided_group_count_nowhere(make_trainer):
    trainer = make_trainer(
        "rollout.prompts_per_batch=2", "algorithm.advantage=batch_normalised", "algorithm.scale_by_std=false"
    )
    undecided = Score(verdict="undecided", value=None)
    scores = [
        undecided,
        wrong(0.0, (0, 100.0)),
        wrong(0.0),
        wrong(0.0, (9, 1.0)),
        wrong(0.0, (9, 0.0)),
        wrong(0.0, (9, 0.0)),
    ]
    exp = estimate(sample(trainer), scores, trainer.config)
    assert all(not a.any() for a in exp.advantages[:G])
    assert_close(torch.stack([a[0] for a in exp.advantages[G:]]), torch.tensor([2 / 3, -1 / 3, -1 / 3]))


def test_each_rank_gets_the_advantages_of_its_own_rollouts(make_trainer):
    trainer = make_trainer("algorithm.advantage=batch_normalised")
    rollouts = sample(trainer)
    scores = [wrong(float(i), (i % 10, float(i))) for i in range(len(rollouts))]
    whole = estimate(rollouts, scores, trainer.config)
    half = len(rollouts) // 2
    everyone = [(score, 0.0, len(rollout.token_ids)) for score, rollout in zip(scores, rollouts, strict=True)]
    second = estimate(rollouts[half:], scores[half:], trainer.config, ranks=Ranks(lambda _: everyone, 1))
    for a, b in zip(second.advantages, whole.advantages[half:], strict=True):
        assert torch.equal(a, b)


def test_groups_that_only_their_steps_tell_apart_have_signal():
    assert not has_signal([wrong(1.0), wrong(1.0)])
    assert has_signal([wrong(1.0), wrong(1.0, (0, 1.0))])
    assert not has_signal([wrong(1.0), Score(verdict="undecided", value=None)])


# ------------------------------------------------------------------------------------------------------------------------- KL


def test_kl_in_the_reward_is_subtracted_from_the_sequence_before_samples_are_compared(make_trainer):
    trainer = make_trainer(
        WITH_REFERENCE, "algorithm.kl_coefficient=0.3", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1"
    )
    rollouts = sample(trainer)
    exp = trainer.judge(rollouts, count_of_a_token(rollouts), Metrics())
    kl = trainer.updater.kl_to_reference(rollouts)
    assert [len(k) for k in kl] == [len(r.token_ids) for r in rollouts]
    rewards = torch.tensor([s.value - 0.3 * k.sum().item() for s, k in zip(exp.scores, kl, strict=True)])
    expected = group_relative(rewards.view(-1, G), scale_by_std=False).flatten()
    assert_close(torch.stack([a[0] for a in exp.advantages]), expected)


def test_kl_in_the_reward_leaves_the_loss_alone(make_trainer, captured):
    trainer = make_trainer(WITH_REFERENCE, "algorithm.kl_coefficient=0.3", "algorithm.kl_in=reward")
    exp = experience(trainer)
    trainer.updater.update(exp, Metrics())
    assert_same(captured[0], expected_gradient(trainer, exp))


def test_an_adaptive_coefficient_rises_while_the_policy_is_further_from_the_reference_than_the_target(make_trainer):
    # in the loss it is adapted after each of two steps of 6 completions, in the reward once for all 12
    for place, times, completions in (("loss", 2, 6), ("reward", 1, 12)):
        options = (
            WITH_REFERENCE, "algorithm.kl_coefficient=0.3", f"algorithm.kl_in={place}", "algorithm.kl_horizon=120",
            "training.minibatches_per_batch=2",
        )  # fmt: skip
        for target, sign in ((1e-9, 1), (9, -1)):
            trainer = make_trainer(*options, f"algorithm.kl_target={target}", folder=f"{place}-{target}")
            trainer.updater.update(experience(trainer), Metrics())
            expected = 0.3 * (1 + sign * 0.2 * completions / 120) ** times
            assert trainer.updater.kl_coefficient == pytest.approx(expected)


def test_a_moving_average_follows_the_policy_when_it_is_due(make_trainer):
    trainer = make_trainer(
        "reference={kind: moving_average, every_steps: 2, mix: 0.25}",
        "algorithm.kl_coefficient=0.1",
        "optimizer.learning_rate=0.01",
    )
    old = [p.clone() for p in trainer.updater.reference.scorer.parameters()]
    trainer.updater.update(experience(trainer), Metrics())
    assert all(torch.equal(a, b) for a, b in zip(old, trainer.updater.reference.scorer.parameters(), strict=True))
    trainer.updater.update(dataclasses.replace(experience_of_now(trainer)), Metrics())
    for before, now, new in zip(
        old, trainer.updater.reference.scorer.parameters(), trainer.updater.policy.unwrapped.parameters(), strict=True
    ):
        assert_close(now, before + 0.25 * (new - before))
        assert not now.requires_grad


def experience_of_now(trainer):
    """Rollouts of the engine after a push."""
    trainer.sync.push(policy_version=trainer.policy_version)
    return experience(trainer)


def test_the_base_of_a_lora_run_is_its_reference_without_a_second_model(make_trainer):
    trainer = make_trainer(
        "policy.lora={rank: 4}",
        "reference={kind: lora_base}",
        "algorithm.kl_coefficient=0.1",
        "optimizer.learning_rate=0.1",
    )
    metrics = Metrics()
    trainer.updater.update(experience(trainer), metrics)
    assert metrics.pairs()["policy/kl_reference"][0] == 0  # B starts at 0
    metrics = Metrics()
    trainer.updater.update(experience_of_now(trainer), metrics)
    assert metrics.pairs()["policy/kl_reference"][0] > 0
    assert trainer.updater.reference.scorer is trainer.updater.policy.unwrapped


# -------------------------------------------------------------------------------------------------------------------- entropy


def test_only_the_tokens_of_highest_entropy_have_a_gradient_whatever_the_cut(make_trainer, captured):
    seen = []
    for folder, budget in (("whole", 10_000), ("cut", 120)):
        trainer = make_trainer(
            "algorithm.top_entropy_share=0.2", f"training.tokens_per_micro_batch={budget}", folder=folder
        )
        metrics = Metrics()
        trainer.updater.update(experience(trainer), metrics)
        seen.append(metrics.pairs()["policy/focus"])
    assert_same(captured[1], captured[0])
    kept, tokens = seen[0]
    assert seen[1] == seen[0]
    assert kept == int(0.2 * (tokens - 1)) + 1
    everything = make_trainer(folder="all")
    everything.updater.update(experience(everything), Metrics())
    assert captured[2].keys() == captured[0].keys()
    norms = [sum(g.square().sum() for g in step.values()) for step in (captured[0], captured[2])]
    assert 0 < norms[0] < norms[1]


def test_the_entropy_bonus_is_paid_only_at_or_below_its_target_and_grows_there(make_trainer):
    low = make_trainer("algorithm.entropy_target=100", "algorithm.entropy_step=0.25", folder="low")
    assert low.updater._entropy_bonus() == 0  # nothing measured yet
    low.updater.update(experience(low, [1.0] * 4 * G), Metrics())  # groups without signal are measured too
    assert (low.updater.entropy_coefficient, low.updater._entropy_bonus()) == (0.25, 0.25)
    high = make_trainer(
        "algorithm.entropy_target=0", "algorithm.entropy_coefficient=0.3", "algorithm.entropy_step=0.25", folder="high"
    )
    high.updater.update(experience(high), Metrics())
    assert high.updater.entropy_coefficient == pytest.approx(0.05)
    assert high.updater._entropy_bonus() == 0


def test_vespo_weighs_by_the_ratio_to_the_sampler_itself_where_the_sampler_is_corrected(make_trainer, captured):
    """An engine whose log-probabilities are half a nat off in one token: phi(w) of w = e^-0.5 at that sequence."""
    for name, options in (("plain", ()), ("corrected", ("algorithm.sampler_correction=truncate",))):
        trainer = make_trainer(
            "algorithm.loss=vespo", "algorithm.aggregation=sequence_sum", "rollout.prompts_per_batch=1",
            "guards.max_kl_sampler=9", *options, folder=name,
        )  # fmt: skip
        exp = experience(trainer, [1.0, 1.0, 0.0])
        exp.advantages[1].zero_()
        exp.advantages[2].zero_()
        first = exp.rollouts[0]
        exp.rollouts[0] = dataclasses.replace(first, logprobs=(first.logprobs[0] + 0.5, *first.logprobs[1:]))
        trainer.updater.update(exp, Metrics())
    phi = math.exp(2 * -0.5 + 3 * (1 - math.exp(-0.5)))
    assert_same(captured[1], {name: gradient * phi for name, gradient in captured[0].items()})


# ------------------------------------------------------------------------------------------------------------ dynamic sampling


def answers_in_turn(per_group):
    """Rewards of whole groups, in the order in which they are asked for."""
    queue = [value for group in per_group for value in group]

    def reward(rollouts):
        return [wrong(queue.pop(0)) for _ in rollouts]

    return reward


def collect(trainer):
    metrics = Metrics()
    rollouts, scores = trainer.collect(0, metrics, dict.fromkeys(("rollout", "reward", "train", "sync"), 0.0))
    return rollouts, [s.value for s in scores], metrics.pairs()


def test_groups_without_signal_are_refilled_from_the_stream_until_the_budget_ends(make_trainer):
    same, mixed = [1.0] * G, [1.0, 0.0, 0.0]
    reward = answers_in_turn([mixed, same, same, mixed, same, mixed, same])
    trainer = make_trainer("rollout.refill_rounds=2", reward_fn=reward)
    rollouts, values, metrics = collect(trainer)
    # round 1 refills groups 1 and 2 with (same, mixed): group 2 is mended; round 2 tries group 1 once more, in vain
    assert values == [*mixed, *same, *mixed, *mixed]
    assert trainer.prompts_used == 4 + 2 + 1
    assert metrics["rollout/refilled"] == (1, 4)
    asked = [r.prompt.id for r in rollouts[::G]]
    assert len(set(asked)) == 4
    assert all(len({r.prompt.id for r in rollouts[g : g + G]}) == 1 for g in range(0, 12, G))
    assert (
        metrics["rollout/tokens"][0] >= sum(len(r.token_ids) for r in rollouts) * 7 / 4 * 0.8
    )  # what was thrown away counts


def test_refills_hide_no_failing_grader_and_no_reward_that_was_sampled(make_trainer):
    decided, undecided = [1.0, 0.0, 0.0], [None, 1.0, 0.0]
    queue = [value for group in [decided, undecided, undecided, decided, decided, decided] for value in group]

    def reward(rollouts):
        values = [queue.pop(0) for _ in rollouts]
        return [Score(verdict="undecided" if v is None else "wrong", value=v, reason="time-out") for v in values]

    trainer = make_trainer("rollout.refill_rounds=1", "guards.max_undecided_share=0.12", reward_fn=reward)
    _, values, metrics = collect(trainer)
    assert None not in values  # both groups were mended
    assert metrics["rollout/undecided"] == (2, 18)
    assert metrics["reward/total"] == (6, 16)
    queue = [value for group in [decided, undecided, undecided, decided, decided, decided] for value in group]
    strict = make_trainer(
        "rollout.refill_rounds=1", "guards.max_undecided_share=0.1", reward_fn=reward, folder="strict"
    )
    with pytest.raises(RuntimeError, match="11% of the completions could not be judged"):
        collect(strict)


def test_ranks_take_prompts_of_their_own_from_one_stream(make_trainer, monkeypatch):
    trainer = make_trainer()
    first = trainer._take(4, batch=0)
    monkeypatch.setattr(online, "gather", lambda _, counts, group=None: [3, *counts])
    monkeypatch.setattr(type(trainer.accelerator), "process_index", property(lambda _: 1))
    trainer.prompts_used = 0
    assert trainer._take(1, batch=0) == first[3:]  # the other rank took the first three
    assert trainer.prompts_used == 4


def test_nothing_is_sampled_again_when_every_group_has_signal(make_trainer):
    trainer = make_trainer("rollout.refill_rounds=5", reward_fn=answers_in_turn([[1.0, 0.0, 0.0]] * 4))
    assert collect(trainer)[2]["rollout/refilled"] == (0, 4)
    assert trainer.prompts_used == 4


def test_a_resumed_run_goes_on_in_the_stream_where_refills_had_brought_it(make_trainer):
    def reward(rollouts):
        return [wrong(float(r.prompt.token_ids[-3] % 2 == 0 and i % G == 0)) for i, r in enumerate(rollouts)]

    whole = make_trainer("rollout.refill_rounds=1", folder="whole", reward_fn=count_of_a_token)
    whole.reward_fn = reward
    whole.train()
    interrupted = make_trainer("rollout.refill_rounds=1", folder="cut", reward_fn=reward)
    interrupted.config.training.__dict__["num_batches"] = 3
    interrupted.train()
    resumed = make_trainer("rollout.refill_rounds=1", folder="cut", reward_fn=reward)
    resumed.train()
    assert resumed.prompts_used == whole.prompts_used > 16
    for a, b in zip(whole.unwrapped.parameters(), resumed.unwrapped.parameters(), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------------------------------- memory and adapters


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_gradient_checkpointing_changes_no_gradient(make_trainer, captured, layout, monkeypatch):
    recomputed = []
    original = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *a, **k: (recomputed.append(1), original(*a, **k))[1]
    )
    for switch in ("false", "true"):
        trainer = make_trainer(f"policy.gradient_checkpointing={switch}", f"training.layout={layout}", folder=switch)
        trainer.updater.update(experience(trainer), Metrics())
    assert_same(captured[1], captured[0])
    assert trainer.unwrapped.is_gradient_checkpointing
    assert trainer.unwrapped.training


def test_dropout_is_off_in_a_policy_whose_config_asks_for_it(make_trainer, model_folder):
    from rlhf.models import load_causal_lm, ready

    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.dropout = torch.nn.Dropout(0.5)
    ready(model, gradient_checkpointing=True)
    assert all(layer.self_attn.attention_dropout == layer.dropout.p == 0 for layer in model.model.layers)


@pytest.mark.parametrize("sync", ["merged", "adapter"])
def test_lora_moves_its_adapters_and_nothing_else_and_the_engine_follows(make_trainer, sync):
    trainer = make_trainer(f"policy.lora={{rank: 8, sync: {sync}}}", "optimizer.learning_rate=0.03")
    before = {n: p.clone() for n, p in trainer.unwrapped.named_parameters()}
    history = trainer.train()
    moved = {n for n, p in trainer.unwrapped.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("lora_" in n for n in moved)
    assert all(row["sync/error"] < 1e-4 and row["policy/kl_sampler"] < 1e-8 for row in history)


def test_a_resumed_lora_run_equals_the_uninterrupted_one_bit_for_bit(make_trainer):
    options = ("policy.lora={rank: 4}", "optimizer.learning_rate=0.03")
    whole = make_trainer(*options, folder="whole")
    whole.train()
    interrupted = make_trainer(*options, folder="cut")
    interrupted.config.training.__dict__["num_batches"] = 3
    interrupted.train()
    resumed = make_trainer(*options, folder="cut")
    resumed.train()
    assert resumed.first_batch == 2
    for a, b in zip(whole.unwrapped.parameters(), resumed.unwrapped.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rewards=[{name: correctness}, {name: overlong, buffer_tokens: 11}]", "buffer_tokens is 11, more than"),
        ("algorithm.kl_target=0.1", "kl_target is 0.1 but kl_coefficient, where it starts, is 0"),
        ("algorithm.kl_weighted=true", "kl_weighted needs a KL term in the loss"),
        ("algorithm={normalise_components: true, scale_by_std: true, kl_in: reward}", "kl_in reward is none of them"),
        ("reference={kind: moving_average}", "reference is set but algorithm.kl_coefficient is 0"),
        ("reference={kind: moving_average, path: x}", "has the path x, which nothing would read"),
    ],
)
def test_relations_between_keys_are_checked(override, message):
    with pytest.raises(ValueError, match=message):
        config(override)
