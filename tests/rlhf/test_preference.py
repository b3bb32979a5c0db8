"""ORPO's mathematics and trainer: numbers by hand, how a step is cut, resuming."""

import math
import shutil
from dataclasses import asdict

import pytest
import torch
from preference_helpers import make_pairs, recipe
from safetensors.torch import load_file
from torch.testing import assert_close

from rlhf.attention import NAME
from rlhf.lora import adapter_parameters
from rlhf.metrics import read_jsonl
from rlhf.models import load_causal_lm
from rlhf.preference import log1mexp, log_odds, mean_logprobs, odds_ratio_loss
from rlhf.trainers.preference import PairCollator, PairExample, build_trainer, refusal, response_logprobs, train_orpo


@pytest.fixture
def pairs(renderer, demonstrations):
    return make_pairs(renderer, demonstrations)


# ------------------------------------------------------------------------------------------------------------------- mathematics


@pytest.mark.parametrize(
    ("x", "value", "slope"),
    [
        (math.log(0.5), math.log(0.5), -1.0),  # -e^x / (1 - e^x)
        (math.log(0.25), math.log(0.75), -1 / 3),
        (math.log(0.75), math.log(0.25), -3.0),
        (-1e-8, math.log(1e-8), -1e8),
        (-20.0, -2.0611536e-9, -2.0611536e-9),
    ],
)
def test_the_logarithm_of_the_rest_of_a_probability_is_right_to_the_last_digit(x, value, slope):
    x = torch.tensor(x, requires_grad=True)
    result = log1mexp(x)
    result.backward()
    assert_close(result.detach(), torch.tensor(value))
    assert_close(x.grad, torch.tensor(slope))


@pytest.mark.parametrize("certain", [0.0, -1e-8, -1e-6, -1e-4])
@pytest.mark.parametrize("which", [0, 1])
def test_a_response_that_is_as_good_as_certain_leaves_loss_and_gradient_finite(certain, which):
    logprobs = torch.tensor([-0.5, -0.5])
    logprobs[which] = certain
    logprobs.requires_grad_()
    loss = odds_ratio_loss(logprobs[:1], logprobs[1:]).sum()
    loss.backward()
    assert loss.isfinite()
    assert logprobs.grad.isfinite().all()
    assert (loss < 1e-3) == (which == 0) or certain == -1e-4


def test_the_loss_compares_odds():
    # odds 3 and 1/3: -log sigmoid(log 9) = log(1 + 1/9); its slope is -sigmoid(-log 9) = -1/10, times 1 / (1 - P)
    logprobs = torch.tensor([0.75, 0.25]).log().requires_grad_()
    assert_close(log_odds(logprobs.detach()), torch.tensor([3.0, 1 / 3]).log())
    loss = odds_ratio_loss(logprobs[:1], logprobs[1:])
    loss.backward()
    assert_close(loss.detach(), torch.tensor([math.log(10 / 9)]))
    assert_close(logprobs.grad, torch.tensor([-0.4, 0.1 / 0.75]))
    assert_close(odds_ratio_loss(torch.tensor([-1.0]), torch.tensor([-1.0])), torch.tensor([math.log(2)]))


def test_a_sequence_counts_by_the_mean_of_its_tokens_not_by_its_length():
    means = mean_logprobs(torch.tensor([-1.0, -3.0, -2.0, -2.0, -2.0]), torch.tensor([1, 1, 0, 0, 0]), 2)
    assert_close(means, torch.tensor([-2.0, -2.0]))


# ------------------------------------------------------------------------------------------------------------------------ batches


def alone(model, pair, side):
    """Mean log-probability of a response, from a forward pass of its own."""
    ids = pair.prompt_ids + getattr(pair, side)
    logp = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0].float(), -1)
    start = len(pair.prompt_ids)
    return torch.stack([logp[t - 1, ids[t]] for t in range(start, len(ids))])


@pytest.mark.parametrize("share", [True, False])
def test_responses_in_a_batch_have_the_logprobs_and_gradients_of_each_alone(pairs, model_folder, renderer, share):
    twins = [*pairs[:3], PairExample(prompt_ids=pairs[0].prompt_ids, chosen_ids=[7], rejected_ids=[8, 9])]
    batch = PairCollator(renderer.pad_token_id, share)([asdict(p) for p in twins])
    assert batch["input_ids"].shape[0] == (1 if share else 8)
    gradients, means = [], []
    for together in (True, False):
        model = load_causal_lm(model_folder, revision=None, dtype="float32")
        if together:
            model.set_attn_implementation(NAME if share else "sdpa")
            logprobs = response_logprobs(model, batch)
            mean = mean_logprobs(logprobs, batch["sequences"], 8)
        else:
            mean = torch.stack([alone(model, p, side).mean() for side in ("chosen_ids", "rejected_ids") for p in twins])
        (mean * torch.linspace(1, 2, 8)).sum().backward()
        means.append(mean.detach())
        gradients.append({n: p.grad for n, p in model.named_parameters()})
    assert_close(means[0], means[1])
    for name, gradient in gradients[0].items():
        assert_close(gradient, gradients[1][name], atol=2e-6, rtol=1e-4)


