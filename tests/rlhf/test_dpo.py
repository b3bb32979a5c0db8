"""DPO on TRL's trainer: what it is given, what it makes of it, and TRL's ORPO beside ours."""

import math
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from preference_helpers import make_pairs, recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf.config import load_config
from rlhf.metrics import read_jsonl
from rlhf.models import load_causal_lm
from rlhf.trainers.dpo import build_trainer, loss_arguments, train_dpo
from rlhf.trainers.preference import PairCollator, PairExample, StepSize, response_logprobs
from rlhf.trainers.preference import build_trainer as build_orpo

RECIPE = Path(__file__).parents[2] / "recipes/tiny/dpo.yaml"


@pytest.fixture
def pairs(renderer, demonstrations):
    return make_pairs(renderer, demonstrations)


def run_dpo(renderer, pairs, config):
    train_dpo(config, renderer.tokenizer, pairs)
    folder = Path(config.output_dir)
    return read_jsonl(folder / "metrics.jsonl"), load_file(folder / "model.safetensors")


def sums_and_lengths(model, pairs, pad):
    """([2, B] log-probabilities of the responses, [2, B] their lengths), chosen first."""
    batch = PairCollator(pad, False)([asdict(p) for p in pairs])
    logprobs = response_logprobs(model, batch).detach()
    sums = torch.zeros(2 * len(pairs)).index_add(0, batch["sequences"], logprobs)
    return sums.view(2, -1), torch.bincount(batch["sequences"]).view(2, -1)


# ------------------------------------------------------------------------------------------------------------------ what TRL gets


def test_trl_gets_our_token_ids_and_cuts_none(pairs, renderer, model_folder, tmp_path):
    long = PairExample(prompt_ids=[20] * 900, chosen_ids=[21] * 400, rejected_ids=[22] * 300)  # TRL's limit is 1,024
    trainer = build_trainer(recipe("dpo", tmp_path / "run", model_folder), renderer.tokenizer, [*pairs[:3], long])
    assert len(trainer.train_dataset) == 4
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    for b, pair in enumerate([*pairs[:3], long]):
        for row, response in ((b, pair.chosen_ids), (b + 4, pair.rejected_ids)):
            real = batch["attention_mask"][row].bool()
            assert batch["input_ids"][row][real].tolist() == pair.prompt_ids + response
            assert batch["input_ids"][row][batch["completion_mask"][row].bool()].tolist() == response


def test_the_share_of_wrong_labels_belongs_to_the_losses_that_read_it():
    with pytest.raises(ValueError, match="loss is sigmoid and wrong_labels is 0.1, which it does not read"):
        load_config(RECIPE, ["wrong_labels=0.1"])
    with pytest.raises(ValueError, match="loss is robust and wrong_labels is 0, so it would be plain DPO"):
        load_config(RECIPE, ["loss=robust"])


def log_sigmoid(x):
    return -torch.log(1 + torch.exp(-x))


@pytest.mark.parametrize("loss", ["sigmoid", "length_normalised", "ipo", "conservative", "robust"])
def test_a_loss_is_that_of_its_paper_on_the_responses_logprobs(pairs, renderer, model_folder, tmp_path, loss):
    doubt = 0.2 if loss in ("conservative", "robust") else 0.0
    config = recipe(
        "dpo", tmp_path / "run", model_folder, f"loss={loss}", f"wrong_labels={doubt}", "reference=frozen", "beta=0.1"
    )
    trainer = build_trainer(config, renderer.tokenizer, pairs)
    with torch.no_grad():  # the policy has moved from the reference
        torch.manual_seed(0)
        for parameter in trainer.model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    policy, reference = (load_causal_lm(model_folder, revision=None, dtype="float32") for _ in range(2))
    policy.load_state_dict(trainer.model.state_dict())
    sums, lengths = sums_and_lengths(policy, pairs, renderer.pad_token_id)
    ratios = sums - sums_and_lengths(reference, pairs, renderer.pad_token_id)[0]
    h = 0.1 * (ratios[0] - ratios[1])
    of_means = ratios[0] / lengths[0] - ratios[1] / lengths[1]
    expected = {
        "sigmoid": -log_sigmoid(h),
        "length_normalised": -log_sigmoid(0.1 * of_means),
        "ipo": (of_means - 5.0).square(),  # 1 / (2 · 0.1)
        "conservative": -0.8 * log_sigmoid(h) - 0.2 * log_sigmoid(-h),
        "robust": (-0.8 * log_sigmoid(h) + 0.2 * log_sigmoid(-h)) / 0.6,
    }[loss].mean()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    trainer._pairs, trainer.current_gradient_accumulation_steps = 8, 1
    found = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch))
    assert h.abs().max() > 0.1
    assert_close(found.detach(), expected, atol=1e-5, rtol=1e-4)


