"""Load of experts, the loss that evens it out, and choices compared: numbers worked out by hand."""

import math

import torch
from torch.testing import assert_close
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from rlhf.balance import balance_weights, differ, expert_load, relative_load, router_weights


def test_the_load_of_an_expert_is_the_number_of_tokens_sent_to_it_in_each_layer():
    experts = torch.tensor(
        [[[0, 1], [2, 1]], [[0, 2], [2, 1]], [[0, 1], [0, 1]]]
    )  # three tokens, two layers, two experts each
    assert expert_load(experts, 3).tolist() == [[3, 2, 1], [1, 3, 2]]


def test_the_balance_loss_is_experts_times_the_sum_of_share_and_mean_probability():
    # shares 3/4 and 1/4, mean probabilities 0.6 and 0.4: 2 (0.75 0.6 + 0.25 0.4) = 1.1
    weights = balance_weights(torch.tensor([[3, 1]]), 4, coefficient=1.0)
    assert_close((weights * torch.tensor([[2.4, 1.6]])).sum(), torch.tensor(1.1, dtype=torch.float64))


def test_layers_are_averaged_and_cannot_make_up_for_each_other():
    # two layers that send everything to one expert, each to another one: 2 in each; lumped together they would look even, 1
    weights = balance_weights(torch.tensor([[4, 0], [0, 4]]), 4, coefficient=1.0)
    assert (weights * torch.tensor([[4.0, 0.0], [0.0, 4.0]])).sum() == 2.0


def test_an_even_load_costs_as_many_as_a_token_has_experts():
    weights = balance_weights(torch.tensor([[2, 2, 2, 2]]), 4, coefficient=1.0)  # four tokens, two experts each
    assert (weights * torch.ones(1, 4)).sum() == 2.0


def test_one_layer_and_one_micro_batch_are_transformers_loss():
    torch.manual_seed(0)
    logits = torch.randn(17, 8)
    experts = logits.topk(2).indices.unsqueeze(1)
    weights = balance_weights(expert_load(experts, 8), 17, coefficient=1.0)
    ours = (weights * logits.softmax(-1).sum(0)).sum()
    assert_close(ours.float(), load_balancing_loss_func((logits,), num_experts=8, top_k=2))


def test_a_step_without_trained_tokens_costs_nothing():
    assert balance_weights(torch.zeros(1, 2, dtype=torch.long), 0, coefficient=1.0).sum() == 0


def test_the_relative_load_is_one_where_it_is_even_and_the_experts_where_one_does_everything():
    assert relative_load(torch.tensor([[2, 2], [5, 5]])) == 1
    assert relative_load(torch.tensor([[4, 0, 0, 0]])) == 4
    assert relative_load(torch.tensor([[3, 1], [2, 2]])) == 1.25


def test_choices_differ_as_sets():
    chosen = torch.tensor([[0, 1], [0, 1], [3, 2]])
    assert differ(chosen, torch.tensor([[1, 0], [0, 2], [2, 3]])).tolist() == [False, True, False]


def test_weights_are_the_softmax_at_the_chosen_experts():
    logits = torch.tensor([[math.log(1.0), math.log(2.0), math.log(5.0)]])  # probabilities 1/8, 2/8, 5/8
    chosen = torch.tensor([[2, 0]])
    assert_close(router_weights(logits, chosen, normalised=False), torch.tensor([[5 / 8, 1 / 8]]))
    assert_close(router_weights(logits, chosen, normalised=True), torch.tensor([[5 / 6, 1 / 6]]))
