"""The plan's formulas against numbers worked out by hand, against autograd, and its laws."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf import footprint
from rlhf.config import Lora, load_config
from rlhf.footprint import Sharding, Trained, read_sharding
from rlhf.hardware import GIB, GPUS, Machine, cpu, parse_gpus
from rlhf.lora import add_lora
from rlhf.models import ready
from rlhf.packing import pack_shared
from rlhf.plan import ALWAYS, Plan, make_plan
from rlhf.repairs import repairs
from rlhf.scorer import Scorer
from rlhf.shapes import meta_model, shape_of
from rlhf.types import Prompt, Rollout

ROOT = Path(__file__).parents[2]
TINY = {
    "model_type": "qwen3", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 32, "tie_word_embeddings": True,
}  # fmt: skip
QWEN_05B = {
    "model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
WIDE = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
    "tie_word_embeddings": True, "max_position_embeddings": 512,
}  # fmt: skip
WHOLE = Sharding()
FAMILIES = {
    "qwen3": {"head_dim": 24},
    "qwen2": {},
    "llama": {"head_dim": 24},
    "qwen3_moe": {"head_dim": 24, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "qwen2_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"head_dim": 24, "num_local_experts": 4},
}  # fmt: skip


def trained(shape=None, **changes):
    return replace(
        Trained(shape=shape or shape_of(TINY), dtype="float32", checkpointing=False, lora=None, has_head=True),
        **changes,
    )


# ------------------------------------------------------------------------------------------------------------------------- shapes


def test_parameters_are_counted_as_one_would_by_hand():
    shape = shape_of(TINY)
    # q 8x8, k and v 4x8, o 8x8, gate, up and down 16x8, norms of 8, 8, 4 and 4; embedding 32x8; the last norm 8
    layer = 64 + 32 + 32 + 64 + 3 * 128 + 8 + 8 + 4 + 4
    assert shape.parameters == 2 * layer + 256 + 8
    assert shape.active_parameters == shape.parameters
    # rank 2 on q, k, v, o: 2 (8+8) + 2 (8+4) twice + 2 (8+8), on the three others 2 (8+16) each; two layers
    assert shape.adapter_parameters(2, None) == 2 * (32 + 24 + 24 + 32 + 3 * 48)
    assert shape.adapter_parameters(2, ("q_proj",)) == 2 * 32


def test_a_mixture_has_the_published_totals():
    mixtral = shape_of({"model_type": "mixtral"})  # transformers' defaults are Mixtral 8x7B
    assert round(mixtral.parameters / 1e9, 1) == 46.7
    assert round(mixtral.active_parameters / 1e9, 1) == 12.9
    assert mixtral.moe_classes == ("MixtralSparseMoeBlock",)
    assert round(shape_of(QWEN_05B).parameters / 1e6) == 494


@pytest.mark.parametrize(
    ("raw", "says"), [({}, "no model_type"), ({"model_type": "t5"}, "causal"), ({"model_type": "nope"}, "nope")]
)
def test_what_is_no_causal_language_model_is_named(raw, says):
    with pytest.raises(ValueError, match=says):
        shape_of(raw)


# --------------------------------------------------------------------------------------------------- weights, gradients, optimizer


def test_weights_gradients_and_moments_of_a_tiny_model():
    model, one = trained(), Sharding()
    parameters = shape_of(TINY).parameters
    assert footprint.weights(model, one, 1) == 4 * parameters
    assert footprint.gradients(model, one, 1) == 4 * parameters
    assert footprint.optimizer(model, one, 1) == 8 * parameters
    narrow = replace(model, dtype="bfloat16")
    assert footprint.weights(narrow, one, 1) == 2 * parameters
    assert footprint.optimizer(narrow, one, 1) == 4 * parameters
    assert footprint.optimizer(narrow, Sharding(stage=1), 1) == 12 * parameters  # with a master copy, all float32


def test_with_lora_only_the_adapters_have_gradients_and_moments():
    shape, lora = shape_of(TINY), Lora(rank=2)
    model = trained(lora=lora, dtype="bfloat16")
    adapters = shape.adapter_parameters(2, None)
    assert footprint.weights(model, Sharding(), 1) == 2 * shape.parameters + 4 * adapters
    assert footprint.gradients(model, Sharding(), 1) == 4 * adapters
    assert footprint.optimizer(model, Sharding(), 1) == 8 * adapters


def test_a_value_model_has_a_head_of_one_number_instead_of_the_vocabulary():
    shape = shape_of(TINY | {"tie_word_embeddings": False})
    assert trained(shape).parameters == shape.parameters
    assert trained(shape, has_head=False).parameters == shape.parameters - 32 * 8 + 8


@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"), [(0, 1, 1, 1), (1, 1, 1, 8), (2, 1, 8, 8), (3, 8, 8, 8)]
)
def test_zero_divides_exactly_the_sharded_parts_by_the_number_of_gpus(stage, weights, gradients, optimizer):
    model, sharding = trained(), Sharding(stage=stage)
    assert footprint.weights(model, sharding, 8) * weights == footprint.weights(model, sharding, 1)
    assert footprint.gradients(model, sharding, 8) * gradients == footprint.gradients(model, sharding, 1)
    assert footprint.optimizer(model, sharding, 8) * optimizer == footprint.optimizer(model, sharding, 1)


# --------------------------------------------------------------------------------------------------------------------- activations


def test_what_a_layer_keeps_is_what_one_would_add_up():
    # norms 2 (12 x 8 + 4); attention 4 (2 x 8 + 2 x 4) + 4 x 2; QK-norm 8 (8 + 4) + 4 (2 + 1); feed-forward 4 x 4 x 16
    assert footprint.saved_by_layer(trained()) == 200 + 104 + 108 + 256


def rollouts():
    generator = torch.Generator().manual_seed(0)

    def tokens(count):
        return tuple(torch.randint(4, 300, (count,), generator=generator).tolist())

    prompts = [Prompt(id=str(p), token_ids=tokens(16), question="", reference="") for p in range(2)]
    return [
        Rollout(prompt=p, token_ids=tokens(33), logprobs=(0.0,) * 33, finish_reason="stop", text="", policy_version=0)
        for p in prompts
        for _ in range(3)
    ]


def kept_by_autograd(model, batch):
    """Bytes of all tensors that the graph holds, parameters aside."""
    scorer = Scorer(model, share_prompts=True).train(model.training)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scorer(batch, 1.0)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora", [None, Lora(rank=4)], ids=["whole", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_what_autograd_keeps(family, dtype, lora):
    raw = {"model_type": family, **WIDE, **FAMILIES[family]}
    model = type(meta_model(raw, "test"))(meta_model(raw, "test").config).to(getattr(torch, dtype))
    if lora is not None:
        add_lora(model, lora)
    model = ready(model, gradient_checkpointing=False)
    batch = pack_shared(rollouts(), range(6), torch.ones(6, dtype=torch.bool))
    scored = len(batch.targets)
    of_head = scored * (64 * footprint.WIDTH[dtype] + 16)  # selected states, targets, places
    planned = footprint.activations(trained(shape_of(raw), dtype=dtype, lora=lora), batch.num_tokens)
    assert planned == pytest.approx(kept_by_autograd(model, batch) - of_head, rel=0.003)


def test_checkpointing_keeps_each_layers_input_and_one_layer():
    plain, checkpointed = trained(), trained(checkpointing=True)
    last = 8 * 8 + 4 + 2 * 4 * 4 + 8  # the last norm, the rotation, the token's number
    assert footprint.activations(plain, 10) == 10 * (2 * footprint.saved_by_layer(plain) + last)
    assert footprint.activations(checkpointed, 10) == 10 * (2 * 4 * 8 + last)
    more = footprint.backward_scratch(checkpointed, 10) - footprint.backward_scratch(plain, 10)
    assert more == 10 * footprint.saved_by_layer(plain)


def test_logits_are_held_for_512_rows_at_most():
    states, matrix = 4 * 1000 * 8, 4 * 32 * 8
    assert footprint.head(trained(), 1000).forward == 2 * states + 2 * 4 * 512 * 32 + matrix
    assert footprint.head(trained(), 100).forward == 2 * states / 10 + 2 * 4 * 100 * 32 + matrix
    assert footprint.head(trained(lora=Lora()), 100).forward == 2 * states / 10 + 2 * 4 * 100 * 32


# ------------------------------------------------------------------------------------------------------------------------- recipes


def plan_of(recipe, *overrides, gpus="8xH100-80GB", raw=QWEN_05B, sharding=WHOLE):
    config = load_config(ROOT / recipe, overrides)
    shapes = dict.fromkeys(("policy", "reference", "critic", "reward_model"), shape_of(raw))
    return make_plan(config, shapes, parse_gpus(gpus), sharding)


def part(plan: Plan, name, when=ALWAYS):
    return sum(p.size for p in plan.parts if p.name == name and p.when == when)


def test_the_peak_is_what_is_always_there_plus_the_largest_moment():
    plan = plan_of("recipes/gsm8k/grpo.yaml")
    assert plan.peak == plan.resident + max(plan.moments.values())
    assert part(plan, "weights") == 4 * shape_of(QWEN_05B).parameters
    assert part(plan, "rollout engine") == 0.4 * GPUS["H100-80GB"].memory
    assert sum(plan.seconds.values()) > 0


def test_zero_3_leaves_the_parts_that_are_whole_on_every_device():
    whole = plan_of("recipes/gsm8k/ppo.yaml", gpus="8xH100-80GB")
    sharded = plan_of("recipes/gsm8k/ppo.yaml", gpus="8xH100-80GB", sharding=Sharding(stage=3))
    for name in ("weights", "critic: weights", "reference"):
        assert part(sharded, name) * 8 == part(whole, name) > 0
    for name in ("reward model", "rollout engine", "runtime overhead"):
        assert part(sharded, name) == part(whole, name) > 0
    rewards = "rewards=[{name: correctness}, {name: reward_model, path: judge, placement: sharded}]"
    in_pieces = plan_of("recipes/gsm8k/ppo.yaml", rewards, gpus="8xH100-80GB", sharding=Sharding(stage=3))
    assert part(in_pieces, "reward model") * 8 == part(sharded, "reward model")
    for moment in ("policy: forward pass", "critic: backward pass"):
        assert part(sharded, "activations", moment) == part(whole, "activations", moment) > 0


def test_four_bit_weights_have_no_plan_under_zero_3():
    with pytest.raises(ValueError, match="zero_stage 3, which would cut packed weights off"):
        plan_of("recipes/gsm8k/grpo_qlora.yaml", gpus="8xH100-80GB", sharding=Sharding(stage=3))


def test_an_offloaded_optimizer_is_in_the_hosts_memory():
    here = plan_of("recipes/gsm8k/sft.yaml", gpus="4xH100-80GB", sharding=Sharding(stage=2))
    there = plan_of("recipes/gsm8k/sft.yaml", gpus="4xH100-80GB", sharding=Sharding(stage=2, offload_optimizer=True))
    assert there.resident == here.resident - part(here, "optimizer")
    assert there.host == 4 * part(here, "optimizer")


def test_a_frozen_base_as_reference_costs_no_weights():
    lora = ("policy.lora={rank: 16}", "algorithm.kl_coefficient=0.01", "reference={kind: lora_base}")
    assert part(plan_of("recipes/gsm8k/grpo.yaml", *lora), "reference") == 0
    frozen = ("algorithm.kl_coefficient=0.01", "reference={path: x}")
    assert part(plan_of("recipes/gsm8k/grpo.yaml", *frozen), "reference") == 4 * shape_of(QWEN_05B).parameters


def test_more_tokens_in_a_micro_batch_never_take_less():
    peaks = [
        plan_of("recipes/gsm8k/grpo.yaml", f"training.tokens_per_micro_batch={n}").peak
        for n in (1024, 4096, 8192, 16384, 32768)
    ]
    assert peaks == sorted(peaks)


def test_what_transformers_keeps_of_every_sampled_token_is_planned():
    plan = plan_of("recipes/gsm8k/grpo.yaml", "rollout.engine=transformers", gpus="H100-80GB")
    # 256 sequences at a time, 512 new tokens of 151,936 logits in float32
    assert part(plan, "logits of every step", "rollout") == 4 * 256 * 512 * 151936
    assert not plan.fits


def test_an_engine_without_room_for_one_sequence_is_a_warning():
    plan = plan_of("recipes/gsm8k/grpo.yaml", "rollout.gpu_memory_share=0.01")
    assert "gpu_memory_share" in " ".join(plan.warnings)


def test_repairs_are_tried_before_they_are_told():
    config = load_config(ROOT / "recipes/gsm8k/grpo.yaml", ["policy.gradient_checkpointing=false"])
    shapes = dict.fromkeys(("policy", "reward_model"), shape_of(QWEN_05B))
    machine = parse_gpus("A100-40GB")
    assert not make_plan(config, shapes, machine, Sharding()).fits
    told = repairs(config, shapes, machine, Sharding())
    assert told[0].endswith("fits")
    assert any(line.startswith("policy.gradient_checkpointing=true:") and line.endswith("fits") for line in told)


def test_changes_are_combined_when_none_is_enough():
    config = load_config(ROOT / "recipes/gsm8k/ppo.yaml", ["policy.gradient_checkpointing=false"])
    shapes = dict.fromkeys(("policy", "reference", "critic", "reward_model"), shape_of(QWEN_05B))
    machine = parse_gpus("ANY-30GB")
    told = repairs(config, shapes, machine, Sharding())
    assert not any(line.endswith("fits") for line in told[:-1])
    assert told[-1].startswith("together: ")
    overrides = [text for text in told[-1].removeprefix("together: ").rpartition(": ")[0].split(" and ")]
    changed = load_config(ROOT / "recipes/gsm8k/ppo.yaml", overrides)
    assert make_plan(changed, shapes, machine, Sharding()).fits


def test_a_process_models_logits_are_planned_where_its_head_needs_them():
    def logits(*overrides):
        plan = plan_of("recipes/tiny/process_reward_model.yaml", *overrides, gpus="H100-80GB")
        return part(plan, "logits", "policy: forward pass")

    odds = ("head=next_token", "right_token=+", "wrong_token='-'")
    assert logits("head=classification") == 0
    assert logits("head=likelihood") == 4 * 32 * 160 * 151936
    # 2 rows of 160 tokens have 10 steps together, at each of which both rows are computed
    assert logits(*odds, "training.micro_batch_size=2") == 4 * 20 * 151936
    assert logits(*odds) == logits("head=likelihood")


def test_a_pair_is_two_sequences_and_dpos_frozen_reference_a_second_model():
    def plan(stage, *overrides):
        return plan_of(f"recipes/tiny/{stage}.yaml", *overrides, gpus="H100-80GB")

    frozen, precomputed = (plan("dpo", f"reference={kind}") for kind in ("frozen", "precomputed"))
    assert part(frozen, "reference", "always") == 4 * shape_of(QWEN_05B).parameters
    assert part(precomputed, "reference", "always") == 0
    activations = part(plan("orpo"), "activations", "policy: forward pass")
    assert activations == part(plan("sft", "training.micro_batch_size=32"), "activations", "policy: forward pass")
    # 512 rows of logits at a time, and not those of all 32 x 160 tokens in float32
    assert part(plan("orpo"), "logits", "policy: forward pass") < 4 * 32 * 160 * 151936


def test_a_stage_that_trains_nothing_has_no_plan():
    with pytest.raises(ValueError, match="evaluate trains nothing"):
        plan_of("recipes/gsm8k/evaluate.yaml")


# ------------------------------------------------------------------------------------------------------------------------ machines


def test_machines_are_read_by_name_and_by_memory():
    assert parse_gpus("8xH100-80GB") == Machine(8, GPUS["H100-80GB"])
    assert parse_gpus("h100-80gb").count == 1
    anything = parse_gpus("4xANY-24GB")
    assert (anything.count, anything.device.name) == (4, "ANY-24GB")
    assert anything.device.memory == 0.94 * 24 * GIB
    assert cpu(memory=1.0, flops=2.0).is_cpu


@pytest.mark.parametrize(
    ("text", "says"), [("8xH100", "not of the form"), ("0xH100-80GB", "no GPU at all"), ("2xH200-80GB", "did you mean")]
)
def test_a_machine_that_is_not_known_is_named(text, says):
    with pytest.raises(ValueError, match=says):
        parse_gpus(text)


def test_sharding_is_read_from_an_accelerate_configuration(tmp_path):
    assert read_sharding(ROOT / "recipes/accelerate/zero2.yaml") == (Sharding(stage=2), 2)
    assert read_sharding(ROOT / "recipes/accelerate/single.yaml") == (Sharding(), 1)
    (tmp_path / "ds.json").write_text(
        json.dumps(
            {
                "bf16": {"enabled": True},
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": 5e7},
            }
        )
    )
    path = tmp_path / "accelerate.yaml"
    path.write_text(
        f"distributed_type: DEEPSPEED\nnum_processes: 4\ndeepspeed_config:\n  deepspeed_config_file: {tmp_path}/ds.json\n"
    )
    expected = Sharding(stage=3, offload_optimizer=True, reduce_bucket=50_000_000, mixed_bf16=True)
    assert read_sharding(path) == (expected, 4)
    with pytest.raises(ValueError, match="does not exist"):
        read_sharding(tmp_path / "missing.yaml")
