"""What each token is responsible for: rewards of steps, rewards of tokens, GAE, the critic's loss; numbers by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import (
    ADVANTAGES,
    generalised_advantages,
    normalised_steps,
    softmin_rewards,
    sum_of_future,
    token_rewards,
    whitened,
)
from rlhf.losses import (
    value_loss,
)

# ------------------------------------------------------------------------------------------------------------ rewards of steps


STEPS = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 5.0])
SAMPLES = torch.tensor([0, 0, 1, 2, 3, 3])  # two prompts of two samples; the second prompt's steps are all equal


@pytest.mark.parametrize(
    ("advantage", "differences", "scale"),
    [
        ("group_relative", [0.0, -1.0, 1.0, 0.0, 0.0, 0.0], 1.0),  # mean 1, variance (0 + 1 + 1) / 2
        ("leave_one_out", [-1.0, -2.0, 1.5, 0.0, 0.0, 0.0], 1.0),  # the other sample's mean: 2, 2, 1/2
        ("batch_normalised", [-2.0, -3.0, -1.0, 2.0, 2.0, 2.0], math.sqrt(26 / 5)),  # mean 3, squares 4 + 9 + 1 + 3 * 4
        ("group_baseline", [0.0, -1.0, 1.0, 0.0, 0.0, 0.0], math.sqrt(2 / 5)),  # one scale for both groups
    ],
)
def test_steps_are_compared_as_their_estimator_compares_samples(advantage, differences, scale):
    expected = torch.tensor(differences)
    plain = normalised_steps(STEPS, SAMPLES, shape=(2, 2), advantage=advantage, scale_by_std=False)
    assert_close(plain, expected)
    scaled = normalised_steps(STEPS, SAMPLES, shape=(2, 2), advantage=advantage, scale_by_std=True)
    assert_close(scaled, expected / (scale + 1e-4))


@pytest.mark.parametrize("scale_by_std", [False, True])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_one_step_in_each_sample_is_the_estimator_itself_in_any_order(advantage, scale_by_std):
    rewards = torch.tensor([[1.0, 0.0, 4.0], [3.0, 1.0, 1.5], [0.1, 0.1, 0.1]])
    order = torch.tensor([8, 3, 1, 0, 5, 7, 2, 6, 4])
    got = normalised_steps(
        rewards.flatten()[order], order, shape=(3, 3), advantage=advantage, scale_by_std=scale_by_std
    )
    assert_close(got, ADVANTAGES[advantage](rewards, scale_by_std=scale_by_std).flatten()[order])


@pytest.mark.parametrize("reward", [0.1, -0.1])
@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_equal_steps_give_exactly_zero_whatever_rounding_does_to_their_mean(advantage, reward):
    samples = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    got = normalised_steps(torch.full((7,), reward), samples, shape=(1, 2), advantage=advantage, scale_by_std=True)
    assert got.eq(0).all()


@pytest.mark.parametrize("advantage", ADVANTAGES)
def test_a_single_step_has_nothing_to_be_compared_with_and_prompts_without_steps_are_nothing(advantage):
    got = normalised_steps(torch.tensor([3.0]), torch.tensor([3]), shape=(4, 2), advantage=advantage, scale_by_std=True)
    assert got.eq(0).all()
    two = normalised_steps(
        torch.tensor([3.0, 1.0]), torch.tensor([3, 2]), shape=(4, 2), advantage=advantage, scale_by_std=True
    )
    difference = 2.0 if advantage == "leave_one_out" else 1.0
    assert_close(two, torch.tensor([difference, -difference]) / (math.sqrt(2) + 1e-4))


def test_a_step_alone_in_its_group_does_not_widen_the_scale_of_the_others():
    steps, samples = torch.tensor([3.0, 1.0, 50.0]), torch.tensor([0, 1, 2])
    got = normalised_steps(steps, samples, shape=(3, 2), advantage="group_baseline", scale_by_std=True)
    assert_close(got, torch.tensor([1.0, -1.0, 0.0]) / (1 + 1e-4))  # variance (1 + 1 + 0) / 2


def test_steps_of_one_sample_alone_get_nothing_from_leave_one_out():
    steps, samples = torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([1, 1, 2, 3])
    got = normalised_steps(steps, samples, shape=(2, 2), advantage="leave_one_out", scale_by_std=False)
    assert_close(got, torch.tensor([0.0, 0.0, 2.0, -2.0]))


def test_steps_of_a_group_of_one_are_refused_unless_the_whole_batch_is_compared():
    steps, samples = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="leave_one_out .* got G=1; set rollout.samples_per_prompt"):
        normalised_steps(steps, samples, shape=(2, 1), advantage="leave_one_out", scale_by_std=False)
    got = normalised_steps(steps, samples, shape=(2, 1), advantage="batch_normalised", scale_by_std=False)
    assert_close(got, torch.tensor([-1.0, 1.0]))


def test_a_token_is_responsible_for_the_steps_that_end_at_it_or_later():
    got = sum_of_future(
        torch.tensor([10.0, 5.0, 1.0]), torch.tensor([0, 2, 0]), torch.tensor([2, 0, 0]), torch.tensor([3, 0, 2])
    )
    assert_close(got, torch.tensor([11.0, 10.0, 10.0, 5.0, 0.0]))


def test_two_steps_that_end_at_the_same_token_both_count():
    got = sum_of_future(torch.tensor([1.0, 2.0]), torch.tensor([0, 0]), torch.tensor([1, 1]), torch.tensor([2]))
    assert_close(got, torch.tensor([3.0, 3.0]))


def test_a_step_beyond_the_end_of_its_sequence_is_a_bug():
    with pytest.raises(AssertionError, match="^a step ends behind the last trained token of its sequence"):
        sum_of_future(torch.tensor([1.0]), torch.tensor([0]), torch.tensor([2]), torch.tensor([2, 5]))


def test_the_soft_minimum_by_hand():
    # T = 1 / ln 2 makes exp(-r / T) = 2 ** -r: weights 1/2, 1, 1/4 of a sum of 7/4, and one step alone keeps its reward
    rewards, samples = torch.tensor([1.0, 0.0, 2.0, -3.0]), torch.tensor([1, 1, 1, 0])
    got = softmin_rewards(rewards, samples, 3, temperature=1 / math.log(2))
    assert_close(got, torch.tensor([2 / 7, 0.0, 2 / 7, -3.0]))


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_a_cold_minimum_is_the_worst_step_for_every_token_up_to_it_and_nothing_behind(scale):
    rewards, samples = scale * torch.tensor([0.9, -0.8, 0.7, 0.6]), torch.tensor([0, 0, 0, 1])
    soft = softmin_rewards(rewards, samples, 2, temperature=1e-3 * scale)
    got = sum_of_future(soft, samples, torch.tensor([1, 2, 4, 0]), torch.tensor([5, 2]))
    assert_close(got, scale * torch.tensor([-0.8, -0.8, -0.8, 0.0, 0.0, 0.6, 0.0]))


def test_equal_steps_share_their_reward_and_no_reward_of_theirs_is_counted_twice():
    got = softmin_rewards(torch.full((4,), 0.5), torch.tensor([0, 0, 0, 0]), 1, temperature=0.1)
    assert_close(got, torch.full((4,), 0.125))


# ------------------------------------------------------------------------------------------------------------------------ PPO


def test_the_reward_of_ppo_is_the_cost_of_the_kl_and_the_score_at_the_end():
    scores, kl = torch.tensor([1.0, 9.0, -2.0]), torch.tensor([0.5, -0.5, 2.0], requires_grad=True)
    got = token_rewards(scores, kl, torch.tensor([2, 0, 1]), coefficient=0.1)
    assert_close(got, torch.tensor([-0.05, 1.05, -2.2]))
    assert not got.requires_grad
    assert_close(token_rewards(scores.double(), kl, torch.tensor([2, 0, 1]), coefficient=0.1), got)


def test_gae_by_hand_of_two_sequences_that_do_not_see_each_other():
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.0, 1.0], requires_grad=True)
    got = generalised_advantages(rewards, values, torch.tensor([2, 0, 1]), discount=0.5, trace=0.5)
    # delta = 1 + 0.5 * 1 - 0.5, 2 - 1, 3 - 1; the first adds a quarter of the second
    assert_close(got, torch.tensor([1.25, 1.0, 2.0]))
    assert not got.requires_grad


def test_gae_with_a_full_trace_is_return_minus_value_and_with_none_the_surprise_of_one_token():
    rewards, values, lengths = torch.tensor([1.0, 0.0, 4.0]), torch.tensor([2.0, 3.0, 5.0]), torch.tensor([3])
    full = generalised_advantages(rewards, values, lengths, discount=0.5, trace=1.0)
    assert_close(full, torch.tensor([1 + 0.25 * 4 - 2, 0.5 * 4 - 3, 4.0 - 5]))
    none = generalised_advantages(rewards, values, lengths, discount=0.5, trace=0.0)
    assert_close(none, torch.tensor([1 + 0.5 * 3 - 2, 0.5 * 5 - 3, 4.0 - 5]))


def test_gae_of_a_sequence_is_the_same_whatever_lies_beside_it():
    rewards, values = torch.tensor([1.0, -1.0, 0.5]), torch.tensor([0.3, 0.1, -0.7])
    alone = generalised_advantages(rewards, values, torch.tensor([3]), discount=0.9, trace=0.8)
    for garbage in (1e30, math.inf, math.nan):
        beside = torch.full((4,), garbage)
        got = generalised_advantages(
            torch.cat([beside, rewards, beside]), torch.cat([beside, values, beside]), torch.tensor([4, 3, 4]),
            discount=0.9, trace=0.8,
        )  # fmt: skip
        assert_close(got[4:7], alone, rtol=0, atol=0)


def test_tensors_are_made_where_the_inputs_are():
    with torch.device("meta"):
        flat, lengths = torch.ones(3, device="cpu"), torch.tensor([2, 1], device="cpu")
        assert generalised_advantages(flat, flat, lengths, discount=1.0, trace=0.5).tolist() == [1.0, 0.0, 0.0]


def test_no_sequence_has_no_advantages():
    none, lengths = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert generalised_advantages(none, none, lengths, discount=1.0, trace=0.95).shape == (0,)
    assert generalised_advantages(none, none, torch.tensor([0, 0]), discount=1.0, trace=0.95).shape == (0,)
    assert sum_of_future(none, lengths, lengths, torch.tensor([0, 0])).shape == (0,)


def test_whitening_uses_the_numbers_of_the_whole_batch_and_a_constant_stays_finite():
    assert_close(whitened(torch.tensor([1.0, 4.0]), mean=2.0, std=0.5), torch.tensor([-1.0, 2.0]) / (0.5 + 1e-4))
    assert_close(whitened(torch.tensor([3.0]), mean=3.0, std=0.0), torch.tensor([0.0]))


@pytest.mark.parametrize(
    ("value", "loss", "gradient"),
    [
        (1.5, 0.125, 0.5),  # nothing clipped: (1.5 - 1)^2 / 2
        (1.0, 0.32, 0.0),  # moved to the return by more than the clip of 0.2: 1.8 counts, (1.8 - 1)^2 / 2
        (2.5, 1.125, 1.5),  # moved away: the worse of (2.5 - 1)^2 / 2 and (2.2 - 1)^2 / 2
        (1.9, 0.405, 0.9),  # within the clip
        (0.0, 0.5, -1.0),  # overshot the return: its own error is the larger
    ],
)
def test_the_critics_loss_is_the_worse_of_the_plain_and_the_clipped_error(value, loss, gradient):
    old = 1.5 if value == 1.5 else 2.0
    values = torch.tensor([value], requires_grad=True)
    got = value_loss(values, torch.tensor([old]), torch.tensor([1.0]), clip=0.2)
    got.sum().backward()
    assert (got.item(), values.grad.item()) == (pytest.approx(loss), pytest.approx(gradient))


def test_without_a_clip_the_critics_loss_is_half_the_squared_error():
    values = torch.tensor([3.0], requires_grad=True)
    got = value_loss(values, torch.tensor([100.0]), torch.tensor([1.0]), clip=None)
    got.sum().backward()
    assert (got.item(), values.grad.item()) == (2.0, 2.0)
