"""How components become one reward: scale, clip, weight over time, applicability, gates; and what each of them drives."""

import math
from pathlib import Path

import pytest
import torch
from test_rewards import part, rollout
from torch.testing import assert_close

from reward_models.composite import CompositeReward, build_reward, require_columns
from reward_models.verifiable import repetition
from rlhf.advantages import component_deviations, filled_components, normalised_deviations, variance_shares
from rlhf.config import RuleReward, load_config, scheduled
from rlhf.experience import ComponentTable, describe_advantages, estimate, sequence_advantages
from rlhf.metrics import Metrics
from rlhf.types import Prompt, Score, StepReward

RECIPE = Path(__file__).parents[2] / "recipes/tiny/grpo.yaml"
RIGHT, WRONG = "<think>\n</think>\n\\boxed{7}", "<think>\n</think>\n\\boxed{8}"


def of(value):
    """A rule that gives each completion the same value, or the value that its number of tokens picks out."""
    return lambda rollout, text: value[len(rollout.token_ids)] if isinstance(value, dict) else value


def reward(*parts, **options):
    return CompositeReward(dict([part("correctness"), *parts]), **options)


def tokens(*lengths, text=RIGHT):
    return [rollout(text, tokens=tuple(range(n))) for n in lengths]


def recipe(*overrides):
    return load_config(RECIPE, overrides)


def score(verdict="wrong", weights=None, **scaled):
    weights = weights or dict.fromkeys(scaled, 1.0)
    return Score(
        verdict=verdict,
        value=sum(weights[k] * v for k, v in scaled.items()),
        components=scaled,
        scaled=scaled,
        weights=weights,
    )


# ---------------------------------------------------------------------------------------------------------------- one completion


def test_a_value_is_divided_by_its_scale_then_clipped_then_weighted_and_the_raw_one_is_kept():
    [score] = reward(part("style", of(-50.0), scale=10.0, clip=3.0, weight=0.5))(tokens(2))
    assert score.components == {"correctness": 1.0, "style": -50.0}
    assert score.scaled == {"correctness": 1.0, "style": -3.0}
    assert score.weighted == {"correctness": 1.0, "style": -1.5}
    assert score.value == -0.5


def test_two_components_of_one_kind_have_names_of_their_own():
    config = recipe(
        "rewards=[{name: correctness}, {name: short, kind: length}, {name: long, kind: length, weight: -2}]"
    )
    [score] = build_reward(config, prefill="", device="cpu")([rollout(RIGHT, tokens=(5,) * 1000)])
    assert score.weighted == {"correctness": 1.0, "short": 0.5, "long": -1.0}


@pytest.mark.parametrize(
    ("batch", "weight"), [(1, 1.0), (3, 1.0), (4, 0.75), (5, 0.5), (7, 0.0), (100, 0.0)]
)  # from 1 to 0 between the batches 3 and 7
def test_a_weight_moves_in_a_line_with_the_number_of_the_batch(batch, weight):
    options = RuleReward.model_validate({"name": "format", "schedule": {"to": 0.0, "first_batch": 3, "last_batch": 7}})
    assert scheduled(options.weight, options.schedule, batch) == weight
    named = reward(part("style", of(2.0), schedule={"to": 0.0, "first_batch": 3, "last_batch": 7}))
    assert named.at(batch)(tokens(2))[0].value == 1.0 + 2.0 * weight


def test_a_component_that_does_not_apply_is_missing_and_not_asked():
    asked = []

    def brief(rollout, text):
        asked.append(rollout.text)
        return 0.25

    right, wrong = reward(part("brief", brief, applies={"verdict": "correct"}))([rollout(RIGHT), rollout(WRONG)])
    assert asked == [RIGHT]
    assert (right.value, wrong.value) == (1.25, 0.0)
    assert "brief" not in wrong.components
    assert "brief" not in wrong.weighted


@pytest.mark.parametrize(
    ("columns", "applies"),
    [({"subject": "algebra", "level": 5}, True), ({"subject": "geometry", "level": 5}, False), ({"subject": "algebra", "level": 1}, False), ({}, False)],
)  # fmt: skip
def test_a_component_may_be_for_some_values_of_the_datas_columns(columns, applies):
    prompt = Prompt(id="p", token_ids=(1,), question="q", reference="7", columns=columns)
    hard = part("hard", of(1.0), applies={"columns": {"subject": ["algebra"], "level": [4, 5]}})
    named = part("named", of(1.0), applies={"columns": {"subject": []}})
    base = rollout(RIGHT)
    [scored] = reward(hard, named)([type(base)(**{**{f: getattr(base, f) for f in base.__slots__}, "prompt": prompt})])
    assert ("hard" in scored.components) == applies
    assert ("named" in scored.components) == ("subject" in columns)


