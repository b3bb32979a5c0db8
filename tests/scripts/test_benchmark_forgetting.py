"""The second task, and the arithmetic of what was forgotten."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchmarks.forgetting import forgetting_tables, to_interim, to_interim_demonstration, verdicts

from data.stories import read_story

STORY = read_story(
    "On Monday Mia has 7 coins. On Tuesday she finds 5. On Wednesday she loses 3. On Thursday she doubles them. How many coins does she have?"
)


def test_the_second_task_asks_for_the_first_days_result_which_the_first_tasks_answer_is_not():
    problem = to_interim(STORY)
    assert problem.question.endswith("How many coins does she have on Tuesday?")
    assert (problem.answer, STORY.answer) == ("12", "18")
    right, wrong = (to_interim_demonstration(STORY, stops=stops) for stops in (True, False))
    assert (right.scratchpad, right.answer) == ("On Tuesday she finds 5: 7 + 5 = 12", "12")
    assert (wrong.scratchpad.count("\n"), wrong.answer) == (2, "18")


def test_a_fall_is_given_as_a_part_of_that_without_control_of_the_same_seed():
    def run(arm, seed, stories, interim):
        return {"arm": arm, "seed": seed, "against": "none", "after": {"stories": stories, "interim": interim}}

    results = {
        "before": {"stories": "2222", "interim": "1111"},  # right answers of two samples
        "runs": [
            run("none", 0, "0002", "2222"),
            run("none", 1, "0000", "2222"),
            run("ewc", 0, "2221", "2212"),
            run("ewc", 1, "2220", "2222"),
        ],
    }
    found = verdicts(results, "ewc")
    assert [v["part"] for v in found] == [0.125 / 0.75, 0.25]
    assert [v["b"]["mean"] for v in found] == [-0.125, 0.0]
    assert "| ewc | 2 | -0.188 (-0.250) | 0.21 (0.25) | -0.062 (-0.125) |" in forgetting_tables(results)
