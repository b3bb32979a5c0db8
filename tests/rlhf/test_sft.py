"""Packing changes nothing but the time, and the guards of supervised fine-tuning."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.chat import render_response
from rlhf.config import load_config
from rlhf.models import load_causal_lm
from rlhf.trainers.sft import IGNORED, Example, PackingCollator, require_trained_stop_token, train

RECIPE = Path(__file__).parents[2] / "recipes/tiny/sft.yaml"


@pytest.fixture
def examples(renderer, demonstrations):
    return [
        Example(
            prompt_ids=renderer.prompt_ids(d.question),
            response_ids=renderer.response_ids(render_response(d.scratchpad, d.answer)),
        )
        for d in demonstrations
    ]


def collate(examples, pad):
    return PackingCollator(pad)([{"input_ids": e.input_ids, "labels": e.labels} for e in examples])


def check(batch, renderer):
    return require_trained_stop_token(batch, stop_token_id=renderer.stop_token_id, pad_token_id=renderer.pad_token_id)


def some_short(examples):
    """Conversations of very different length, as when some answer at once."""
    return [
        e if i % 3 else Example(prompt_ids=e.prompt_ids[:9], response_ids=e.response_ids[-5:])
        for i, e in enumerate(examples[:10])
    ]


def test_packed_conversations_have_the_loss_and_gradient_of_each_alone(examples, renderer, model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    model.config.use_cache = False
    conversations = some_short(examples)
    batch = collate(conversations, renderer.pad_token_id)
    assert batch["input_ids"].shape[0] < len(conversations)
    count = sum(len(e.response_ids) for e in conversations)
    gradients = []
    for parts in (
        [batch],
        [{"input_ids": torch.tensor([e.input_ids]), "labels": torch.tensor([e.labels])} for e in conversations],
    ):
        model.zero_grad()
        total = sum(model(**part, num_items_in_batch=count).loss for part in parts)
        total.backward()
        gradients.append((total.item(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert gradients[0][0] == pytest.approx(gradients[1][0], rel=1e-5)
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradient, gradients[1][1][name], atol=1e-6, rtol=1e-4)


def test_packing_loses_no_token_and_pads_less_than_a_row_a_conversation(examples, renderer):
    conversations = some_short(examples)
    batch = collate(conversations, renderer.pad_token_id)
    real = batch["input_ids"] != renderer.pad_token_id
    assert sorted(batch["input_ids"][real].tolist()) == sorted(t for e in conversations for t in e.input_ids)
    assert (batch["labels"] != IGNORED).sum() == sum(len(e.response_ids) for e in conversations)
    assert batch["input_ids"].shape[1] == max(len(e.input_ids) for e in conversations)


def test_only_responses_are_trained_on_and_each_one_with_its_stop_token(examples, renderer):
    batch = collate(examples[:4], renderer.pad_token_id)
    share = check(batch, renderer)
    tokens = [(len(e.response_ids), len(e.input_ids)) for e in examples[:4]]
    assert share == pytest.approx(sum(r for r, _ in tokens) / sum(n for _, n in tokens))


def test_a_masked_stop_token_is_an_error_before_training(examples, renderer):
    batch = collate(examples[:4], renderer.pad_token_id)
    batch["labels"][
        batch["labels"] == renderer.stop_token_id
    ] = -100  # what happens when padding and stop token are one
    with pytest.raises(ValueError, match="does not train its stop token"):
        check(batch, renderer)


@pytest.mark.parametrize("everything", [True, False])
def test_a_mask_of_all_or_nothing_is_an_error_before_training(examples, renderer, everything):
    batch = collate(examples[:4], renderer.pad_token_id)
    batch["labels"] = (
        torch.where(batch["input_ids"] != renderer.pad_token_id, batch["input_ids"], -100)
        if everything
        else torch.full_like(batch["labels"], -100)
    )
    with pytest.raises(ValueError, match="100%" if everything else "0%"):
        check(batch, renderer)


def test_trained_padding_is_an_error(examples, renderer):
    batch = collate(some_short(examples), renderer.pad_token_id)
    batch["labels"][batch["input_ids"] == renderer.pad_token_id] = renderer.pad_token_id
    with pytest.raises(ValueError, match="padding is trained on"):
        check(batch, renderer)


def test_a_step_of_sft_with_accumulation_equals_one_without(examples, renderer, model_folder, tmp_path):
    weights = {}
    for micro in (8, 2):
        overrides = [
            f"output_dir={tmp_path}/{micro}", f"model.path={model_folder}", "training.num_steps=2", "training.sequences_per_step=8",
            f"training.micro_batch_size={micro}", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.0001", "optimizer.schedule=constant",
        ]  # fmt: skip
        (tmp_path / str(micro)).mkdir()
        result = train(
            load_config(RECIPE, overrides), renderer.tokenizer, examples[:64], pad_token_id=renderer.pad_token_id
        )
        assert 0 < result["trained_share"] < 1
        weights[micro] = load_file(tmp_path / str(micro) / "model.safetensors")
    start = load_file(Path(model_folder) / "model.safetensors")
    for name, tensor in weights[8].items():
        torch.testing.assert_close(weights[2][name], tensor, atol=2e-5, rtol=0)
    assert any((weights[8][n] - start[n]).abs().max() > 1e-4 for n in start)
    assert not list(tmp_path.glob("*/*.bin"))
