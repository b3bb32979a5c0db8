"""The pure functions, with numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import group_relative
from rlhf.kl import k1, k2, k3
from rlhf.logprobs import token_entropy, token_logprobs
from rlhf.losses import clipped_policy_loss, is_clipped
from rlhf.masking import token_weights


def loss_and_gradient(prob, advantage, **clip):
    logprobs = torch.tensor([[prob]]).log().requires_grad_()
    per_token = clipped_policy_loss(logprobs, torch.tensor([[0.5]]).log(), torch.tensor([[advantage]]), **clip)
    per_token.sum().backward()
    return per_token.item(), logprobs.grad.item()


def test_on_policy_the_gradient_is_minus_the_advantage():
    loss, gradient = loss_and_gradient(0.5, 2.0, clip_low=0.2, clip_high=0.2)
    assert loss == pytest.approx(-2.0)
    assert gradient == pytest.approx(-2.0)


@pytest.mark.parametrize(("prob", "advantage", "loss"), [(0.75, 1.0, -1.2), (0.25, -1.0, 0.8)])
def test_a_token_outside_the_trust_region_in_its_advantages_direction_gets_no_gradient(prob, advantage, loss):
    assert loss_and_gradient(prob, advantage, clip_low=0.2, clip_high=0.2) == (pytest.approx(loss), 0.0)


@pytest.mark.parametrize(("prob", "advantage"), [(0.75, -1.0), (0.25, 1.0)])
def test_a_token_that_moved_the_wrong_way_keeps_its_gradient(prob, advantage):
    ratio = prob / 0.5
    assert loss_and_gradient(prob, advantage, clip_low=0.2, clip_high=0.2) == (
        pytest.approx(-ratio * advantage),
        pytest.approx(-ratio * advantage),
    )


def test_clip_higher_moves_only_the_upper_bound():
    assert loss_and_gradient(0.625, 1.0, clip_low=0.2, clip_high=0.28)[1] == pytest.approx(-1.25)  # ratio 1.25 < 1.28
    assert loss_and_gradient(0.625, 1.0, clip_low=0.2, clip_high=0.2)[1] == 0.0


def test_is_clipped_agrees_with_a_vanished_gradient():
    for prob in (0.2, 0.45, 0.5, 0.55, 0.8):
        for advantage in (-1.0, 1.0):
            _, gradient = loss_and_gradient(prob, advantage, clip_low=0.2, clip_high=0.28)
            clipped = is_clipped(
                torch.tensor(prob).log(), torch.tensor(0.5).log(), torch.tensor(advantage), clip_low=0.2, clip_high=0.28
            )
            assert bool(clipped) == (gradient == 0.0)


def test_group_relative_of_one_success_in_four():
    # mean 1/4, sample variance (9/16 + 3/16) / 3 = 1/4, so std 1/2
    assert_close(
        group_relative(torch.tensor([[1.0, 0, 0, 0]]), scale_by_std=True),
        torch.tensor([[0.75, -0.25, -0.25, -0.25]]) / (0.5 + 1e-4),
    )
    assert_close(
        group_relative(torch.tensor([[1.0, 0, 0, 0]]), scale_by_std=False), torch.tensor([[0.75, -0.25, -0.25, -0.25]])
    )


def test_groups_do_not_see_each_other():
    alone = group_relative(torch.tensor([[1.0, 0.0]]), scale_by_std=True)
    assert_close(group_relative(torch.tensor([[1.0, 0.0], [100.0, -7.0]]), scale_by_std=True)[:1], alone)


def test_equal_rewards_give_exactly_zero_whatever_rounding_does_to_their_mean():
    assert group_relative(torch.full((1, 7), 0.1), scale_by_std=True).eq(0).all()


def test_a_group_of_one_is_refused_with_the_key_to_change():
    with pytest.raises(ValueError, match="samples_per_prompt"):
        group_relative(torch.ones(3, 1), scale_by_std=True)


def test_kl_estimators_at_a_ratio_of_two():
    logprobs, reference = torch.tensor(0.25).log(), torch.tensor(0.5).log()
    assert k1(logprobs, reference).item() == pytest.approx(-math.log(2))
    assert k2(logprobs, reference).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert k3(logprobs, reference).item() == pytest.approx(2 - math.log(2) - 1)


def test_k1_and_k3_average_to_the_exact_kl():
    policy, reference = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([0.5, 0.25, 0.25])
    exact = (policy * (policy / reference).log()).sum()
    for estimator in (k1, k3):
        assert_close((policy * estimator(policy.log(), reference.log())).sum(), exact)


def test_logprobs_and_entropy_use_the_temperature():
    logits = torch.tensor([[0.0, math.log(3.0)]])
    assert_close(token_logprobs(logits, torch.tensor([1]), temperature=1.0).exp(), torch.tensor([0.75]))
    assert_close(token_logprobs(logits, torch.tensor([1]), temperature=0.5).exp(), torch.tensor([0.9]))  # 9 / (1 + 9)
    assert_close(token_entropy(torch.zeros(1, 4), temperature=2.0), torch.tensor([math.log(4)]))


def test_token_weights_by_token_and_by_sequence():
    lengths = torch.tensor([1, 3, 0])
    assert_close(token_weights(lengths, "token"), torch.tensor([0.25, 0.25, 0.0]))
    assert_close(token_weights(lengths, "sequence"), torch.tensor([0.5, 1 / 6, 0.0]))


@pytest.mark.parametrize("aggregation", ["token", "sequence"])
def test_the_weights_of_all_trained_tokens_sum_to_one(aggregation):
    lengths = torch.tensor([5, 1, 0, 9])
    assert_close((token_weights(lengths, aggregation) * lengths).sum(), torch.tensor(1.0))


def test_a_step_without_trained_tokens_has_weights_of_zero_not_nan():
    for aggregation in ("token", "sequence"):
        assert token_weights(torch.zeros(3, dtype=torch.long), aggregation).eq(0).all()
