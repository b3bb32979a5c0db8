"""scripts/verify_resume.py finds what differs, and runs that are killed for real end as the one left alone."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.chat import render_response
from data.records import Problem, write_records
from data.stories import prepare
from rlhf.metrics import read_jsonl

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import verify_resume  # noqa: E402
from verify_resume import differing_rows, differing_weights, find_victims, strike  # noqa: E402


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


LEADER = """
import os, subprocess, sys, time
ranks = [subprocess.Popen(["sleep", "60"], env=os.environ | {"LOCAL_RANK": str(rank)}, start_new_session=True) for rank in range(2)]
grader = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)  # from reward_models.grading.worker import main"])
print(ranks[0].pid, ranks[1].pid, grader.pid, flush=True)
ranks[1].wait()
time.sleep(float(sys.argv[1]))
sys.exit(1)
"""
"""As a launcher: ends with an error, `argv[1]` seconds after its second rank is gone."""


def leader(seconds):
    process = subprocess.Popen([sys.executable, "-c", LEADER, seconds], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, [int(pid) for pid in process.stdout.readline().split()]


def have_ended(processes):
    """All of them, within ten seconds; those that nobody asks for their exit code stay behind as zombies."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        if not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in processes):
            return True
        time.sleep(0.02)
    return False


def test_each_kind_of_victim_is_found_among_the_processes_of_a_run():
    process, pids = leader("0")
    found = {victim: sorted(p.pid for p in find_victims(process, victim)) for victim in ("job", "rank", "grader")}
    everything, ranks = find_victims(process, "job"), find_victims(process, "rank")
    assert found == {"job": sorted([process.pid, *pids]), "rank": sorted(pids[:2]), "grader": [pids[2]]}
    assert strike(process, [rank for rank in ranks if rank.pid == pids[1]], everything)
    assert have_ended(everything)
    assert find_victims(process, "rank") == []


def test_a_run_that_waits_for_a_rank_that_was_killed_is_a_failure_and_is_ended(monkeypatch):
    monkeypatch.setattr(verify_resume, "LAUNCHER_SECONDS", 0.5)
    process, pids = leader("60")
    everything = find_victims(process, "job")
    with pytest.raises(ChildProcessError, match="0.5 s after the kill the run had not ended"):
        strike(process, [p for p in everything if p.pid == pids[1]], everything)
    assert process.wait(10) != 0
    assert have_ended(everything)


@pytest.fixture
def guesser(model_folder, renderer, tmp_path):
    """A policy that answers 1, 2 or 3 at once, whatever the question."""
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    prompt = renderer.prompt_ids("?")
    guesses = torch.tensor([prompt + renderer.response_ids(render_response("", answer)) for answer in "123"])
    for _ in range(40):
        optimizer.zero_grad()
        model(input_ids=guesses, labels=guesses).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path / "guesser")
    renderer.tokenizer.save_pretrained(tmp_path / "guesser")
    return tmp_path / "guesser"


@pytest.mark.slow
def test_a_run_that_is_killed_or_loses_its_graders_ends_as_the_one_left_alone(guesser, tmp_path):
    """With a curriculum, a replay buffer, and a coefficient that follows a held-out ability: all that a run remembers beside its weights."""
    prepared = prepare(
        seed=0, min_level=2, max_level=3, answers_at_once=0.0, demonstrations=64, train_problems=64, test_problems=4,
        train_pairs=4, heldout_pairs=2,
    )  # fmt: skip
    trained = [Problem(id=f"{i}", question="?", answer="23"[i % 2]) for i in range(6)]
    held_out = [Problem(id=f"held-out-{i}", question="?", answer="1") for i in range(64)]  # which training unlearns
    write_records(trained, tmp_path / "problems.jsonl")
    write_records(held_out, tmp_path / "held_out.jsonl")
    write_records(prepared.demonstrations, tmp_path / "demonstrations.jsonl")
    command = [
        sys.executable, "scripts/verify_resume.py", "recipes/tiny/grpo.yaml", f"policy.path={guesser}", f"problems={tmp_path}/problems.jsonl",
        f"demonstrations={tmp_path}/demonstrations.jsonl", "rewards=[{name: correctness}, {name: length}]", "rollout.engine=transformers",
        "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4", "rollout.max_prompt_tokens=120", "training.num_batches=4",
        "training.passes_per_batch=2", "curriculum={kind: signal}", "replay={}", "algorithm.sampler_correction=truncate",
        f"retention.ptx={{demonstrations: {tmp_path}/demonstrations.jsonl, coefficient: 0.1, tokens_per_step: 64}}",
        f"retention.adaptive={{steers: ptx, problems: {tmp_path}/held_out.jsonl, every_batches: 1, max_fall: 0.01}}",
        "--kills", "2", "--victim", "job", "--victim", "grader", "--damage", "--folder", tmp_path / "runs",
    ]  # fmt: skip
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 of 2 resumed runs end as the run left alone" in done.stdout
    assert done.stdout.count("newest checkpoint damaged") >= 1
    assert "the run went on through 2 of 2 kills; weights that differ: 0, rows that differ: 0" in done.stdout
    rows = read_jsonl(tmp_path / "runs/alone/metrics.jsonl")
    assert any(row["replay/rescued"] > 0 for row in rows)
    assert any(row["retention/factor"] > 1 for row in rows)
    assert rows[-1]["curriculum/active"] > 0
