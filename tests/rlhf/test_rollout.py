"""Both engines, for real: what comes back, that weights arrive, and that a fault on the way is noticed."""

import math

import pytest
import torch

from rlhf.config import PolicyLora
from rlhf.config import Rollout as RolloutConfig
from rlhf.logprobs import token_logprobs
from rlhf.lora import add_lora
from rlhf.models import load_causal_lm
from rlhf.rollout.engine import Sampling, build_engine, choose_engine, require_prompts_fit
from rlhf.weight_sync import Probe, WeightSync, send_weights

ENGINES = ("vllm", "transformers")


def config(engine, **kwargs):
    return RolloutConfig(
        **{
            "engine": engine,
            "samples_per_prompt": 3,
            "max_prompt_tokens": 80,
            "max_new_tokens": 12,
            "dtype": "float32",
            **kwargs,
        }
    )


@pytest.fixture(scope="module")
def engines(model_folder, renderer):
    return {
        name: build_engine(config(name), model_folder, stop_token_id=renderer.stop_token_id, decode=renderer.decode)
        for name in ENGINES
    }


@pytest.fixture(params=ENGINES)
def engine(request, engines, model_folder):
    chosen = engines[request.param]
    chosen.load_weights(named(load_causal_lm(model_folder, revision=None, dtype="float32")), policy_version=0)
    return chosen


@pytest.fixture
def policy(model_folder):
    return load_causal_lm(model_folder, revision=None, dtype="float32").eval()


@pytest.fixture(scope="module")
def prompts(renderer, demonstrations):
    return [renderer.prompt(d.id, d.question, d.answer) for d in demonstrations[:4]]


@pytest.fixture(scope="module")
def probes(prompts, renderer):
    return [Probe(p.token_ids, tuple(renderer.response_ids("On Tuesday 1 + 2 = 3"))) for p in prompts[:2]]


def named(model):
    return [(name, parameter.detach()) for name, parameter in model.named_parameters()]


def perturb(model, scale, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * scale)


def sample(engine, prompts, *, seed=0, **kwargs):
    sampling = Sampling(**{"samples_per_prompt": 3, "temperature": 1.0, "max_new_tokens": 12, **kwargs})
    return engine.generate(prompts, sampling, seed=seed)


