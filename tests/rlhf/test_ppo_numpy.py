"""PPO from its papers in NumPy: padded arrays, loops, sums written out, gradients by hand; ours must be equal on ragged batches.

Sources: GAE https://arxiv.org/abs/1506.02438, eq. 11-16; PPO https://arxiv.org/abs/1707.06347, eq. 7; the per-token reward of
https://arxiv.org/abs/1909.08593, eq. 2; whitening and the clipped value loss as in OpenAI's lm-human-preferences. Padding holds
garbage, which nothing may read.
"""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from rlhf.advantages import generalised_advantages, token_rewards, whitened
from rlhf.kl import k1, off_policy
from rlhf.losses import clipped_policy_loss, token_ratio, value_loss
from rlhf.masking import token_weights

GARBAGE = 1e6
BETA, GAMMA, LAMBDA, CLIP, VALUE_CLIP, VALUE_WEIGHT = 0.05, 0.97, 0.9, 0.2, 0.15, 0.5
LENGTHS = [[1], [7], [3, 3, 3], [5, 1, 9, 2], [4, 0, 6], [0, 2, 0, 0, 11, 1], [30, 1, 1, 1, 1, 1]]


def make_batch(lengths, seed):
    """Padded arrays of everything a step of PPO starts from."""
    random = np.random.default_rng(seed)
    shape = (len(lengths), max(lengths) + 2)
    mask = np.arange(shape[1]) < np.array(lengths)[:, None]
    batch = {name: random.normal(size=shape) for name in ("values", "old_values")}
    batch["old"] = -random.exponential(1.5, size=shape)
    batch["reference"] = batch["old"] + 0.3 * random.normal(size=shape)
    batch["new"] = batch["old"] + 0.3 * random.normal(size=shape)
    batch["values"] = batch["old_values"] + 0.3 * random.normal(size=shape)
    for values in batch.values():
        values[~mask] = GARBAGE
    return batch, random.normal(size=len(lengths)), mask


def numpy_rewards(batch, scores, lengths):
    rewards = np.full(batch["old"].shape, GARBAGE)
    for i, length in enumerate(lengths):
        for t in range(length):
            rewards[i, t] = -BETA * (batch["old"][i, t] - batch["reference"][i, t])
            if t == length - 1:
                rewards[i, t] += scores[i]
    return rewards


def numpy_advantages(rewards, values, lengths):
    """The sum over all later errors, term by term, not the recursion."""
    advantages = np.full(values.shape, GARBAGE)
    for i, length in enumerate(lengths):
        for t in range(length):
            total = 0.0
            for later in range(t, length):
                value_after = values[i, later + 1] if later + 1 < length else 0.0
                error = rewards[i, later] + GAMMA * value_after - values[i, later]
                total += (GAMMA * LAMBDA) ** (later - t) * error
            advantages[i, t] = total
    return advantages


def numpy_loss(batch, advantages, returns, lengths):
    """Mean over tokens of the policy's and the critic's loss, with their gradients."""
    count = sum(lengths)
    loss, d_logprobs, d_values = 0.0, np.zeros(advantages.shape), np.zeros(advantages.shape)
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio, advantage = np.exp(batch["new"][i, t] - batch["old"][i, t]), advantages[i, t]
            gain = ratio * advantage
            limit = (1 + CLIP if advantage > 0 else 1 - CLIP) * advantage
            if gain < limit:
                d_logprobs[i, t] = -gain / count
            loss -= min(gain, limit) / count
            value, old, goal = batch["values"][i, t], batch["old_values"][i, t], returns[i, t]
            held = (
                old + VALUE_CLIP
                if value > old + VALUE_CLIP
                else old - VALUE_CLIP
                if value < old - VALUE_CLIP
                else value
            )
            plain, clipped = 0.5 * (value - goal) ** 2, 0.5 * (held - goal) ** 2
            if plain >= clipped:
                d_values[i, t] = VALUE_WEIGHT * (value - goal) / count
            loss += VALUE_WEIGHT * max(plain, clipped) / count
    return loss, d_logprobs, d_values


