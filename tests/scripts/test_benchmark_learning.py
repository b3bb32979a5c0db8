"""The arithmetic behind docs/benchmarks/learning.md: when a run is good, what a budget of tokens buys, and TRL's words for our recipe."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmarks.learning import (  # noqa: E402
    Clock,
    cpu_seconds,
    is_spent,
    learning_table,
    load_results,
    mean_curve,
    race_table,
    reached,
    time_to,
    write_results,
)
from benchmarks.learning_trl import TRLReward, trl_settings  # noqa: E402

from rlhf.config import load_config  # noqa: E402
from rlhf.types import Prompt, Rollout, Score  # noqa: E402


@pytest.mark.parametrize(
    ("accuracies", "batch"),
    [
        ([0.5, 0.88, 0.92, 0.95], 2),  # 0.88 and 0.92 have a mean of 0.9
        ([0.5, 0.89, 0.90, 0.95], 3),  # 0.895 is not enough
        ([0.95, 0.80, 0.95, 0.95], 3),  # 0.875 twice: a lucky batch before does not count
        ([0.95, 0.95, 0.80, 0.95, 0.95], 4),  # it was there, and fell
        ([0.95, 0.95], 1),
        ([0.95], None),  # no second batch
        ([0.95, 0.95, 0.5], None),
        ([], None),
    ],
)
def test_the_threshold_is_reached_when_two_batches_hold_it_for_good(accuracies, batch):
    assert reached(accuracies, threshold=0.9, window=2) == batch


def test_the_time_to_the_threshold_is_that_of_the_second_batch_of_the_pair():
    batches = [{"correctness": c, "cpu": cpu} for c, cpu in ((0.5, 3.0), (0.9, 7.0), (0.92, 11.0), (1.0, 15.0))]
    assert time_to(batches) == {"correctness": 0.92, "cpu": 11.0, "batch": 3}


def rollout(length, *, finish_reason="stop"):
    return Rollout(
        prompt=Prompt(id="p", token_ids=(1,), question="?", reference="2"),
        token_ids=(7,) * length,
        logprobs=(0.0,) * length,
        finish_reason=finish_reason,
        text="2",
        policy_version=0,
    )


def test_sampled_tokens_add_up_over_batches_until_the_budget_is_spent():
    clock = Clock()
    right, wrong = Score(verdict="correct", value=1.0), Score(verdict="wrong", value=0.5)
    undecided = Score(verdict="undecided", value=None)
    score = clock.scoring(lambda rollouts: [right, wrong, undecided][: len(rollouts)])
    clock.start()
    assert not is_spent(1, clock.batches)
    score([rollout(3), rollout(5, finish_reason="length")])  # 8
    score([rollout(2), rollout(4), rollout(6)])  # 12 more
    first, second = clock.batches
    assert (first["sampled_tokens"], second["sampled_tokens"]) == (8, 20)
    assert (first["length"], first["truncated"], first["correctness"], first["reward"]) == (4, 0.5, 0.5, 0.75)
    assert second["truncated"] == 0
    assert second["correctness"] == 0.5  # the undecided one is in neither count
    assert not is_spent(21, clock.batches)
    assert is_spent(20, clock.batches)


def test_work_of_a_child_process_is_counted_while_it_lives_and_after():
    before = cpu_seconds()
    busy = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    child.stdout.readline()
    assert cpu_seconds() - before >= 0.45
    child.communicate(b"\n")
    assert cpu_seconds() - before >= 0.45


def test_time_before_the_start_is_not_counted():
    clock = Clock()
    spin_until = time.process_time() + 0.3
    while time.process_time() < spin_until:
        pass
    clock.start()
    clock.stop(steps=40)
    assert clock.startup_cpu >= 0.3
    assert clock.training["cpu"] < 0.2
    assert clock.training["steps"] == 40


def test_trl_is_given_the_batch_arithmetic_and_the_loss_of_the_recipe():
    config = load_config(ROOT / "recipes/tiny/grpo.yaml", [])
    settings = trl_settings(config, micro_batch=32)
    # 32 prompts x 8 samples = 256 completions a rollout batch, 128 an optimizer step, 32 a forward pass
    assert settings["num_generations"] == 8
    assert settings["per_device_train_batch_size"] * settings["steps_per_generation"] == 256
    assert settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] == 128
    assert (settings["epsilon"], settings["epsilon_high"], settings["scale_rewards"]) == (0.2, 0.28, "none")
    assert settings["learning_rate"] == 3e-4


def test_recipes_that_trl_would_run_differently_are_refused():
    with pytest.raises(ValueError, match="only GRPO with a mean over tokens"):
        trl_settings(load_config(ROOT / "recipes/algorithms/rloo.yaml", []), micro_batch=32)
    with pytest.raises(ValueError, match="does not divide the 128 completions"):
        trl_settings(load_config(ROOT / "recipes/tiny/grpo.yaml", []), micro_batch=48)


def test_trl_hears_our_rewards_of_the_right_prompts_and_a_completion_without_a_stop_token_was_cut(renderer):
    seen = []

    def score(rollouts):
        seen.extend(rollouts)
        return [Score(verdict="correct", value=1.0), Score(verdict="undecided", value=None)]

    prompts = [Prompt(id=f"{i}", token_ids=(1,), question="?", reference="2") for i in range(2)]
    whole = renderer.response_ids("\\boxed{4}")
    reward = TRLReward(prompts, renderer, score)
    assert reward(completion_ids=[whole, whole[:-1]], index=[1, 0], prompts=["", ""]) == [1.0, None]
    assert [(r.prompt.id, r.text, r.finish_reason) for r in seen] == [
        ("1", "\\boxed{4}", "stop"),
        ("0", "\\boxed{4}", "length"),
    ]


def estimate(mean):
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 500}


def run(algorithm, seed, accuracies, *, seconds_per_batch):
    batches = [
        {"correctness": a, "cpu": seconds_per_batch * i, "wall": 2 * seconds_per_batch * i, "sampled_tokens": 100 * i}
        for i, a in enumerate(accuracies, 1)
    ]
    training = {"cpu": seconds_per_batch * len(batches), "wall": 2 * seconds_per_batch * len(batches), "steps": 8}
    return {
        "algorithm": algorithm, "seed": seed, "after": estimate(0.95), "difference": estimate(0.4),
        "sampled_tokens": 1000, "training": training, "batches": batches,
    }  # fmt: skip


def test_the_tables_show_each_run_and_the_ratio_of_each_seed():
    results = {
        "before": estimate(0.55),
        "runs": [
            run("grpo", 0, [0.5, 0.9, 0.9, 0.9], seconds_per_batch=4),  # there at batch 3: 12 s
            run("grpo", 1, [0.5, 0.9, 0.9, 0.9], seconds_per_batch=4),
            run("trl", 0, [0.5, 0.5, 0.9, 0.9], seconds_per_batch=9),  # there at batch 4: 36 s
            run("trl", 1, [0.5, 0.5, 0.5, 0.5], seconds_per_batch=10),
        ],
    }
    assert (
        "| grpo | 0 | 0.550 [0.540, 0.560] | 0.950 [0.940, 0.960] | +0.400 [+0.390, +0.410] | 1,000 | 8 | 0.3 |"
        in learning_table(results)
    )
    assert "grpo: 2 seeds, mean difference +0.400, lowest end of an interval +0.390" in learning_table(results)
    table = race_table(results)
    assert "| 0 | ours | 3 | 300 | 12.0 | 24.0 | 16.000 | 0.950 [0.940, 0.960] |" in table  # 16 s for 1,000 tokens
    assert "| 1 | TRL | never | - | - | - | 40.000 |" in table
    assert "CPU seconds to 0.9 over ours: median **3.00** (3.00)" in table
    assert "per sampled token over ours, whole run: median **2.38** (2.25, 2.50)" in table


def test_the_mean_curve_ends_where_the_shortest_run_does():
    xs, ys = mean_curve([[{"x": 1, "y": 0.2}, {"x": 2, "y": 0.4}], [{"x": 3, "y": 0.6}]], "x", "y")
    assert (xs, ys) == ([2], [0.4])


def test_results_are_kept_one_run_a_line(tmp_path):
    results = {"before": estimate(0.5), "runs": [{"cpu": 1.23456789, "seed": 0}, {"cpu": 2.0, "seed": 1}]}
    write_results(tmp_path / "results.json", results)
    assert len((tmp_path / "results.json").read_text().splitlines()) == 4
    assert load_results(tmp_path / "results.json")["runs"] == [{"cpu": 1.23457, "seed": 0}, {"cpu": 2.0, "seed": 1}]
