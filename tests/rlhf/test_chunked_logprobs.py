"""Log-probabilities whose gradients are formed in the forward pass are those of two passes, and of plain autograd."""

import pytest
import torch
from torch.testing import assert_close

from rlhf.logprobs import chunked_logprobs, token_entropy, token_logprobs

TARGETS = torch.tensor([3, 0, 10, 3, 7])
WANTED = torch.tensor([0.5, -1.0, 0.25, 0.0, 2.0])


def gradients(expected=None, *, entropy_weight=0.0, scale=1.0, wanted=WANTED, plain=False):
    """Gradients of sum(wanted * logp) + entropy_weight * sum(H), all times `scale`, with two rows of logits at a time."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator).requires_grad_()
    weight = torch.randn(11, 4, generator=generator).requires_grad_()
    if plain:
        logits = hidden @ weight.T
        logprobs, entropies = (
            token_logprobs(logits, TARGETS, temperature=0.7),
            token_entropy(logits, temperature=0.7),
        )
    else:
        logprobs, entropies = chunked_logprobs(hidden, weight, TARGETS, temperature=0.7, expected=expected, chunk=2)
    loss = (wanted * logprobs).sum()
    if entropy_weight:
        loss = loss + entropy_weight * entropies.sum()
    (scale * loss).backward()
    return hidden.grad, weight.grad


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"scale": -3.0},
        {"wanted": torch.tensor([0.5, -1.0, 0.25, 1.0, 2.0])},
        {"wanted": torch.zeros(5)},
        {"entropy_weight": 0.1},
    ],
    ids=["as expected", "as expected but for a factor", "one token otherwise", "nothing", "an entropy bonus besides"],
)
def test_gradients_do_not_depend_on_what_was_expected(asked):
    for ours, reference in zip(gradients(WANTED, **asked), gradients(plain=True, **asked), strict=True):
        assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_what_was_expected_is_used_and_not_computed_again(monkeypatch):
    from rlhf.logprobs import _Head

    products = []
    counted = _Head.scaled_logits
    monkeypatch.setattr(_Head, "scaled_logits", lambda head, rows: products.append(rows) or counted(head, rows))
    gradients(WANTED)
    assert len(products) == 3  # 5 rows, two at a time
    products.clear()
    gradients()
    assert len(products) == 6


def test_a_bfloat16_head_sums_its_gradient_in_float32():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=generator).bfloat16()
    weight = torch.randn(11, 8, generator=generator).bfloat16().float().requires_grad_()
    targets = torch.arange(64) % 11
    wanted = torch.randn(64, generator=generator)
    (chunked_logprobs(hidden, weight, targets, temperature=1.0, chunk=4)[0] * wanted).sum().backward()
    exact = weight.detach().clone().requires_grad_()
    (token_logprobs(hidden.float() @ exact.T, targets, temperature=1.0) * wanted).sum().backward()
    error = (weight.grad - exact.grad).norm() / exact.grad.norm()
    assert error < 5e-3  # bfloat16 keeps 8 bits of each product


@pytest.mark.parametrize("expected", [None, WANTED])
def test_a_frozen_head_costs_no_gradient_and_leaves_that_of_the_hidden_states_alone(expected):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 4, generator=generator).requires_grad_()
    weight = torch.randn(11, 4, generator=generator)
    (
        chunked_logprobs(hidden, weight, TARGETS, temperature=0.7, expected=expected, chunk=2)[0] * WANTED
    ).sum().backward()
    assert weight.grad is None
    assert_close(hidden.grad, gradients(plain=True)[0], rtol=1e-5, atol=1e-6)
