"""A base of 4 bits: what it is, that every side has the same one, and that gradients pass through it."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from online_helpers import config
from peft import PeftModel
from safetensors import safe_open
from test_lora import RECIPES, batch, logits, shake
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from checks.environment import check_quantization
from checks.findings import Context, Report

from data.chat import render_response
from rlhf import footprint
from rlhf.config import Lora, Policy, load_config
from rlhf.footprint import Sharding, trained_of
from rlhf.lora import adapt, add_lora, base_of, merged_parameters, save_model
from rlhf.metrics import read_jsonl
from rlhf.models import load_causal_lm
from rlhf.quantization import dequantised, has_quantised, is_quantised, quantise_linear_layers
from rlhf.scorer import Scorer
from rlhf.shapes import read_shape
from rlhf.trainers.arguments import LogLines
from rlhf.trainers.sft import Example
from rlhf.trainers.sft import train as train_sft

NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
"""The 16 values of a 4-bit NormalFloat, appendix E of https://arxiv.org/abs/2305.14314."""


def load(model_folder, dtype="float32"):
    return load_causal_lm(model_folder, revision=None, dtype=dtype).eval()


@pytest.fixture
def policy(model_folder):
    """4-bit base, with adapters that do something."""
    return quantised(load(model_folder))


def quantised(model):
    torch.manual_seed(3)
    adapt(model, Policy.model_validate({"path": "x", "lora": {"rank": 4, "alpha": 8}, "quantization": "nf4"}))
    shake(model)
    return model


def plain_twin(model, model_folder, dtype="float32"):
    """A plain model of the dequantised base."""
    twin = load(model_folder, dtype)
    own = dict(twin.named_parameters())
    for name, parameter in model.named_parameters():
        if ".lora_" not in name:
            own[name.replace(".base_layer.", ".")].data.copy_(dequantised(parameter))
    return twin


class OneLayer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data = weight

    def get_output_embeddings(self):
        return None


def test_weights_that_are_the_16_values_times_a_scale_are_kept_and_others_go_to_the_nearest():
    kept = torch.tensor(NF4).repeat(4)[None] * 0.5  # one block of 64, its scale 0.5
    one = OneLayer(kept.clone())
    quantise_linear_layers(one)
    assert_close(dequantised(one.layer.weight), kept, rtol=0, atol=1e-7)
    moved = kept.clone()
    moved[0, 8] = 0.5 * 0.115  # between 0.0796 and 0.1609, nearer to the first
    moved[0, 9] = 0.5 * 0.125  # nearer to the second
    two = OneLayer(moved)
    quantise_linear_layers(two)
    assert_close(dequantised(two.layer.weight), kept, rtol=0, atol=1e-7)


def test_the_linear_layers_of_the_blocks_are_quantised_and_nothing_else(policy):
    for name, parameter in policy.named_parameters():
        linear = "_proj.base_layer.weight" in name
        assert is_quantised(parameter) == linear, name
        assert parameter.requires_grad == (".lora_" in name), name
    assert policy.get_output_embeddings().weight is policy.get_input_embeddings().weight


def test_a_head_trained_in_full_and_its_biases_stay(model_folder):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    quantise_linear_layers(model, keep=["score"])
    assert not is_quantised(model.score.weight)
    assert has_quantised(model)
    biased = OneLayer(torch.randn(4, 64))
    biased.layer.bias = nn.Parameter(torch.arange(4.0))
    plain = copy.deepcopy(biased)
    quantise_linear_layers(biased)
    x = torch.zeros(1, 64)
    assert torch.equal(biased.layer(x), plain.layer(x))


def test_the_model_computes_with_the_dequantised_weights(policy, model_folder):
    with base_of(policy):
        assert_close(logits(policy), logits(plain_twin(policy, model_folder)))
    assert (logits(policy) - logits(load(model_folder))).abs().max() > 0.01


