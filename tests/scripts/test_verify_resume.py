"""scripts/verify_resume.py finds what differs, and runs that are killed for real end as the one left alone."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.records import write_records
from data.stories import prepare

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from verify_resume import differing_rows, differing_weights  # noqa: E402


def test_numbers_that_differ_are_counted_bit_by_bit():
    weights = {
        "a": torch.tensor([[1.0, 2.0], [3.0, 0.0]]),
        "b": torch.zeros(3, dtype=torch.bfloat16),
        "c": torch.tensor(1.0),
    }
    assert differing_weights(weights, {name: tensor.clone() for name, tensor in weights.items()}) == 0
    other = {**weights, "a": torch.tensor([[1.0, 2.0 + 2**-22], [3.0, -0.0]])}  # the next float32, and another zero
    assert differing_weights(weights, other) == 2
    assert differing_weights(weights, {"a": weights["a"], "c": weights["c"]}) == 3
    assert differing_weights(weights, {**weights, "b": torch.zeros(3, dtype=torch.float16)}) == 3


def test_rows_that_differ_or_are_missing_are_counted():
    rows = [{"batch": 1.0}, {"batch": 2.0}, {"batch": 3.0}]
    assert differing_rows(rows, list(rows)) == 0
    assert differing_rows(rows, rows[:2]) == 1
    assert differing_rows(rows, [rows[0], {"batch": 2.5}, rows[2], rows[2]]) == 2


@pytest.mark.slow
def test_a_run_that_is_killed_or_loses_its_graders_ends_as_the_one_left_alone(model_folder, tmp_path):
    prepared = prepare(
        seed=0, min_level=2, max_level=3, answers_at_once=0.0, demonstrations=64, train_problems=64, test_problems=4,
        train_pairs=4, heldout_pairs=2,
    )  # fmt: skip
    write_records(prepared.train_problems, tmp_path / "problems.jsonl")
    write_records(prepared.demonstrations, tmp_path / "demonstrations.jsonl")
    command = [
        sys.executable, "scripts/verify_resume.py", "recipes/tiny/grpo.yaml", f"policy.path={model_folder}", f"problems={tmp_path}/problems.jsonl",
        f"demonstrations={tmp_path}/demonstrations.jsonl", "rewards=[{name: correctness}, {name: length}]", "rollout.engine=transformers",
        "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4", "rollout.max_prompt_tokens=120", "training.num_batches=4",
        "training.passes_per_batch=2", "--kills", "2", "--victim", "job", "--victim", "grader", "--damage", "--folder", tmp_path / "runs",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 resumed runs end as the run left alone" in done.stdout
    assert done.stdout.count("newest checkpoint damaged") >= 1
    assert "the run went on through 2 of 2 kills; weights that differ: 0, rows that differ: 0" in done.stdout
