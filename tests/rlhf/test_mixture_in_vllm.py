"""vLLM samples from mixtures of experts, for real: weights arrive whole, and its experts are known token by token."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import MixtralConfig, MixtralForCausalLM

from rlhf.config import OnlineRollout
from rlhf.logprobs import token_logprobs
from rlhf.lora import save_model
from rlhf.models import load_causal_lm
from rlhf.rollout import vllm_colocate
from rlhf.rollout.engine import Sampling, build_engine
from rlhf.routing import Routers
from rlhf.weight_sync import Probe, WeightSync

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(mixture_folder, tokenizer, tmp_path_factory):
    """A mixture with many narrow experts, and one with few."""
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        intermediate_size=32, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256, sliding_window=None,
        tie_word_embeddings=True, pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, initializer_range=0.1,
    )  # fmt: skip
    mixtral = tmp_path_factory.mktemp("mixtral")
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(mixtral)
    tokenizer.save_pretrained(mixtral)
    return {"qwen3_moe": mixture_folder, "mixtral": str(mixtral)}


@pytest.fixture(scope="module", params=["qwen3_moe", "mixtral"])
def folder(request, folders):
    return folders[request.param]


def start(folder, renderer, dtype="float32"):
    config = OnlineRollout(
        engine="vllm", prompts_per_batch=1, samples_per_prompt=3, max_prompt_tokens=80, max_new_tokens=12, dtype=dtype, record_experts=True
    )  # fmt: skip
    return build_engine(config, folder, stop_token_id=renderer.stop_token_id, decode=renderer.decode)


@pytest.fixture(scope="module")
def engine(folder, renderer):
    started = start(folder, renderer)
    yield started
    started.close()


@pytest.fixture(scope="module")
def prompts(renderer, demonstrations):
    return [renderer.prompt(d.id, d.question, d.answer) for d in demonstrations[:3]]


@pytest.fixture(scope="module")
def probes(prompts, renderer):
    return [Probe(p.token_ids, tuple(renderer.response_ids("On Tuesday 1 + 2 = 3"))) for p in prompts]


@pytest.fixture
def policy(folder):
    return load_causal_lm(folder, revision=None, dtype="float32").eval()


@pytest.fixture
def sync(engine, policy, probes):
    """The engine with the policy's weights, checked."""
    engine.load_weights(vllm_names(policy), policy_version=0)
    return WeightSync(engine, policy, probes, tolerance=1e-3)


def vllm_names(policy):
    from rlhf.weight_sync import as_saved

    return as_saved(policy, policy.named_parameters())


def perturb(model, scale, names=""):
    torch.manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if names in name:
                parameter.add_(torch.randn_like(parameter) * scale)


def sample(engine, prompts, seed=0):
    return engine.generate(prompts, Sampling(samples_per_prompt=3, temperature=1.0, max_new_tokens=12), seed=seed)


@pytest.mark.parametrize("names", ["", "experts.gate_up_proj", "experts.down_proj", "mlp.gate."])
def test_whatever_moved_the_engine_answers_as_the_new_weights(sync, policy, names):
    for version in (1, 2):
        perturb(policy, 0.05, names)
        freshness = sync.push(policy_version=version)
        assert freshness.error < 5e-6
        assert freshness.moved > 1e-4


def test_experts_that_are_not_packed_again_are_caught(sync, policy, monkeypatch):
    """What vLLM's reload does by itself on a CPU."""
    monkeypatch.setattr(vllm_colocate, "repack", lambda model: None)
    perturb(policy, 0.05)
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


@pytest.mark.parametrize("lost", ["experts.gate_up_proj", "experts.down_proj", "mlp.gate."])
def test_a_push_that_loses_a_part_of_the_mixture_is_caught(sync, engine, policy, lost, monkeypatch):
    perturb(policy, 0.1)
    monkeypatch.setattr(
        "rlhf.weight_sync.merged_parameters", lambda model: [(n, p) for n, p in model.named_parameters() if lost not in n]
    )  # fmt: skip
    with pytest.raises((RuntimeError, ValueError)):
        sync.push(policy_version=1)


def test_a_withheld_update_of_the_experts_alone_is_caught(sync, engine, policy, monkeypatch):
    perturb(policy, 0.02, "experts")
    monkeypatch.setattr(
        type(engine), "load_weights", lambda self, named, *, policy_version: setattr(self, "policy_version", policy_version)
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


@torch.no_grad()
def trainer_view(policy, rollout):
    """Log-probabilities of a completion, and [prompt + T - 1, L, K] experts, by the trainer's model."""
    tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    routers, start_at = Routers(policy), len(rollout.prompt.token_ids) - 1
    with routers.listening() as routing:
        logits = policy(input_ids=tokens[:, :-1]).logits[0, start_at:]
    for router in routers._places:
        router._forward_hooks.clear()
    return token_logprobs(logits, tokens[0, start_at + 1 :], temperature=1.0), torch.stack(routing.own, 1)


def test_the_engine_says_which_experts_each_token_went_to_also_after_a_push(sync, engine, policy, prompts):
    for version in (1, 2):
        perturb(policy, 0.05)
        sync.push(policy_version=version)
        rollouts = sample(engine, prompts, seed=version)
        assert len(rollouts) == 9
        assert len({len(r.token_ids) + len(r.prompt.token_ids) for r in rollouts}) > 1
        for rollout in rollouts:
            logprobs, experts = trainer_view(policy, rollout)
            torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs, atol=2e-5, rtol=0)
            assert rollout.routed_experts.dtype == torch.uint8
            assert rollout.routed_experts.sort(-1).values.tolist() == experts.sort(-1).values.tolist()


def test_recording_does_not_change_what_is_sampled_and_is_forgotten_between_calls(engine, sync, prompts):
    first = sample(engine, prompts, seed=5)
    again = sample(engine, prompts[:1], seed=6)
    assert len(engine._experts._of_request) == 3
    assert all(r.routed_experts is not None for r in again)
    assert [r.token_ids for r in sample(engine, prompts, seed=5)] == [r.token_ids for r in first]


def test_a_saved_mixture_loads_in_transformers_and_in_vllm_whose_bfloat16_kernels_are_fed_as_well(
    folders, renderer, probes, tmp_path, tokenizer
):
    policy = load_causal_lm(folders["qwen3_moe"], revision=None, dtype="float32").eval()
    perturb(policy, 0.05)
    save_model(policy, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.7.gate_proj.weight" in load_file(tmp_path / "model.safetensors")
    loaded = load_causal_lm(str(tmp_path), revision=None, dtype="float32")
    for (name, parameter), other in zip(policy.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(parameter, other), name
    started = start(str(tmp_path), renderer, dtype="bfloat16")
    try:
        sync = WeightSync(started, policy, probes, tolerance=0.05)
        perturb(policy, 0.05, "experts")
        freshness = sync.push(policy_version=1)
        assert freshness.error < freshness.moved / 4
    finally:
        started.close()