def test_a_closed_gate_makes_a_component_0_and_an_open_one_changes_nothing():
    style = part("style", of(0.5), gates=[{"component": "correctness"}])
    right, wrong = reward(style)([rollout(RIGHT), rollout(WRONG)])
    assert (right.scaled["style"], wrong.scaled["style"]) == (0.5, 0.0)
    assert wrong.components["style"] == 0.5  # what it would have been stays to be seen
    assert (right.value, wrong.value) == (1.5, 0.0)


def test_a_gate_looks_at_raw_values_and_is_closed_where_its_component_does_not_apply():
    quality = part("quality", of({2: 40.0, 3: 60.0}), scale=100.0, applies={"verdict": "correct"})
    style = part("style", of(1.0), gates=[{"component": "quality", "at_least": 50}])
    low, high = reward(quality, style)(tokens(2, 3))
    [missing] = reward(quality, style)(tokens(3, text=WRONG))
    assert [s.scaled["style"] for s in (low, high, missing)] == [0.0, 1.0, 0.0]


def test_a_gate_and_a_scale_reach_every_step_of_a_component_that_judges_steps():
    steps = part(
        "steps", of([StepReward(0, 10.0), StepReward(1, -99.0)]), scale=10.0, clip=2.0, weight=3.0,
        gates=[{"component": "correctness"}],
    )  # fmt: skip
    right, wrong = reward(steps)([rollout(RIGHT), rollout(WRONG)])
    assert right.steps == (StepReward(0, 3.0), StepReward(1, -6.0))
    assert wrong.steps == (StepReward(0, 0.0), StepReward(1, 0.0))
    assert right.weighted == {"correctness": 1.0, "steps": -3.0}
    assert right.value == 1.0


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_component_without_a_value_leaves_the_completion_undecided_and_never_at_0(nothing):
    fine, down = reward(part("mine", of({2: 1.0, 3: nothing})))(tokens(2, 3))
    assert fine.value == 2.0
    assert (down.verdict, down.value, down.reason) == ("undecided", None, "mine gave no value of p")
    assert down.components == {"correctness": 1.0}


def test_a_component_that_is_only_watched_may_have_no_value_unless_a_gate_looks_at_it():
    seen = part("seen", of(None), weight=0.0)
    assert reward(seen)(tokens(2))[0].value == 1.0
    assert reward(seen, part("style", of(1.0), gates=[{"component": "seen"}]))(tokens(2))[0].value is None


def test_a_batch_component_is_asked_once_with_the_decided_rollouts_it_applies_to_even_when_there_are_none():
    asked = []
    name, judge = part("judge", of(1.0), applies={"verdict": "correct"})
    count = type(judge)(judge.options, lambda rollouts: asked.append(len(rollouts)) or [None] * len(rollouts))
    rollouts = [rollout(RIGHT), rollout(WRONG), rollout(RIGHT, reference=" "), rollout(RIGHT)]
    assert [s.value for s in reward((name, count))(rollouts)] == [None, 0.0, None, None]
    reward((name, count))([])
    reward((name, type(judge)(part("judge")[1].options, count.component)))(rollouts)
    assert asked == [2, 0, 3]


def test_repetition_is_the_share_of_ngrams_that_stood_there_before():
    # 12 tokens have five 8-grams; with one token repeated they are all the same, so four of them stood there before
    assert repetition(rollout("x", tokens=(5,) * 12), "x") == -0.8
    assert repetition(rollout("x", tokens=tuple(range(12))), "x") == 0.0
    assert repetition(rollout("x", tokens=(5,) * 7), "x") == 0.0
    # 1..8 twice: nine 8-grams, the last of which is the first again
    assert repetition(rollout("x", tokens=(*range(8), *range(8))), "x") == pytest.approx(-1 / 9)


# -------------------------------------------------------------------------------------------------------------------- comparison


