"""Packing changes nothing but the time, and the guards of supervised fine-tuning."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.chat import render_response
from rlhf.config import load_config
from rlhf.metrics import read_jsonl
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


def balance_by_hand(folder, examples):
    """Mean over layers of 8 sum_e f_e P_e over the trained tokens, by a loop over conversations."""
    model = load_causal_lm(folder, revision=None, dtype="float32")
    logits = []
    with torch.no_grad():
        for example in examples:
            output = model(input_ids=torch.tensor([example.input_ids]), output_router_logits=True)
            logits.append(torch.stack([layer[len(example.prompt_ids) - 1 : -1] for layer in output.router_logits]))
    logits = torch.cat(logits, 1)
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 8).sum(2).float()
    return (8 * (chosen.mean(1) * logits.softmax(-1).mean(1)).sum(1)).mean().item()


def test_the_balance_loss_of_a_mixture_is_that_of_the_whole_step_however_it_is_cut(
    examples, renderer, mixture_folder, tmp_path
):
    rows, weights = {}, {}
    for micro, coefficient in ((8, 1.0), (2, 1.0), (8, 0.0)):
        folder = tmp_path / f"{micro}-{coefficient}"
        overrides = [
            f"output_dir={folder}", f"model.path={mixture_folder}", "training.num_steps=2", "training.sequences_per_step=8", "training.log_every=1",
            f"training.micro_batch_size={micro}", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.0001", "optimizer.schedule=constant",
            f"model.router_aux_coefficient={coefficient}",
        ]  # fmt: skip
        folder.mkdir()
        train(load_config(RECIPE, overrides), renderer.tokenizer, examples[:8], pad_token_id=renderer.pad_token_id)
        rows[micro, coefficient] = read_jsonl(folder / "metrics.jsonl")
        weights[micro, coefficient] = load_file(folder / "model.safetensors")
    whole, cut, without = (rows[key] for key in ((8, 1.0), (2, 1.0), (8, 0.0)))
    assert whole[0]["moe/balance_loss"] == pytest.approx(balance_by_hand(mixture_folder, examples[:8]), rel=1e-5)
    for row, other in zip(whole, cut, strict=True):
        for key in ("grad_norm", "moe/balance_loss", "moe/load", "moe/router_entropy"):
            assert other[key] == pytest.approx(row[key], rel=1e-4), key
    for name, tensor in weights[8, 1.0].items():
        torch.testing.assert_close(weights[2, 1.0][name], tensor, atol=2e-5, rtol=0)
    assert abs(without[0]["grad_norm"] - whole[0]["grad_norm"]) > 1e-3
    assert "moe/balance_loss" not in without[0]
    assert without[0]["moe/load"] == whole[0]["moe/load"]
    assert json.loads((tmp_path / "8-1.0/config.json").read_text())["router_aux_loss_coef"] == 0.001
