"""The loop's arithmetic on stored rollouts, its guards, and an exact resume."""

import dataclasses

import pytest
import torch
from online_helpers import G, assert_same, config, expected_gradient, experience, sample
from torch.testing import assert_close

import rlhf.micro_batches as micro_batches
import rlhf.trainers.online as online
from rlhf.advantages import group_relative
from rlhf.curriculum import prompt_stream
from rlhf.experience import estimate, sequence_advantages
from rlhf.guards import require_one_policy
from rlhf.metrics import Metrics, read_jsonl
from rlhf.packing import pack_padded, pack_shared, padded_chunks, shared_chunks
from rlhf.types import Rollout, Score


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_gradient_is_that_of_a_plain_loop_over_sequences(make_trainer, captured, aggregation):
    trainer = make_trainer(f"algorithm.aggregation={aggregation}")
    exp = experience(trainer)
    trainer.updater.update(exp, Metrics())
    assert_same(captured[0], expected_gradient(trainer, exp, aggregation=aggregation))


@pytest.mark.parametrize("weighted", [False, True])
def test_the_kl_penalty_has_the_gradient_of_its_estimator_and_reaches_groups_without_signal(
    make_trainer, captured, model_folder, weighted
):
    trainer = make_trainer(
        "algorithm.kl_coefficient=0.3", f"algorithm.kl_weighted={weighted}", f"reference={{path: {model_folder}}}"
    )
    exp = experience(trainer, [1.0] * G + [0.0, 1.0, 0.0] * 3)
    trainer.updater.update(exp, Metrics())
    assert_same(captured[0], expected_gradient(trainer, exp, kl_coefficient=0.3, kl_weighted=weighted))


@pytest.mark.parametrize("budget", [120, 250, 10_000])
def test_how_a_step_is_cut_into_micro_batches_does_not_change_its_gradient(make_trainer, captured, budget):
    trainer = make_trainer(f"training.tokens_per_micro_batch={budget}")
    exp = experience(trainer)
    trainer.updater.update(exp, Metrics())
    assert_same(captured[0], expected_gradient(trainer, exp))


@pytest.mark.parametrize(
    "options",
    [
        ("algorithm.loss=sequence_clipped", "algorithm.aggregation=sequence"),
        ("algorithm.loss=sapo", "algorithm.entropy_coefficient=0.01", "algorithm.aggregation=constant"),
        ("algorithm.sampler_correction=mask", "algorithm.sampler_correction_level=sequence", "algorithm.advantage=group_baseline"),
    ],
)  # fmt: skip
def test_no_member_of_the_family_depends_on_how_a_step_is_cut(make_trainer, captured, options):
    for folder, budget in (("whole", 10_000), ("cut", 250)):
        trainer = make_trainer(
            f"training.tokens_per_micro_batch={budget}", "training.passes_per_batch=2", *options, folder=folder
        )
        trainer.updater.update(experience(trainer), Metrics())
    steps = len(captured) // 2
    assert steps >= 2  # the later ones are off policy
    for whole, cut in zip(captured[:steps], captured[steps:], strict=True):
        assert_same(cut, whole)
        assert any(gradient.abs().max() > 0 for gradient in whole.values())


def test_an_entropy_bonus_reaches_groups_without_signal(make_trainer, captured):
    trainer = make_trainer("algorithm.entropy_coefficient=0.1")
    trainer.updater.update(experience(trainer, [1.0] * 4 * G), Metrics())
    assert any(gradient.abs().max() > 0 for gradient in captured[0].values())


def test_groups_without_signal_are_not_computed_but_count_in_the_denominator(make_trainer, captured, monkeypatch):
    trainer = make_trainer("training.tokens_per_micro_batch=120")
    exp = experience(trainer, [1.0] * G + [0.0] * G + [0.0, 1.0, 0.0] * 2)
    packed = []
    pack = micro_batches.pack_shared
    monkeypatch.setattr(micro_batches, "pack_shared", lambda *a: (packed.append(a[1]), pack(*a))[1])
    trainer.updater.update(exp, Metrics())
    assert sorted(i for rows in packed for i in rows) == list(range(2 * G, 4 * G))
    assert_same(captured[0], expected_gradient(trainer, exp))


def test_a_batch_without_any_signal_takes_one_pass_with_a_gradient_of_zero(make_trainer, captured):
    trainer = make_trainer()
    trainer.updater.update(experience(trainer, [1.0] * 4 * G), Metrics())
    assert all(gradient.eq(0).all() for gradient in captured[0].values())


