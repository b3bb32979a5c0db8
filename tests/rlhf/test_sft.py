"""The guards of supervised fine-tuning, on batches as TRL's own collator makes them."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from data.chat import render_response
from rlhf.config import load_config
from rlhf.trainers.sft import Example, require_trained_stop_token, train

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
    return DataCollatorForLanguageModeling(pad_token_id=pad)(
        [{"input_ids": e.input_ids, "labels": e.labels} for e in examples]
    )


def test_only_responses_are_trained_on_and_each_one_with_its_stop_token(examples, renderer):
    batch = collate(examples[:4], renderer.pad_token_id)
    share = require_trained_stop_token(batch, renderer.stop_token_id)
    tokens = [(len(e.response_ids), len(e.input_ids)) for e in examples[:4]]
    assert share == pytest.approx(sum(r for r, _ in tokens) / sum(n for _, n in tokens))


def test_a_masked_stop_token_is_an_error_before_training(examples, renderer):
    batch = collate(examples[:4], renderer.pad_token_id)
    batch["labels"][
        batch["labels"] == renderer.stop_token_id
    ] = -100  # what happens when padding and stop token are one
    with pytest.raises(ValueError, match="does not train its stop token"):
        require_trained_stop_token(batch, renderer.stop_token_id)


@pytest.mark.parametrize("everything", [True, False])
def test_a_mask_of_all_or_nothing_is_an_error_before_training(examples, renderer, everything):
    batch = collate(examples[:4], renderer.pad_token_id)
    batch["labels"] = (
        torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
        if everything
        else torch.full_like(batch["labels"], -100)
    )
    with pytest.raises(ValueError, match="100%" if everything else "0%"):
        require_trained_stop_token(batch, renderer.stop_token_id)


def test_trained_padding_is_an_error(examples, renderer):
    batch = collate(examples[:4], renderer.pad_token_id)
    batch["labels"][~batch["attention_mask"].bool()] = renderer.pad_token_id
    with pytest.raises(ValueError, match="padding is trained on"):
        require_trained_stop_token(batch, renderer.stop_token_id)


def test_a_step_of_sft_with_accumulation_equals_one_without(examples, renderer, model_folder, tmp_path):
    weights = {}
    for micro in (8, 2):
        overrides = [
            f"output_dir={tmp_path}/{micro}", f"model.path={model_folder}", "training.num_steps=2", "training.sequences_per_step=8",
            f"training.micro_batch_size={micro}", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.0001", "optimizer.schedule=constant",
        ]  # fmt: skip
        (tmp_path / str(micro)).mkdir()
        result = train(load_config(RECIPE, overrides), renderer.tokenizer, examples[:64])
        assert 0 < result["trained_share"] < 1
        weights[micro] = load_file(tmp_path / str(micro) / "model.safetensors")
    start = load_file(Path(model_folder) / "model.safetensors")
    for name, tensor in weights[8].items():
        torch.testing.assert_close(weights[2][name], tensor, atol=2e-5, rtol=0)
    assert any((weights[8][n] - start[n]).abs().max() > 1e-4 for n in start)
    assert not list(tmp_path.glob("*/*.bin"))