def test_what_a_component_contributes_is_its_distance_from_those_of_the_group_it_applies_to():
    values = torch.tensor([[[1.0], [3.0], [99.0]], [[5.0], [5.0], [5.0]], [[7.0], [99.0], [99.0]]])
    applies = torch.tensor([[[True], [True], [False]], [[True]] * 3, [[True], [False], [False]]])
    expected = torch.tensor([[[-1.0], [1.0], [0.0]], [[0.0]] * 3, [[0.0]] * 3])
    assert_close(component_deviations(values, applies), expected, rtol=0, atol=0)
    filled = torch.tensor([[[1.0], [3.0], [2.0]], [[5.0]] * 3, [[7.0]] * 3])
    assert_close(filled_components(values, applies), filled, rtol=0, atol=0)
    mean = (1 + 3 + 5 + 5 + 5 + 7) / 6
    assert filled_components(values, applies, over_batch=True)[0, 2].item() == pytest.approx(mean)


def test_a_component_that_is_missing_in_a_sum_is_no_lower_reward():
    # brevity is a punishment for the right ones only: the wrong one must not gain by having none
    weights = {"correctness": 1.0, "brief": 2.0}
    scores = [
        score("correct", weights, correctness=1.0, brief=-0.3),
        score("correct", weights, correctness=1.0, brief=-0.5),
        score(weights=weights, correctness=0.0),
        *[score("correct", weights, correctness=1.0, brief=-0.1)] * 3,
    ]
    options = ("rollout.samples_per_prompt=3", "algorithm.scale_by_std=false")
    # 1 - 0.6, 1 - 1, 0 + 2 (-0.4): mean -0.4 / 3
    expected = torch.tensor([0.4, 0.0, -0.8, 0.0, 0.0, 0.0]) + torch.tensor([0.4 / 3] * 3 + [0.0] * 3)
    assert_close(sequence_advantages(scores, recipe(*options)), expected)
    # over the whole batch: 0 + 2 (-0.3 - 0.5 - 3 * 0.1) / 5
    rewards = torch.tensor([0.4, 0.0, -0.44, 0.8, 0.8, 0.8])
    over_batch = sequence_advantages(scores, recipe(*options, "algorithm.advantage=batch_normalised"))
    assert_close(over_batch, rewards - rewards.mean())


def test_a_component_that_is_missing_in_a_normalised_comparison_contributes_nothing():
    weights = {"correctness": 1.0, "brief": 1.0}
    scores = [score(weights=weights, correctness=0.0, brief=b) for b in (1.0, 3.0)] + [
        score(weights=weights, correctness=0.0)
    ]
    config = recipe(
        "rollout.samples_per_prompt=3", "algorithm.normalise_components=true", "algorithm.scale_by_std=true"
    )
    one = 1 / (math.sqrt(2) + 3e-4)  # +-1 around 2, standard deviation sqrt 2, a floor of 1e-4 of the largest value
    expected = torch.tensor([-one, one, 0.0]) / (one + 1e-4)  # the batch: sum of squares 2 one², divisor 2
    assert_close(sequence_advantages(scores, config), expected)


@pytest.mark.parametrize("factor", [1000.0, 0.001])
def test_the_unit_of_a_component_does_not_change_the_advantages_when_components_are_normalised(factor):
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(6, 4, generator=draw).tolist()
    right = [[float(x > 0.5) for x in row] for row in torch.rand(6, 4, generator=draw).tolist()]

    def advantages(scale, **algorithm):
        config = recipe(
            "rollout.samples_per_prompt=4",
            f"rewards=[{{name: correctness}}, {{name: style, kind: 'x:y', weight: 0.3, scale: {scale}}}]",
            *(f"algorithm.{key}={value}" for key, value in algorithm.items()),
        )
        parts = dict([part("correctness"), ("style", None)])
        rows = []
        for group, verdicts in zip(values, right, strict=True):
            for value, correct in zip(group, verdicts, strict=True):
                parts["style"] = part("style", of(value), weight=0.3, scale=config.rewards[1].scale)[1]
                rows += CompositeReward(parts)([rollout(RIGHT if correct else WRONG)])
        return sequence_advantages(rows, config)

    normalised = {"normalise_components": "true", "scale_by_std": "true"}
    assert_close(advantages(factor, **normalised), advantages(1.0, **normalised))
    summed = advantages(factor, scale_by_std="false") - advantages(1.0, scale_by_std="false")
    assert summed.abs().max() > 0.05  # where components are summed before, the unit is a weight


def test_rounding_in_a_component_is_not_blown_up_to_a_signal():
    values = torch.full((1, 4, 1), 1000.0)
    values[0, 0] += 6.2e-5  # the next number in float32
    assert normalised_deviations(values).abs().max() < 1e-3


