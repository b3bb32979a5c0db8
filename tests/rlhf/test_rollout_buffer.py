"""A rollout batch under way survives the disk unchanged, and is dealt out anew to other numbers of ranks."""

import json
import random
from dataclasses import fields

import numpy as np
import pytest
import torch

from rlhf.experience import Experience
from rlhf.metrics import Metrics
from rlhf.rollout_buffer import PER_TOKEN, RolloutBuffer, from_files, share_of, to_files
from rlhf.training_state import restore_rank, write_rank
from rlhf.types import Prompt, Rollout, Score, StepReward


def rollout(name, length):
    return Rollout(
        prompt=Prompt(id=name[0], token_ids=(1, 2), question="⅓?", reference="1"),
        token_ids=tuple(range(10, 10 + length)),
        logprobs=tuple(-0.1 / (i + 3) for i in range(length)),  # no float32 has these values
        finish_reason="stop",
        text=f"{name} \ud800 not UTF-8",
        policy_version=7,
        weight=0.3,
    )


def buffer(*names, **per_token):
    """Rollouts of 2, 3, 4… tokens."""
    rollouts = [rollout(name, 2 + i) for i, name in enumerate(names)]
    metrics = Metrics()
    metrics.add("rollout/length", total=0.1, count=3)
    experience = Experience(
        rollouts,
        [
            Score(verdict="undecided", value=None, reason="timeout")
            if i == 0
            else Score(verdict="wrong", value=0.1 * i, components={"format": 1 / 3}, steps=(StepReward(1, -0.5),))
            for i in range(len(names))
        ],
        tuple(torch.randn(len(r.token_ids)) for r in rollouts),
        torch.tensor([i > 0 for i in range(len(names))]),
        **per_token,
    )
    return RolloutBuffer(experience, metrics, {"train": 0.1}, steps_taken=1)


def assert_equal(one, other):
    for name in ("rollouts", "scores"):
        assert getattr(one.experience, name) == getattr(other.experience, name)
    for name in PER_TOKEN:
        a, b = getattr(one.experience, name), getattr(other.experience, name)
        assert (a is None) == (b is None)
        assert all(torch.equal(x, y) for x, y in zip(a or (), b or (), strict=True)), name
    assert torch.equal(one.experience.trained, other.experience.trained)
    assert (one.metrics.pairs(), one.seconds, one.steps_taken) == (
        other.metrics.pairs(),
        other.seconds,
        other.steps_taken,
    )


def test_no_field_of_an_experience_is_left_out():
    assert {f.name for f in fields(Experience)} == {"rollouts", "scores", "trained", *PER_TOKEN}


@pytest.mark.parametrize("known", [False, True])
def test_a_buffer_comes_back_from_its_files_as_it_was(known):
    extra = (
        {"old_logprobs": (torch.zeros(0), torch.randn(3))} if known else {}
    )  # the first is not computed, it has no advantage
    before = buffer("a1", "a2", **extra)
    tensors, document = to_files(before)
    assert_equal(from_files(tensors, json.loads(json.dumps(document))), before)


def test_each_optimizer_step_keeps_its_rollouts_whatever_the_number_of_ranks():
    # two prompts a rank, one in each of two mini-batches, two samples each
    ranks = [buffer("a1", "a2", "b1", "b2"), buffer("c1", "c2", "d1", "d2")]

    def names(part):
        return [r.text[:2] for r in part.experience.rollouts]

    one = share_of(ranks, 0, 1, minibatches=2)
    assert names(one) == ["a1", "a2", "c1", "c2", "b1", "b2", "d1", "d2"]
    assert one.metrics.pairs() == {"rollout/length": (0.2, 6)}
    assert [a.tolist() for a in one.experience.advantages[2:4]] == [
        a.tolist() for a in ranks[1].experience.advantages[:2]
    ]
    for rank in range(2):
        assert_equal(share_of(ranks, rank, 2, minibatches=2), ranks[rank])
    back = [share_of([one], rank, 2, minibatches=2) for rank in range(2)]
    assert [names(part) for part in back] == [names(part) for part in ranks]
    assert back[1].metrics.pairs() == {}  # counted once


def draw():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(1).item()


def test_the_random_state_of_a_rank_goes_on_where_it_was(tmp_path):
    draw()  # a normal of each kind is cached, a second one of its pair
    write_rank(tmp_path, 0, {})
    expected = [draw() for _ in range(3)]
    assert restore_rank(tmp_path, 0, 1, saved_ranks=1, minibatches=1) == {}
    assert [draw() for _ in range(3)] == expected
