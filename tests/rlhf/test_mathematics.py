"""The pure functions, with numbers worked out by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import (
    batch_normalised,
    group_baseline,
    group_relative,
    leave_one_out,
    normalised_components,
)
from rlhf.controllers import adapted_entropy_coefficient, adapted_kl_coefficient, applied_entropy_coefficient
from rlhf.kl import k1, k2, k3, off_policy
from rlhf.logprobs import _Head, chunked_logprobs, token_entropy, token_logprobs
from rlhf.losses import (
    cispo_loss,
    clipped_policy_loss,
    high_entropy_mask,
    high_entropy_threshold,
    is_clipped,
    sampler_correction,
    sapo_loss,
    sequence_ratio,
    token_ratio,
    vespo_loss,
)
from rlhf.masking import token_weights


def loss_and_gradient(prob, advantage, **clip):
    logprobs = torch.tensor([[prob]]).log().requires_grad_()
    ratio = token_ratio(logprobs, torch.tensor([[0.5]]).log())
    per_token = clipped_policy_loss(ratio, torch.tensor([[advantage]]), **clip)
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
            clipped = is_clipped(torch.tensor(prob / 0.5), torch.tensor(advantage), clip_low=0.2, clip_high=0.28)
            assert bool(clipped) == (gradient == 0.0)


def test_is_clipped_at_its_bounds_and_without_an_advantage_is_false():
    # at the bound itself the clamp still has a gradient
    ratios, advantages = torch.tensor([1.25, 0.75, 2.0, 0.5, 0.5, 0.5]), torch.tensor([1.0, -1.0, 0.0, 0.0, 0.5, -0.5])
    got = is_clipped(ratios, advantages, clip_low=0.25, clip_high=0.25)
    assert got.tolist() == [False, False, False, False, False, True]


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
    rewards = torch.full((2, 7), 0.1)
    rewards[1, 0] = 1.0
    advantages = group_relative(rewards, scale_by_std=True)
    assert advantages[0].eq(0).all()
    assert advantages[1].ne(0).all()


@pytest.mark.parametrize("estimator", [group_relative, group_baseline])
def test_a_group_of_one_is_refused_with_the_key_to_change(estimator):
    sentence = "compares samples of one prompt and got G=1; set rollout.samples_per_prompt to 2 or more"
    with pytest.raises(ValueError, match=f"^{estimator.__name__} {sentence}$"):
        estimator(torch.ones(3, 1), scale_by_std=True)


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


def test_the_only_sequence_of_a_step_is_all_of_it():
    assert_close(token_weights(torch.tensor([0, 4]), "sequence"), torch.tensor([0.0, 0.25]))


def test_logprobs_and_entropy_of_rows_of_tokens_are_those_of_the_last_dimension():
    logits = torch.tensor([[[1.0, 3.0], [1.0, 1.0], [4.0, 1.0]]]).log()
    got = token_logprobs(logits, torch.tensor([[1, 0, 1]]), temperature=1.0).exp()
    assert_close(got, torch.tensor([[0.75, 0.5, 0.2]]))
    entropies = [-sum(p * math.log(p) for p in row) for row in ((0.25, 0.75), (0.5, 0.5), (0.8, 0.2))]
    assert_close(token_entropy(logits, temperature=1.0), torch.tensor([entropies]))


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


def test_the_two_sided_clip_bounds_how_hard_a_bad_token_that_became_likely_pushes():
    # ratio 4, advantage -1: the plain clip leaves loss 4 with a gradient, the ceiling of 3 leaves 3 and none
    assert loss_and_gradient(2.0, -1.0, clip_low=0.2, clip_high=0.2) == (pytest.approx(4.0), pytest.approx(4.0))
    assert loss_and_gradient(2.0, -1.0, clip_low=0.2, clip_high=0.2, ceiling=3.0) == (pytest.approx(3.0), 0.0)
    # a good token is held by the ordinary clip, whatever the ceiling
    assert loss_and_gradient(2.0, 1.0, clip_low=0.2, clip_high=0.2, ceiling=3.0) == (pytest.approx(-1.2), 0.0)


def test_the_ratio_of_a_sequence_is_the_geometric_mean_of_its_tokens_and_each_of_them_gets_its_share_of_the_gradient():
    logprobs = torch.tensor([0.2, 0.8, 0.3]).log().requires_grad_()  # ratios 2 and 8 in sequence 0, 3 in sequence 2
    ratio = sequence_ratio(logprobs, torch.tensor([0.1, 0.1, 0.1]).log(), torch.tensor([0, 0, 2]))
    assert_close(ratio, torch.tensor([4.0, 4.0, 3.0]))
    ratio[0].backward()
    assert_close(logprobs.grad, torch.tensor([2.0, 2.0, 0.0]))  # ratio / length


def test_cispo_weighs_a_token_by_its_clipped_ratio_and_silences_none():
    logprobs = torch.tensor([0.9, 0.1]).log().requires_grad_()
    ratio = torch.tensor([9.0, 0.5])
    per_token = cispo_loss(ratio, logprobs, torch.tensor([1.0, -2.0]), max_ratio=5.0)
    per_token.sum().backward()
    assert_close(logprobs.grad, torch.tensor([-5.0, 1.0]))  # -min(r, 5) A


def test_sapo_is_the_policy_gradient_at_ratio_one_and_fades_on_both_sides():
    gradients = []
    for r in (0.2, 1.0, 1.8):
        ratio = torch.tensor([r], requires_grad=True)
        sapo_loss(ratio, torch.tensor([1.0]), temperature_positive=2.0, temperature_negative=3.0).sum().backward()
        gradients.append(ratio.grad.item())
    assert gradients[1] == pytest.approx(-1.0)  # 4/tau * tau * sigmoid'(0) = 1
    # 4 s (1 - s) with s = sigmoid(2 * 0.8): the same on both sides
    s = 1 / (1 + math.exp(-1.6))
    assert gradients[0] == pytest.approx(gradients[2])
    assert gradients[2] == pytest.approx(-4 * s * (1 - s))


def test_sapo_takes_its_temperature_from_the_sign_of_the_advantage():
    values = sapo_loss(torch.ones(2), torch.tensor([3.0, -0.5]), temperature_positive=1.0, temperature_negative=2.0)
    assert_close(values, torch.tensor([-6.0, 0.5]))  # 4/tau sigmoid(0) = 2/tau


@pytest.mark.parametrize(
    ("level", "mode", "weights"),
    [
        ("token", "truncate", [2.0, 0.5, 1.0]),
        ("token", "mask", [0.0, 0.5, 1.0]),
        ("sequence", "truncate", [1.5, 1.5, 1.0]),
        ("sequence", "mask", [1.5, 1.5, 1.0]),
    ],
)
def test_the_sampler_is_corrected_by_a_bounded_weight_per_token_or_per_sequence(level, mode, weights):
    old = torch.tensor([0.6, 0.2, 0.3]).log().requires_grad_()
    sampler = torch.tensor([0.2, 0.4, 0.3]).log()  # ratios 3, 1/2 in sequence 0; 1 in sequence 1
    got = sampler_correction(old, sampler, torch.tensor([0, 0, 1]), level=level, mode=mode, max_ratio=2.0)
    assert_close(got, torch.tensor(weights))
    assert not got.requires_grad


def test_a_weight_at_the_bound_stays_and_no_token_needs_no_weight():
    one = torch.tensor([math.log(2.0)]).exp().log()
    for mode in ("truncate", "mask"):
        got = sampler_correction(
            one, torch.zeros(1), torch.tensor([0]), level="token", mode=mode, max_ratio=one.exp().item()
        )
        assert_close(got, torch.tensor([2.0]))
        none = sampler_correction(
            torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.long), level="sequence", mode=mode, max_ratio=2.0
        )
        assert none.shape == (0,)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert_close(leave_one_out(rewards, scale_by_std=False), torch.tensor([[1.0, -1 / 3, -1 / 3, -1 / 3]]))


def test_batch_normalised_compares_with_the_whole_batch():
    # mean 1/2, sample variance 4 * 1/4 / 3 = 1/3
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    assert_close(batch_normalised(rewards, scale_by_std=True), torch.tensor([[expected] * 2, [-expected] * 2]))
    assert_close(batch_normalised(torch.full((1, 7), 0.1), scale_by_std=True), torch.zeros(1, 7), rtol=0, atol=0)
    assert_close(batch_normalised(torch.tensor([[3.0]]), scale_by_std=False), torch.tensor([[0.0]]))


def test_group_baseline_has_one_scale_for_all_groups():
    # group means 1/2 and 2: deviations +-1/2, +-1; their sample variance (1/4 + 1/4 + 1 + 1) / 3 = 5/6
    rewards = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    scale = math.sqrt(5 / 6) + 1e-4
    assert_close(group_baseline(rewards, scale_by_std=True), torch.tensor([[0.5, -0.5], [1.0, -1.0]]) / scale)
    assert_close(group_baseline(torch.full((3, 4), 0.1), scale_by_std=True), torch.zeros(3, 4), rtol=0, atol=0)


def test_normalised_components_give_a_small_reward_its_say():
    # a large component that prefers the first and a hundred times smaller one that prefers the second: as strong as each other
    components = torch.tensor([[[100.0, 0.0], [0.0, 1.0]], [[100.0, 1.0], [0.0, 0.0]]])
    advantages = normalised_components(components, torch.tensor([1.0, 1.0]))
    assert_close(advantages[0], torch.zeros(2), atol=1e-3, rtol=0)
    assert advantages[1, 0] > 0.5
    assert advantages[1, 1] < -0.5


def test_normalised_components_are_weighted_summed_and_whitened():
    # each component is +-1/2 around its mean, its group's standard deviation sqrt(1/2)
    components = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[1.0, 2.0], [0.0, 0.0]]])
    # and the floor a ten thousandth of its largest value
    one, two = 0.5 / (math.sqrt(0.5) + 1e-4), 1 / (math.sqrt(2) + 2e-4)
    sums = torch.tensor([[2 * one - 3 * two, 3 * two - 2 * one], [2 * one + 3 * two, -2 * one - 3 * two]])
    scale = math.sqrt((2 * (2 * one - 3 * two) ** 2 + 2 * (2 * one + 3 * two) ** 2) / 3) + 1e-4
    assert_close(normalised_components(components, torch.tensor([2.0, 3.0])), sums / scale)


def test_a_constant_denominator_gives_a_token_the_same_weight_in_short_and_long_sequences():
    assert_close(token_weights(torch.tensor([1, 4, 0]), "constant", max_length=10), torch.tensor([1 / 20, 1 / 20, 0.0]))


@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_log_probabilities_in_chunks_have_the_values_and_gradients_of_the_whole(chunk):
    generator = torch.Generator().manual_seed(0)
    targets = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    up, up_entropy = torch.randn(7, generator=generator), torch.randn(7, generator=generator)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(5, 6, generator=generator)
    results = []
    for compute in (
        lambda h, w: chunked_logprobs(h, w, targets, temperature=0.7, chunk=chunk),
        lambda h, w: (token_logprobs(h @ w.T, targets, temperature=0.7), token_entropy(h @ w.T, temperature=0.7)),
    ):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = compute(*leaves)
        ((logprobs * up).sum() + (entropy * up_entropy).sum()).backward()
        results.append((logprobs, entropy, leaves[0].grad, leaves[1].grad))
    for ours, whole in zip(*results, strict=True):
        assert_close(ours, whole)


@pytest.mark.filterwarnings("error")  # a buffer of the wrong size is enlarged with a warning
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_last_chunk_that_is_not_full_is_computed_in_its_part_of_the_buffer(dtype, temperature):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).to(dtype) for n in (7, 5))
    targets = torch.tensor([0, 4, 2, 2, 1, 3, 0])
    logits = hidden @ weight.T
    ours = chunked_logprobs(hidden, weight, targets, temperature=temperature, chunk=3)
    assert_close(ours[0], token_logprobs(logits, targets, temperature=temperature))
    assert_close(ours[1], token_entropy(logits, temperature=temperature))


@pytest.mark.parametrize("factor", [0.0, 1 / 3, -1e9 / 3, 1e-9 / 3])
def test_derivatives_known_but_for_any_factor_take_no_second_product(factor, monkeypatch):
    products = []
    counted = _Head.scaled_logits
    monkeypatch.setattr(_Head, "scaled_logits", lambda head, rows: products.append(rows) or counted(head, rows))
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 6, generator=generator).requires_grad_() for n in (3, 5))
    wanted = torch.tensor([0.3, -1.1, 0.7])
    logprobs, _ = chunked_logprobs(hidden, weight, torch.tensor([0, 4, 2]), temperature=1.0, expected=wanted, chunk=3)
    (logprobs * (wanted * factor)).sum().backward()
    assert len(products) == 1


def test_a_loss_of_entropies_alone_has_their_gradient():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(7, 6, generator=generator), torch.randn(5, 6, generator=generator)
    gradients = []
    for compute in (
        lambda h, w: chunked_logprobs(h, w, torch.zeros(7, dtype=torch.long), temperature=0.7, chunk=3)[1],
        lambda h, w: token_entropy(h @ w.T, temperature=0.7),
    ):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with torch.device("meta"):  # what is made on the way is made where the inputs are
            compute(*leaves).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    for ours, whole in zip(*gradients, strict=True):
        assert_close(ours, whole)


def test_the_head_computes_in_float32_where_its_inputs_are_whatever_the_defaults_are():
    hidden, weight = torch.ones(3, 2).requires_grad_(), torch.eye(2).requires_grad_()
    targets, device = torch.tensor([0, 1, 0]), torch.device("meta")
    torch.set_default_dtype(torch.float64)
    try:
        with device:
            logprobs, entropies = chunked_logprobs(hidden, weight, targets, temperature=1.0, chunk=2)
            (logprobs.sum() + entropies.sum()).backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(logprobs.detach(), torch.full((3,), -math.log(2)))
    assert_close(entropies.detach(), torch.full((3,), math.log(2)))
    assert_close(weight.grad, torch.tensor([[0.5, 0.5], [-0.5, -0.5]]))  # 2 - 3/2 and 1 - 3/2 hidden states of ones


def test_no_trained_token_gives_a_gradient_of_zero_and_not_none():
    hidden, weight = torch.randn(0, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    logprobs, _ = chunked_logprobs(hidden, weight, torch.zeros(0, dtype=torch.long), temperature=1.0)
    logprobs.sum().backward()
    assert weight.grad.eq(0).all()


def test_a_sequence_sum_counts_a_sequence_as_its_length():
    assert_close(token_weights(torch.tensor([1, 4, 0]), "sequence_sum"), torch.tensor([0.5, 0.5, 0.0]))
    assert_close(token_weights(torch.tensor([1, 4, 0]), "constant"), torch.tensor([0.5, 0.5, 0.0]))  # of one token


# ---------------------------------------------------------------------------------------------- VESPO, entropy, KL, controllers


def test_vespo_is_the_policy_gradient_on_policy():
    logprobs = torch.tensor([0.5, 0.25, 0.5]).log().requires_grad_()
    vespo_loss(logprobs, logprobs.detach(), torch.tensor([2.0, 2.0, -3.0]), torch.tensor([0, 0, 1])).sum().backward()
    assert_close(logprobs.grad, torch.tensor([-2.0, -2.0, 3.0]))


def test_vespos_weight_at_twice_the_probability():
    logprobs = torch.tensor([0.5, 0.5]).log()
    loss = vespo_loss(logprobs, torch.tensor([0.25, 0.25]).log(), torch.tensor([0.5, -0.5]), torch.tensor([0, 1]))
    # w^k exp(lambda (1 - w)): 2^2 exp(-3) where the advantage is positive, 2^3 exp(-2) where it is negative
    expected = torch.tensor([4 * math.exp(-3) * 0.5, -8 * math.exp(-2) * 0.5]) * math.log(2)
    assert_close(loss, expected)


def test_vespo_weighs_every_token_by_the_product_of_its_sequences_ratios():
    # ratios 1/2 and 1/2 (product 1/4) with advantage 1, ratio 2 with advantage -1
    logprobs = torch.tensor([0.25, 0.25, 0.5]).log().requires_grad_()
    old = torch.tensor([0.5, 0.5, 0.25]).log()
    loss = vespo_loss(
        logprobs, old, torch.tensor([1.0, 1.0, -1.0]), torch.tensor([0, 0, 1]),
        power_positive=1.0, decay_positive=4.0, power_negative=2.0, decay_negative=1.0,
    )  # fmt: skip
    loss.sum().backward()
    positive, negative = 0.25 * math.exp(4 * 0.75), 4 * math.exp(-1)
    assert_close(logprobs.grad, torch.tensor([-positive, -positive, negative]))
    assert_close(loss.detach(), torch.tensor([-positive * math.log(0.25)] * 2 + [negative * math.log(0.5)]))


def test_vespo_stays_finite_far_from_the_policy_that_sampled():
    for distance in (-1000.0, 1000.0, -math.inf):
        logprobs = torch.tensor([-1.0], requires_grad=True)
        loss = vespo_loss(logprobs, torch.tensor([-distance]), torch.tensor([1.0]), torch.tensor([0]))
        loss.sum().backward()
        assert logprobs.grad.abs().item() < 1e-10


def test_half_of_the_tokens_are_those_above_the_median_and_ties_with_it_stay():
    entropies = torch.tensor([0.1, 0.5, 0.3, 0.2, 0.4])
    assert high_entropy_threshold(entropies, 0.5) == pytest.approx(0.3)
    assert high_entropy_mask(entropies, high_entropy_threshold(entropies, 0.5)).tolist() == [
        False,
        True,
        True,
        False,
        True,
    ]
    tied = torch.tensor([0.3, 0.5, 0.3, 0.2, 0.3])
    assert high_entropy_mask(tied, high_entropy_threshold(tied, 0.25)).tolist() == [True, True, True, False, True]


@pytest.mark.parametrize(("share", "kept"), [(0.0, 1), (0.29, 30), (0.2, 21), (0.7, 71), (1.0, 101)])
def test_the_share_of_101_tokens_keeps_the_highest_and_at_least_one(share, kept):
    entropies = torch.arange(101.0)[torch.randperm(101, generator=torch.Generator().manual_seed(0))]
    mask = high_entropy_mask(entropies, high_entropy_threshold(entropies, share))
    assert int(mask.sum()) == kept
    assert entropies[mask].min() == 101 - kept


def test_no_token_has_a_threshold_above_every_entropy():
    assert high_entropy_threshold(torch.zeros(0), 0.2) == math.inf


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("old", [[0.2, 0.3, 0.5], [0.4, 0.4, 0.2]])
def test_a_weighted_estimate_has_the_gradient_of_the_exact_kl_on_and_off_policy(estimator, old):
    old, reference = torch.tensor(old), torch.tensor([0.5, 0.25, 0.25]).log()
    logits = torch.tensor([0.2, 0.3, 0.5]).log()  # a policy of three tokens, summed over instead of sampled
    gradients = []
    for compute in (
        lambda logp: (logp.exp() * (logp - reference)).sum(),
        lambda logp: (old * off_policy(estimator(logp, reference), token_ratio(logp, old.log()))).sum(),
    ):
        leaf = logits.clone().requires_grad_()
        value = compute(leaf.log_softmax(0))
        value.backward()
        gradients.append((value.detach(), leaf.grad))
    assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (0.05, 0.5),  # on target
        (0.055, 0.5 * 1.05),  # a tenth above it, half a horizon
        (0.045, 0.5 * 0.95),
        (5.0, 0.5 * 1.1),  # the error counts as a fifth at most
        (-1.0, 0.5 * 0.9),  # an estimate of k1 may be negative
    ],
)
def test_the_kl_coefficient_follows_its_target(measured, expected):
    assert adapted_kl_coefficient(0.5, measured, target=0.05, horizon=1000, samples=500) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("coefficient", "entropy", "expected"),
    [(0.01, 0.1, 0.015), (0.01, 0.2, 0.015), (0.01, 0.3, 0.005), (0.098, 0.1, 0.1), (0.003, 0.3, 0.0)],
)
def test_the_entropy_coefficient_rises_up_to_the_target_and_falls_above_it_within_its_bounds(
    coefficient, entropy, expected
):
    got = adapted_entropy_coefficient(coefficient, entropy, target=0.2, step=0.005, maximum=0.1)
    assert got == pytest.approx(expected)


def test_the_entropy_bonus_is_paid_only_up_to_the_target():
    assert [applied_entropy_coefficient(0.01, e, target=0.2) for e in (0.1, 0.2, 0.21, math.inf)] == [0.01, 0.01, 0, 0]
