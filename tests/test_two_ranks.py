"""The tiny GRPO recipe under `accelerate launch` on two CPU ranks."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from data.records import write_records
from data.stories import prepare
from reward_models.outcome import STATISTICS

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    prepared = prepare(
        seed=0, min_level=2, max_level=3, answers_at_once=0.0, demonstrations=64, train_problems=64, test_problems=4,
        train_pairs=16, heldout_pairs=2,
    )  # fmt: skip
    write_records(prepared.train_pairs, folder / "pairs.jsonl")
    write_records(prepared.train_problems, folder / "problems.jsonl")
    write_records(prepared.demonstrations, folder / "demonstrations.jsonl")
    return folder


@pytest.fixture(scope="module")
def judge_folder(model_folder, tokenizer, tmp_path_factory):
    """A reward model with a head drawn at random."""
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    judge.config.pad_token_id = tokenizer.pad_token_id
    judge.save_pretrained(folder)
    (folder / STATISTICS).write_text('{"mean": 0.0, "std": 1.0}')
    return folder


def config_file(name):
    """Of the recipes, with `_bf16` in bfloat16; `pieces` is ZeRO-3 that keeps not even the smallest weights whole, as it would with our tiny models."""
    recipe = ROOT / f"recipes/accelerate/{name.removesuffix('_bf16').replace('pieces', 'zero3')}.yaml"
    if recipe.stem == name:
        return recipe
    folder, config = Path(tempfile.mkdtemp()), yaml.safe_load(recipe.read_text())
    if not name.startswith("pieces"):
        (folder / "accelerate.yaml").write_text(yaml.safe_dump(config | {"mixed_precision": "bf16"}))
        return folder / "accelerate.yaml"
    deepspeed = {
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 1.0,
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
    }
    if name.endswith("_bf16"):
        deepspeed["bf16"] = {"enabled": True}
    (folder / "deepspeed.json").write_text(json.dumps(deepspeed))
    config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "deepspeed.json"), "zero3_init_flag": True}
    del config["mixed_precision"]
    (folder / "accelerate.yaml").write_text(yaml.safe_dump(config))
    return folder / "accelerate.yaml"


def launcher(accelerate_config, num_ranks):
    """One rank needs none, and starts in half the time."""
    if accelerate_config == "single":
        return [sys.executable]
    return [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", config_file(accelerate_config), "--num_processes", str(num_ranks), "--main_process_port", "0",
    ]  # fmt: skip


def launch(accelerate_config, num_ranks, stage, output_dir, *overrides):
    """metrics rows and final weights of a short run of a tiny recipe."""
    command = [
        *launcher(accelerate_config, num_ranks), ROOT / f"scripts/train_{stage}.py", "--config", ROOT / f"recipes/tiny/{stage}.yaml",
        f"output_dir={output_dir}", *overrides,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(rf"ranks +{num_ranks}\n", done.stdout)  # accelerate may start fewer than it was told
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return rows, load_file(output_dir / "model.safetensors")


def grpo(accelerate_config, model_folder, records, output_dir, *overrides):
    return launch(
        accelerate_config, 2, "grpo", output_dir,
        f"policy.path={model_folder}", f"problems={records}/problems.jsonl", f"demonstrations={records}/demonstrations.jsonl",
        "rewards=[{name: correctness}, {name: length}]", "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4",
        "rollout.max_prompt_tokens=120", "training.num_batches=2", "rollout.kv_cache_gb=1", *overrides,
    )  # fmt: skip


@pytest.mark.long
@pytest.mark.slow
def test_zero_3_on_two_ranks_with_vllm_on_each_trains_and_stays_fresh(model_folder, judge_folder, records, tmp_path):
    rewards = (
        f"[{{name: correctness}}, {{name: length}}, {{name: reward_model, path: {judge_folder}, placement: sharded}}]"
    )
    rows, weights = grpo("pieces", model_folder, records, tmp_path / "run", "rollout.engine=vllm", f"rewards={rewards}")
    start = load_file(Path(model_folder) / "model.safetensors")
    assert any(not torch.equal(start[name], weights[name]) for name in start)
    assert [row["step"] for row in rows] == [2, 4]
    for row in rows:
        assert row["sync/error"] < 1e-4
        assert row["policy/kl_sampler"] < 1e-6
        assert row["rollout/length"] > 1
        assert row["reward/reward_model"] != 0


@pytest.mark.slow
def test_zero_3_on_two_ranks_trains_while_a_server_samples_for_both(model_folder, records, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rows, _ = grpo(
        "pieces", model_folder, records, tmp_path / "run", "rollout.engine=server", f"rollout.server={{first_port: {port}}}",
        "training.max_staleness=1", "algorithm.sampler_correction=truncate", "training.num_batches=3", "rollout.refill_rounds=1",
    )  # fmt: skip
    assert [row["rollout/age"] for row in rows] == [0, 2, 2]
    for row in rows:
        assert row["sync/error"] < 1e-4
        assert row["rollout/length"] > 1


@pytest.mark.slow
def test_an_odd_number_of_micro_batches_on_one_rank_does_not_dead_lock(model_folder, records, tmp_path):
    # two or three sequences per micro-batch: the ranks need different numbers of passes
    rows, _ = grpo(
        "ddp",
        model_folder,
        records,
        tmp_path / "run",
        "rollout.engine=transformers",
        "training.tokens_per_micro_batch=216",
    )
    assert [row["step"] for row in rows] == [2, 4]


LAST_WORDS = """
import sys

