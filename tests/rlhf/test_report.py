"""What people look at: it must not break on, or obey, what a model wrote."""

import json

from rlhf.evaluation import GradedProblem, compare, summarise
from rlhf.report import before_and_after, draw, evaluation_table


def results(written):
    graded = {
        label: [
            GradedProblem(
                id=f"p{i}",
                level=1,
                answers=("1", "2"),
                verdicts=("correct", second),
                lengths=(3, 5),
                truncated=(False, True),
                texts=(written, written),
            )
            for i in range(3)
        ]
        for label, second in (("sft", "wrong"), ("grpo", "correct"))
    }
    return {
        "models": {label: summarise(g, pass_at=(1, 2), seed=0) for label, g in graded.items()},
        "paired_difference": compare(*graded.values(), seed=0),
        "rollout_engine": "vllm",
        "shown": [{"question": "costs $5 or $6?", "reference": "1", "sft": written, "grpo": written}],
    }


def test_the_table_shows_every_figure_with_its_interval():
    table = evaluation_table(results("x"))
    assert "pass@1       0.500 [0.065, 0.935]  1.000 [0.139, 1.000]" in table
    assert "mean length  4.0 tokens            4.0 tokens" in table
    assert "truncated    50.0%                 50.0%" in table
    assert "undecided    0.0% in 0 problems" in table
    assert "paired difference in pass@1, grpo - sft: +0.500 [+0.500, +0.500]" in table
    assert "p = 0.25 (exact, dynamic programming; sign-flip permutation)" in table


def test_control_characters_of_a_model_never_reach_the_terminal():
    shown = before_and_after(results("a\x1b[2Jb\x07\rc\nd"))
    assert "a�[2Jb��c\n" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_a_picture_is_drawn_of_whatever_a_model_writes(tmp_path):
    rows = [
        {"step": s, "reward/total": s, "reward/correctness": 0.5, "rollout/length": 9, "policy/kl_sampler": 0.0}
        for s in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(
        tmp_path / "metrics.jsonl", results("$\\frac{1$ \x15 \ud7ff 漢"), tmp_path / "picture.png", max_kl_sampler=0.05
    )
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