def test_an_undecided_completion_takes_its_whole_group_out_and_is_never_a_zero(make_trainer, captured):
    trainer = make_trainer()
    exp = experience(trainer, [None, 1.0, 0.0] + [0.0, 1.0, 0.0] * 3)
    assert exp.trained.tolist() == [False] * G + [True] * 3 * G
    trainer.updater.update(exp, Metrics())
    without = dataclasses.replace(
        exp, rollouts=exp.rollouts[G:], scores=exp.scores[G:], advantages=exp.advantages[G:], trained=exp.trained[G:]
    )
    assert_same(captured[0], expected_gradient(trainer, without))


def test_advantages_are_those_of_the_whole_group_before_truncated_completions_are_masked(make_trainer):
    trainer = make_trainer("algorithm.truncated=mask", "algorithm.scale_by_std=true")
    rollouts = [
        dataclasses.replace(r, finish_reason="length" if i == 0 else "stop") for i, r in enumerate(sample(trainer))
    ]
    scores = [Score(verdict="wrong", value=float(i % G == 0)) for i in range(len(rollouts))]
    exp = estimate(rollouts, scores, trainer.config)
    assert exp.trained.tolist() == [False] + [True] * (4 * G - 1)
    expected = group_relative(torch.tensor([[1.0, 0.0, 0.0]]), scale_by_std=True)[0]
    assert [a.unique().item() for a in exp.advantages[:G]] == [0.0, expected[1], expected[2]]


def test_garbage_in_every_masked_position_changes_nothing(make_trainer, captured, monkeypatch):
    original = micro_batches.pack_padded

    def poisoned(*args, **kwargs):
        batch = original(*args, **kwargs)
        batch.input_ids[~batch.attention_mask] = 5
        return batch

    for layout in ("padded", "shared"):
        trainer = make_trainer(f"training.layout={layout}", folder=layout)
        exp = experience(trainer, [None, 1.0, 0.0] + [0.0, 1.0, 0.0] * 3)
        trainer.updater.update(exp, Metrics())
        monkeypatch.setattr(micro_batches, "pack_padded", poisoned)
        for i in (~exp.trained).nonzero().flatten().tolist():
            exp.advantages[i].fill_(float("nan"))
        for i in range(G):
            exp.rollouts[i] = dataclasses.replace(
                exp.rollouts[i], logprobs=(float("nan"),) * len(exp.rollouts[i].token_ids)
            )
        trainer.updater.update(exp, Metrics())
        assert_same(captured[-1], captured[-2])
    assert_same(captured[-1], captured[0])  # and both layouts agree


def test_later_minibatches_are_compared_with_the_policy_that_sampled(make_trainer):
    trainer = make_trainer(
        "training.minibatches_per_batch=2", "optimizer.learning_rate=0.003", "guards.max_kl_sampler=1e-6"
    )
    metrics = Metrics()
    trainer.updater.update(
        experience(trainer), metrics
    )  # the second step's old log-probabilities come from before the first: its KL to the sampler is 0
    assert trainer.policy_version == 2
    total, count = metrics.pairs()["policy/kl_sampler"]
    assert total / count < 1e-6


def test_a_sampler_that_is_not_the_policy_stops_the_run_before_the_step(make_trainer):
    trainer = make_trainer()
    exp = experience(trainer)
    before = [p.clone() for p in trainer.unwrapped.parameters()]
    off = [dataclasses.replace(r, logprobs=tuple(x - 0.7 for x in r.logprobs)) for r in exp.rollouts]
    with pytest.raises(RuntimeError, match="policy/kl_sampler is .* above guards.max_kl_sampler"):
        trainer.updater.update(dataclasses.replace(exp, rollouts=off), Metrics())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


def test_a_sampler_whose_logprobs_are_nan_stops_the_run(make_trainer):
    trainer = make_trainer()
    exp = experience(trainer)
    off = [dataclasses.replace(r, logprobs=(float("nan"),) * len(r.token_ids)) for r in exp.rollouts]
    with pytest.raises(RuntimeError, match="policy/kl_sampler is nan"):
        trainer.updater.update(dataclasses.replace(exp, rollouts=off), Metrics())


