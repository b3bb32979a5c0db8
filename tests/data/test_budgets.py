"""Thinking budgets in records, prompts and recipes."""

import pytest

from data.chat import ChatRenderer
from data.records import Demonstration, PreferencePair, Problem, parse_record
from data.stories import prepare, read_story, to_budgeted_demonstration
from rlhf.config import load_config

STORY = "On Monday Mia has 7 coins. On Tuesday she finds 5. On Wednesday she loses 3. On Thursday she doubles them. On Friday she uses 8. How many coins does she have?"


def test_a_budget_stands_below_the_question_in_every_kind_of_record(renderer):
    asked = "<|im_start|>user\nHow many?\n\nthink: short<|im_end|>\n<|im_start|>assistant\n"
    whole = renderer.tokenizer.encode(asked, add_special_tokens=False)
    demonstration = Demonstration(id="d", question="How many?", scratchpad="", answer="7", think="short")
    pair = PreferencePair(id="p", question="How many?", chosen="7", rejected="8", think="short")
    problem = Problem(id="q", question="How many?", answer="7", think="short")
    assert renderer.prompt_text("How many?", think="short") == asked
    assert renderer.demonstration_ids(demonstration)[0] == whole
    assert renderer.pair_ids(pair)[0] == whole
    assert list(renderer.problem_prompt(problem).token_ids) == whole


def test_a_record_without_a_budget_gets_the_recipes_and_rewards_see_it(renderer):
    long = ChatRenderer(renderer.tokenizer, think="long")
    without, own = (
        Problem(id="a", question="How many?", answer="7"),
        Problem(id="b", question="How many?", answer="7", think="off"),
    )
    assert long.problem_prompt(without).columns["think"] == "long"
    assert long.problem_prompt(own).columns["think"] == "off"
    assert long.problem_prompt(own).token_ids == renderer.problem_prompt(own).token_ids
    assert "think" not in renderer.problem_prompt(without).columns
    assert long.problem_prompt(without).question == "How many?"  # what a judge reads


def test_the_bare_word_off_of_yaml_is_the_budget_off():
    recipe = "recipes/tiny/sft.yaml"
    assert load_config(recipe, ["chat.think=off"]).chat.think == "off"
    assert load_config(recipe, ["chat.think=120"]).chat.think == "120"
    for wrong in ("on", "medium", "0"):
        with pytest.raises(ValueError, match="chat.think"):
            load_config(recipe, [f"chat.think={wrong}"])


def test_a_record_with_an_unknown_budget_is_refused():
    with pytest.raises(ValueError, match="field 'think' must be off, short, long or a number of tokens, got 'medium'"):
        parse_record(Problem, {"id": "a", "question": "?", "answer": "7", "think": "medium"})


def test_the_three_styles_of_a_story():
    story = read_story(STORY)  # 7, 12, 9, 18, 10
    assert to_budgeted_demonstration(story, "off").scratchpad == ""
    assert (
        to_budgeted_demonstration(story, "short").scratchpad.splitlines()[-1]
        == "On Thursday she doubles them: 9 * 2 = 18"
    )
    assert to_budgeted_demonstration(story, "long").scratchpad.splitlines()[-1] == "On Friday she uses 8: 18 - 8 = 10"
    assert {to_budgeted_demonstration(story, think).answer for think in ("off", "short", "long")} == {"10"}


def test_budgets_are_drawn_by_their_weights_and_change_no_story():
    def prepared(budgets):
        return prepare(
            seed=0, min_level=4, max_level=6, answers_at_once=0.5, budgets=budgets, demonstrations=300, train_problems=300, test_problems=3,
            train_pairs=1, heldout_pairs=1,
        )  # fmt: skip

    plain, mixed = prepared({}), prepared({"off": 1, "long": 2})
    assert [p.question for p in plain.train_problems] == [p.question for p in mixed.train_problems]
    for records in (mixed.demonstrations, mixed.train_problems):
        assert {r.think for r in records} == {"off", "long"}
        assert 0.58 < sum(r.think == "long" for r in records) / 300 < 0.75
    assert {p.think for p in plain.train_problems} | {p.think for p in mixed.test_problems} == {""}
    assert all((d.scratchpad == "") == (d.think == "off") for d in mixed.demonstrations)
