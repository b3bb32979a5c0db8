"""Sharing a prompt must not change what any sequence computes."""

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rlhf.attention import NAME, Group, _SharedPrefixOnCPU, can_share_prefix, dense, dense_mask

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


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
MODELS = {
    "qwen3": Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=16),
    "qwen2": Qwen2Config(**SIZES, num_key_value_heads=2),
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "mistral": MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=None),
    "olmo": OlmoConfig(**SIZES),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, sliding_window=None),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_key_value_heads=2, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}  # fmt: skip


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


def test_a_model_with_another_attention_is_recognised():
    assert can_share_prefix(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=16)) == "a sliding window"
    assert can_share_prefix(
        Qwen3Config(
            **SIZES, layer_types=["full_attention", "sliding_attention"], sliding_window=8, use_sliding_window=True
        )
    ) == ("layers of type sliding_attention")