def test_a_prompt_stands_once_for_its_two_responses(pairs, renderer):
    batch = PairCollator(renderer.pad_token_id, True)([asdict(p) for p in pairs])
    lengths = [len(p.prompt_ids) + len(p.chosen_ids) - 1 + len(p.rejected_ids) - 1 for p in pairs]
    assert batch["input_ids"].numel() == sum(lengths)
    assert len(batch["targets"]) == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)


def test_pairs_that_are_too_long_or_no_choice_are_refused_with_a_reason(pairs):
    pair = pairs[0]
    assert refusal(pair, max_tokens=pair.longest) is None
    assert refusal(pair, max_tokens=pair.longest - 1) == f"longer than max_tokens {pair.longest - 1}"
    twin = PairExample(prompt_ids=[1], chosen_ids=[2, 3], rejected_ids=[2, 3])
    assert refusal(twin, max_tokens=9) == "both responses are the same tokens"


# ----------------------------------------------------------------------------------------------------------------------- training


def run_orpo(renderer, pairs, config):
    train_orpo(config, renderer.tokenizer, pairs, pad_token_id=renderer.pad_token_id)
    folder = config.output_dir
    return read_jsonl_of(folder), load_file(f"{folder}/model.safetensors")


def read_jsonl_of(folder):
    from pathlib import Path

    return read_jsonl(Path(folder) / "metrics.jsonl")


def by_hand(model, pairs, weight):
    """The loss of the whole step, response by response."""
    chosen, rejected = ([alone(model, p, side) for p in pairs] for side in ("chosen_ids", "rejected_ids"))
    nll = -torch.cat(chosen).mean()
    odds = [torch.stack([lp.mean() for lp in side]).exp() for side in (chosen, rejected)]
    ratio = (odds[0] / (1 - odds[0])) / (odds[1] / (1 - odds[1]))
    return nll + weight * torch.log(1 + 1 / ratio).mean()


@pytest.mark.parametrize("num_pairs", [8, 6])
def test_a_step_of_orpo_is_the_same_however_it_is_cut(pairs, renderer, model_folder, tmp_path, num_pairs):
    """Of eight pairs in micro-batches of 8 or 2; and of six, where an epoch, and with it the step, ends in a micro-batch of 2 instead of 4."""
    pairs = pairs[:num_pairs]
    runs = {
        micro: run_orpo(
            renderer, pairs, recipe("orpo", tmp_path / str(micro), model_folder, f"training.micro_batch_size={micro}")
        )
        for micro in ((8, 2) if num_pairs == 8 else (4, 2))
    }
    (rows, weights), (others, cut) = runs.values()
    expected = by_hand(load_causal_lm(model_folder, revision=None, dtype="float32"), pairs, 1.0)
    assert rows[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for row, other in zip(rows, others, strict=True):
        for key in row:
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-6), key
    for name, tensor in weights.items():
        assert_close(cut[name], tensor, atol=2e-5, rtol=0)


def test_orpo_makes_chosen_responses_likelier_than_rejected_ones(pairs, renderer, model_folder, tmp_path):
    config = recipe("orpo", tmp_path / "run", model_folder, "training.num_steps=12", "optimizer.learning_rate=0.003")
    rows, _ = run_orpo(renderer, pairs, config)
    assert rows[-1]["preference/margin"] > rows[0]["preference/margin"] + 0.1
    assert rows[-1]["preference/nll_chosen"] < rows[0]["preference/nll_chosen"] - 0.5


def test_orpo_resumed_from_a_checkpoint_ends_like_the_uninterrupted_run(pairs, renderer, model_folder, tmp_path):
    steps = ("training.num_steps=4", "training.sequences_per_step=4", "training.micro_batch_size=2")
    straight = recipe("orpo", tmp_path / "a", model_folder, *steps, "training.checkpoint_every=2")
    rows, weights = run_orpo(renderer, pairs, straight)
    shutil.copytree(tmp_path / "a/trainer/checkpoint-2", tmp_path / "b/trainer/checkpoint-2")
    shutil.copy(tmp_path / "a/metrics.jsonl", tmp_path / "b")  # two of its rows are dropped and written again
    resumed, again = run_orpo(renderer, pairs, recipe("orpo", tmp_path / "b", model_folder, *steps))
    assert resumed == rows
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


def test_with_lora_orpo_moves_the_adapters_alone(pairs, renderer, model_folder, tmp_path):
    config = recipe("orpo", tmp_path / "run", model_folder, "model.lora={rank: 4}")
    trainer = build_trainer(config, pairs, pad_token_id=renderer.pad_token_id)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all(".lora_" in name for name in moved)
    assert len(moved) == len(dict(adapter_parameters(trainer.model)))