def test_gradients_are_those_over_the_dequantised_base_also_after_a_pass_without(policy, model_folder):
    """bitsandbytes would repack the weights of a model in evaluation mode, and lose the gradient through them."""
    twin = plain_twin(policy, model_folder)
    add_lora(twin, Lora(rank=4, alpha=8))
    adapters = {name: p for name, p in policy.named_parameters() if ".lora_" in name}
    for name, parameter in twin.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(adapters[name])
    logits(policy)
    with torch.no_grad():
        Scorer(policy, share_prompts=False)(batch(), 1.0)
    for model in (policy, twin):
        Scorer(model, share_prompts=False)(batch(), 1.0)[0].sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if ".lora_" in name}
    for name, parameter in adapters.items():
        assert parameter.grad.abs().max() > 0
        assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_the_dequantised_base_and_the_adapters_rounded_once(model_folder, dtype):
    model = quantised(load(model_folder, dtype))
    merged = dict(merged_parameters(model))
    assert merged.keys() == dict(load(model_folder).named_parameters()).keys()
    name = "model.layers.0.mlp.up_proj"
    a, b = (model.get_parameter(f"{name}.lora_{side}.default.weight") for side in "AB")
    base = dequantised(model.get_parameter(f"{name}.base_layer.weight"))
    assert base.dtype == getattr(torch, dtype)
    assert torch.equal(merged[f"{name}.weight"], (base + 2 * (b @ a)).to(base.dtype))


def test_what_is_saved_loads_without_bitsandbytes_and_computes_the_same(policy, model_folder, tmp_path):
    save_model(policy, tmp_path)
    saved = load(str(tmp_path))
    assert not has_quantised(saved)
    assert_close(logits(saved), logits(policy))
    assert not hasattr(saved.config, "quantization_config")
    on_base = PeftModel.from_pretrained(plain_twin(policy, model_folder), str(tmp_path / "adapter")).eval()
    assert_close(logits(on_base), logits(policy))


def test_an_engine_that_kept_the_weights_of_the_path_is_found_before_the_first_rollout(make_trainer, monkeypatch):
    options = ("policy.lora={rank: 4}", "policy.quantization=nf4", "guards.freshness_tolerance=0.001")
    assert make_trainer(*options).sync is not None
    monkeypatch.setattr("rlhf.trainers.online.has_quantised", lambda model: False)
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        make_trainer(*options, folder="stale")


def test_a_run_stays_on_policy_and_its_checkpoint_holds_the_adapters_alone_and_resumes_to_the_bit(make_trainer):
    options = ("policy.lora={rank: 4}", "policy.quantization=nf4", "optimizer.learning_rate=0.03")
    whole = make_trainer(*options, folder="whole")
    for row in whole.train():
        assert row["policy/kl_sampler"] < 1e-6
        assert row["sync/error"] < 1e-5
    killed = make_trainer(*options)
    killed.config.training.__dict__["num_batches"] = 3  # in the third batch, after the checkpoint of the second
    killed.train()
    with safe_open(whole.checkpoints / "step-000002/policy.weights.safetensors", "pt") as file:
        assert all(".lora_" in name for name in file.keys())  # noqa: SIM118 - no dict
    resumed = make_trainer(*options)
    assert (resumed.first_batch, resumed.engine.policy_version) == (2, 2)
    resumed.train()
    assert torch.equal(logits(resumed.unwrapped), logits(whole.unwrapped))


@pytest.fixture
def sft(renderer, demonstrations, model_folder, tmp_path):
    """Runs 12 steps in a folder, with a checkpoint after 6, and loads what it saved as any stage would."""
    examples = [
        Example(
            prompt_ids=renderer.prompt_ids(d.question),
            response_ids=renderer.response_ids(render_response(d.scratchpad, d.answer)),
        )
        for d in demonstrations
    ]

    def run(folder):
        overrides = [
            f"output_dir={tmp_path / folder}", f"model.path={model_folder}", "model.lora={rank: 8, alpha: 16}", "model.quantization=nf4",
            "training.num_steps=12", "training.sequences_per_step=8", "training.micro_batch_size=8", "training.log_every=3",
            "training.checkpoint_every=6", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.02", "optimizer.schedule=constant",
        ]  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        train_sft(
            load_config(RECIPES / "sft.yaml", overrides),
            renderer.tokenizer,
            examples,
            pad_token_id=renderer.pad_token_id,
        )
        return load(str(tmp_path / folder))

    return run


