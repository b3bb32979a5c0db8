"""Sharing a prompt must not change what any sequence computes."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from rlhf.attention import NAME, PLAIN, Group, _SharedPrefixOnCPU, block_mask, can_share_prefix, dense, dense_mask, flex
from rlhf.packing import pack_padded, pack_shared
from rlhf.scorer import Scorer
from rlhf.types import Prompt, Rollout

LAYOUT = (Group((0, 3), ((3, 5), (5, 9))), Group((9, 11), ()), Group((11, 12), ((12, 13), (13, 17), (17, 19))))
LENGTH = 19


def test_the_mask_shows_a_completion_its_prompt_and_itself_and_nothing_else():
    mask = dense_mask((Group((0, 2), ((2, 3), (3, 5))), Group((5, 6), ((6, 7),))), 7, torch.device("cpu"))
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (6, 1)])
def test_the_blocks_have_the_outputs_and_gradients_of_the_dense_mask(heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(h, LENGTH, 16, generator=generator) for h in (heads, key_heads, key_heads)]
    weight = torch.randn(heads, LENGTH, 16, generator=generator)
    results = []
    for attend in (
        lambda q, k, v: _SharedPrefixOnCPU.apply(q, k, v, LAYOUT, 0.25),
        lambda q, k, v: dense(q[None], k[None], v[None], LAYOUT, 0.25)[0],
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        output = attend(*leaves)
        (output * weight).sum().backward()
        results.append((output, *(leaf.grad for leaf in leaves)))
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_flex_attention_has_the_outputs_of_the_dense_mask(heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, h, LENGTH, 16, generator=generator) for h in (heads, key_heads, key_heads))
    assert_close(flex(q, k, v, LAYOUT, 0.25), dense(q, k, v, LAYOUT, 0.25), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention has a backward pass on CUDA only")
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_flex_attention_has_the_gradients_of_the_dense_mask(heads, key_heads):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, h, LENGTH, 16, generator=generator).cuda() for h in (heads, key_heads, key_heads)]
    weight = torch.randn(1, heads, LENGTH, 16, generator=generator).cuda()
    results = []
    for attend in (flex, dense):
        leaves = [t.clone().requires_grad_() for t in tensors]
        (attend(*leaves, LAYOUT, 0.25) * weight).sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for ours, reference in zip(*results, strict=True):
        assert_close(ours, reference, rtol=2e-3, atol=2e-3)  # TF32 products


def test_the_blocks_of_flex_attention_are_found_once_for_all_layers_of_a_micro_batch():
    block_mask.cache_clear()
    q = torch.randn(1, 2, LENGTH, 16)
    for _ in range(8):
        flex(q, q, q, LAYOUT, 0.25)
    assert block_mask.cache_info().misses == 1


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
MODELS = {
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "olmo": OlmoConfig(**SIZES),
    "olmo2": Olmo2Config(**SIZES, num_key_value_heads=2),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, sliding_window=None),
    "qwen2_moe": Qwen2MoeConfig(**SIZES, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}  # fmt: skip


def test_every_type_whose_attention_counts_as_plain_is_tested_here():
    assert sorted(MODELS) == sorted(PLAIN)


def rollout(prompt, completion):
    return Rollout(
        prompt=prompt,
        token_ids=tuple(completion),
        logprobs=(0.0,) * len(completion),
        finish_reason="stop",
        text="",
        policy_version=0,
    )


PROMPTS = [
    Prompt(id=str(p), token_ids=tokens, question="", reference="") for p, tokens in enumerate([(5, 6, 7), (9, 4)])
]
ROLLOUTS = [
    rollout(PROMPTS[p], tokens)
    for p, tokens in [(0, (8, 9)), (1, (3,)), (0, (10, 11, 12, 13)), (0, (14,)), (1, (15, 16, 17))]
]
WEIGHTS = {0: 1.0, 1: -0.5, 2: 0.25, 3: 2.0, 4: -1.5}
"""Of each rollout's log-probability in the loss."""


