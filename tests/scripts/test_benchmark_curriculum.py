"""The mixture of scripts/benchmark_curriculum.py, when it calls a policy good, and its pictures."""

import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import pytest
from benchmarks.curriculum import draw_race, race_table, reached
from benchmarks.mixture import MIXTURE, demonstrations, heldout_problems, training_problems

from data.stories import read_story
from rlhf.curriculum_report import draw_curriculum, pool_table, require_measured
from rlhf.metrics import PASS_RATE_BINS, POOLS


def rows(count):
    return [
        {
            "batch": i + 1, "rollout/tokens": 100.0, "reward/groups_with_signal": 0.5, "curriculum/effective": 4.0, "curriculum/pass_rate": 0.25,
            **{f"curriculum/{pool}": 10.0 for pool in POOLS},
            **{f"curriculum/{key}_{j}": float(j == 2) for key in ("rates", "chosen") for j in range(PASS_RATE_BINS)},
        }
        for i in range(count)
    ]  # fmt: skip


def run(label, seed, *accuracies):
    measured = [{"batch": 5 * i, "sampled_tokens": 500.0 * i, "accuracy": a} for i, a in enumerate(accuracies)]
    return {"label": label, "seed": seed, "measured": measured, "batches": rows(5 * len(accuracies))}


def test_the_mixture_has_the_shares_it_says_and_no_problem_twice():
    problems = training_problems()
    assert Counter(p.subject for p in problems) == MIXTURE
    assert len({p.id for p in problems}) == len(problems)
    assert problems == training_problems()


def test_an_impossible_story_is_the_possible_one_with_hundreds_more():
    for problem in (p for p in training_problems() if p.subject == "impossible"):
        story = read_story(problem.question)
        assert story.start >= 200
        assert int(problem.answer) - story.start == int(problem.answer) % 100 - story.start % 100
        assert story.level in (3, 4, 5)


def test_no_held_out_or_training_problem_was_a_demonstration():
    shown = {read_story(d.question).key() for d in demonstrations() if d.question.count(" On ") >= 3}
    learnable = [p for p in training_problems() if p.subject == "learnable"]
    assert not shown & {read_story(p.question).key() for p in [*learnable, *heldout_problems()]}


def test_a_policy_is_good_when_two_measurements_in_a_row_say_so():
    assert reached(run("a", 0, 0.4, 0.92, 0.88, 0.9, 0.95)["measured"])["batch"] == 15
    assert reached(run("a", 0, 0.4, 0.92, 0.88, 0.95)["measured"]) is None


def test_the_table_compares_runs_of_one_seed():
    runs = [run("signal", 0, 0.4, 0.9, 0.9), run("uniform", 0, 0.4, 0.5, 0.9, 0.9), run("uniform", 1, 0.4, 0.5)]
    table = race_table(runs)
    assert "| signal | 0 | 5 | 500 | 0.50 | 50% |" in table
    assert "| uniform | 1 | never (0.50 at the end) | over 500 | - | 50% |" in table
    assert "| signal | 1 | 500 | 0.50 (0.50) |" in table
    assert "| uniform | 2 | not every seed got there | 1.00 (1.00) |" in table


def test_pools_are_shown_as_a_table_and_pass_rates_as_pictures(tmp_path):
    assert pool_table(rows(30), num_lines=3).splitlines()[2:] == [
        f"| {batch} | 10 | 10 | 10 | 10 | 0.25 | 4 | 50% |" for batch in (1, 15, 30)
    ]
    draw_curriculum(rows(30), tmp_path / "one.png")
    draw_race([run("signal", 0, 0.4, 0.9), run("uniform", 0, 0.4, 0.5)], tmp_path / "two.png")
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("one.png", "two.png"))
    with pytest.raises(ValueError, match="set curriculum.measure to true"):
        require_measured([{"batch": 1}], "metrics.jsonl")