def test_sft_over_4_bits_learns_and_killed_after_a_checkpoint_ends_where_it_would_have(sft, monkeypatch, tmp_path):
    whole = sft("whole")
    losses = [row["loss"] for row in read_jsonl(tmp_path / "whole/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.05
    with monkeypatch.context() as killed:
        on_log = LogLines.on_log

        def kill(self, args, state, control, logs=None, **kwargs):
            on_log(self, args, state, control, logs, **kwargs)
            if state.global_step == 9:
                raise KeyboardInterrupt

        killed.setattr(LogLines, "on_log", kill)
        with pytest.raises(KeyboardInterrupt):
            sft("killed")
    assert torch.equal(logits(sft("killed")), logits(whole))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("policy.quantization=nf4", "quantization is nf4 and lora is not set"),
        ("policy={quantization: nf4, lora: {sync: adapter}}", "set lora.sync to merged"),
        ("policy={quantization: int8, lora: {rank: 4}}", "key 'policy.quantization' has the value 'int8'"),
    ],
)
def test_a_recipe_that_would_train_4_bits_or_sample_from_another_base_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        config(override)


@pytest.mark.parametrize(("stage", "refused"), [("3", True), ("2", False)])
def test_zero_3_is_refused_before_anything_is_quantised(model_folder, monkeypatch, stage, refused):
    model = load(model_folder)
    block = Policy.model_validate({"path": "x", "lora": {}, "quantization": "nf4"})
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", stage)
    if refused:
        with pytest.raises(ValueError, match="zero_stage 3, which would cut packed weights off from their scales"):
            adapt(model, block)
    else:
        adapt(model, block)
    assert has_quantised(model) is not refused


def test_the_launcher_and_the_check_refuse_zero_3_before_any_host_is_asked():
    root = RECIPES.parents[1]
    recipe, accelerate = "recipes/gsm8k/grpo_qlora.yaml", "recipes/accelerate/multi_node.yaml"
    launched = subprocess.run(
        [sys.executable, "scripts/launch.py", recipe, "--hosts=a,b", "--accelerate", accelerate, "--dry-run"],
        cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True,
    )  # fmt: skip
    report = Report(show=lambda line: None)
    settings = yaml.safe_load((root / accelerate).read_text())
    check_quantization(report, load_config(root / recipe), Context(accelerate=settings))
    assert (launched.returncode, report.failed) == (2, True)
    for text in (launched.stderr, report.findings[0].text):
        assert "zero_stage 3, which would cut packed weights off from their scales" in text


def test_the_plan_counts_the_bytes_that_the_model_takes(policy, model_folder):
    block = Policy.model_validate({"path": "x", "lora": {"rank": 4}, "quantization": "nf4"})
    plan = trained_of(block, read_shape(Path(model_folder) / "config.json"), Sharding(), has_head=True)
    # a block: q 64x64, k and v 64x32, o 64x64, gate, up and down 64x128
    assert plan.in_four_bits == 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    assert plan.dequantised == 4 * 64 * 128
    taken = sum(p.numel() * p.element_size() for p in policy.parameters())
    states = [p.quant_state for p in policy.parameters() if is_quantised(p)]
    taken += sum(s.absmax.numel() + 4 * s.state2.absmax.numel() for s in states)
    # the layers are so small that a last block of scales is not full
    assert footprint.weights(plan, Sharding(), 1) == pytest.approx(taken, rel=1e-3)