import torch
from torch import distributed
from rlhf.distributed import leave

distributed.init_process_group("gloo")
sys.setswitchinterval(100)  # seconds: Gloo's thread gets to let go of the tensor only when it is waited for
tensor = torch.zeros(2_000_000)
distributed.all_reduce(tensor)
leave()
del tensor
"""


@pytest.mark.slow
def test_ranks_that_left_do_not_abort_as_they_exit(tmp_path):
    """Without `leave` one in three of these pairs ends with SIGABRT: Gloo's thread lets go of the tensor too late."""
    (tmp_path / "last_words.py").write_text(LAST_WORDS)
    for _ in range(5):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment = {
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
        }  # fmt: skip
        ranks = [
            subprocess.Popen([sys.executable, tmp_path / "last_words.py"], env={**environment, "RANK": str(rank)})
            for rank in range(2)
        ]
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]


@pytest.mark.slow
def test_sft_on_two_ranks_sharded_or_not_takes_the_steps_of_one(model_folder, records, tmp_path):
    runs = {}
    for accelerate_config, ranks in (("single", 1), ("ddp", 2), ("pieces", 2)):
        runs[accelerate_config] = launch(
            accelerate_config, ranks, "sft", tmp_path / accelerate_config, f"model.path={model_folder}", "max_tokens=400",
            f"demonstrations={records}/demonstrations.jsonl", "training.num_steps=4", "training.micro_batch_size=8", "training.log_every=1",
            "optimizer.warmup_steps=1",
        )  # fmt: skip
    rows, weights = runs.pop("single")
    for other_rows, other_weights in runs.values():
        for row, other in zip(rows, other_rows, strict=True):
            assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sharded"),
    [
        ("orpo", ["ddp"]),
        pytest.param("orpo", ["zero2", "pieces"], marks=pytest.mark.long),
        pytest.param("dpo", ["ddp", "zero2", "pieces"], marks=pytest.mark.long),
    ],
)
def test_preference_training_on_two_ranks_sharded_or_not_takes_the_steps_of_one(
    model_folder, records, tmp_path, stage, sharded
):
    """Twelve pairs a step, which a rank of two has three micro-batches of, on sixteen pairs: an epoch's last step has four."""
    runs = {
        name: launch(
            name, 1 if name == "single" else 2, stage, tmp_path / name, f"model.path={model_folder}", "max_tokens=400",
            f"pairs={records}/pairs.jsonl", "training.num_steps=3", "training.sequences_per_step=12", "training.micro_batch_size=2",
            "training.log_every=1", "optimizer.warmup_steps=1",
        )
        for name in ("single", *sharded)
    }  # fmt: skip
    rows, weights = runs.pop("single")
    for other_rows, other_weights in runs.values():
        for row, other in zip(rows, other_rows, strict=True):
            for key in ("loss", "preference/margin", "preference/nll_chosen", "rewards/margins"):
                if key in row:
                    assert other[key] == pytest.approx(row[key], rel=1e-3, abs=1e-5), key
            assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
        for name, weight in weights.items():
            torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def models(model_folder, judge_folder, process_folder, tokenizer, tmp_path_factory):
    """A dense model and two mixtures of experts, one with fused experts and many, one with few."""
    shape = dict(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        num_experts_per_tok=2, max_position_embeddings=256, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("mixtures")
    torch.manual_seed(0)
    qwen = Qwen3MoeConfig(**shape, intermediate_size=64, moe_intermediate_size=32, num_experts=8)
    Qwen3MoeForCausalLM(qwen).save_pretrained(folder / "moe")
    mixtral = MixtralConfig(**shape, intermediate_size=32, num_local_experts=4, sliding_window=None)
    MixtralForCausalLM(mixtral).save_pretrained(folder / "mixtral")
    return {
        "base": model_folder,
        "four_bits": model_folder,
        "retained": model_folder,
        "moe": folder / "moe",
        "mixtral": folder / "mixtral",
        "judge": judge_folder,
        "process": process_folder,
        "past": tmp_path_factory.mktemp("past"),
    }


def weights_after(accelerate_config, num_ranks, models, output):
    named = (f"{name}={model}" for name, model in models.items())
    command = [*launcher(accelerate_config, num_ranks), ROOT / "tests/update_on_ranks.py", output, *named]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return load_file(output)


@pytest.fixture(scope="module")
def steps_of_one_rank(models, tmp_path_factory):
    weights = weights_after("single", 1, models, tmp_path_factory.mktemp("one") / "weights")
    assert {key for key in weights if key.endswith("grad_norm")} == {
        "grpo.policy/grad_norm", "entropy.policy/grad_norm", "average.policy/grad_norm", "frozen.policy/grad_norm", "ppo.policy/grad_norm",
        "ppo.critic/grad_norm", "moe.policy/grad_norm", "mixtral.policy/grad_norm", "four bits.policy/grad_norm",
        "retained.policy/grad_norm", "ptx.policy/grad_norm", "past.policy/grad_norm", "past resumed.policy/grad_norm",
    }  # fmt: skip
    return weights


@pytest.mark.slow
@pytest.mark.parametrize(
    ("accelerate_config", "chosen"),
    [
        ("ddp", {"base", "moe", "four_bits", "retained", "past"}),
        ("zero1", {"moe"}),
        ("zero2", {"base", "four_bits", "retained"}),
        ("pieces", {"base", "moe", "mixtral", "judge", "process", "past"}),
        pytest.param("zero3_offload", {"moe"}, marks=pytest.mark.long),  # builds DeepSpeed's optimizer for CPUs first
    ],
)
def test_two_ranks_sharded_or_not_take_the_steps_of_one(models, steps_of_one_rank, tmp_path, accelerate_config, chosen):
    """GRPO, with LoRA and an entropy mask over all ranks, with a moving average as reference, of mixtures of experts; PPO with its critic;
    an outcome and a process model in pieces, which one rank asks more than the other; and a run with a curriculum, a replay buffer and a
    coefficient that follows a held-out ability, from its beginning and from the middle of what one rank did."""
    two = weights_after(accelerate_config, 2, {name: models[name] for name in chosen}, tmp_path / "weights")
    if "base" in chosen:
        assert (two["poisoned.running"], two["poisoned.changed"]) == (
            0,
            0,
        )  # on every rank, before a weight was touched
    members = {key.partition(".")[0] for key in two}
    assert two.keys() == {key for key in steps_of_one_rank if key.partition(".")[0] in members}
    assert chosen - {"base", "four_bits"} <= members
    assert ("four bits" in members) == ("four_bits" in chosen)
    for key, value in two.items():
        torch.testing.assert_close(
            value, steps_of_one_rank[key], atol=2e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}"
        )


