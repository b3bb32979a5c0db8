"""From the rewards of steps to advantages of tokens inside the loop: components, weights, credit; numbers by hand."""

import math

import pytest
import torch
from torch.testing import assert_close

from rlhf.config import load_config
from rlhf.experience import estimate, step_advantages
from rlhf.types import Prompt, Rollout, Score, StepReward
from tests.rlhf.online_helpers import RECIPE

PROMPT = Prompt(id="a", token_ids=(1,), question="?", reference="1")


def config(*overrides, size=2, recipe=RECIPE):
    return load_config(
        recipe,
        [f"rollout.samples_per_prompt={size}", "rewards=[{name: correctness}]", *([] if recipe != RECIPE else ["algorithm.scale_by_std=false"]), *overrides],
    )  # fmt: skip


def score(*steps, value=0.0, weights=None, name="process"):
    """Steps as (position, weighted reward)."""
    weights = weights or {name: 1.0}
    return Score(
        verdict="wrong", value=value, weights=weights, steps=tuple(StepReward(at, reward, name) for at, reward in steps)
    )


def test_the_minimum_compares_returns_of_tokens_and_ends_at_the_worst_step():
    # returns: -1 for two tokens, then 0; 0.5 for one token, then 0. Their mean over five tokens is -0.3.
    scores = [score((0, 0.9), (1, -1.0), (2, 0.9)), score((0, 0.5), (1, 0.9))]
    cold = config("algorithm.step_credit=min", "algorithm.step_temperature=0.001")
    first, second = step_advantages(scores, [3, 2], cold)
    assert_close(first, torch.tensor([-0.7, -0.7, 0.3]))
    assert_close(second, torch.tensor([0.8, 0.3]))


def test_the_sum_compares_steps_and_adds_up_their_future():
    # mean over the five steps 0.44
    scores = [score((0, 0.9), (1, -1.0), (2, 0.9)), score((0, 0.5), (1, 0.9))]
    first, second = step_advantages(scores, [3, 2], config())
    assert_close(first, torch.tensor([0.46 - 1.44 + 0.46, -1.44 + 0.46, 0.46]))
    assert_close(second, torch.tensor([0.06 + 0.46, 0.46]))


def test_a_token_answers_for_its_own_step_alone_and_for_none_behind_the_last():
    # mean over the five steps 0.44; the second completion's steps end in one token
    scores = [score((0, 0.9), (2, -1.0), (3, 0.9)), score((1, 0.5), (1, 0.9))]
    first, second = step_advantages(scores, [5, 3], config("algorithm.step_credit=own"))
    assert_close(first, torch.tensor([0.46, -1.44, -1.44, 0.46, 0.0]))
    assert_close(second, torch.tensor([0.52, 0.52, 0.0]))


def test_with_a_critic_a_step_cannot_stand_for_itself_as_the_discount_says_that():
    with pytest.raises(ValueError, match="step_credit"):
        load_config(RECIPE.parent / "ppo.yaml", ["algorithm.step_credit=own"])


def test_the_minimum_of_probabilities_is_refused_as_it_would_hold_down_what_is_right_behind_the_worst_step():
    cold = config("algorithm.step_credit=min", "algorithm.step_temperature=0.001")
    first, _ = step_advantages([score((0, 0.1), (1, 0.9)), score((1, 0.2))], [2, 2], cold)  # returns 0.1, 0; 0.2, 0.2
    assert_close(first, torch.tensor([-0.025, -0.125]))  # the right step is worse off than the wrong one before it
    first, _ = step_advantages([score((0, -0.8), (1, 0.8)), score((1, -0.6))], [2, 2], cold)
    assert_close(first, torch.tensor([-0.3, 0.5]))
    process = "rewards=[{name: correctness}, {name: process, kind: process_reward_model, path: judge, step_value: %s}]"
    with pytest.raises(ValueError, match=r"rewards\.process\.step_value is probability: .*set step_value to signed"):
        config("algorithm.step_credit=min", process % "probability")
    config("algorithm.step_credit=min", process % "signed")


def test_with_the_minimum_leaving_one_out_compares_with_the_tokens_of_the_other_sample():
    scores = [score((1, 0.2)), score((0, 0.8))]
    cold = config("algorithm.step_credit=min", "algorithm.advantage=leave_one_out")
    first, second = step_advantages(scores, [2, 4], cold)
    assert_close(first, torch.tensor([0.2 - 0.2, 0.2 - 0.2]))  # the other's tokens: 0.8, 0, 0, 0
    assert_close(second, torch.tensor([0.6, -0.2, -0.2, -0.2]))


