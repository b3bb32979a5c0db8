"""Schedules of temperature and entropy, advantages of the best of k, and how different samples are."""

import itertools
import math

import pytest
import torch
from online_helpers import G, config, experience, perturbed
from torch.testing import assert_close

from rlhf.advantages import pass_at_k
from rlhf.diversity import distinct_share, self_bleu, thought_and_answer
from rlhf.metrics import Metrics

COOLING = "rollout.temperature_schedule={to: 0.5, first_batch: 1, last_batch: 3}"


# --------------------------------------------------------------------------------------------------------------- pass@k


def test_two_of_four_right_with_k_2_by_hand():
    # five of six pairs hold a right sample: mean 5/6, variance 5/36. A wrong one is in three pairs, two of which hold a right one.
    advantages = pass_at_k(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), scale_by_std=False, k=2)
    assert_close(advantages, torch.tensor([[1 / 6, -1 / 6, 1 / 6, -1 / 6]]))
    scaled = pass_at_k(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), scale_by_std=True, k=2)
    assert_close(scaled, advantages / (math.sqrt(5) / 6 + 1e-4))


def test_one_of_four_right_counts_more_with_k_2_than_three():
    hard, easy = pass_at_k(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]), scale_by_std=False, k=2)
    # hard: three of six pairs hold it, mean 1/2; a wrong one has one of three pairs with it
    assert_close(hard, torch.tensor([1 / 2, -1 / 6, -1 / 6, -1 / 6]))
    assert easy.eq(0).all()  # no pair of wrong samples


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_rewards_of_any_size_agree_with_a_loop_over_all_subsets(k):
    rewards = torch.tensor([[0.3, 1.1, -0.4, 0.3, 0.9], [2.0, 2.0, 0.0, 0.0, 1.0]])
    for row, found in zip(rewards, pass_at_k(rewards, scale_by_std=False, k=k), strict=True):
        best = {s: max(row[list(s)].tolist()) for s in itertools.combinations(range(5), k)}
        mean = sum(best.values()) / len(best)
        own = [[b for s, b in best.items() if i in s] for i in range(5)]
        assert_close(found, torch.tensor([sum(b) / len(b) - mean for b in own]))


