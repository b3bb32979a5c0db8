"""Fixtures: a tiny real model and tokenizer, built once a session."""

import dataclasses
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

from itertools import islice

import hypothesis
import pytest
import torch
from transformers import AutoModelForTokenClassification

from data.chat import ChatRenderer, render_response
from data.stories import generate_stories, to_demonstration
from data.tokenizer import train_tokenizer
from reward_models.process import DESCRIPTION, Description
from rlhf.config import Architecture
from rlhf.models import build_qwen3

hypothesis.settings.register_profile("any_machine", deadline=None)  # a busy one is many times slower
hypothesis.settings.load_profile("any_machine")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def demonstrations():
    return [
        to_demonstration(story, answers_at_once=False)
        for story in islice(generate_stories("train", seed=0, min_level=2, max_level=3), 200)
    ]


@pytest.fixture(scope="session")
def tokenizer(demonstrations):
    return train_tokenizer(
        [f"{d.question} {render_response(d.scratchpad, d.answer)}" for d in demonstrations], vocab_size=400
    )


@pytest.fixture(scope="session")
def renderer(tokenizer):
    return ChatRenderer(tokenizer)


@pytest.fixture(scope="session")
def tiny_architecture():
    return Architecture(
        hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=256
    )


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, tokenizer, tiny_architecture):
    """A saved, randomly initialised policy with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "base"
    build_qwen3(tiny_architecture, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def process_folder(tmp_path_factory, model_folder, tokenizer):
    """A process model whose head was drawn at random."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("process")
    model = AutoModelForTokenClassification.from_pretrained(model_folder, num_labels=1)
    torch.nn.init.normal_(model.score.weight, std=1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    description = Description(
        head="classification", separator="\n", opening="<think>\n", right_token=None, wrong_token=None, threshold=0.5
    )
    (folder / DESCRIPTION).write_text(json.dumps(dataclasses.asdict(description)))
    return str(folder)


@pytest.fixture(scope="session")
def mixture_folder(tmp_path_factory, tokenizer):
    """A saved, randomly initialised mixture of experts with its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "mixture"
    architecture = Architecture(
        hidden_size=64, num_experts=8, experts_per_token=2, expert_intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=1,
        head_dim=32, max_positions=256, initializer_range=0.1,
    )  # fmt: skip
    build_qwen3(architecture, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