def logprobs_and_gradients(model, *, shared, precision=None):
    """Log-probabilities by rollout, and the gradients of their weighted sum."""
    rows, trained = [0, 1, 2, 3, 4], torch.ones(5, dtype=torch.bool)
    pack = pack_shared(ROLLOUTS, rows, trained) if shared else pack_padded(ROLLOUTS, rows, trained, pad_token_id=0)
    scorer = Scorer(model, share_prompts=shared)
    model.zero_grad()
    with torch.autocast("cpu", precision or torch.bfloat16, enabled=precision is not None):
        logprobs = scorer(pack, 0.8).logprobs
    parts = dict(zip(pack.kept, logprobs.split([len(ROLLOUTS[i].token_ids) for i in pack.kept]), strict=True))
    sum(WEIGHTS[i] * part.sum() for i, part in parts.items()).backward()
    found = torch.cat([parts[i].detach() for i in rows])
    return found, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_shared_rows_have_the_logprobs_and_gradients_of_padded_rows(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name]).eval()
    assert can_share_prefix(model.config) is None
    (ours, our_gradients), (padded, padded_gradients) = (logprobs_and_gradients(model, shared=s) for s in (True, False))
    assert_close(ours, padded, rtol=1e-4, atol=1e-5)
    assert our_gradients.keys() == padded_gradients.keys()
    for parameter, gradient in padded_gradients.items():
        assert_close(our_gradients[parameter], gradient, rtol=1e-3, atol=2e-5, msg=lambda m, p=parameter: f"{p}: {m}")


def test_gradient_checkpointing_leaves_the_gradients_of_shared_rows_as_they_are():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["qwen3"]).train()
    kept = logprobs_and_gradients(model, shared=True)
    recomputed = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: recomputed.append(1))
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again = logprobs_and_gradients(model, shared=True)
    assert len(recomputed) == 2  # once forward, once for the backward pass
    assert_close(again, kept)


def test_under_autocast_shared_rows_stay_as_near_to_float32_as_padded_rows():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS["qwen3"]).eval()
    _, exact = logprobs_and_gradients(model, shared=False)
    errors = []
    for shared in (True, False):
        _, gradients = logprobs_and_gradients(model, shared=shared, precision=torch.bfloat16)
        errors.append(sum((gradients[n] - exact[n]).square().sum() for n in exact).sqrt())
    assert errors[0] <= 1.1 * errors[1]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_computes_on_the_packed_row_what_it_computes_on_each_sequence(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MODELS[name], attn_implementation="sdpa").eval()
    assert can_share_prefix(model.config) is None
    prompt, completions = [5, 6, 7], [[8, 9], [10, 11, 12, 13]]
    with torch.no_grad():
        separate = [model(input_ids=torch.tensor([prompt + c])).logits[0] for c in completions]
        model.set_attn_implementation(NAME)
        packed = model(
            input_ids=torch.tensor([prompt + completions[0] + completions[1]]),
            position_ids=torch.tensor([[0, 1, 2, 3, 4, 3, 4, 5, 6]]),
            layout=(Group((0, 3), ((3, 5), (5, 9))),),
            use_cache=False,
        ).logits[0]
    assert_close(packed[:5], separate[0], rtol=1e-4, atol=1e-5)
    assert_close(packed[5:], separate[1][3:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "obstacle"),
    [
        (MistralConfig(**SIZES, sliding_window=16), "a sliding window"),
        (MixtralConfig(**SIZES, sliding_window=16), "a sliding window"),
        (
            Qwen3Config(**SIZES, layer_types=["full_attention", "sliding_attention"], sliding_window=8),
            "layers of type sliding_attention",
        ),
        (LlamaConfig(**SIZES, attention_dropout=0.1), "attention dropout"),
        (Gemma2Config(**SIZES), "layers of type sliding_attention"),
        (Gemma3TextConfig(**SIZES, layer_types=["full_attention"] * 2, sliding_window=None), "the type gemma3_text"),
        (Olmo3Config(**SIZES), "layers of type sliding_attention"),
        (Qwen3NextConfig(num_hidden_layers=4), "layers of type linear_attention"),
        (GptOssConfig(num_hidden_layers=2), "layers of type sliding_attention"),
        (
            GptOssConfig(num_hidden_layers=2, layer_types=["full_attention"] * 2, sliding_window=None),
            "the type gpt_oss",
        ),  # attention sinks
        (GPT2Config(attn_pdrop=0.0), "the type gpt2"),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_a_model_with_another_attention_is_recognised(config, obstacle):
    found = can_share_prefix(config)
    assert found is not None
    assert found.startswith(obstacle)