def test_a_k_that_no_group_can_have_is_refused():
    for changes, message in (
        (["algorithm.advantage=pass_at_k"], "pass_at_k needs a k"),
        (["algorithm.pass_at=2"], "nothing else reads it"),
        (["algorithm.advantage=pass_at_k", f"algorithm.pass_at={G + 1}"], "more than rollout.samples_per_prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            config(*changes)


def test_a_recipe_trains_on_the_best_of_k(make_trainer):
    trainer = make_trainer("algorithm.advantage=pass_at_k", "algorithm.pass_at=2", "algorithm.scale_by_std=false")
    found = experience(trainer, [1.0, 0.0, 0.0] + [1.0, 1.0, 0.0] * 3)
    of_groups = torch.stack([a[0] for a in found.advantages]).view(-1, G)
    # one of three right: two of three pairs, mean 2/3; a wrong one is in one pair of two with it
    assert_close(of_groups[0], torch.tensor([1 / 3, -1 / 6, -1 / 6]))
    assert of_groups[1:].eq(0).all()


# ------------------------------------------------------------------------------------------------------------ schedules


def test_a_rollout_batch_is_sampled_and_trained_at_its_own_temperature(make_trainer):
    trainer = make_trainer(COOLING, "guards.max_kl_sampler=1e-5", "optimizer.learning_rate=1e-4")
    asked = []
    generate = trainer.engine.generate
    trainer.engine.generate = lambda prompts, sampling, *, seed: (
        asked.append(sampling.temperature) or generate(prompts, sampling, seed=seed)
    )
    rows = trainer.train()  # the guard compares the sampler's log-probabilities with the trainer's
    assert asked == [row["rollout/temperature"] for row in rows] == [1.0, 0.75, 0.5, 0.5]
    assert all(row["policy/kl_sampler"] < 1e-5 for row in rows)


def test_the_log_probabilities_of_another_temperature_would_be_seen(make_trainer):
    trainer = make_trainer(COOLING, "guards.max_kl_sampler=1e-5")
    buffer = trainer._next(2)  # sampled at 0.5
    with pytest.raises(RuntimeError, match="policy/kl_sampler is"):
        trainer.updater.update(buffer.experience, Metrics(), batch=0)


def test_the_reference_is_asked_at_the_temperature_of_the_batch(make_trainer, model_folder):
    trainer = make_trainer(
        COOLING, "algorithm.kl_coefficient=0.1", "algorithm.kl_in=reward", "algorithm.kl_estimator=k1",
        f"reference={{path: {model_folder}}}",
    )  # fmt: skip
    rollouts = trainer.sample(trainer.prompts[:2], 2)
    kl = trainer.updater.kl_to_reference(rollouts, batch=2)
    model = perturbed(trainer.unwrapped)  # as the fixture's reference is
    tokens = torch.tensor([[*rollouts[0].prompt.token_ids, *rollouts[0].token_ids]])
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits[0, len(rollouts[0].prompt.token_ids) - 1 :] / 0.5
    expected = logits.log_softmax(-1).gather(1, torch.tensor(rollouts[0].token_ids)[:, None])[:, 0]
    assert_close(kl[0], torch.tensor(rollouts[0].logprobs) - expected, atol=1e-4, rtol=1e-4)


def test_an_entropy_coefficient_moves_with_the_batch(make_trainer, captured):
    trainer = make_trainer(
        "algorithm.entropy_coefficient=0.0", "algorithm.entropy_schedule={to: 0.2, first_batch: 1, last_batch: 3}"
    )
    nothing = experience(trainer, [1.0] * 4 * G)
    coefficients = []
    for batch in range(4):
        trainer.updater.update(nothing, Metrics(), batch=batch)
        coefficients.append(trainer.updater.entropy_coefficient)
    assert coefficients == [0.0, 0.1, 0.2, 0.2]
    assert all(g.eq(0).all() for g in captured[0].values())
    for name, gradient in captured[1].items():
        assert_close(captured[2][name], 2 * gradient, atol=1e-7, rtol=1e-4)


def test_schedules_that_contradict_the_recipe_are_refused():
    for change, message in (
        ("rollout.temperature_schedule={to: 0, last_batch: 3}", "where nothing is left to chance"),
        ("rollout.temperature_schedule={to: 1, first_batch: 3, last_batch: 3}", "raise last_batch"),
        ("algorithm.entropy_schedule={to: -1, last_batch: 3}", "set it to 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            config(change)
    with pytest.raises(ValueError, match="both move entropy_coefficient"):
        config("algorithm.entropy_schedule={to: 1, last_batch: 3}", "algorithm.entropy_target=1.0")


# ------------------------------------------------------------------------------------------------------------ diversity


def test_samples_that_are_all_the_same_have_no_diversity():
    assert distinct_share(["a", "a", "a"]) == 0
    assert distinct_share(["a", "b", "a"]) == 0.5
    assert distinct_share(["a", "b", "c"]) == 1
    assert self_bleu([(1, 2, 3, 4, 5)] * 3) == pytest.approx(1)
    assert self_bleu([(1, 2, 3, 4, 5), (6, 7, 8, 9, 10)]) == 0


def test_self_bleu_by_hand():
    # Of (1 2 3 4 5) against (1 2 3 4 6): 4/5, 3/4, 2/3, 1/2 of its n-grams; their product is 1/5
    assert self_bleu([(1, 2, 3, 4, 5), (1, 2, 3, 4, 6)]) == pytest.approx(0.2**0.25)
    # clipped: (1 1) has one 1 in common with (1 2); order 1, and lengths agree
    assert self_bleu([(1, 1), (1, 2)], order=1) == pytest.approx(0.5)
    # the short one is punished for its brevity: exp(1 - 4/2); the long one has half of its words
    assert self_bleu([(1, 2), (1, 2, 3, 4)], order=1) == pytest.approx((math.exp(-1) + 0.5) / 2)


def test_a_word_is_matched_with_the_reference_that_has_it_most_often():
    # (1 1 1) has two of its 1s in another one; (1 1 2) has all; of the 2s of (1 2 2) another one has one
    assert self_bleu([(1, 1, 1), (1, 1, 2), (1, 2, 2)], order=1) == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)


def test_the_answer_is_what_comes_after_the_last_thought():
    assert thought_and_answer("<think>\n1 + 1 = 2\n</think>\n\\boxed{2}") == ("<think>\n1 + 1 = 2", "\\boxed{2}")
    assert thought_and_answer("\\boxed{2}") == ("", "\\boxed{2}")


def test_a_run_shows_how_different_its_samples_are(make_trainer):
    row = make_trainer("training.num_batches=1").train()[0]
    assert row["rollout/distinct_scratchpads"] >= 0
    assert 0 <= row["rollout/self_bleu"] < 1
    assert row["rollout/distinct_answers"] > 0
