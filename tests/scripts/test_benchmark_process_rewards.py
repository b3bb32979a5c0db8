"""Arithmetic of the comparison of process with outcome rewards; numbers by hand."""

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location(
        "benchmark_process_rewards", ROOT / "scripts/benchmark_process_rewards.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_of(label, *accuracies, seed=0, completions=128):
    batches = [{"sampled_tokens": 100 * (i + 1), "correctness": a, "length": 1.0} for i, a in enumerate(accuracies)]
    return {"label": label, "seed": seed, "completions": completions, "held_out": {"accuracy": 0.5}, "batches": batches}


def test_a_target_is_reached_where_a_window_of_256_completions_has_it_for_good(script):
    run = run_of("own", 0.2, 0.6, 0.4, 0.3, 0.5, 0.7)  # means of two: 0.4 0.5 0.35 0.4 0.6
    assert script.tokens_to(run, 0.4) == 500
    assert script.tokens_to(run, 0.6) == 600
    assert script.tokens_to(run, 0.7) is None


def test_runs_are_compared_seed_by_seed_and_one_that_never_gets_there_gives_a_bound(script):
    runs = [
        run_of("outcome", 0.1, 0.1, 0.5, 0.5), run_of("own", 0.5, 0.5, 0.5, 0.5),
        run_of("outcome", 0.1, 0.1, 0.1, 0.1, seed=1), run_of("own", 0.1, 0.5, 0.5, 0.5, seed=1), run_of("own", 0.1, 0.1, seed=2),
    ]  # fmt: skip
    # 400 tokens against 200, and more than 400 against 300
    assert "| own | 0.5 | 2.00, > 1.33 | at least 1.63 |" in script.ratios(runs, [0.5])
    assert "| own | 0.9 | never there, never there | - |" in script.ratios(runs, [0.9])
    assert "| outcome | 1 | never |" in script.table(runs, [0.5])