@pytest.mark.slow
def test_two_ranks_in_bfloat16_pieces_take_the_steps_of_one_in_float32_up_to_rounding(
    models, steps_of_one_rank, tmp_path
):
    """A norm is a sum over all weights, in which roundings of 2^-9 cancel. Two steps of AdamW move a weight by twice the learning rate at most, in
    either direction: rounding may turn a step round where the gradient is next to nothing."""
    two = weights_after("pieces_bf16", 2, {name: models[name] for name in ("base", "moe")}, tmp_path / "weights")
    for key, value in two.items():
        if key.endswith("grad_norm") or key.startswith("poisoned"):
            assert value.item() == pytest.approx(steps_of_one_rank[key].item(), rel=0.03), key
        else:
            learning_rate = 1e-3 if ".critic." in key else 3e-4
            torch.testing.assert_close(
                value,
                steps_of_one_rank[key],
                atol=4.1 * learning_rate,
                rtol=2**-8,
                msg=lambda m, key=key: f"{key}: {m}",
            )


@pytest.mark.slow
def test_in_bfloat16_what_zero_2_steps_starts_as_the_float32_weights_of_the_file(model_folder, tmp_path):
    assert weights_after("zero2_bf16", 2, {"masters": model_folder}, tmp_path / "weights")["masters.error"] == 0


