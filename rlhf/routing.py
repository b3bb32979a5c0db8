"""Routers of a mixture of experts, listened to in a forward pass and, under replay, overruled. Letters as in rlhf/balance.py.

A token counts here as it does in the policy loss: once for each trained token, at the position that predicts it. So nothing here depends on
padding, on whether a group's prompt is computed once or for each sample, or on how an optimizer step is cut.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlhf.balance import differ, expert_load, router_weights
from rlhf.distributed import whole
from rlhf.run import say
from rlhf.shapes import moe_blocks


class RouterStatistics(NamedTuple):
    """What the routers did at the `N` trained tokens of a forward pass."""

    tokens: Tensor
    """How many."""
    probability: Tensor
    """[L, E] sums over tokens of the routers' probabilities; carries the gradient."""
    load: Tensor
    """[L, E] tokens that each expert got."""
    entropy: Tensor
    """Sum over (token, layer) of the probabilities' entropy, in nats."""
    differing: Tensor
    """Number of (token, layer) whose experts are not the sampler's; 0 where these are not known."""
    replaced: Tensor
    """Number of (token, layer) whose own choice replay put aside."""


@dataclass(slots=True)
class Routing:
    """Of each router, in the order of the layers, in one forward pass."""

    logits: list[Tensor] = field(default_factory=list)
    """[M, E]"""
    own: list[Tensor] = field(default_factory=list)
    """[M, K] what the router chose."""
    experts: list[Tensor] = field(default_factory=list)
    """[M, K] what was computed; another choice under replay."""

    def at(self, positions: Tensor, sampled: Tensor | None = None) -> RouterStatistics:
        """Summed over some positions [N].

        Args:
            positions: [N] of the rows laid end to end; a position counts as often as it comes.
            sampled: [M, L, K] the sampler's experts.
        """
        positions = positions.to(self.logits[0].device)
        logits = torch.stack([layer.index_select(0, positions) for layer in self.logits], 1).float()
        experts, own = (
            torch.stack([layer.index_select(0, positions) for layer in layers], 1)
            for layers in (self.experts, self.own)
        )
        log_probabilities = logits.log_softmax(-1)
        probabilities = log_probabilities.exp()
        nothing = torch.zeros((), dtype=torch.long, device=logits.device)
        others = None if sampled is None else sampled.to(experts.device).index_select(0, positions).long()
        return RouterStatistics(
            tokens=nothing + len(positions),
            probability=probabilities.sum(0),
            load=expert_load(experts, logits.shape[-1]),
            entropy=-(probabilities * log_probabilities).detach().sum(),
            differing=nothing if others is None else differ(experts, others).sum(),
            replaced=differ(experts, own).sum(),
        )


class Routers:
    """The routers of a model, listened to and, under replay, overruled.

    Understood are routers that return (logits, weights, experts) with weights that are the softmax of the logits at the chosen experts,
    normalised over them or not: Mixtral, Qwen2-, Qwen3-MoE, OLMoE and their like. That is tried out, not looked up.

    Args:
        model: of transformers, with at least one block of experts.

    Raises:
        ValueError: when a block's router is of another kind.
    """

    def __init__(self, model: Any) -> None:
        self._routing: Routing | None = None
        self._replay: Tensor | None = None
        found = [_router_of(name, block) for name, block in moe_blocks(model)]
        self._places = {router: (place, normalised) for place, (router, normalised, _) in enumerate(found)}
        self.num_experts = max(num_experts for *_, num_experts in found)
        for router in self._places:
            router.register_forward_hook(self._after)

    @contextmanager
    def listening(self, replay: Tensor | None = None) -> Iterator[Routing]:
        """What the routers do in the forward pass inside; with `replay` [M, L, K] they take those experts, with their own weights for them.

        What the backward pass recomputes of a pass with gradient takes the same experts; other passes outside the block choose freely.
        """
        before, self._replay = self._replay, replay
        self._routing = Routing()
        try:
            yield self._routing
        finally:
            self._routing = None
            if not torch.is_grad_enabled():
                self._replay = before

    def _after(self, router: nn.Module, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...] | None:
        logits, weights, own = output
        experts, (place, normalised) = own, self._places[router]
        recomputed = torch._C._current_graph_task_id() != -1  # as torch.utils.checkpoint finds it out
        replay = self._replay if self._routing is not None or recomputed else None
        if replay is not None:
            experts = replay[:, place].to(own)
            weights = router_weights(logits, experts, normalised=normalised).to(weights.dtype)
        if self._routing is not None:
            self._routing.logits.append(logits)
            self._routing.own.append(own)
            self._routing.experts.append(experts)
        return None if replay is None else (logits, weights, experts)


def find_routers(model: Any, *, needed_by: str | None = None) -> Routers | None:
    """The routers of a model; None where it has none or they are of a kind that `Routers` does not understand.

    Raises:
        ValueError: in these cases when a recipe's key needs them.
    """
    if not moe_blocks(model):
        if needed_by is not None:
            raise ValueError(f"{needed_by} is set and a {model.config.model_type} model has no router; remove it")
        return None
    try:
        return Routers(model)
    except ValueError as error:
        if needed_by is not None:
            raise ValueError(f"{needed_by} is set and {error}; remove it") from None
        say(f"expert metrics are left out: {error}")
        return None


@torch.no_grad()
def _router_of(name: str, block: nn.Module) -> tuple[nn.Module, bool, int]:
    """The router of a block, whether it normalises the weights of the chosen experts, and how many there are; found by trying."""
    for child_name, child in block.named_children():
        weight = getattr(child, "weight", None)
        if child_name in ("experts", "shared_expert", "shared_expert_gate") or not isinstance(weight, Tensor):
            continue
        with whole([weight]):
            if weight.ndim != 2:
                continue
            draw = torch.Generator().manual_seed(0)
            states = torch.randn(16, weight.shape[1], generator=draw).to(weight)
            output = child(states)
        if not isinstance(output, tuple) or len(output) != 3:
            continue
        logits, weights, experts = output
        if experts.shape != weights.shape or experts.is_floating_point() or logits.shape[:1] != (16,):
            continue
        for normalised in (True, False):
            expected = router_weights(logits, experts, normalised=normalised).to(weights.dtype)
            if torch.allclose(expected, weights, rtol=1e-2 if weights.dtype == torch.bfloat16 else 1e-4):
                return child, normalised, logits.shape[-1]
    raise ValueError(
        f"the router of {name} is not a softmax over experts as of Mixtral, Qwen3-MoE or OLMoE, so its choice can be neither balanced nor replayed"
    )
