"""The base of QLoRA (https://arxiv.org/abs/2305.14314): frozen linear layers in 4 bits, NF4 with double quantisation, by bitsandbytes.

    W ~ s_block code[q]     q: 4 bits a weight; s: 8 bits for 64 weights, themselves scaled by 32 bits for 256 of them

Every product is computed with the weights dequantised, in the model's own precision. The dequantised W is therefore *the* base: it is what
the adapters are trained on, what the rollout engine gets and what is saved; the weights that were loaded are used no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def quantise_linear_layers(model: Any, *, keep: Sequence[str] = ()) -> None:
    """Put NF4 layers in the place of the linear layers of the model's blocks, in place, on the device where they are.

    Embeddings, norms, the output head and fused experts stay as they are.

    Args:
        model: of transformers.
        keep: modules, such as a new head, that are trained in full and stay.

    Raises:
        ValueError: when the model has no linear layer to quantise.
    """
    head = model.get_output_embeddings()
    linear = [
        (name, module)
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module is not head and name not in keep
    ]
    if not linear:
        raise ValueError("quantization is nf4 and the model has no linear layer in its blocks; remove it")
    for name, module in linear:
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _quantised(module))


def _quantised(module: nn.Linear) -> nn.Module:
    from bitsandbytes import nn as untyped

    library: Any = untyped
    weight = module.weight.data
    with torch.device("meta"):
        layer = library.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4"
        )  # fmt: skip
    packed = library.Params4bit(weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer)
    layer.weight = packed.to(weight.device)  # which quantises
    layer.bias = module.bias
    layer.train(module.training)
    # On processors with AVX512-BF16 a pass without gradients would repack the weights in place, for a kernel that computes in bfloat16 and
    # has no backward pass: the next training step would lose its gradients without a word.
    layer.support_avx512bf16_for_cpu = False
    return layer


def is_quantised(parameter: Tensor) -> bool:
    return getattr(parameter, "quant_state", None) is not None


def has_quantised(model: nn.Module) -> bool:
    return any(map(is_quantised, model.parameters()))


@torch.no_grad()
def dequantised(parameter: Tensor) -> Tensor:
    """[O, I] as the layer multiplies with it; any other parameter as it is."""
    if not is_quantised(parameter):
        return parameter.detach()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(parameter.data, parameter.quant_state)  # type: ignore[attr-defined]
