from itertools import islice, pairwise

import pytest

from data.records import LabelledSteps, Problem, read_records, write_records
from data.stories import (
    LARGEST,
    generate_stories,
    judge_steps,
    prepare,
    read_story,
    to_labelled_steps,
    to_preference_pair,
)
from reward_models.grading import grade


def stories(split, n, seed=0, levels=(2, 5)):
    return list(islice(generate_stories(split, seed=seed, min_level=levels[0], max_level=levels[1]), n))


def test_the_same_seed_tells_the_same_stories_and_another_seed_others():
    assert stories("train", 50) == stories("train", 50)
    assert stories("train", 50) != stories("train", 50, seed=1)


def test_splits_share_no_plot_whatever_the_seeds():
    train, test, validation = (
        {s.key() for s in stories(split, 3000, seed)} for split, seed in (("train", 0), ("test", 1), ("validation", 2))
    )
    assert not train & test
    assert not train & validation
    assert not test & validation


def test_every_step_follows_from_the_story_and_stays_in_range():
    for story in stories("train", 300):
        assert all(1 <= value <= LARGEST for value in story.values)
        for event in story.events:
            assert event.telling in story.question


def test_a_question_worked_by_hand():
    story = next(s for s in stories("train", 2000) if [e.operator for e in s.events] == ["+", "*"])
    added, doubled = story.events
    assert story.answer == str((story.start + added.operand) * doubled.operand)


def test_a_rejected_response_is_wrong_from_its_error_step_on_and_right_before():
    import random

    for story in stories("train", 200):
        pair = to_preference_pair(story, random.Random(0))
        assert grade(pair.chosen, story.answer).verdict == "correct"
        assert grade(pair.rejected, story.answer).verdict == "wrong"
        chosen, rejected = pair.chosen.split("\n"), pair.rejected.split("\n")
        first_difference = next(i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
        assert first_difference - 1 == pair.error_step  # line 0 is <think>


def test_every_other_scratchpad_is_right_and_the_labels_of_the_others_turn_false_and_stay_false():
    import random

    rng = random.Random(0)
    drawn = [to_labelled_steps(story, rng) for story in stories("train", 200)]
    assert all(r.labels == sorted(r.labels, reverse=True) for r in drawn)
    assert 60 < sum(all(r.labels) for r in drawn) < 140


def test_a_story_is_read_back_from_its_question_and_judges_any_scratchpad():
    import random

    rng = random.Random(0)
    for story in stories("train", 200):
        assert read_story(story.question) == story
        record = to_labelled_steps(story, rng)
        sums = [(event.operator, event.operand) for event in story.events]
        if all(a != b for a, b in pairwise(sums)):  # of two equal events it cannot be told which was left out
            assert judge_steps(story, record.steps) == record.labels
    with pytest.raises(ValueError, match="no sentence of the embedded task"):
        read_story("On Monday Mia has 7 coins. She eats 2. How many coins does she have?")


def test_another_verb_beside_the_right_numbers_is_right_and_so_is_the_right_answer_alone():
    story = read_story("On Monday Mia has 7 coins. On Tuesday she finds 5. On Wednesday she halves them. How many?")
    right = ["On Tuesday she buys 5: 7 + 5 = 12", "On Wednesday she halves them: 12 / 2 = 6", "\\boxed{6}"]
    assert judge_steps(story, right) == [True] * 3
    assert judge_steps(story, right[2:]) == [True]
    assert judge_steps(story, right[1:]) == [False, False]
    assert judge_steps(story, [*right[:2], "\\boxed{7}", "\\boxed{6}"]) == [True, True, False, False]


def test_demonstrations_problems_and_pairs_are_different_problems():
    p = prepare(
        seed=0,
        min_level=2,
        max_level=5,
        answers_at_once=0.5,
        budgets={},
        demonstrations=200,
        train_problems=200,
        test_problems=50,
        train_pairs=50,
        heldout_pairs=10,
    )
    groups = [
        {r.id for r in records}
        for records in (
            p.demonstrations,
            p.train_problems,
            p.test_problems,
            p.train_pairs,
            p.heldout_pairs,
            p.labelled_steps,
            p.heldout_steps,
        )
    ]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 200 + 200 + 50 + 50 + 10 + 50 + 10
    assert 60 < sum(not d.scratchpad for d in p.demonstrations) < 140


def test_asking_for_more_problems_than_there_are_says_so():
    with pytest.raises(ValueError, match="raise max_level"):
        list(islice(generate_stories("test", seed=0, min_level=1, max_level=1), 10_000))


def test_records_survive_the_file(tmp_path):
    problems = [
        Problem(id="a", question="Wie viel? 7 €", answer="7"),
        Problem(id="b", question="q", answer="8", level=3),
    ]
    write_records(problems, tmp_path / "p.jsonl")
    assert read_records(Problem, tmp_path / "p.jsonl") == problems


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "question": "q"}', "field 'answer' is missing"),
        ('{"id": "b", "question": "q", "answer": 7}', "field 'answer' must be str, got 7"),
        ('{"id": "b", "question": "q", "answer": "7", "anwser": "8"}', "unknown field 'anwser'"),
        ('{"id": "a", "question": "q", "answer": "7"}', "already used on line 1"),
        ('{"id": "b", "question": " ", "answer": "7"}', "field 'question' is empty"),
        ("{not json", "Expecting property name"),
        ("[1]", "expected an object"),
    ],
)
def test_a_malformed_row_is_named_with_file_and_line(tmp_path, line, message):
    path = tmp_path / "problems.jsonl"
    path.write_text('{"id": "a", "question": "q", "answer": "7"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message) as error:
        read_records(Problem, path)
    assert "problems.jsonl:2:" in str(error.value)


@pytest.mark.parametrize("label", [-100, 1, 1.0, None, "true"])
def test_a_step_label_that_is_not_a_boolean_is_refused_rather_than_cast(tmp_path, label):
    import json

    path = tmp_path / "steps.jsonl"
    path.write_text(json.dumps({"id": "a", "question": "q", "steps": ["s"], "labels": [label]}) + "\n")
    with pytest.raises(ValueError, match="must be a list of bool"):
        read_records(LabelledSteps, path)
