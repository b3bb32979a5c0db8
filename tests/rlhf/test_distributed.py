"""Where the experts of a model are, for ZeRO-3, and which optimizer's learning rate counts."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.distributed import mark_leaf_modules, require_whole_experts, stepping_optimizer


def model_of(kind, **changes):
    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 2
    for key, value in changes.items():
        setattr(config, key, value)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        ("qwen3_moe", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("mixtral", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("olmoe", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("gpt_oss", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("glm4_moe", ["model.layers.1.mlp"]),  # its first layer is dense
        ("granitemoe", ["model.layers.0.block_sparse_moe", "model.layers.1.block_sparse_moe"]),
    ],
)
def test_mixtures_of_experts_are_found_from_the_model_and_not_from_a_list_of_classes(kind, blocks):
    model = model_of(kind)
    assert mark_leaf_modules(model) == blocks
    assert [name for name, module in model.named_modules() if getattr(module, "_z3_leaf", False)] == blocks


def test_a_dense_model_has_no_leaf_modules():
    assert mark_leaf_modules(model_of("qwen3")) == []


def test_experts_that_are_not_found_are_refused():
    model = model_of("mixtral")
    for layer in model.model.layers:
        layer.mlp = nn.Identity()
    with pytest.raises(ValueError, match=r"'num_local_experts': 8.*zero_stage 2"):
        mark_leaf_modules(model)


def test_expert_parallelism_is_refused_and_other_configurations_are_not():
    require_whole_experts({})
    require_whole_experts({"zero_optimization": {"stage": 3}, "expert_parallel": {"enabled": False}})
    with pytest.raises(ValueError, match=r"expert_parallel, under which no rank holds the whole model.*zero3.yaml"):
        require_whole_experts({"expert_parallel": {"enabled": True, "autoep_size": 2}})


def test_the_innermost_optimizer_is_the_one_whose_learning_rate_counts():
    own = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])

    class Wrapper:
        def __init__(self, optimizer):
            self.optimizer = optimizer

    assert stepping_optimizer(Wrapper(Wrapper(own))) is own
    assert stepping_optimizer(own) is own