def test_a_loss_that_is_not_finite_stops_the_run_before_the_step(make_trainer):
    trainer = make_trainer()
    exp = experience(trainer)
    before = [p.clone() for p in trainer.unwrapped.parameters()]
    with pytest.raises(FloatingPointError, match="nothing is saved"):
        trainer.updater.update(
            dataclasses.replace(exp, advantages=tuple(a * float("inf") for a in exp.advantages)), Metrics()
        )
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step(make_trainer):
    trainer = make_trainer()
    exp = experience(trainer)
    before = [p.clone() for p in trainer.unwrapped.parameters()]
    next(trainer.unwrapped.parameters()).register_hook(lambda g: g * float("nan"))
    with pytest.raises(FloatingPointError, match="gradient norm is nan"):
        trainer.updater.update(exp, Metrics())
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.unwrapped.parameters(), strict=True))


def test_ranks_that_drift_apart_stop_the_run():
    with pytest.raises(RuntimeError, match="different policies"):
        require_one_policy([-2.0, -2.0 + 1e-3])
    for levels in ([float("nan"), -2.0], [-2.0, float("nan")]):
        with pytest.raises(RuntimeError, match="different policies"):
            require_one_policy(levels)
    require_one_policy([-2.0, -2.0 + 1e-6])


def test_rollouts_of_another_policy_version_are_refused(make_trainer):
    trainer = make_trainer()
    trainer.updater.policy_version = 3
    with pytest.raises(RuntimeError, match="rollouts come from policy version 0 while the trainer is at 3"):
        sample(trainer)


def test_too_many_undecided_completions_stop_the_run_with_their_reasons(make_trainer):
    def undecided(rollouts):
        return [Score(verdict="undecided", value=None, reason="unreadable_reference of p7") for _ in rollouts]

    with pytest.raises(RuntimeError, match="100% of the completions could not be judged.*unreadable_reference of p7"):
        make_trainer(reward_fn=undecided).train()


def test_the_policy_learns_what_is_rewarded(make_trainer):
    trainer = make_trainer(
        "training.num_batches=12",
        "optimizer.learning_rate=0.01",
        "rollout.prompts_per_batch=8",
        "rollout.samples_per_prompt=8",
    )
    history = trainer.train()
    assert history[-1]["reward/total"] > history[0]["reward/total"] + 0.3
    assert all(row["sync/error"] < 1e-4 for row in history)


def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(make_trainer):
    clock = ("seconds/", "share/", "memory/", "rollout/tokens_per_second", "train/tokens_per_second")
    whole = make_trainer(folder="whole")
    whole.train()
    interrupted = make_trainer(folder="interrupted")
    interrupted.config.training.__dict__["num_batches"] = (
        3  # killed in the third batch, after the checkpoint of the second
    )
    interrupted.train()
    resumed = make_trainer(folder="interrupted")
    assert (resumed.first_batch, resumed.policy_version) == (2, 2)
    resumed.train()
    for a, b in zip(whole.unwrapped.parameters(), resumed.unwrapped.parameters(), strict=True):
        assert torch.equal(a, b)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(clock)} for row in read_jsonl(t.metrics_file)]
        for t in (whole, resumed)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 4


def test_a_checkpoint_half_written_is_not_resumed_from(make_trainer):
    trainer = make_trainer()
    trainer.train()
    (trainer.checkpoints / "step-000003").mkdir()
    (trainer.checkpoints / "writing-000003").mkdir()
    assert make_trainer().first_batch == 2


def test_every_epoch_takes_every_prompt_once_in_a_fresh_order_that_the_seed_fixes():
    drawn = [i for start in range(0, 20, 4) for i in prompt_stream(10, start, 4, seed=0)]
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert drawn[:10] != drawn[10:20]
    assert prompt_stream(10, 8, 4, seed=0) == drawn[8:12]
    assert prompt_stream(10, 0, 10, seed=1) != prompt_stream(10, 0, 10, seed=0)


def rollouts_of(renderer, *groups):
    """One rollout for each length, the lengths of a group answering the same prompt."""
    rollouts = []
    for g, lengths in enumerate(groups):
        prompt = dataclasses.replace(renderer.prompt("p", "q", "1"), token_ids=(90 + g, 5, 6))
        for length in lengths:
            rollouts.append(
                Rollout(
                    prompt=prompt, token_ids=tuple(range(10, 10 + length)), logprobs=(-1.0,) * length, finish_reason="stop", text="", policy_version=0
                )
            )  # fmt: skip
    return rollouts