def test_the_weights_of_conservative_dpo_are_worked_out():
    config = load_config(RECIPE, ["loss=conservative", "wrong_labels=0.25"])
    assert loss_arguments(config) == {
        "loss_type": ["sigmoid", "robust"], "loss_weights": [1.5, -0.5], "label_smoothing": 0.25,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------- training


def test_a_step_of_dpo_is_the_same_however_it_is_cut(pairs, renderer, model_folder, tmp_path):
    """With six pairs an epoch ends in a micro-batch of 2 instead of 4, whose pairs TRL by itself would count twice."""
    (rows, weights), (others, cut) = (
        run_dpo(renderer, pairs[:6], recipe("dpo", tmp_path / str(m), model_folder, f"training.micro_batch_size={m}"))
        for m in (4, 2)
    )
    assert rows[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row, other in zip(rows, others, strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(row["grad_norm"], rel=1e-3)
    for name, tensor in weights.items():
        assert_close(cut[name], tensor, atol=2e-5, rtol=0)


def test_the_reference_is_the_model_that_training_starts_from_precomputed_or_kept(
    pairs, renderer, model_folder, tmp_path
):
    runs = {
        kind: run_dpo(renderer, pairs, recipe("dpo", tmp_path / kind, model_folder, f"reference={kind}"))
        for kind in ("precomputed", "frozen")
    }
    for rows, _ in runs.values():
        assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
        assert abs(rows[1]["rewards/margins"]) > 1e-5
    for name, tensor in runs["precomputed"][1].items():
        assert_close(runs["frozen"][1][name], tensor, atol=1e-5, rtol=0)


def test_with_lora_the_reference_is_the_base_and_the_adapters_are_saved(pairs, renderer, model_folder, tmp_path):
    config = recipe("dpo", tmp_path / "run", model_folder, "model.lora={rank: 4}", "optimizer.learning_rate=0.001")
    rows, weights = run_dpo(renderer, pairs, config)
    assert rows[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-5)
    assert rows[1]["rewards/margins"] > 1e-5
    start = load_file(Path(model_folder) / "model.safetensors")
    assert weights.keys() == start.keys()
    assert torch.equal(weights["model.embed_tokens.weight"], start["model.embed_tokens.weight"])
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_dpo_resumed_from_a_checkpoint_ends_like_the_uninterrupted_run(pairs, renderer, model_folder, tmp_path):
    steps = ("training.num_steps=4", "training.sequences_per_step=4", "training.micro_batch_size=2")
    rows, weights = run_dpo(
        renderer, pairs, recipe("dpo", tmp_path / "a", model_folder, *steps, "training.checkpoint_every=2")
    )
    shutil.copytree(tmp_path / "a/trainer/checkpoint-2", tmp_path / "b/trainer/checkpoint-2")
    shutil.copy(tmp_path / "a/metrics.jsonl", tmp_path / "b")
    resumed, again = run_dpo(renderer, pairs, recipe("dpo", tmp_path / "b", model_folder, *steps))
    counted = "num_tokens"  # TRL counts from the start of the process
    assert [{k: v for k, v in row.items() if k != counted} for row in resumed] == [
        {k: v for k, v in row.items() if k != counted} for row in rows
    ]
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


# ---------------------------------------------------------------------------------------------------------------- TRL's own ORPO


@pytest.fixture
def trl_orpo(renderer, model_folder, tmp_path):
    """TRL's experimental trainer on texts, with λ 1, as (loss and NLL of a batch of pairs, its model)."""
    pytest.importorskip("trl.experimental.orpo", reason="TRL has removed it")
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    def make(texts):
        arguments = ORPOConfig(
            output_dir=str(tmp_path / "trl"), beta=1.0, max_length=2048, bf16=False, use_cpu=True, report_to=[], gradient_checkpointing=False,
            per_device_train_batch_size=8, disable_tqdm=True,
        )  # fmt: skip
        model = load_causal_lm(model_folder, revision=None, dtype="float32")
        rows = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in texts]
        return ORPOTrainer(
            model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=renderer.tokenizer
        )

    return make


def ours(pairs, renderer, model_folder, folder):
    """(loss of the pairs as one step, its gradients)"""
    trainer = build_orpo(recipe("orpo", folder, model_folder), pairs, pad_token_id=renderer.pad_token_id)
    trainer._size = StepSize(sum(len(p.chosen_ids) for p in pairs), len(pairs))
    loss = trainer.compute_loss(trainer.model, trainer.data_collator([asdict(p) for p in pairs]))
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}


def theirs(trainer):
    batch = trainer._prepare_inputs(
        trainer.data_collator([trainer.train_dataset[i] for i in range(len(trainer.train_dataset))])
    )
    loss, metrics = trainer.get_batch_loss_metrics(trainer.model, batch)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in trainer.model.named_parameters()}, metrics["nll_loss"], batch