def trainer_logprobs(policy, rollout, temperature):
    tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
    logits = policy(input_ids=tokens[:, :-1]).logits[0, len(rollout.prompt.token_ids) - 1 :]
    return token_logprobs(logits, tokens[0, len(rollout.prompt.token_ids) :], temperature=temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_samplers_logprobs_are_the_trainers_at_the_same_temperature(engine, policy, prompts, temperature):
    with torch.no_grad():
        for rollout in sample(engine, prompts, temperature=temperature):
            torch.testing.assert_close(
                torch.tensor(rollout.logprobs), trainer_logprobs(policy, rollout, temperature), atol=2e-4, rtol=0
            )


def test_samples_of_a_prompt_are_neighbours_and_differ(engine, prompts):
    rollouts = sample(engine, prompts)
    assert [r.prompt.id for r in rollouts] == [p.id for p in prompts for _ in range(3)]
    assert len({r.token_ids for r in rollouts}) > len(prompts)


def test_the_same_seed_gives_the_same_completions_and_another_seed_others(engine, prompts):
    first = [r.token_ids for r in sample(engine, prompts, seed=1)]
    torch.rand(7)  # whatever else happened to the random state
    assert [r.token_ids for r in sample(engine, prompts, seed=1)] == first
    assert [r.token_ids for r in sample(engine, prompts, seed=2)] != first


def test_sampling_leaves_the_trainers_random_state_alone(engine, prompts):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    sample(engine, prompts)
    assert torch.rand(1) == expected


def test_a_completion_cut_by_the_limit_says_length_and_one_that_ends_says_stop(engine, policy, prompts, renderer):
    always_stop = load_causal_lm(policy.config._name_or_path, revision=None, dtype="float32")
    with torch.no_grad():
        always_stop.get_input_embeddings().weight[renderer.stop_token_id] *= (
            40  # tied: its logit becomes extreme in one direction
        )
    cut = sample(engine, prompts, max_new_tokens=2)
    assert all(
        r.finish_reason == "length" and len(r.token_ids) == 2 for r in cut if renderer.stop_token_id not in r.token_ids
    )
    engine.load_weights(named(always_stop), policy_version=1)
    ended = [r for r in sample(engine, prompts) if renderer.stop_token_id in r.token_ids]
    assert ended
    for rollout in ended:
        assert rollout.finish_reason == "stop"
        assert rollout.token_ids.index(renderer.stop_token_id) == len(rollout.token_ids) - 1
        assert renderer.tokenizer.eos_token not in rollout.text


def test_the_text_is_the_decoded_tokens_with_think_tags_kept(renderer):
    assert (
        renderer.decode(renderer.response_ids("<think>\na\n</think>\n\\boxed{1}")) == "<think>\na\n</think>\n\\boxed{1}"
    )


def test_after_a_push_the_engine_answers_as_the_new_weights_and_carries_their_version(engine, policy, prompts, probes):
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    perturb(policy, 0.02)
    freshness = sync.push(policy_version=7)
    assert freshness.error < 1e-4 < freshness.moved
    rollouts = sample(engine, prompts)
    assert {r.policy_version for r in rollouts} == {7}
    with torch.no_grad():
        torch.testing.assert_close(
            torch.tensor(rollouts[0].logprobs), trainer_logprobs(policy, rollouts[0], 1.0), atol=2e-4, rtol=0
        )


def test_a_push_that_does_not_arrive_is_an_error(engine, policy, probes, monkeypatch):
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    perturb(policy, 0.02)
    monkeypatch.setattr(
        type(engine),
        "load_weights",
        lambda self, named, *, policy_version: setattr(self, "policy_version", policy_version),
    )
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


def test_a_push_that_moves_less_than_the_tolerance_is_still_caught_when_it_does_not_arrive(
    engine, policy, probes, monkeypatch
):
    sync = WeightSync(engine, policy, probes, tolerance=0.5)
    perturb(policy, 0.003)
    monkeypatch.setattr(
        type(engine),
        "load_weights",
        lambda self, named, *, policy_version: setattr(self, "policy_version", policy_version),
    )
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


def test_an_engine_that_loses_one_tensor_is_caught(engine, policy, probes, monkeypatch):
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    perturb(policy, 0.05)
    whole = type(engine).load_weights
    monkeypatch.setattr(
        type(engine),
        "load_weights",
        lambda self, named, *, policy_version: whole(
            self, [(n, t) for n, t in named if "layers.1.mlp.down" not in n], policy_version=policy_version
        ),
    )
    with pytest.raises((RuntimeError, ValueError)):
        sync.push(policy_version=1)


def test_an_engine_whose_weights_are_not_numbers_is_caught(engine, policy, probes, monkeypatch):
    """As those of memory that a lost tensor never filled may be; no comparison with a bound is true of them."""
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    whole = type(engine).load_weights
    monkeypatch.setattr(
        type(engine),
        "load_weights",
        lambda self, named, *, policy_version: whole(
            self,
            [(n, t * math.nan if "layers.1.mlp.down" in n else t) for n, t in named],
            policy_version=policy_version,
        ),
    )
    with pytest.raises(RuntimeError, match="are nan nats per token from the trainer's"):
        sync.push(policy_version=1)


def test_an_engine_that_starts_with_other_weights_is_refused(engine, policy, probes):
    perturb(policy, 0.05)
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        WeightSync(engine, policy, probes, tolerance=1e-3)


def test_a_version_that_does_not_follow_the_push_is_an_error(engine, policy, probes, monkeypatch):
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    whole = type(engine).load_weights
    monkeypatch.setattr(
        type(engine), "load_weights", lambda self, named, *, policy_version: whole(self, named, policy_version=0)
    )
    with pytest.raises(RuntimeError, match="reports policy version 0 after a push of 3"):
        sync.push(policy_version=3)


def test_an_engine_draws_tokens_as_often_as_the_policy_says(engine, policy, prompts):
    n = 4000
    with torch.no_grad():
        probabilities = policy(input_ids=torch.tensor([prompts[0].token_ids])).logits[0, -1].softmax(-1)
    drawn = torch.tensor([r.token_ids[0] for r in sample(engine, prompts[:1], samples_per_prompt=n, max_new_tokens=1)])
    # ten bins of equal probability: each count is within four standard deviations of n / 10
    order = probabilities.argsort(descending=True)
    bin_of = torch.empty_like(order)
    bin_of[order] = (probabilities[order].cumsum(0) * 10).long().clamp(max=9)
    expected = torch.zeros(10).index_add_(0, bin_of, probabilities)
    share = torch.bincount(bin_of[drawn], minlength=10) / n
    assert ((share - expected).abs() < 4 * (expected * (1 - expected) / n).sqrt()).all()


def test_auto_is_vllm_where_it_is_installed_and_says_so_where_it_is_not(monkeypatch, caplog):
    assert choose_engine("auto") == "vllm"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_engine("auto") == "transformers"
    assert "make install" in caplog.text
    with pytest.raises(ValueError, match="vLLM is not installed"):
        choose_engine("vllm")


def test_a_prompt_that_is_too_long_is_named(prompts):
    with pytest.raises(ValueError, match=r"max_prompt_tokens 10; set it to \d+"):
        require_prompts_fit(prompts, config("vllm", max_prompt_tokens=10))


def test_a_tied_head_large_enough_to_be_repacked_is_refreshed_by_a_push(
    tmp_path, tokenizer, tiny_architecture, renderer, probes
):
    """vLLM's reload on CPUs leaves the packed copy of a large tied head at its old weights; the engine repairs that."""
    from rlhf.models import build_qwen3

    model = build_qwen3(tiny_architecture, tokenizer, seed=1)
    model.resize_token_embeddings(16384)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_causal_lm(str(tmp_path), revision=None, dtype="float32").eval()
    engine = build_engine(config("vllm"), str(tmp_path), stop_token_id=renderer.stop_token_id, decode=renderer.decode)
    sync = WeightSync(engine, policy, probes, tolerance=1e-3)
    perturb(policy, 0.05)
    assert sync.push(policy_version=1).error < 1e-4


# ------------------------------------------------------------------------------------------------------------------- adapters


def lora(sync):
    return PolicyLora(rank=4, alpha=8, sync=sync)


@pytest.fixture(scope="module")
def adapter_engines(model_folder, renderer):
    return {
        name: build_engine(
            config(name),
            model_folder,
            stop_token_id=renderer.stop_token_id,
            decode=renderer.decode,
            lora=lora("adapter"),
        )
        for name in ENGINES
    }


@pytest.fixture
def adapted(policy):
    """A policy with new adapters, which change nothing yet."""
    torch.manual_seed(3)
    add_lora(policy, lora("merged"))
    return policy


@pytest.fixture(params=[(name, sync) for name in ENGINES for sync in ("merged", "adapter")], ids="-".join)
def lora_engine(request, engines, adapter_engines, adapted):
    name, sync = request.param
    chosen = (adapter_engines if sync == "adapter" else engines)[name]
    assert (chosen.lora is not None) == (sync == "adapter")
    send_weights(chosen, adapted, policy_version=0)
    return chosen


def train_adapters(model, scale, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.add_(torch.randn_like(parameter) * scale)


def test_adapters_reach_the_engine_merged_or_alone_at_every_push(lora_engine, adapted, prompts, probes):
    sync = WeightSync(lora_engine, adapted, probes, tolerance=1e-3)
    for version in (1, 2):
        train_adapters(adapted, 0.1, seed=version)
        freshness = sync.push(policy_version=version)
        assert freshness.error < 1e-4 < freshness.moved
        with torch.no_grad():
            for rollout in sample(lora_engine, prompts, temperature=0.7):
                assert rollout.policy_version == version
                torch.testing.assert_close(
                    torch.tensor(rollout.logprobs), trainer_logprobs(adapted, rollout, 0.7), atol=2e-4, rtol=0
                )


def test_pushes_do_not_add_up(lora_engine, adapted, probes):
    """Adapters that went away and came back to zero leave the engine where it began, to the last bit."""
    begun = [lora_engine.score(p.prompt_ids, p.completion_ids) for p in probes]
    before = {name: parameter.clone() for name, parameter in adapted.named_parameters()}
    for version in (1, 2, 3):
        train_adapters(adapted, 0.1, seed=version)
        send_weights(lora_engine, adapted, policy_version=version)
    assert [lora_engine.score(p.prompt_ids, p.completion_ids) for p in probes] != begun
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            assert torch.equal(parameter, before[name]) or ".lora_" in name
            parameter.copy_(before[name])
    send_weights(lora_engine, adapted, policy_version=4)
    assert [lora_engine.score(p.prompt_ids, p.completion_ids) for p in probes] == begun


def test_adapters_that_are_never_delivered_stop_the_run(lora_engine, adapted, probes, monkeypatch):
    sync = WeightSync(lora_engine, adapted, probes, tolerance=0.5)
    train_adapters(adapted, 0.05)
    for load in ("load_adapter", "load_weights"):
        monkeypatch.setattr(
            type(lora_engine),
            load,
            lambda self, named, *, policy_version: setattr(self, "policy_version", policy_version),
        )
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


def test_an_adapter_that_vllm_holds_but_no_request_asks_for_stops_the_run(
    adapter_engines, adapted, probes, monkeypatch
):
    engine = adapter_engines["vllm"]
    send_weights(engine, adapted, policy_version=0)
    sync = WeightSync(engine, adapted, probes, tolerance=0.5)
    train_adapters(adapted, 0.05)
    generate = engine._llm.generate
    monkeypatch.setattr(engine._llm, "generate", lambda *args, lora_request, **kwargs: generate(*args, **kwargs))
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=1)


def test_adapters_merged_for_one_engine_and_applied_by_another_are_one_policy(
    engines, adapter_engines, adapted, probes
):
    train_adapters(adapted, 0.1)
    scores = []
    for engine in (*engines.values(), *adapter_engines.values()):
        send_weights(engine, adapted, policy_version=1)
        scores.append([logprob for p in probes for logprob in engine.score(p.prompt_ids, p.completion_ids)[0]])
    assert len(scores) == 4
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=2e-5)


