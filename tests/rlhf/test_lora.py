"""Adapters: what they train, what they leave alone, and that the model that comes out is the one that was trained."""

from pathlib import Path

import pytest
import torch
from online_helpers import experience
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification

from data.chat import render_response
from reward_models.outcome import OutcomeModel, TokenPair
from reward_models.outcome import train as train_reward_model
from rlhf.config import Lora, load_config
from rlhf.lora import adapter_parameters, add_lora, base_of, has_lora, load_adapter, merged_parameters, save_model
from rlhf.metrics import Metrics, read_jsonl
from rlhf.models import load_causal_lm
from rlhf.scorer import Scorer
from rlhf.trainers.arguments import LogLines
from rlhf.trainers.sft import Example
from rlhf.trainers.sft import train as train_sft
from rlhf.types import Batch
from rlhf.weight_sync import send_weights

RECIPES = Path(__file__).parents[2] / "recipes/tiny"
TOKENS = torch.tensor([[5, 9, 17, 33, 60, 77, 80, 12]])


@pytest.fixture
def base(model_folder):
    return load_causal_lm(model_folder, revision=None, dtype="float32").eval()


@pytest.fixture
def policy(model_folder):
    """With adapters that do something."""
    model = load_causal_lm(model_folder, revision=None, dtype="float32").eval()
    return adapted(model)


def adapted(model, **config):
    torch.manual_seed(3)
    add_lora(model, Lora(**{"rank": 4, "alpha": 8, **config}))
    shake(model)
    return model


