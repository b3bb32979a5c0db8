"""Rewards that depend on the length of a completion, by hand."""

import math

import pytest

from reward_models.composite import build_reward
from reward_models.verifiable import cosine, target_length
from rlhf.config import load_config
from rlhf.types import Prompt, Rollout

RIGHT, WRONG = "<think>\n</think>\n\\boxed{7}", "<think>\n</think>\n\\boxed{8}"


def rollout(tokens, *, text=RIGHT, finish="stop", think=None):
    columns = {} if think is None else {"think": think}
    prompt = Prompt(id="p", token_ids=(1,), question="3 + 4?", reference="7", columns=columns)
    return Rollout(
        prompt=prompt, token_ids=(5,) * tokens, logprobs=(-1.0,) * tokens, finish_reason=finish, text=text, policy_version=0
    )  # fmt: skip


@pytest.mark.parametrize(
    ("tokens", "value"),
    [
        (0.001, 2.0),
        (25, 1 + (1 + math.sqrt(0.5)) / 2),
        (50, 1.5),
        (75, 1 + (1 - math.sqrt(0.5)) / 2),
        (100, 1.0),
        (120, 1.0),
    ],
)
def test_the_cosine_falls_from_its_value_at_no_tokens_to_that_at_the_limit(tokens, value):
    component = cosine(max_tokens=100, at_zero=2.0, at_limit=1.0)
    assert component(rollout(max(1, int(tokens))), "") == pytest.approx(value, abs=3e-4 if tokens < 1 else 1e-9)


def test_the_cosine_of_wrong_completions_rises_with_their_length():
    component = cosine(max_tokens=100, at_zero=-10.0, at_limit=0.0)
    assert [component(rollout(n), "") for n in (50, 100)] == [pytest.approx(-5.0), pytest.approx(0.0)]


def test_a_completion_that_was_cut_gets_the_value_for_that():
    component = cosine(max_tokens=100, at_zero=2.0, at_limit=1.0, exceeded=-10.0)
    assert component(rollout(100, finish="length"), "") == -10.0
    assert component(rollout(100), "") == pytest.approx(1.0)
    assert cosine(max_tokens=100, at_zero=2.0, at_limit=1.0)(rollout(100, finish="length"), "") == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("think", "tokens", "value"),
    [("short", 20, 0.0), ("short", 26, -0.6), ("short", 15, -0.5), ("long", 95, -0.5), ("30", 27, -0.3)],
)
def test_an_exact_target_costs_each_token_of_distance(think, tokens, value):
    component = target_length(tokens={"short": 20, "long": 100}, form="exact", per_token=0.1)
    assert component(rollout(tokens, think=think), "") == pytest.approx(value)


@pytest.mark.parametrize(
    ("tokens", "value"), [(20, 0.5), (18, 0.7), (15, 1.0), (1, 1.0), (22, 0.3), (25, 0.0), (90, 0.0)]
)
def test_at_most_a_target_is_one_well_below_it_and_zero_well_above(tokens, value):
    component = target_length(tokens={"short": 20}, form="at_most", per_token=0.1)
    assert component(rollout(tokens, think="short"), "") == pytest.approx(value)


def test_a_target_that_nobody_set_has_no_value_which_is_no_zero():
    component = target_length(tokens={"short": 20}, form="exact", per_token=0.1)
    assert component(rollout(20), "") is None
    assert component(rollout(20, think="long"), "") is None


def grpo(rewards):
    return build_reward(load_config("recipes/tiny/grpo.yaml", [f"rewards={rewards}"]), prefill="", device="cpu")


def test_a_correct_completion_within_its_budget_earns_the_product_of_both():
    """L1-Max: I(correct) clip(alpha (target - n) + delta, 0, 1)."""
    reward = grpo(
        "[{name: correctness, weight: 0}, {name: budget, kind: target_length, form: at_most, tokens: {off: 10}, per_token: 0.1, "
        "gates: [{component: correctness}]}]"
    )
    scores = reward(
        [rollout(n, text=text, think="off") for n, text in ((10, RIGHT), (13, RIGHT), (30, RIGHT), (10, WRONG))]
    )
    assert [s.value for s in scores] == [pytest.approx(v) for v in (0.5, 0.2, 0.0, 0.0)]


def test_right_and_wrong_completions_have_each_their_cosine():
    """max_new_tokens is 96: at 48 tokens a cosine is half way."""
    reward = grpo(
        "[{name: correctness, weight: 0}, {name: right, kind: cosine, at_zero: 2, at_limit: 1, exceeded: -10, applies: {verdict: correct}}, "
        "{name: wrong, kind: cosine, at_zero: -10, at_limit: 0, exceeded: -10, applies: {verdict: wrong}}]"
    )
    scores = reward([rollout(48), rollout(48, text=WRONG), rollout(96, finish="length")])
    assert [s.value for s in scores] == [pytest.approx(1.5), pytest.approx(-5.0), -10.0]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("{name: budget, kind: target_length, slack: 0.1}", "form is exact and slack is 0.1, which only at_most reads"),
        ("{name: budget, kind: target_length, tokens: {medium: 3}}", "medium"),
        ("{name: cosine, at_zero: 1}", "at_limit"),
    ],
)
def test_a_reward_that_lacks_or_has_too_much_is_a_sentence(reward, message):
    with pytest.raises(ValueError, match=message):
        grpo(f"[{{name: correctness}}, {reward}]")
