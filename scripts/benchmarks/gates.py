"""Two sides did the same work, or no ratio is printed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FLOAT32_ERROR, FLOAT32_TENSOR_ERROR = 1e-5, 1e-4
LOGPROB_ERROR = {"fp32": 1e-4, "bf16": 0.1}
STEP_ERROR = {"fp32": 1e-4}
BFLOAT16_MARGIN, BFLOAT16_COSINE = 1.1, 0.9995


@dataclass(frozen=True, slots=True, order=True)
class Entry:
    """What one sequence contributes to a loss."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    advantage: float
    masked: int
    """Tokens that count."""
    denominator: int


def key_of(prompt: Sequence[int], completion: Sequence[int]) -> str:
    return hashlib.sha256(repr((list(prompt), list(completion))).encode()).hexdigest()


def ledger_hash(entries: Sequence[Entry]) -> str:
    """The same for the same sequences in any order; advantages count to four decimals."""
    lines = sorted(
        f"{list(e.prompt)} {list(e.completion)} {round(e.advantage, 4) + 0.0:.4f} {e.masked} {e.denominator}"
        for e in entries
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@dataclass(slots=True)
class Record:
    """What a side computed in one step from the initial weights."""

    ledger: str = ""
    gradients: dict[str, Tensor] = field(default_factory=dict)
    deltas: dict[str, Tensor] = field(default_factory=dict)
    """What the optimizer step changed."""
    logprobs: dict[str, Tensor] = field(default_factory=dict)
    """By `key_of` a sequence."""


def relative_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())
    difference = sum((ours[n].double() - theirs[n].double()).square().sum().item() for n in theirs)
    return math.sqrt(difference / sum(t.double().square().sum().item() for t in theirs.values()))


def worst_tensor_error(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    return max(relative_error({n: ours[n]}, {n: theirs[n]}) for n in theirs)


def cosine(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    product = sum((ours[n].double() * theirs[n].double()).sum().item() for n in theirs)
    norms = [sum(t.double().square().sum().item() for t in side.values()) for side in (ours, theirs)]
    return product / math.sqrt(norms[0] * norms[1])


def step_error(ours: Record, theirs: Record) -> float:
    """Relative difference of the parameters' change, where both gradients agree to a hundredth and so have one sign.

    AdamW's first step is the learning rate times the gradient's sign, so elsewhere rounding decides.
    """
    difference = total = 0.0
    for name, g in theirs.gradients.items():
        sure = g.abs() > 100 * (ours.gradients[name] - g).abs()
        difference += (ours.deltas[name] - theirs.deltas[name])[sure].double().square().sum().item()
        total += theirs.deltas[name][sure].double().square().sum().item()
    return math.sqrt(difference / total) if total else math.inf


def logprob_error(ours: Record, theirs: Record) -> float:
    """Largest difference over the sequences that both computed."""
    common = ours.logprobs.keys() & theirs.logprobs.keys()
    return max(((ours.logprobs[k] - theirs.logprobs[k]).abs().max().item() for k in common), default=math.inf)


def compare(
    ours: Record, theirs: Record, *, dtype: str, reference: Record | None
) -> tuple[dict[str, float], list[str]]:
    """What was measured, and a sentence for each gate that did not pass.

    Args:
        ours: of this project.
        theirs: of the peer.
        dtype: `fp32` or `bf16`.
        reference: float32 gradients of plain sequences, for bf16.
    """
    if ours.ledger != theirs.ledger:
        return {}, [f"the token ledgers differ: {ours.ledger[:12]} is ours, {theirs.ledger[:12]} the peer's"]
    figures = {
        "grad_rel_err": relative_error(ours.gradients, theirs.gradients),
        "grad_worst_tensor": worst_tensor_error(ours.gradients, theirs.gradients),
        "logprob_max_diff": logprob_error(ours, theirs),
        "step_rel_err": step_error(ours, theirs),
    }
    bounds = {"logprob_max_diff": LOGPROB_ERROR[dtype]}
    if dtype == "fp32":
        bounds |= {
            "grad_rel_err": FLOAT32_ERROR,
            "grad_worst_tensor": FLOAT32_TENSOR_ERROR,
            "step_rel_err": STEP_ERROR["fp32"],
        }
    else:
        assert reference is not None
        figures["grad_err_ours"] = relative_error(ours.gradients, reference.gradients)
        figures["grad_err_peer"] = relative_error(theirs.gradients, reference.gradients)
        figures["grad_cosine"] = cosine(ours.gradients, reference.gradients)
        bounds["grad_err_ours"] = BFLOAT16_MARGIN * figures["grad_err_peer"]
    failures = [
        f"{name} is {figures[name]:.3g}, above {bound:.3g}"
        for name, bound in bounds.items()
        if not figures[name] <= bound
    ]
    if dtype == "bf16" and not figures["grad_cosine"] >= BFLOAT16_COSINE:
        failures.append(f"grad_cosine is {figures['grad_cosine']:.6f}, below {BFLOAT16_COSINE}")
    return figures, failures


def snapshot(model: torch.nn.Module, attribute: str = "data") -> dict[str, Tensor]:
    """Copies of all parameters, or of their gradients, in float32."""
    return {
        name: getattr(p, attribute).detach().float().clone()
        for name, p in model.named_parameters()
        if getattr(p, attribute) is not None
    }