def shake(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_new_adapters_change_nothing_and_the_model_stays_what_it_was(base, model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32").eval()
    assert not has_lora(model)
    add_lora(model, Lora())
    assert has_lora(model)
    assert type(model) is type(base)
    assert torch.equal(logits(model), logits(base))


def test_by_default_all_linear_layers_of_the_blocks_are_adapted_and_nothing_else_is_trained(policy):
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    kinds = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # fmt: skip
    assert trained == {
        f"model.layers.{layer}.{kind}.lora_{side}.default.weight" for layer in (0, 1) for kind in kinds for side in "AB"
    }


def test_a_head_trained_in_full_is_trained_itself_and_comes_with_the_adapters(model_folder):
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    add_lora(model, Lora(target_modules=("o_proj",)), trained_in_full=["score"])
    trained = {name.replace(".default", "") for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == dict(adapter_parameters(model)).keys()
    assert {name.rpartition(".o_proj")[2] for name in trained} == {".lora_A.weight", ".lora_B.weight", "score.weight"}
    assert torch.equal(dict(merged_parameters(model))["score.weight"], model.score.weight)


def batch():
    return Batch(
        input_ids=TOKENS,
        position_ids=torch.arange(8)[None],
        attention_mask=torch.ones_like(TOKENS),
        layout=None,
        scored=torch.arange(3, 7),
        targets=TOKENS[0, 4:8],
        sequences=torch.zeros(4, dtype=torch.long),
        sampler_logprobs=torch.zeros(4),
        rows=(0,),
        kept=(0,),
    )


def test_gradients_reach_the_adapters_alone_and_recomputed_activations_give_the_same(policy):
    scorer = Scorer(policy, share_prompts=False)
    assert scorer.plain_head
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.gradient_checkpointing_enable()
            policy.train()
        policy.zero_grad()
        scorer(batch(), 1.0)[0].sum().backward()
        gradients.append({name: p.grad for name, p in policy.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == {name for name, _ in policy.named_parameters() if ".lora_" in name}
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    for name, gradient in gradients[1].items():
        assert_close(gradient, gradients[0][name])


def test_a_merged_weight_is_w_plus_alpha_over_rank_b_a(base, model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    add_lora(model, Lora(rank=2, alpha=6, target_modules=("q_proj",)))
    a, b = (model.get_parameter(f"model.layers.1.self_attn.q_proj.lora_{side}.default.weight") for side in "AB")
    with torch.no_grad():
        a.zero_()
        a[1, 5] = 2.0
        b[7, 1] = 0.5
    merged = dict(merged_parameters(model))
    expected = {name: parameter.clone() for name, parameter in base.named_parameters()}
    expected["model.layers.1.self_attn.q_proj.weight"][7, 5] += 3.0  # 6 / 2 x 0.5 x 2
    assert merged.keys() == expected.keys()  # the tied head once, under the embedding's name
    for name, tensor in merged.items():
        assert torch.equal(tensor, expected[name]), name


def test_merging_is_pefts_and_leaves_the_weights_as_they_were_bit_for_bit(policy):
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    first, second = dict(merged_parameters(policy)), dict(merged_parameters(policy))
    for name, parameter in policy.named_parameters():
        assert torch.equal(parameter, before[name])
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
    for module in policy.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    for name, parameter in policy.named_parameters():
        if ".lora_" not in name:
            assert torch.equal(first[name.replace(".base_layer.", ".")], parameter)


def test_a_bf16_model_has_float32_adapters_and_merges_with_one_rounding(model_folder):
    model = adapted(load_causal_lm(model_folder, revision=None, dtype="bfloat16"))
    assert {p.dtype for n, p in model.named_parameters() if ".lora_" in n} == {torch.float32}
    name = "model.layers.0.mlp.up_proj"
    a, b = (model.get_parameter(f"{name}.lora_{side}.default.weight") for side in "AB")
    expected = (model.get_parameter(f"{name}.base_layer.weight").float() + 2 * (b @ a)).bfloat16()
    assert torch.equal(dict(merged_parameters(model))[f"{name}.weight"], expected)


def test_a_plain_models_merged_parameters_are_its_own(base):
    own, merged = dict(base.named_parameters()), dict(merged_parameters(base))
    assert merged.keys() == own.keys()
    for name, tensor in merged.items():
        assert tensor.data_ptr() == own[name].data_ptr()
        assert not tensor.requires_grad


def test_inside_base_of_the_policy_is_the_reference_and_a_gradient_begun_before_is_kept(policy, base):
    adapted_logits, moved = logits(policy), policy(input_ids=TOKENS).logits
    with base_of(policy):
        assert torch.equal(logits(policy), logits(base))
    assert torch.equal(logits(policy), adapted_logits)
    assert not torch.allclose(adapted_logits, logits(base), atol=1e-3)
    moved.square().sum().backward()
    assert all(p.grad is not None for n, p in policy.named_parameters() if ".lora_" in n)


def test_base_of_turns_the_adapters_on_again_after_a_fault(policy):
    before = logits(policy)
    with pytest.raises(KeyError), base_of(policy):
        raise KeyError
    assert torch.equal(logits(policy), before)


def test_what_is_saved_loads_without_peft_and_the_adapter_loads_with_it(policy, base, tmp_path):
    save_model(policy, tmp_path)
    plain = load_causal_lm(str(tmp_path), revision=None, dtype="float32").eval()
    assert not has_lora(plain)
    assert_close(logits(plain), logits(policy))
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight
    assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()), logits(policy))


def test_a_model_without_adapters_is_saved_as_it_is(base, tmp_path):
    save_model(base, tmp_path)
    assert torch.equal(logits(load_causal_lm(str(tmp_path), revision=None, dtype="float32")), logits(base))
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_other_layers_is_refused(policy, model_folder):
    other = adapted(load_causal_lm(model_folder, revision=None, dtype="float32"), target_modules=("q_proj",))
    with pytest.raises(ValueError, match="missing or unexpected"):
        load_adapter(policy, adapter_parameters(other))


@pytest.mark.parametrize(("target", "repair"), [("q_prj", "did you mean 'q_proj'"), ("lm_head", "known: down_proj")])
def test_a_target_that_is_no_layer_of_the_blocks_is_named(base, target, repair):
    with pytest.raises(ValueError, match=f"'{target}', which is no linear layer .*{repair}"):
        add_lora(base, Lora(target_modules=("v_proj", target)))


@pytest.mark.parametrize(
    ("recipe", "override", "key"),
    [
        ("evaluate", "models.sft.lora.rank=4", "models.sft.lora"),
        ("sft", "model.lora.sync=merged", "model.lora.sync"),
        ("grpo", "policy.lora.dropout=0.1", "policy.lora.dropout"),
    ],
)
def test_a_stage_refuses_what_it_would_not_read(recipe, override, key):
    with pytest.raises(ValueError, match=f"unknown key '{key}'"):
        load_config(RECIPES / f"{recipe}.yaml", [override])


@pytest.fixture
def sft(renderer, demonstrations, model_folder, tmp_path):
    """Runs 30 steps in a folder, with a checkpoint after 20, and loads what it saved as any stage would."""
    examples = [
        Example(
            prompt_ids=renderer.prompt_ids(d.question),
            response_ids=renderer.response_ids(render_response(d.scratchpad, d.answer)),
        )
        for d in demonstrations
    ]

    def run(folder):
        overrides = [
            f"output_dir={tmp_path / folder}", f"model.path={model_folder}", "model.lora={rank: 8, alpha: 16}", "training.num_steps=30",
            "training.sequences_per_step=8", "training.micro_batch_size=8", "training.log_every=5", "training.checkpoint_every=20",
            "optimizer.warmup_steps=0", "optimizer.learning_rate=0.02", "optimizer.schedule=constant",
        ]  # fmt: skip
        (tmp_path / folder).mkdir(exist_ok=True)
        config = load_config(RECIPES / "sft.yaml", overrides)
        train_sft(config, renderer.tokenizer, examples, pad_token_id=renderer.pad_token_id)
        return load_causal_lm(str(tmp_path / folder), revision=None, dtype="float32").eval()

    return run


def test_sft_with_adapters_lowers_the_loss_and_saves_a_model_that_loads_plainly(sft, base, tmp_path):
    saved = sft("whole")
    losses = [row["loss"] for row in read_jsonl(tmp_path / "whole/metrics.jsonl")]
    assert losses[-1] < losses[0] - 0.2
    assert torch.equal(saved.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert not torch.allclose(logits(saved), logits(base), atol=0.1)
    assert_close(logits(PeftModel.from_pretrained(base, str(tmp_path / "whole/adapter")).eval()), logits(saved))


def test_sft_killed_after_a_checkpoint_takes_up_its_adapters_and_ends_where_it_would_have(sft, monkeypatch, tmp_path):
    whole = sft("whole")
    with monkeypatch.context() as killed:
        on_log = LogLines.on_log

        def kill(self, args, state, control, logs=None, **kwargs):
            on_log(self, args, state, control, logs, **kwargs)
            if state.global_step == 25:
                raise KeyboardInterrupt

        killed.setattr(LogLines, "on_log", kill)
        with pytest.raises(KeyboardInterrupt):
            sft("killed")
    assert torch.equal(logits(sft("killed")), logits(whole))
    assert [row["step"] for row in read_jsonl(tmp_path / "killed/metrics.jsonl")] == [5, 10, 15, 20, 25, 30]


def test_a_reward_model_trained_with_adapters_loads_with_its_head(renderer, demonstrations, model_folder, tmp_path):
    def pair(d):
        prompt = renderer.prompt_ids(d.question)
        good, bad = (renderer.response_ids(render_response(d.scratchpad, answer)) for answer in (d.answer, "no"))
        return TokenPair(chosen_ids=prompt + good, rejected_ids=prompt + bad)

    pairs = [pair(d) for d in demonstrations[:48]]
    overrides = [
        f"output_dir={tmp_path}", f"model.path={model_folder}", "model.lora={rank: 4, alpha: 8}", "training.num_steps=20",
        "training.sequences_per_step=8", "training.micro_batch_size=8", "training.log_every=10", "optimizer.learning_rate=0.01",
        "head=classification",
    ]  # fmt: skip
    config = load_config(RECIPES / "reward_model.yaml", overrides)
    statistics = train_reward_model(config, train_pairs=pairs[:32], heldout_pairs=pairs[32:])
    assert statistics["accuracy"] > 0.9
    judge = OutcomeModel.load(str(tmp_path), device="cpu")
    sequences = [p.chosen_ids for p in pairs[32:]] + [p.rejected_ids for p in pairs[32:]]
    assert judge.raw_scores(sequences, batch_size=64).mean().item() == pytest.approx(statistics["mean"], abs=1e-4)
    assert "base_model.model.score.weight" in load_file(tmp_path / "adapter/adapter_model.safetensors")


def test_a_resumed_run_brings_its_adapters_to_an_engine_that_starts_from_the_base(make_trainer, base):
    overrides = ("policy.lora={rank: 4, sync: adapter}", "optimizer.learning_rate=0.03")
    killed = make_trainer(*overrides)
    killed.config.training.__dict__["num_batches"] = 3  # in the third batch, after the checkpoint of the second
    killed.train()
    resumed = make_trainer(*overrides)
    assert (resumed.first_batch, resumed.engine.policy_version) == (2, 2)
    assert max(row["sync/error"] for row in resumed.train()) < 1e-5
    with base_of(resumed.unwrapped):
        assert torch.equal(logits(resumed.unwrapped), logits(base))
    assert not torch.allclose(logits(resumed.unwrapped), logits(base), atol=1e-3)


def test_rows_with_a_shared_prompt_reach_the_adapters_as_padded_rows_do(make_trainer, captured):
    for layout in ("shared", "padded"):
        trainer = make_trainer("policy.lora={rank: 4}", f"training.layout={layout}", folder=layout)
        shake(trainer.unwrapped)
        send_weights(trainer.engine, trainer.unwrapped, policy_version=0)
        trainer.updater.update(experience(trainer), Metrics(), batch=0)
    shared, padded = captured
    assert shared.keys() == padded.keys()
    assert all(".lora_" in name for name in shared)
    for name, gradient in shared.items():
        assert_close(gradient, padded[name], atol=2e-7, rtol=1e-4)