def moments_of(checkpoint):
    return {
        f"{file}/{name}": tensor
        for file in ("policy.weights", "policy.optimizer", "critic.weights", "critic.optimizer")
        for name, tensor in load_file(checkpoint / f"{file}.safetensors").items()
    }


@pytest.mark.slow
def test_a_checkpoint_inside_a_rollout_batch_goes_on_with_more_or_fewer_ranks_sharded_or_not(
    model_folder, records, tmp_path
):
    """Four optimizer steps of PPO on one rollout batch, handed on: from one rank to two, to two under ZeRO-2 or ZeRO-3, to the same again or to one."""
    run, kept = tmp_path / "run", tmp_path / "kept"

    def train(accelerate_config, num_ranks):
        rows, weights = launch(
            accelerate_config, num_ranks, "ppo", run, f"policy.path={model_folder}", f"critic.path={model_folder}", "reference=null",
            "algorithm.kl_coefficient=0", "critic.warmup_batches=0", f"problems={records}/problems.jsonl",
            f"demonstrations={records}/demonstrations.jsonl", "rewards=[{name: correctness}, {name: length}]", "rollout.engine=transformers",
            "rollout.prompts_per_batch=4", "rollout.samples_per_prompt=4", "rollout.max_prompt_tokens=120",
            "training.num_batches=1", "training.passes_per_batch=2", "training.checkpoint_every_steps=1", "training.keep_checkpoints=10",
            "optimizer.warmup_steps=0",
        )  # fmt: skip
        shutil.copytree(run, kept / accelerate_config, dirs_exist_ok=True)
        return rows[0], weights | {f"critic.{k}": v for k, v in load_file(run / "critic/model.safetensors").items()}

    def go_on_from(accelerate_config, step):
        shutil.rmtree(run)
        (run / "checkpoints").mkdir(parents=True)
        shutil.copy(kept / accelerate_config / "recipe.yaml", run)
        shutil.copytree(
            kept / accelerate_config / f"checkpoints/step-00000{step}", run / f"checkpoints/step-00000{step}"
        )

    row, weights = train("single", 1)
    all_moments = moments_of(kept / "single/checkpoints/step-000003").keys()
    go_on_from("single", 1)
    runs = {"two ranks": train("ddp", 2)}
    for accelerate_config in ("zero2", "pieces"):
        go_on_from("ddp", 2)
        runs[accelerate_config] = train(accelerate_config, 2)
        assert moments_of(kept / accelerate_config / "checkpoints/step-000003").keys() == all_moments
    go_on_from("pieces", 3)
    runs["pieces again"] = train("pieces", 2)
    go_on_from("pieces", 3)
    runs["one rank again"] = train("single", 1)
    for name, (other_row, other_weights) in runs.items():
        for key in (
            "policy/ratio",
            "policy/clip_fraction",
            "policy/entropy",
            "critic/error",
            "critic/value",
            "rollout/length",
        ):  # means over tokens
            assert other_row[key] == pytest.approx(row[key], rel=1e-3, abs=1e-6), (name, key)
        for key, weight in weights.items():
            torch.testing.assert_close(
                other_weights[key], weight, atol=2e-5, rtol=1e-4, msg=lambda m, at=(name, key): f"{at}: {m}"
            )
    again = runs["pieces again"][1]
    assert all(torch.equal(again[key], weight) for key, weight in runs["pieces"][1].items())