def texts_of(pairs, renderer):
    decode = renderer.tokenizer.decode
    return [(decode(p.prompt_ids), decode(p.chosen_ids[:-1]), decode(p.rejected_ids[:-1])) for p in pairs]


def test_loss_and_gradients_are_those_of_trls_orpo_where_it_trains_on_responses_alone(
    pairs, renderer, model_folder, trl_orpo, tmp_path
):
    """Its NLL is over prompt and response; a prompt of one token, which nothing predicts, leaves the response."""
    short = [
        PairExample(prompt_ids=p.prompt_ids[:1], chosen_ids=p.chosen_ids, rejected_ids=p.rejected_ids) for p in pairs
    ]
    loss, gradients, _, batch = theirs(trl_orpo(texts_of(short, renderer)))
    row = batch["chosen_input_ids"][1]
    assert row[: len(short[1].chosen_ids) + 1].tolist() == short[1].prompt_ids + short[1].chosen_ids
    own, own_gradients = ours(short, renderer, model_folder, tmp_path / "ours")
    assert own == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert_close(own_gradients[name], gradient, atol=1e-6, rtol=1e-4)


def test_with_a_prompt_trls_orpo_trains_on_it_too(pairs, renderer, model_folder, trl_orpo, tmp_path):
    loss, _, nll, _ = theirs(trl_orpo(texts_of(pairs, renderer)))
    own, _ = ours(pairs, renderer, model_folder, tmp_path / "ours")
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    whole = [
        PairExample(prompt_ids=p.prompt_ids[:1], chosen_ids=p.prompt_ids[1:] + p.chosen_ids, rejected_ids=[1])
        for p in pairs
    ]
    sums, lengths = sums_and_lengths(model, whole, renderer.pad_token_id)
    of_everything = -(sums[0].sum() / lengths[0].sum()).item()
    sums, lengths = sums_and_lengths(model, pairs, renderer.pad_token_id)
    of_responses = -(sums[0].sum() / lengths[0].sum()).item()
    assert nll == pytest.approx(of_everything, rel=1e-5)
    assert loss - of_everything == pytest.approx(own - of_responses, rel=1e-4)


def test_trls_logarithm_has_no_gradient_where_a_response_is_certain():
    """Why row 12 of the silent faults is not left to TRL."""
    from trl.experimental.orpo.orpo_trainer import log1mexp as theirs

    for certain in (0.0, -1e-8):
        x = torch.tensor(certain, requires_grad=True)
        theirs(x).backward()
        assert not x.grad.isfinite()
