"""Routers of real models, listened to and overruled."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, MixtralConfig, MixtralForCausalLM

from rlhf.models import load_causal_lm
from rlhf.packing import pack_padded, pack_shared
from rlhf.routing import Routers, find_routers
from rlhf.scorer import Scorer
from rlhf.types import Prompt, Rollout


@pytest.fixture
def mixture(mixture_folder):
    return load_causal_lm(mixture_folder, revision=None, dtype="float32").eval()


def rollouts(experts=None):
    """Two groups of two, of uneven lengths; with experts, tokens go where the function of (token, layer) says."""
    torch.manual_seed(1)
    made = []
    for g, length in enumerate((3, 7)):
        prompt = Prompt(
            id=str(g), token_ids=tuple(torch.randint(5, 200, (length,)).tolist()), question="", reference=""
        )
        for _ in range(2):
            tokens = tuple(torch.randint(5, 200, (length + len(made),)).tolist())
            made.append(
                Rollout(
                    prompt=prompt, token_ids=tokens, logprobs=(0.0,) * len(tokens), finish_reason="stop", text="", policy_version=0,
                    routed_experts=None if experts is None else torch.stack([experts(t) for t in (*prompt.token_ids, *tokens[:-1])]).to(torch.uint8),
                )
            )  # fmt: skip
    return made


def scattered(token):
    """[L, K] experts of a token, which have nothing to do with what a router would choose."""
    return torch.tensor([[token % 8, (token + 1 + token % 5) % 8], [(token * 3) % 8, (token * 3 + 4) % 8]])


def batches(made):
    everything = torch.ones(len(made), dtype=torch.bool)
    rows = range(len(made))
    return {
        "shared": pack_shared(made, rows, everything),
        "padded": pack_padded(made, rows, everything, pad_token_id=0),
    }


@pytest.mark.parametrize("experts", [None, scattered])
def test_statistics_do_not_depend_on_the_layout(mixture, experts):
    found = {}
    for layout, batch in batches(rollouts(experts)).items():
        scorer = Scorer(mixture, share_prompts=layout == "shared", replay_experts=experts is not None)
        found[layout] = scorer(batch, 1.0).routing
        for router in scorer.routers._places:
            router._forward_hooks.clear()
    assert found["shared"].tokens == found["padded"].tokens == sum(len(r.token_ids) for r in rollouts())
    order = [found["shared"].load, found["padded"].load]
    assert order[0].tolist() == order[1].tolist()
    assert_close(found["shared"].probability, found["padded"].probability, atol=1e-4, rtol=1e-5)
    assert_close(found["shared"].entropy, found["padded"].entropy)


def test_probabilities_and_loads_add_up_to_the_tokens_and_their_experts(mixture):
    routing = Scorer(mixture, share_prompts=True)(batches(rollouts())["shared"], 1.0).routing
    assert_close(routing.probability.sum(1), routing.tokens.float().expand(2))
    assert routing.load.sum(1).tolist() == [2 * routing.tokens] * 2
    assert 0 < routing.entropy / routing.tokens / 2 < torch.tensor(8.0).log()


def own_experts(mixture, made):
    """The rollouts, with the experts the model itself chooses."""
    routers, changed = Routers(mixture), []
    for rollout in made:
        tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:-1]]])
        with torch.no_grad(), routers.listening() as routing:
            mixture(input_ids=tokens)
        changed.append(replace(rollout, routed_experts=torch.stack(routing.own, 1).to(torch.uint8)))
    for router in routers._places:
        router._forward_hooks.clear()
    return changed


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_replaying_the_models_own_experts_changes_nothing(mixture, layout):
    batch = batches(own_experts(mixture, rollouts()))[layout]
    free = Scorer(mixture, share_prompts=layout == "shared")(batch, 1.0)
    assert free.routing.differing == 0
    for router in find_routers(mixture)._places:
        router._forward_hooks.clear()
    replayed = Scorer(mixture, share_prompts=layout == "shared", replay_experts=True)(batch, 1.0)
    assert_close(replayed.logprobs, free.logprobs)
    assert (replayed.routing.differing, replayed.routing.replaced) == (0, 0)


def block_by_hand(block, states, experts):
    """A block of experts over [M, H] states with given experts: softmax of the router, normalised over the chosen."""
    out = torch.zeros_like(states)
    for m, state in enumerate(states):
        probabilities = (block.gate.weight @ state).softmax(0)[experts[m]]
        for e, share in zip(experts[m].tolist(), probabilities / probabilities.sum(), strict=True):
            gate, up = (block.experts.gate_up_proj[e] @ state).chunk(2)
            out[m] += share * (block.experts.down_proj[e] @ (torch.nn.functional.silu(gate) * up))
    return out


def test_with_other_experts_the_block_and_the_routers_gradient_are_those_of_a_block_written_by_hand(mixture):
    block = mixture.model.layers[1].mlp
    torch.manual_seed(3)
    states = torch.randn(1, 5, 64)
    experts = torch.tensor([[0, 3], [7, 1], [2, 4], [5, 0], [6, 2]])
    replay = experts.unsqueeze(1).expand(5, 2, 2)  # the same in both layers
    with Routers(mixture).listening(replay):
        given = block(states)
    expected = block_by_hand(block, states[0], experts)
    assert_close(given[0], expected)
    gradients = [torch.autograd.grad(o.square().sum(), block.gate.weight)[0] for o in (given, expected)]
    assert gradients[1].abs().max() > 1e-3
    assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


def test_disagreement_counts_the_pairs_whose_experts_differ_and_replay_leaves_none(mixture):
    made = own_experts(mixture, rollouts())
    first = made[0].routed_experts.clone()
    position = len(made[0].prompt.token_ids)  # of the first sampled token, in the second layer only
    first[position, 1] = _others(first[position, 1])
    made[0] = replace(made[0], routed_experts=first)
    batch = batches(made)["shared"]
    assert Scorer(mixture, share_prompts=True)(batch, 1.0).routing.differing == 1
    for router in find_routers(mixture)._places:
        router._forward_hooks.clear()
    replayed = Scorer(mixture, share_prompts=True, replay_experts=True)(batch, 1.0).routing
    assert replayed.differing == 0
    assert replayed.replaced == 1


def _others(experts):
    return torch.tensor([e for e in range(8) if e not in experts.tolist()][:2], dtype=experts.dtype)


def test_recomputing_activations_takes_the_replayed_experts_again(mixture):
    batch, gradients = batches(rollouts(scattered))["shared"], []
    scorer = Scorer(mixture, share_prompts=True, replay_experts=True, balances_experts=True)
    for checkpointing in (False, True):
        if checkpointing:
            mixture.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            mixture.train()
        mixture.zero_grad()
        scored = scorer(batch, 1.0)
        with torch.no_grad():  # what a reference that is the policy without its adapters does in between
            scorer(replace(batch, routed_experts=None), 1.0)
        (scored.logprobs.sum() + scored.routing.probability.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in mixture.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_replay_ends_with_its_pass(mixture):
    tokens = torch.tensor([[5, 6, 7]])
    free = mixture(input_ids=tokens).logits
    routers = Routers(mixture)
    replay = torch.stack([scattered(t) for t in (5, 6, 7)])
    with routers.listening(replay):
        replayed = mixture(input_ids=tokens).logits
    assert (replayed - free).abs().max() > 1e-3
    assert torch.equal(mixture(input_ids=tokens).logits, free)
    replayed.sum().backward()
    assert torch.equal(mixture(input_ids=tokens).logits, free)


SHAPE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def test_mixtral_normalises_over_the_chosen_experts():
    mixtral = MixtralForCausalLM(MixtralConfig(**SHAPE, intermediate_size=16, num_local_experts=4))
    assert [normalised for _, normalised in Routers(mixtral)._places.values()] == [True, True]


def test_a_router_of_another_kind_is_refused_with_the_key_that_needs_it_and_else_left_alone(model_folder):
    config = DeepseekV3Config(
            **SHAPE,
            intermediate_size=16,
            moe_intermediate_size=16,
            n_routed_experts=8,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            first_k_dense_replace=0,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
    )  # fmt: skip
    model = DeepseekV3ForCausalLM(config)
    assert find_routers(model) is None
    with pytest.raises(
        ValueError, match=r"policy.router_replay is set and the router of model.layers.0.mlp is not a softmax"
    ):
        find_routers(model, needed_by="policy.router_replay")
    dense = load_causal_lm(model_folder, revision=None, dtype="float32")
    with pytest.raises(ValueError, match="policy.router_aux_coefficient is set and a qwen3 model has no router"):
        find_routers(dense, needed_by="policy.router_aux_coefficient")


def test_experts_of_another_number_of_tokens_are_refused():
    with pytest.raises(ValueError, match="experts of 2 tokens for 'a', of which 3 were computed"):
        Rollout(
            prompt=Prompt(id="a", token_ids=(1, 2), question="", reference=""), token_ids=(3, 4), logprobs=(0.0, 0.0), finish_reason="stop",
            text="", policy_version=0, routed_experts=torch.zeros(2, 2, 2),
        )  # fmt: skip