def flat(array, mask):
    return torch.from_numpy(array[mask].copy())


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rewards_advantages_losses_and_gradients_of_ppo_are_those_of_the_papers(lengths):
    batch, scores, mask = make_batch(lengths, seed=sum(lengths))
    rewards = numpy_rewards(batch, scores, lengths)
    advantages = numpy_advantages(rewards, batch["old_values"], lengths)
    returns = np.where(mask, advantages + batch["old_values"], GARBAGE)
    mean, std = advantages[mask].mean(), advantages[mask].std()
    white = np.where(mask, (advantages - mean) / (std + 1e-4), GARBAGE)
    loss, d_logprobs, d_values = numpy_loss(batch, white, returns, lengths)

    tensors = {name: flat(array, mask) for name, array in batch.items()}
    sizes = torch.tensor(lengths)
    our_rewards = token_rewards(
        torch.from_numpy(scores), k1(tensors["old"], tensors["reference"]), sizes, coefficient=BETA
    )
    assert_close(our_rewards, flat(rewards, mask), rtol=0, atol=1e-12)
    ours = generalised_advantages(our_rewards, tensors["old_values"], sizes, discount=GAMMA, trace=LAMBDA)
    assert_close(ours, flat(advantages, mask), rtol=0, atol=1e-12)
    our_white = whitened(ours, mean=mean, std=std)
    assert_close(our_white, flat(white, mask), rtol=0, atol=1e-9)
    logprobs, values = tensors["new"].requires_grad_(), tensors["values"].requires_grad_()
    policy = clipped_policy_loss(token_ratio(logprobs, tensors["old"]), our_white, clip_low=CLIP, clip_high=CLIP)
    critic = value_loss(values, tensors["old_values"], ours + tensors["old_values"], clip=VALUE_CLIP)
    weights = token_weights(sizes, "token").double().repeat_interleave(sizes)
    our_loss = ((policy + VALUE_WEIGHT * critic) * weights).sum()
    our_loss.backward()
    assert our_loss.item() == pytest.approx(loss, rel=1e-6)  # the weights are float32
    assert_close(logprobs.grad, flat(d_logprobs, mask), rtol=1e-6, atol=1e-9)
    assert_close(values.grad, flat(d_values, mask), rtol=1e-6, atol=1e-9)


def test_the_batches_reach_every_branch_of_both_clips():
    reached = set()
    for lengths in LENGTHS:
        batch, scores, mask = make_batch(lengths, seed=sum(lengths))
        advantages = numpy_advantages(numpy_rewards(batch, scores, lengths), batch["old_values"], lengths)
        _, d_logprobs, d_values = numpy_loss(batch, advantages, advantages + batch["old_values"], lengths)
        reached |= {("policy", a > 0, g == 0) for a, g in zip(advantages[mask], d_logprobs[mask], strict=True)}
        reached |= {("critic", g == 0) for g in d_values[mask]}
    assert len(reached) == 6


def test_rewards_and_advantages_ignore_the_score_of_a_sequence_without_trained_tokens():
    batch, scores, mask = make_batch([4, 0, 6], seed=1)
    sizes = torch.tensor([4, 0, 6])
    results = []
    for score in (scores[1], np.nan):
        scores[1] = score
        rewards = token_rewards(torch.from_numpy(scores.copy()), flat(batch["old"], mask), sizes, coefficient=BETA)
        results.append(
            generalised_advantages(rewards, flat(batch["old_values"], mask), sizes, discount=GAMMA, trace=LAMBDA)
        )
    assert_close(results[0], results[1], rtol=0, atol=0)


def test_moving_a_sequence_moves_its_advantages_and_changes_no_bit_of_them():
    lengths, order = [5, 1, 9, 2], [2, 0, 3, 1]
    batch, scores, mask = make_batch(lengths, seed=3)

    def compute(rows):
        sizes = torch.tensor([lengths[i] for i in rows])
        rewards = token_rewards(
            torch.from_numpy(scores[rows]), flat(batch["old"][rows], mask[rows]), sizes, coefficient=BETA
        )
        values = flat(batch["old_values"][rows], mask[rows])
        result = generalised_advantages(rewards, values, sizes, discount=GAMMA, trace=LAMBDA)
        return dict(zip(rows, result.split(sizes.tolist()), strict=True))

    together, shuffled = compute([0, 1, 2, 3]), compute(order)
    for i in order:
        assert_close(shuffled[i], together[i], rtol=0, atol=0)
        assert_close(compute([i])[i], together[i], rtol=0, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_weighted_kl_is_unbiased_over_samples_of_an_old_policy(seed):
    """Every token of a vocabulary once, weighted by how likely the old policy samples it."""
    random = np.random.default_rng(seed)
    old, new, reference = (random.dirichlet(np.ones(6)) for _ in range(3))
    exact = sum(p * np.log(p / q) for p, q in zip(new, reference, strict=True))
    kl = k1(torch.from_numpy(new).log(), torch.from_numpy(reference).log())
    ratio = token_ratio(torch.from_numpy(new).log(), torch.from_numpy(old).log())
    assert (torch.from_numpy(old) * off_policy(kl, ratio)).sum().item() == pytest.approx(exact, abs=1e-12)
