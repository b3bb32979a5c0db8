"""A process model as a component of a recipe's reward: rewards of steps, or one number for the whole."""

import dataclasses
from pathlib import Path

import pytest

from reward_models.composite import build_reward
from reward_models.process import ProcessModel
from rlhf.config import load_config
from rlhf.types import Prompt, Rollout

RECIPE = Path(__file__).parents[2] / "recipes/tiny/grpo.yaml"
STEPS = ["On Tuesday she finds 5: 7 + 5 = 12", "On Wednesday she loses 3: 12 - 3 = 8"]


def rollout(renderer, *steps, answer="9"):
    text = "<think>\n" + "".join(f"{step}\n" for step in steps) + f"</think>\n\\boxed{{{answer}}}"
    ids = tuple(renderer.response_ids(text))
    return Rollout(
        prompt=renderer.prompt("a", "How many eggs does she have?", "9"),
        token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", text=text, policy_version=0,
    )  # fmt: skip


def scores(renderer, folder, rollouts, *, weight=0.5, **options):
    given = ", ".join(f"{key}: {value}" for key, value in options.items())
    process = f"{{name: steps, kind: process_reward_model, path: {folder}, weight: {weight}, {given}}}"
    config = load_config(RECIPE, [f"rewards=[{{name: correctness}}, {process}]"])
    return build_reward(config, prefill=renderer.prefill, device="cpu")(rollouts)


def probabilities(renderer, folder, one):
    model = ProcessModel.load(folder, device="cpu")
    return [step.value for step in model.scorer(tokens_per_batch=500)([one])[0]]


def test_every_step_earns_its_weighted_probability_where_it_ends_and_the_whole_only_its_correctness(
    renderer, process_folder
):
    one = rollout(renderer, *STEPS)
    (score,) = scores(renderer, process_folder, [one])
    assert score.value == 1.0
    assert [renderer.decode(one.token_ids[: step.position + 1]).rpartition("\n")[2] for step in score.steps] == [
        *STEPS,
        "\\boxed{9}",
    ]
    expected = probabilities(renderer, process_folder, one)
    assert [step.value for step in score.steps] == pytest.approx([0.5 * p for p in expected])
    assert score.components["steps"] == pytest.approx(sum(expected))
    assert {step.component for step in score.steps} == {"steps"}


def test_signed_steps_run_from_minus_one_to_one(renderer, process_folder):
    one = rollout(renderer, *STEPS)
    (score,) = scores(renderer, process_folder, [one], step_value="signed", weight=1.0)
    expected = probabilities(renderer, process_folder, one)
    assert [step.value for step in score.steps] == pytest.approx([2 * p - 1 for p in expected], abs=1e-6)


def test_an_aggregate_is_one_number_at_the_end_and_leaves_no_steps(renderer, process_folder):
    one = rollout(renderer, *STEPS, answer="8")
    (score,) = scores(renderer, process_folder, [one], aggregate="min")
    assert score.steps == ()
    assert score.value == pytest.approx(0.5 * min(probabilities(renderer, process_folder, one)))


def test_a_completion_that_answers_at_once_has_one_step_and_batches_do_not_change_a_value(renderer, process_folder):
    rollouts = [rollout(renderer), rollout(renderer, *STEPS), rollout(renderer, STEPS[1], answer="1")]
    together = scores(renderer, process_folder, rollouts)
    assert [len(score.steps) for score in together] == [1, 3, 2]
    apart = scores(renderer, process_folder, rollouts, tokens_per_batch=1)
    for a, b in zip(together, apart, strict=True):
        assert [step.value for step in a.steps] == pytest.approx([step.value for step in b.steps], abs=1e-5)


def test_a_process_model_of_another_tokenizer_is_refused_rather_than_scoring_other_text(renderer, process_folder):
    one = dataclasses.replace(rollout(renderer, *STEPS), text="something else")
    with pytest.raises(ValueError, match="a process model must have the tokenizer of the policy"):
        scores(renderer, process_folder, [one])


def test_an_undecided_completion_is_not_scored_and_has_no_steps(renderer, process_folder):
    one = rollout(renderer, *STEPS)
    unreadable = dataclasses.replace(one, prompt=Prompt(id="b", token_ids=(1,), question="?", reference="$$"))
    first, second = scores(renderer, process_folder, [unreadable, one])
    assert (first.value, first.steps) == (None, ())
    assert len(second.steps) == 3
