"""The benchmark counts work as one would by hand, and prints no ratio for work that was not the same."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

from benchmarks.cases import (
    CASES,
    Group,
    body_parameters,
    count_tokens,
    make_groups,
    padded_work,
    useful_work,
    write_groups,
)
from benchmarks.gates import Entry, Record, compare, ledger_hash
from benchmarks.measuring import measured, ratio_with_interval
from benchmarks.sides import Spec, build
from benchmarks.train_step import Options, run
from benchmarks.whole_step import StepSpec, compare_steps, let_stop, per_token
from benchmarks.zero import Held, alive, census, refusals, storages

from rlhf.config import Architecture

MODEL = Architecture(
    hidden_size=2, intermediate_size=3, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, max_positions=9
)
LIVE = Group(prompt=[5, 6, 7], completions=[[8, 1], [9, 9, 1]], rewards=[1.0, 0.0], logprobs=[])
DEAD = Group(prompt=[5, 6], completions=[[1], [1]], rewards=[1.0, 1.0], logprobs=[])


def test_tokens_are_counted_from_the_padded_to_the_trained():
    tokens = count_tokens([LIVE, DEAD])
    assert tokens.padded == 4 * (3 + 3)
    assert tokens.real == (3 + 2) + (3 + 3) + (2 + 1) + (2 + 1)
    assert tokens.unique == (3 + 2 + 3) + (2 + 1 + 1)
    assert tokens.trained == 3 + 1 + 2
    assert tokens.scored == 2 + 3


def test_useful_work_is_that_of_groups_with_signal_with_each_prompt_once():
    assert body_parameters(MODEL) == 2 * (2 + 2 + 2) + 2 * 2 + 3 * 2 * 3  # q, k, v; o; gate, up, down
    work = useful_work([LIVE, DEAD], MODEL, vocabulary=5)
    # 6 tokens, of which the prompt's first 2 need only their 2 x 2 x 2 weights of keys and values in the one, last, layer
    assert work.body == 6 * (34 * 6 - (34 - 8) * 2)
    # prompt 1 + 2 + 3 pairs of which 1 + 2 are not needed, completions 4 and 4 + 5
    assert work.attention == 12 * 2 * (19 - 3)
    assert work.head == 6 * 5 * 2 * 5


def test_padded_work_is_that_of_rows_as_long_as_the_longest():
    plain = padded_work([LIVE], MODEL, 5, checkpointing=False, all_positions=True)
    assert (plain.body, plain.attention, plain.head) == (6 * 34 * 12, 12 * 2 * 2 * 36, 8 * 5 * 2 * 12)
    recomputed = padded_work([LIVE], MODEL, 5, checkpointing=True, all_positions=False)
    assert (recomputed.body, recomputed.attention, recomputed.head) == (8 * 34 * 12, 16 * 2 * 2 * 36, 8 * 5 * 2 * 5)


def test_the_share_without_signal_changes_rewards_and_not_lengths():
    half, none = (make_groups(CASES["gsm8k"], zero_share=share) for share in (0.5, 0.0))
    assert [g.has_signal for g in none] == [True] * 4
    assert sum(g.has_signal for g in half) == 2
    assert [[len(c) for c in g.completions] for g in half] == [[len(c) for c in g.completions] for g in none]


def record(gradient, ledger="same"):
    tensors = {"w": torch.tensor(gradient)}
    return Record(
        ledger=ledger, gradients=tensors, deltas={"w": -1e-3 * tensors["w"].sign()}, logprobs={"a": torch.zeros(2)}
    )


def test_gates_pass_what_is_equal_and_name_what_is_not():
    ours = record([3.0, 4.0])
    figures, failures = compare(ours, record([3.0, 4.0]), dtype="fp32", reference=None)
    assert failures == []
    assert figures["grad_rel_err"] == 0
    figures, failures = compare(ours, record([3.0, 4.001]), dtype="fp32", reference=None)
    assert figures["grad_rel_err"] == pytest.approx(0.001 / 5, rel=1e-3)
    assert [f.split()[0] for f in failures] == ["grad_rel_err", "grad_worst_tensor"]
    assert compare(ours, record([3.0, 4.0], ledger="other"), dtype="fp32", reference=None)[0] == {}


@pytest.mark.parametrize(("ours", "peers", "passes"), [(0.0105, 0.01, True), (0.02, 0.01, False)])
def test_in_bfloat16_ours_may_be_a_tenth_further_from_float32_than_the_peer(ours, peers, passes):
    exact = record([1.0, 0.0])
    failures = compare(record([1.0, ours]), record([1.0, peers]), dtype="bf16", reference=exact)[1]
    assert (failures == []) == passes


@pytest.mark.parametrize(
    "change", [{"completion": (3, 4)}, {"advantage": 0.5}, {"masked": 2}, {"denominator": 9}, {"prompt": (1,)}]
)
def test_the_ledger_sees_every_field_and_no_order(change):
    entry = Entry((1, 2), (3,), 0.25, 1, 10)
    other = replace(entry, prompt=(7,))
    assert ledger_hash([entry, other]) == ledger_hash([other, entry])
    assert ledger_hash([entry, other]) != ledger_hash([replace(entry, **change), other])


def test_the_ratio_is_of_medians_and_its_interval_holds_it():
    ratio, (low, high) = ratio_with_interval([8.0, 9.0, 10.0], [2.0, 3.0, 4.0])
    assert ratio == 3.0
    assert low <= ratio <= high
    assert (low, high) == (2.0, 5.0)


def test_a_peak_that_is_gone_by_the_end_is_measured():
    with measured() as sample:
        torch.ones(64 * 2**20, dtype=torch.uint8)
    assert 60 * 2**20 < sample.peak < 100 * 2**20
    assert sample.cpu > 0


TINY = Options(case="gsm8k", against="trl", repeats=1, scale=0.05, settings=("off:8",))


@pytest.mark.long
@pytest.mark.slow
def test_on_a_tiny_scale_both_sides_do_the_same_work():
    figures, failures = run(
        replace(TINY, dtype="bf16", scale=0.25)
    )  # rounding in bfloat16 averages out over more tokens
    assert failures == []
    assert figures["ratio_cpu"] > 1
    assert 0 < figures["share_of_limit"] < 1
    assert figures["tokens"]["padded"] > figures["tokens"]["trained"]


@pytest.mark.long
@pytest.mark.slow
def test_no_ratio_when_one_side_got_another_reward_for_one_completion(tmp_path):
    groups = make_groups(CASES["gsm8k"], zero_share=0.5, scale=0.05)
    groups = [replace(g, logprobs=[[0.0] * len(c) for c in g.completions]) for g in groups]
    groups[0].rewards[3] = 1.0 - groups[0].rewards[3]
    write_groups(groups, tmp_path / "tampered.json")
    figures, failures = run(TINY, peer_rollouts=tmp_path / "tampered.json")
    assert len(failures) == 1
    assert failures[0].startswith("the token ledgers differ")
    assert not any(key.startswith("ratio") for key in figures)


def test_a_random_model_is_made_to_stop_after_so_many_tokens_in_the_mean():
    model, _ = build(Spec(side="ours", rollouts="", folder="", tiny=True))
    let_stop(model, 20)
    tokens = torch.randint(4, 16384, (4, 100), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        chance = model(input_ids=tokens).logits.softmax(-1)[..., 1]
    assert chance.mean().item() == pytest.approx(1 / 20, rel=0.2)
    assert chance.std() < 0.5 / 20


def test_seconds_are_divided_by_the_tokens_they_went_to():
    assert per_token([{"cpu": 3.0, "tokens": 500}, {"cpu": 1.0, "tokens": 1500}], "cpu") == 2.0


@pytest.mark.long
@pytest.mark.slow
def test_whole_steps_of_both_sides_sample_completions_of_the_same_lengths():
    figures = compare_steps(StepSpec(side="ours", folder="", engine="transformers", scale=0.1, steps=2), against="trl")
    # 32 completions of about 15 tokens, geometric: the mean of two batches lies within 40 % of that
    for side in ("ours", "peer"):
        assert figures[side]["tokens"] == pytest.approx(32 * 14.5, rel=0.4)
    assert figures["ratio_cpu"] > 0
    assert figures["parts"].keys() >= {"rollout", "train", "sync"}


def zero_row(**changes):
    held = {"parameters": 100, "optimizer": 300, "gradients": 100, "bucket": 0, "resident": 0}
    row = {
        "model": "dense", "dtype": "fp32", "zero": "none", "ranks": 1, "losses": [1.0, 0.5, 0.0], "logprob_error": 0.0, "held": [held],
    }  # fmt: skip
    return row | changes


def test_views_of_one_buffer_are_counted_once():
    buffer = torch.zeros(100)
    assert sum(storages([buffer[:10], buffer[5:], torch.zeros(3)]).values()) == 400 + 12


def test_what_an_optimizer_steps_and_keeps_is_told_from_the_models_parameters():
    model = torch.nn.Linear(100, 10, bias=False)
    optimizer, held = torch.optim.AdamW(model.parameters()), Held()
    with census(alive(), [model], held):
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 100)).sum().backward()
            optimizer.step()
    assert held.parameters == 4 * 1000
    assert held.optimizer == 2 * 4 * 1000 + 4  # two moments, and the step
    assert held.gradients >= 4 * 1000


def test_a_stage_that_shards_nothing_or_computes_something_else_is_refused():
    half = {"parameters": 50, "optimizer": 150, "gradients": 50, "bucket": 0, "resident": 0}
    alone, one = zero_row(), zero_row(zero="zero3")
    two = zero_row(zero="zero3", ranks=2, held=[half, half])
    assert refusals([alone, one, two]) == []
    assert "each rank holds 1.000" in refusals([alone, one, two | {"held": [half, one["held"][0]]}])[0]
    assert "differ by 0.1 of their range" in refusals([alone, one, two | {"losses": [1.0, 0.6, 0.0]}])[0]
    assert "0.3 nats" in refusals([alone, two | {"logprob_error": 0.3}])[0]
    assert refusals([zero_row(dtype="bf16", logprob_error=0.01)]) == []
