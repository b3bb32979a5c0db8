"""The road end to end with the real parts: TRL, our loop, vLLM, `accelerate launch`. Long ones are marked slow."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
GSM8K = ROOT.parent / "shared/data/gsm8k"


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def run_pipeline(tmp_path, recipe, output_root, overrides):
    """summary.json of a pipeline whose outputs all go under tmp_path, and what it printed; without stages whose overrides are None."""
    pipeline = yaml.safe_load((ROOT / recipe).read_text())
    pipeline["stages"] = [s for s in pipeline["stages"] if overrides.get(Path(s["recipe"]).stem, []) is not None]
    moved = [f"{output_root}/", f"{tmp_path}/"]
    for stage in pipeline["stages"]:
        stage["recipe"] = str(Path(recipe).parent / stage["recipe"])
        loaded = subprocess.run(
            [sys.executable, "-m", "rlhf.config", stage["recipe"]], cwd=ROOT, capture_output=True, text=True, check=True
        )
        resolved = yaml.safe_load(loaded.stdout.replace(*moved))
        path = tmp_path / Path(stage["recipe"]).name
        path.write_text(yaml.safe_dump(resolved, sort_keys=False))
        name = Path(stage["recipe"]).stem
        stage["recipe"], stage["overrides"] = str(path), overrides.get(name, [])
    pipeline["output_dir"] = f"{tmp_path}/pipeline"
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    done = subprocess.run(
        [sys.executable, "scripts/run_pipeline.py", "--config", str(tmp_path / "pipeline.yaml")],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return json.loads((tmp_path / "pipeline/summary.json").read_text()), done.stdout


def check_summary(summary, num_problems):
    for model in ("sft", "grpo"):
        estimate = summary["pass_at_1"][model]
        assert estimate["n"] == num_problems
        assert 0 <= estimate["low"] <= estimate["mean"] <= estimate["high"] <= 1
    assert summary["paired_difference"].keys() == {"mean", "low", "high"}
    assert 0 <= summary["reward_model_accuracy"] <= 1
    assert summary["rollout_engine"] == "vllm"
    assert 0 <= summary["max_kl_sampler"] < 0.05
    assert summary["peak_memory_gb"] < 8
    assert all(seconds > 0 for seconds in summary["seconds"].values())


@pytest.mark.slow
def test_the_demo_in_small_goes_through_every_stage_and_twice_to_the_same_weights(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    overrides = {
        "prepare_data": [
            "num_demonstrations=640",
            "num_train_problems=100",
            "num_test_problems=30",
            "num_preference_pairs=160",
        ],
        "sft": ["training.num_steps=20"],
        "reward_model": ["training.num_steps=5"],
        "label_steps": None,  # this policy solves nothing, and nothing of it could be labelled
        "process_reward_model": ["training.num_steps=3", f"train_steps={first}/data/labelled_steps.jsonl"],
        "best_of_n": ["rollout.samples_per_prompt=2", "pass_at=[1, 2]", "selection.ns=[1, 2]"],
        "grpo": ["training.num_batches=2", "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4"],
        "evaluate": ["rollout.samples_per_prompt=4"],
    }

    first.mkdir()
    summary, printed = run_pipeline(first, "recipes/tiny/pipeline.yaml", "outputs/demo", overrides)
    check_summary(summary, 30)
    assert set(summary["best_of_2"]["sft"]) >= {"majority", "best by outcome model", "best by process model"}
    assert 0 <= summary["process_reward_model_f1"]["mean"] <= 1
    assert "paired difference in pass@1, grpo - sft" in printed
    assert (first / "pipeline/summary.png").stat().st_size > 20_000
    for made_once in ("data", "base"):
        shutil.copytree(first / made_once, second / made_once)
    for stage in ("sft", "reward_model", "grpo"):
        (second / f"{stage}.yaml").write_text((first / f"{stage}.yaml").read_text().replace(str(first), str(second)))
        command = [
            sys.executable,
            f"scripts/train_{stage}.py",
            "--config",
            str(second / f"{stage}.yaml"),
            *overrides[stage],
        ]
        subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True)
        weights = [(folder / stage / "model.safetensors").read_bytes() for folder in (first, second)]
        assert weights[0] == weights[1], f"the same seed gave another {stage}"


@pytest.mark.long
@pytest.mark.slow
def test_a_mixture_of_experts_goes_through_every_stage(tmp_path):
    overrides = {
        "prepare_data": [
            "num_demonstrations=128",
            "num_train_problems=50",
            "num_test_problems=10",
            "num_preference_pairs=32",
        ],
        "sft": ["training.num_steps=10", "training.log_every=5", "training.micro_batch_size=16"],
        "reward_model": ["training.num_steps=2"],
        "grpo": ["training.num_batches=1", "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4", "policy.router_replay=true"],
        "evaluate": ["rollout.samples_per_prompt=4"],
    }  # fmt: skip
    summary, _ = run_pipeline(tmp_path, "recipes/moe/pipeline.yaml", "outputs/moe", overrides)
    check_summary(summary, 10)
    [row] = [json.loads(line) for line in (tmp_path / "grpo/metrics.jsonl").read_text().splitlines()]
    assert row["moe/disagreement"] == 0  # with replay
    assert row["moe/replaced"] < 0.02
    assert row["sync/error"] < 1e-5
    assert 1 <= row["moe/load"] <= 4
    for row in map(json.loads, (tmp_path / "sft/metrics.jsonl").read_text().splitlines()):
        assert 2 <= row["moe/balance_loss"] < 8
    built = json.loads((tmp_path / "grpo/config.json").read_text())
    assert (built["model_type"], built["num_local_experts"], built["num_experts_per_tok"]) == ("qwen3_moe", 8, 2)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs ../shared/data/gsm8k")
def test_real_gsm8k_text_goes_through_every_stage(tmp_path):
    fewer = {
        "sft": ["training.num_steps=8", "optimizer.warmup_steps=2"],
        "reward_model": ["training.num_steps=3"],
        "grpo": ["training.num_batches=1", "rollout.max_new_tokens=128"],
        "evaluate": ["num_problems=30", "rollout.max_new_tokens=64"],
    }
    summary, _ = run_pipeline(tmp_path, "recipes/gsm8k/smoke/pipeline.yaml", "outputs/gsm8k-smoke", fewer)
    check_summary(summary, 30)
    records = json.loads((tmp_path / "data/run.json").read_text())["records"]
    assert records["demonstrations"] == 7473
    assert 8e6 < json.loads((tmp_path / "base/run.json").read_text())["num_parameters"] < 12e6
