"""What an audit of a reward says of groups, on completions small enough to work out by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from reward_models.audit import audit, audit_table, per_prompt
from rlhf.completions import batch_file, read_completions, write_rows
from rlhf.uncertainty import bootstrap_gap

ROOT = Path(__file__).parents[2]


def row(prompt, subject, value, batch=1, verdict="correct", **weighted):
    return {
        "batch": batch, "prompt": prompt, "columns": {"subject": subject, "level": len(subject)}, "verdict": verdict,
        "finish_reason": "stop", "value": value, "components": {k: 10 * v for k, v in weighted.items()}, "weighted": weighted,
    }  # fmt: skip


ROWS = [
    row("a", "algebra", 1.0, style=0.1), row("a", "algebra", 0.0, style=0.3), row("b", "algebra", 1.0, style=0.4),
    row("c", "geometry", 0.0, style=0.0), row("d", "geometry", 0.5), row("d", "geometry", None, verdict="undecided"),
]  # fmt: skip


def found(group, component, rows=ROWS, column="subject"):
    [finding] = [f for f in audit(rows, column) if (f.group, f.component) == (group, component)]
    return finding


def test_samples_of_a_prompt_are_averaged_first():
    assert per_prompt(ROWS, lambda r: r["value"]) == [0.5, 1.0, 0.0, 0.5]
    assert found("algebra", "total").weighted.mean == 0.75
    assert found("algebra", "total").weighted.n == 2


def test_a_gap_is_the_groups_mean_minus_that_of_the_rest():
    assert found("algebra", "style").raw.mean == pytest.approx(3.0)
    assert found("algebra", "style").weighted.mean == pytest.approx(0.3)
    assert found("algebra", "style").gap.mean == pytest.approx(0.3)
    assert found("geometry", "total").gap.mean == pytest.approx(-0.5)


def test_what_does_not_apply_or_is_undecided_is_counted_and_is_no_0():
    style, total = found("geometry", "style"), found("geometry", "total")
    assert (style.weighted.n, style.applies, style.undecided) == (1, 0.5, pytest.approx(1 / 3))
    assert (total.weighted.mean, total.completions) == (0.25, 3)


def test_completions_can_be_grouped_by_what_they_are_and_numbers_are_in_order():
    assert [f.group for f in audit(ROWS, "verdict") if f.component == "total"] == ["correct", "undecided"]
    assert found("undecided", "total", column="verdict").weighted is None
    assert [f.group for f in audit([row("a", "x" * n, 1.0) for n in (10, 9, 2)], "level")] == ["2", "9", "10"]
    with pytest.raises(ValueError, match="no column 'subjects'; did you mean 'subject'"):
        audit(ROWS, "subjects")
    with pytest.raises(ValueError, match="no column 'colour'; known: finish_reason, level, subject, verdict"):
        audit(ROWS, "colour")


def test_the_interval_of_a_gap_covers_the_truth_as_often_as_it_says():
    import numpy as np

    draw = np.random.default_rng(0)
    covered = 0
    for i in range(200):  # means 1 and 0: a gap of 1
        gap = bootstrap_gap(draw.normal(1, 1, 12).tolist(), draw.normal(0, 2, 30).tolist(), seed=i)
        covered += gap.low <= 1 <= gap.high
    assert 180 <= covered <= 199  # 190 are expected, with a standard deviation of 3


def test_a_gap_that_is_there_is_marked_and_one_that_is_not_is_not():
    rows = [
        row(f"p{i}", "ab"[i % 2], 0.0, favour=float(i % 2) + i % 5 / 100, fair=i % 7 / 10, same=0.1) for i in range(70)
    ]
    lines = audit_table(audit(rows, "subject"), "subject").splitlines()
    assert [line.endswith("*") or " * " in line for line in lines if " favour " in line] == [True, True]
    assert [" * " in line for line in lines if " fair " in line] == [False, False]
    assert [" * " in line for line in lines if " same " in line] == [False, False]  # rounding aside


def test_a_runs_completions_are_read_back_for_the_batches_asked_for(tmp_path):
    for batch in (1, 2, 3):
        write_rows(batch_file(tmp_path, batch), [row("a", "algebra", float(batch), batch=batch)])
    assert [r["value"] for r in read_completions(tmp_path, first=2, last=3)] == [2.0, 3.0]
    with pytest.raises(ValueError, match="has those of batches 1 to 3"):
        list(read_completions(tmp_path, first=4))
    done = subprocess.run(
        [sys.executable, "scripts/audit_rewards.py", str(tmp_path), "--by", "subject", "--json", str(tmp_path / "audit.json")],
        capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "PATH": ""}, check=True,
    )  # fmt: skip
    assert "algebra  total" in done.stdout
    assert json.loads((tmp_path / "audit.json").read_text())[0]["weighted"]["mean"] == 2.0