def test_vllm_applies_adapters_on_some_of_the_layers_it_fuses(adapter_engines, policy, probes):
    add_lora(policy, PolicyLora(rank=4, alpha=8, target_modules=("q_proj", "up_proj")))
    send_weights(adapter_engines["vllm"], policy, policy_version=0)
    sync = WeightSync(adapter_engines["vllm"], policy, probes, tolerance=1e-3)
    train_adapters(policy, 0.1)
    assert sync.push(policy_version=1).error < 1e-4


def test_an_engine_that_draws_its_first_adapter_leaves_the_trainers_random_state_alone(model_folder, renderer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    build_engine(
        config("transformers"), model_folder, stop_token_id=renderer.stop_token_id, decode=renderer.decode,
        lora=lora("adapter"),
    )  # fmt: skip
    assert torch.rand(1) == expected


@pytest.mark.parametrize(("rank", "served"), [(1, 1), (4, 8), (16, 16), (100, 128), (512, 512)])
def test_vllm_is_built_for_the_next_rank_it_has_kernels_for(rank, served):
    from rlhf.rollout.vllm_colocate import _served_rank

    assert _served_rank(rank) == served


def test_a_rank_vllm_cannot_serve_is_refused_with_the_way_out():
    from rlhf.rollout.vllm_colocate import _served_rank

    with pytest.raises(
        ValueError,
        match="rank is 513 and vLLM serves adapters up to rank 512; lower it or set policy.lora.sync to merged",
    ):
        _served_rank(513)
