"""Elastic weight consolidation (EWC, https://arxiv.org/abs/1612.00796): weights that an ability rests on are held where they are.

    penalty = 1/2 sum_i F_i (w_i - w*_i)^2        F_i = E_x E_y (d log p(y | x) / d w_i)^2 at w*

x is a prompt and y a whole completion: F is of sequences, not of tokens. With y sampled by the model F is the diagonal of its Fisher
information, estimated by Monte Carlo; with given y it is the empirical Fisher, which is another matrix unless the model would write them
just so (https://arxiv.org/abs/1905.12558).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from rlhf.logprobs import token_logprobs
from rlhf.lora import adapted_layers, delta_weight
from rlhf.types import Rollout

FISHER = "fisher.safetensors"


def elastic_penalty(change: Tensor, fisher: Tensor) -> Tensor:
    """1/2 sum F (w - w*)^2 of one weight: any shape, twice -> a number."""
    return (fisher * change.square()).sum() / 2


def fisher_diagonal(model: Any, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Mean over completions of the squared gradient of their log-likelihoods, by parameter name, in float32.

    One backward pass a completion: the square of a batch's mean gradient would be another thing, and near 0.

    Raises:
        FloatingPointError: when a gradient is not finite.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in named.items()}
    for rollout in rollouts:
        tokens = torch.tensor([*rollout.prompt.token_ids, *rollout.token_ids], device=model.device)
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0, len(rollout.prompt.token_ids) - 1 :]
        likelihood = token_logprobs(logits, tokens[len(rollout.prompt.token_ids) :], temperature=1.0).sum()
        for name, gradient in zip(named, torch.autograd.grad(likelihood, list(named.values())), strict=True):
            fisher[name] += gradient.float().square()
    if not all(torch.isfinite(f).all() for f in fisher.values()):
        raise FloatingPointError(
            "a gradient is not finite, so there is no Fisher information; look at the model's weights"
        )
    return {name: f / len(rollouts) for name, f in fisher.items()}


def save_fisher(folder: Path, fisher: Mapping[str, Tensor], *, weights: str, kind: str, sequences: int) -> Path:
    """The diagonal, with the fingerprint of the weights it was taken at, and what it is."""
    file = folder / FISHER
    about = {"weights": weights, "kind": kind, "sequences": str(sequences)}
    save_file({name: f.cpu().contiguous() for name, f in fisher.items()}, file, metadata={"fisher": json.dumps(about)})
    return file


def load_fisher(folder: str, *, weights: str) -> dict[str, Tensor]:
    """What `save_fisher` wrote, of the weights with this fingerprint.

    Raises:
        ValueError: when there is none, or it is of other weights.
    """
    file = Path(folder) / FISHER
    if not file.is_file():
        raise ValueError(
            f"retention.elastic.fisher is {folder}, which has no {FISHER}; run scripts/estimate_fisher.py first"
        )
    with safe_open(file, framework="pt") as stored:
        about = json.loads((stored.metadata() or {}).get("fisher", "{}"))
        if about.get("weights") != weights:
            raise ValueError(
                f"retention.elastic.fisher {folder} is of the weights {about.get('weights')} and policy.path has {weights}; "
                "run scripts/estimate_fisher.py on policy.path"
            )
        return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118


class Anchor:
    """The weights as they are now, and what leaving them costs.

    Of a model with adapters the change is B A, whatever A and B are: what is held is what the model computes, with the Fisher information
    of the plain weights. (That of A and B themselves would be 0 for A where B is 0, and would depend on how A was drawn.)

    Args:
        model: of transformers, float32, before anything wraps it.
        fisher: by the plain model's names.

    Raises:
        ValueError: when a trained weight has no Fisher information of its shape.
    """

    def __init__(self, model: Any, fisher: Mapping[str, Tensor]) -> None:
        self._layers = adapted_layers(model)
        named = {} if self._layers else {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._weights = {name: (p, p.detach().clone()) for name, p in named.items()}
        shapes = {n: p.shape for n, p in named.items()} | {n: layer.weight.shape for n, layer in self._layers.items()}
        for name, shape in shapes.items():
            if name not in fisher or (not self._layers and fisher[name].shape != shape):
                raise ValueError(
                    f"retention.elastic.fisher has nothing of the shape {tuple(shape)} for {name}; run scripts/estimate_fisher.py on policy.path"
                )
        self._fisher = {name: fisher[name] for name in shapes}

    def penalty(self) -> Tensor:
        """What the weights' way since then costs, with its gradient.

        Under ZeRO-1 and 2 in bfloat16 the way is that of the weights as they compute, from the first ones rounded in the same manner.
        """
        total: Any = 0.0
        for name, (parameter, first) in self._weights.items():
            change = (parameter - first.to(parameter.device, parameter.dtype)).float()
            total = total + elastic_penalty(change, self._of(name, change))
        for name, layer in self._layers.items():
            change = delta_weight(layer)
            total = total + elastic_penalty(change, self._of(name, change))
        return total

    def _of(self, name: str, like: Tensor) -> Tensor:
        self._fisher[name] = self._fisher[name].to(like.device)
        return self._fisher[name]
