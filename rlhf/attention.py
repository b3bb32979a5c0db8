"""Attention over groups that share a prompt, registered with transformers.

A packed row holds, for each group, its prompt once and then its completions one after the other. A prompt attends causally to
itself; a completion attends to the whole prompt and causally to itself. That is what each sequence would see by itself, so outputs
and gradients are those of separate sequences, while the prompt is computed once instead of G times.

    row      | prompt a | a1 ... | a2 ... | prompt b | b1 ... | b2 ... |
    position   0..p-1     p..      p..      0..q-1     q..      q..

Three implementations: on a CPU the flash kernel of torch over blocks (`_SharedPrefixOnCPU`), on CUDA FlexAttention (`flex`), elsewhere, and
as the reference that tests hold the others against, one masked call (`dense`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface

NAME = "shared_prefix"
Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Where a prompt and its completions lie in the packed row."""

    prompt: Span
    completions: tuple[Span, ...]
    """Next to each other, directly after the prompt; a completion of one token takes no place, its prediction is the prompt's last."""


Layout = tuple[Group, ...]


Visible = Callable[[Tensor, Tensor], Tensor]


def visibility(layout: Layout, length: int, device: torch.device) -> Visible:
    """Whether the query at one place of the row may attend to the key at another, for tensors of places."""
    group = torch.full((length,), -1)
    completion = torch.full((length,), -1)
    number = 0
    for g, members in enumerate(layout):
        group[members.prompt[0] : members.prompt[1]] = g
        for start, end in members.completions:
            group[start:end] = g
            completion[start:end] = number
            number += 1
    group, completion = group.to(device), completion.to(device)

    def visible(query: Tensor, key: Tensor) -> Tensor:
        own = (completion[key] == -1) | (completion[query] == completion[key])
        return (group[query] == group[key]) & own & (query >= key)

    return visible


def dense_mask(layout: Layout, length: int, device: torch.device) -> Tensor:
    """[T, T] True where the row's position may attend to the column's."""
    places = torch.arange(length, device=device)
    return visibility(layout, length, device)(places.unsqueeze(1), places.unsqueeze(0))


@lru_cache(maxsize=2)
def block_mask(layout: Layout, length: int, device: torch.device) -> BlockMask:
    """Which blocks of the row FlexAttention computes; made once for all layers, and their backward passes, of a micro-batch."""
    visible = visibility(layout, length, device)
    create = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return create(lambda b, h, query, key: visible(query, key), None, None, length, length, device=device)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=True)


def flex(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """[1, H, T, D] x 3 -> [1, H, T, D] by FlexAttention, which skips blocks that nobody sees. It has no backward pass on CPUs."""
    attend = _compiled(flex_attention) if query.device.type == "cuda" else flex_attention
    mask = block_mask(layout, query.shape[2], query.device)
    grouped = query.shape[1] != key.shape[1]
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped)


