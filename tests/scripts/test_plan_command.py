"""scripts/plan.py says with its exit code whether a recipe fits, and names what is wrong with an argument in one sentence."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture
def model_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return str(path)


@pytest.fixture
def plan(monkeypatch, capsys):
    """The command in this process: importing torch takes most of its time."""
    spec = importlib.util.spec_from_file_location("plan_command", ROOT / "scripts/plan.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    monkeypatch.chdir(ROOT)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan.py", *arguments])
        try:
            code = command.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, *capsys.readouterr()

    return run


def test_a_recipe_that_fits_ends_with_0_and_lists_every_part(plan, model_config):
    code, out, _ = plan("recipes/gsm8k/ppo.yaml", "--gpus", "H200-141GB", "--model-config", model_config)
    assert code == 0
    for part in ("weights", "optimizer", "gradients", "activations", "logits", "rollout engine", "reference", "critic",
                 "reward model", "runtime overhead", "completions per optimizer step", "rollout ", "scoring", "sync"):  # fmt: skip
        assert part in out, part
    assert "fits, with" in out


def test_a_recipe_that_does_not_fit_ends_with_1_and_says_what_would_help(plan, model_config):
    code, out, _ = plan("recipes/gsm8k/ppo.yaml", "--gpus", "RTX4090-24GB", "--model-config", model_config)
    assert code == 1
    assert "does not fit" in out
    assert "ZeRO-2" in out


def test_the_stage_of_the_accelerate_configuration_is_taken(plan, model_config):
    arguments = ("recipes/gsm8k/sft.yaml", "--gpus", "2xH100-80GB", "--model-config", model_config)
    code, out, _ = plan(*arguments, "--accelerate", "recipes/accelerate/zero2.yaml")
    assert (code, "ZeRO-2" in out) == (0, True)
    _, out, _ = plan(*arguments, "--accelerate", "recipes/accelerate/zero2.yaml", "--zero", "3")
    assert "ZeRO-3" in out


def test_on_a_cpu_the_memory_of_this_machine_counts(plan, model_config):
    code, out, _ = plan("recipes/gsm8k/sft.yaml", "training.micro_batch_size=1", "--gpus", "cpu", "--model-config", model_config)  # fmt: skip
    assert "1 x cpu" in out
    assert code in (0, 1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("recipes/gsm8k/grpo.yaml", "--gpus", "8xH100"), "--gpus is '8xH100'"),
        (("recipes/gsm8k/grpo.yaml", "--gpus", "H100-80GB"), "--model-config"),
        (("recipes/gsm8k/grop.yaml", "--gpus", "H100-80GB"), "does not exist"),
        (("recipes/gsm8k/evaluate.yaml", "--gpus", "H100-80GB"), "trains nothing"),
        (("recipes/gsm8k/grpo.yaml", "--gpus", "H100-80GB", "--accelerate", "nowhere.yaml"), "nowhere.yaml"),
        (("recipes/gsm8k/grpo.yaml", "--gpus", "H100-80GB", "--model-config", "critic=x.json"), "role 'critic'"),
    ],
)
def test_a_bad_argument_is_one_sentence_and_ends_with_2(plan, arguments, says):
    code, out, error = plan(*arguments)
    assert (code, out) == (2, "")
    assert says in error
    assert error.count("\n") == 1