def test_padded_chunks_respect_the_budget_with_padding_counted_and_lose_nothing(renderer):
    rollouts = rollouts_of(renderer, [3, 7, 1], [7, 5, 1])
    widths = [3 + len(r.token_ids) - 1 for r in rollouts]
    chunks = padded_chunks(rollouts, range(6), 18)
    assert sorted(i for chunk in chunks for i in chunk) == list(range(6))
    assert all(max(widths[i] for i in chunk) * len(chunk) <= 18 for chunk in chunks)
    with pytest.raises(ValueError, match="tokens_per_micro_batch"):
        padded_chunks(rollouts, range(6), 8)


def test_shared_chunks_count_a_prompt_once_and_cut_a_group_only_when_they_must(renderer):
    rollouts = rollouts_of(renderer, [4, 4, 4], [3, 2], [9, 9, 9])
    # prompts of 3: group 0 takes 3 + 9 = 12, group 1 takes 3 + 3 = 6, group 2 takes 3 + 24 = 27 and is cut into 19 and 11
    chunks = shared_chunks(rollouts, range(8), 20)
    assert [sorted(chunk) for chunk in chunks] == [[5, 6], [0, 1, 2, 3, 4], [7]]
    with pytest.raises(ValueError, match="a sequence of 11 tokens exceeds training.tokens_per_micro_batch 10"):
        shared_chunks(rollouts, range(8), 10)


def test_a_packed_row_holds_each_prompt_once_and_scores_every_token_from_the_one_before_it(renderer):
    rollouts = rollouts_of(renderer, [3, 1], [2])
    batch = pack_shared(rollouts, [0, 2, 1], torch.tensor([True, True, True]))
    assert batch.input_ids.tolist() == [[90, 5, 6, 10, 11, 91, 5, 6, 10]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3]]
    assert batch.rows == (0, 1, 2)
    assert batch.targets.tolist() == [10, 11, 12, 10, 10, 11]
    assert batch.scored.tolist() == [2, 3, 4, 2, 7, 8]
    assert batch.sequences.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.kept == (0, 1, 2)
    assert [(g.prompt, g.completions) for g in batch.layout] == [((0, 3), ((3, 5),)), ((5, 8), ((8, 9),))]


def test_padded_rows_score_every_token_from_the_one_before_it(renderer):
    rollouts = rollouts_of(renderer, [3, 5])
    batch = pack_padded(rollouts, [0, 1], torch.tensor([True, True]), pad_token_id=0)
    assert batch.targets.tolist() == [10, 11, 12, 10, 11, 12, 13, 14]
    assert batch.input_ids.flatten()[batch.scored].tolist() == [6, 10, 11, 6, 10, 11, 12, 13]
    assert batch.attention_mask.sum(1).tolist() == [5, 7]
    assert batch.kept == (0, 1)
    left_out = pack_padded(rollouts, [0, 1], torch.tensor([False, True]), pad_token_id=0)
    assert left_out.targets.tolist() == [10, 11, 12, 13, 14]
    assert left_out.sequences.tolist() == [1] * 5
    assert left_out.kept == (1,)


def test_an_undecided_group_does_not_enter_the_mean_of_the_batch():
    scores = [Score(verdict="undecided" if v is None else "wrong", value=v) for v in (None, 9.0, 9.0, 1.0, 1.0, 0.0)]
    advantages = sequence_advantages(
        scores, config("algorithm.advantage=batch_normalised", "algorithm.scale_by_std=false")
    )
    assert_close(advantages, torch.tensor([0.0, 0.0, 0.0, 1 / 3, 1 / 3, -2 / 3]))  # mean 2/3 of the decided group alone


def test_the_loop_compares_the_policies_of_the_ranks_after_each_push(make_trainer, monkeypatch):
    trainer = make_trainer()
    gather = online.gather

    def drifted(accelerator, items, group=None):
        return [*gather(accelerator, items), *[x + 1e-3 for x in items if isinstance(x, float)]]

    monkeypatch.setattr(online, "gather", drifted)
    with pytest.raises(RuntimeError, match="different policies"):
        trainer.train()


def test_a_rank_without_groups_to_refill_still_takes_part_in_scoring(make_trainer):
    trainer, asked = make_trainer(), []
    trainer.reward_fn = lambda rollouts: asked.append(len(rollouts)) or []
    assert trainer._sample_and_score([], 0, 1, Metrics(), {"rollout": 0.0, "reward": 0.0}) == ([], [])
    assert asked == [0]