def test_shares_of_the_variance_say_which_component_drives_an_update():
    # correctness +-1/2, length -+1/4 in one group: total +-1/4; alone in the other: length +-1
    correctness = torch.tensor([[0.5, -0.5], [0.0, 0.0]])
    length = torch.tensor([[-0.25, 0.25], [1.0, -1.0]])
    shares, whole = variance_shares(torch.stack([correctness, length], 2))
    assert whole.item() == 2 * 0.25**2 + 2
    assert shares.tolist() == [2 * 0.5 * 0.25, -2 * 0.25 * 0.25 + 2]
    assert shares.sum().item() == whole.item()


def test_metrics_name_what_each_component_adds_and_drives():
    config = recipe("rollout.samples_per_prompt=2", "rollout.prompts_per_batch=2", "algorithm.scale_by_std=false")
    weights = {"correctness": 1.0, "length": 2.0}
    scores = [
        score("correct", weights, correctness=1.0, length=0.25), score(weights=weights, correctness=0.0, length=0.5),
        score(weights=weights, correctness=0.0, length=1.0), score(weights=weights, correctness=0.0, length=0.0),
    ]  # fmt: skip
    metrics = Metrics()
    describe_advantages(estimate([rollout(RIGHT)] * 4, scores, config), metrics, config)
    means = {key: total / count for key, (total, count) in metrics.pairs().items()}
    # +-1/2 and -+1/4 in the first group, 0 and +-1 in the second: the numbers of the test above
    assert means["variance_share/correctness"] == pytest.approx(0.25 / 2.125)
    assert means["variance_share/length"] == pytest.approx(1.875 / 2.125)


def test_undecided_completions_are_missing_from_the_table_of_components():
    table = ComponentTable.of([score(style=2.0), Score(verdict="undecided", value=None)], 2)
    assert table.scaled.tolist() == [[[2.0], [0.0]]]
    assert table.applies.tolist() == [[[True], [False]]]


def test_scores_without_components_cannot_be_normalised_by_component():
    config = recipe(
        "rollout.samples_per_prompt=2", "algorithm.normalise_components=true", "algorithm.scale_by_std=true"
    )
    with pytest.raises(ValueError, match="normalise_components compares components and .* have none"):
        sequence_advantages([Score(verdict="wrong", value=v) for v in (0.0, 1.0)], config)


# ------------------------------------------------------------------------------------------------------------------------ recipes


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ("[{name: correctness}, {name: format, gates: [{component: corectness}]}]", "gates names 'corectness', which is no component; did you mean 'correctness'"),
        ("[{name: correctness}, {name: format, gates: [{component: format}]}]", "gates names 'format', which is itself"),
        ("[{name: correctness}, {name: format, schedule: {to: 0, first_batch: 5, last_batch: 5}}]", "raise last_batch"),
        ("[{name: correctness}, {name: format, wieght: 2}]", "unknown key 'rewards.1.RuleReward.wieght'; did you mean 'weight'"),
        ("[{name: correctness}, {name: judge, kind: reward_model}]", "key 'rewards.1.RewardModelReward.path' is missing"),
        ("[{name: correctness}, {name: group_std, kind: format}]", "'group_std', which is a metric of its own"),
        ("[{name: correctness, kind: format}]", "has no correctness component"),
        ("[{name: correctness}, {name: brief, kind: lenght}]", "rewards.1.RuleReward.kind"),
        ("[{name: correctness}, {name: format, scale: 0}]", "rewards.1.RuleReward.scale"),
    ],
)  # fmt: skip
def test_a_reward_that_contradicts_itself_is_refused_with_its_repair(rewards, sentence):
    with pytest.raises(ValueError, match=sentence):
        recipe(f"rewards={rewards}")


def test_columns_that_the_problems_do_not_have_are_refused_before_a_model_is_loaded():
    prompts = [Prompt(id="p", token_ids=(1,), question="q", reference="7", columns={"subject": "algebra", "level": 3})]
    rewards = "rewards=[{{name: correctness}}, {{name: format, applies: {{columns: {{{}}}}}}}]"
    require_columns(recipe(rewards.format("subject: [algebra], level: [3]")), prompts)
    with pytest.raises(ValueError, match="names 'subjct', which the problems do not have; did you mean 'subject'"):
        require_columns(recipe(rewards.format("subjct: [algebra]")), prompts)
    with pytest.raises(ValueError, match="none of the 1 problems is like that"):
        require_columns(recipe(rewards.format("subject: [geometry]")), prompts)