def dense(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    """[1, H, T, D] x 3 -> [1, H, T, D] with the whole mask in memory: simple, and quadratic in the row."""
    mask = dense_mask(layout, query.shape[2], query.device)
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _SharedPrefixOnCPU(torch.autograd.Function):
    """Per group: the prompt's causal block, one rectangle of all completions against the prompt, a causal block per completion.

    A completion's softmax runs over rectangle and block; their outputs are merged by their log-sum-exps, and the backward kernels,
    given the merged output and log-sum-exp, return the exact gradients of their parts.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        """[H, T, D], [K, T, D], [K, T, D] -> [H, T, D]; H is a multiple of K."""
        output = torch.zeros_like(query)
        normaliser = torch.zeros(query.shape[:2], dtype=torch.float32)
        for group in layout:
            p = slice(*group.prompt)
            output[:, p], normaliser[:, p] = _causal(query[:, p], key[:, p], value[:, p], scale)
            if not group.completions:
                continue
            c = slice(group.completions[0][0], group.completions[-1][1])
            to_prompt, prompt_normaliser = _rectangle(query[:, c], key[:, p], value[:, p], scale)
            own, own_normaliser = torch.empty_like(to_prompt), torch.empty_like(prompt_normaliser)
            for start, end in group.completions:
                s, local = slice(start, end), slice(start - c.start, end - c.start)
                own[:, local], own_normaliser[:, local] = _causal(query[:, s], key[:, s], value[:, s], scale)
            merged = torch.logaddexp(prompt_normaliser, own_normaliser)
            share = (prompt_normaliser - merged).exp().unsqueeze(-1)
            output[:, c] = torch.lerp(own.float(), to_prompt.float(), share)  # rounded once, also in bfloat16
            normaliser[:, c] = merged
        ctx.save_for_backward(query, key, value, output, normaliser)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        query, key, value, output, normaliser = ctx.saved_tensors
        d_query, d_key, d_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)

        def add(rows: slice, columns: slice, *, causal: bool) -> None:
            parts = (
                gradient[:, rows],
                query[:, rows],
                key[:, columns],
                value[:, columns],
                output[:, rows],
                normaliser[:, rows],
            )
            dq, dk, dv = (_causal_backward if causal else _rectangle_backward)(*parts, ctx.scale)
            d_query[:, rows] += dq
            d_key[:, columns] += dk
            d_value[:, columns] += dv

        for group in ctx.layout:
            p = slice(*group.prompt)
            add(p, p, causal=True)
            if group.completions:
                add(slice(group.completions[0][0], group.completions[-1][1]), p, causal=False)
            for span in group.completions:
                add(slice(*span), slice(*span), causal=True)
        return d_query, d_key, d_value, None, None


def _repeat(heads: Tensor, times: int) -> Tensor:
    return heads.repeat_interleave(times, 0) if times > 1 else heads


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    times = query.shape[0] // key.shape[0]
    output, normaliser = _flash(
        query[None], _repeat(key, times)[None], _repeat(value, times)[None], 0.0, True, attn_mask=None, scale=scale
    )
    return output[0], normaliser[0]


def _rectangle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Every query sees every key, so the query heads of a key head are more rows of it and nothing is repeated."""
    heads, rows, width = query.shape
    folded = query.reshape(key.shape[0], -1, width)
    output, normaliser = _flash(folded[None], key[None], value[None], 0.0, False, attn_mask=None, scale=scale)
    return output[0].reshape(heads, rows, width), normaliser[0].reshape(heads, rows)


def _causal_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, normaliser: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    times = query.shape[0] // key.shape[0]
    dq, dk, dv = _flash_backward(
        gradient[None], query[None], _repeat(key, times)[None], _repeat(value, times)[None], output[None], normaliser[None].contiguous(), 0.0, True,
        attn_mask=None, scale=scale,
    )  # fmt: skip
    folded = (key.shape[0], times, *key.shape[1:])
    return dq[0], dk[0].reshape(folded).sum(1), dv[0].reshape(folded).sum(1)


def _rectangle_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, normaliser: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    folded = (key.shape[0], -1, query.shape[2])
    dq, dk, dv = _flash_backward(
        gradient.reshape(folded)[None], query.reshape(folded)[None], key[None], value[None], output.reshape(folded)[None],
        normaliser.reshape(1, key.shape[0], -1).contiguous(), 0.0, False, attn_mask=None, scale=scale,
    )  # fmt: skip
    return dq[0].reshape(query.shape), dk[0], dv[0]


def shared_prefix_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *, layout: Layout | None = None,
    scaling: float | None = None, **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention signature; without a layout, plain causal attention of separate rows."""
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    query, key = query.to(value.dtype), key.to(value.dtype)
    if layout is None:
        assert attention_mask is None, "padding needs another attention implementation"
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
    elif query.device.type == "cpu":
        output = _SharedPrefixOnCPU.apply(query[0], key[0], value[0], layout, scale)[None]  # type: ignore[index]
    else:
        output = (flex if query.device.type == "cuda" else dense)(query, key, value, layout, scale)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, shared_prefix_attention)
AttentionMaskInterface.register(NAME, lambda **_: None)


PLAIN = ("llama", "mistral", "mixtral", "olmo", "olmo2", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe")
"""Model types whose attention, apart from what their configuration can add, was compared with that of separate sequences."""


def can_share_prefix(config: Any) -> str | None:
    """None when a model's attention is known to be plain causal attention, else what it is or may be."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return f"layers of type {', '.join(sorted(kinds - {'full_attention'}))}"
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return "a sliding window"
    if getattr(config, "attention_dropout", 0.0):
        return "attention dropout"
    if config.model_type not in PLAIN:
        return f"the type {config.model_type}, whose attention is not known to be plain (known: {', '.join(PLAIN)})"
    return None