@pytest.mark.parametrize("credit", ["sum", "min", "own"])
def test_a_weight_counts_where_advantages_are_divided_by_a_standard_deviation(credit):
    rewards = [[(0, 0.2), (1, 0.7)], [(0, 0.9), (1, 0.4)]]
    overrides = (f"algorithm.step_credit={credit}", "algorithm.scale_by_std=true")
    plain = step_advantages([score(*steps) for steps in rewards], [2, 2], config(*overrides))
    weighted = [score(*((at, 0.25 * r) for at, r in steps), weights={"process": 0.25}) for steps in rewards]
    for light, full in zip(step_advantages(weighted, [2, 2], config(*overrides)), plain, strict=True):
        assert_close(light, 0.25 * full)
        assert full.abs().sum() > 0


@pytest.mark.parametrize("credit", ["sum", "min", "own"])
def test_a_component_with_a_large_scale_does_not_drown_another_that_judges_steps_too(credit):
    def both(factor):
        of = [(0.2, 0.7), (0.9, 0.4)]
        return [
            Score(
                verdict="wrong",
                value=0.0,
                weights={"a": 1.0, "b": 1.0},
                steps=(StepReward(0, a * factor, "a"), StepReward(1, b, "b")),
            )
            for a, b in of
        ]

    given = config(
        f"algorithm.step_credit={credit}", "algorithm.scale_by_std=true", "algorithm.step_temperature=1000000"
    )
    small, large = (step_advantages(both(factor), [2, 2], given) for factor in (1.0, 1000.0))
    for a, b in zip(small, large, strict=True):
        assert_close(a, b, rtol=0, atol=1e-3)  # the floor of the standard deviation is 1e-4


@pytest.mark.parametrize("credit", ["sum", "min", "own"])
def test_steps_that_are_all_alike_add_exactly_nothing(credit):
    scores = [score((1, 0.1)), score((1, 0.1))]
    for advantages in step_advantages(scores, [2, 2], config(f"algorithm.step_credit={credit}")):
        assert advantages.eq(0).all()


@pytest.mark.parametrize("credit", ["sum", "min", "own"])
def test_an_undecided_completion_takes_the_steps_of_its_group_with_it_and_a_weight_of_0_those_of_its_component(credit):
    undecided = Score(verdict="undecided", value=None)
    fine = [score((0, 0.0)), score((0, 1.0))]
    got = step_advantages([score((0, 0.5)), undecided, *fine], [1, 1, 1, 1], config(f"algorithm.step_credit={credit}"))
    assert_close(torch.cat(got), torch.tensor([0.0, 0.0, -0.5, 0.5]))
    silent = [score((0, 0.0), weights={"process": 0.0}), score((0, 0.0), weights={"process": 0.0})]
    assert torch.cat(step_advantages(silent, [1, 1], config(f"algorithm.step_credit={credit}"))).eq(0).all()


def rollout(length):
    return Rollout(
        prompt=PROMPT,
        token_ids=(5,) * length,
        logprobs=(0.0,) * length,
        finish_reason="stop",
        text="",
        policy_version=0,
    )


@pytest.mark.parametrize("credit", ["sum", "min", "own"])
def test_process_rewards_are_added_to_the_advantage_of_the_whole(credit):
    rollouts = [rollout(2), rollout(2)]
    scores = [score((0, 0.2), (1, 0.2), value=1.0), score((0, 0.8), (1, 0.8))]
    given = config(f"algorithm.step_credit={credit}")
    both = estimate(rollouts, scores, given)
    steps = step_advantages(scores, [2, 2], given)
    for advantages, whole, of_steps in zip(both.advantages, (0.5, -0.5), steps, strict=True):
        assert_close(advantages, whole + of_steps)


def test_with_a_critic_the_minimum_is_what_the_rewards_of_tokens_add_up_to():
    ppo = config(
        "algorithm.step_credit=min", "algorithm.step_temperature=0.001", "algorithm.trace=1.0", "algorithm.whiten=false",
        "algorithm.kl_coefficient=0", "reference=null", recipe=RECIPE.parent / "ppo.yaml",
    )  # fmt: skip
    ppo = ppo.model_copy(update={"rollout": ppo.rollout.model_copy(update={"samples_per_prompt": 1})})
    scores = [score((0, 0.9), (1, -0.5), (2, 0.3), weights={"process": 0.5})]
    got = estimate([rollout(4)], scores, ppo, values=(torch.zeros(4),))
    assert_close(got.advantages[0], torch.tensor([-0.5, -0.5, 0.0, 0.0]))
    assert math.isclose(sum(step.value for step in scores[0].steps), 0.7)
