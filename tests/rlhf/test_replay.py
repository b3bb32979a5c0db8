"""Past correct completions for groups that are wrong from end to end."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from online_helpers import G, config
from torch.testing import assert_close

from rlhf.config import Replay
from rlhf.metrics import Metrics
from rlhf.replay import ReplayBuffer, Success, successes
from rlhf.types import Prompt, Rollout, Score

ON = ("replay={max_age_batches: 3}", "algorithm.sampler_correction=truncate")


def prompt(name):
    return Prompt(id=name, token_ids=(1, 2), question=name, reference="")


def rollout(name, *tokens, version=0, logprob=-1.0):
    return Rollout(
        prompt=prompt(name), token_ids=tokens or (5,), logprobs=(logprob,) * max(len(tokens), 1), finish_reason="stop", text="",
        policy_version=version,
    )  # fmt: skip


def score(verdict):
    return Score(verdict=verdict, value={"correct": 1.0, "wrong": 0.0}.get(verdict))


def verdicts(text):
    return [score({"c": "correct", "w": "wrong", "?": "undecided"}[letter]) for letter in text]


def held(buffer):
    return {p.id: [s.rollout.token_ids[0] for s in of_problem] for p, of_problem in buffer.kept.items()}


def test_only_problems_that_are_right_and_wrong_are_remembered():
    rollouts = [rollout(name, i) for name in "abcd" for i in range(3)]
    found = successes(rollouts, verdicts("ccw" + "ccc" + "www" + "?wc"), size=3, batch=4)
    assert [(s.batch, s.rollout.prompt.id, s.rollout.token_ids) for s in found] == [
        (4, "a", (0,)), (4, "a", (1,)), (4, "d", (2,)),
    ]  # fmt: skip


def test_the_newest_of_each_problem_stay_and_the_oldest_problem_leaves_first():
    buffer = ReplayBuffer(Replay(capacity=3, per_problem=2), 3)
    buffer.add([Success(0, rollout("a", i), score("correct")) for i in (1, 2, 3)])
    assert held(buffer) == {"a": [2, 3]}
    buffer.add([Success(1, rollout("b", 4), score("correct"))])
    buffer.add([Success(2, rollout("a", 5), score("correct"))])
    assert held(buffer) == {"b": [4], "a": [3, 5]}
    buffer.add([Success(3, rollout("c", 6), score("correct"))])
    assert held(buffer) == {"a": [3, 5], "c": [6]}


def test_a_group_that_is_all_wrong_gets_a_past_success_and_no_other_group_does():
    buffer = ReplayBuffer(Replay(max_age_batches=5, per_group=1), 2)
    past = {name: rollout(name, 9, version=3) for name in "abcd"}
    buffer.add([Success(10, past[name], score("correct")) for name in "abc"])
    now = [replace(rollout(name, i), weight=0.5) for name in "abcd" for i in range(2)]
    metrics = Metrics()
    rollouts, scores = buffer.rescue(now, verdicts("ww" + "cw" + "w?" + "ww"), batch=12, metrics=metrics)
    assert rollouts == [now[0], replace(past["a"], weight=0.5), *now[2:]]
    assert [s.verdict for s in scores] == [
        "wrong",
        "correct",
        "correct",
        "wrong",
        "wrong",
        "undecided",
        "wrong",
        "wrong",
    ]
    found = {key: total / count for key, (total, count) in metrics.pairs().items()}
    assert found == {"replay/size": 3, "replay/rescued": 1 / 4, "replay/age": 2}
    assert buffer.rescue(now[:2], verdicts("ww"), batch=16, metrics=Metrics())[0] == now[:2]  # too old by then


def test_a_buffer_goes_on_from_a_checkpoint():
    buffer = ReplayBuffer(Replay(), 2)
    buffer.add([Success(i, rollout(name, i, 7, logprob=-0.1 * i), score("correct")) for i, name in enumerate("abab")])
    again = ReplayBuffer(Replay(), 2)
    tensors, document = buffer.to_files()
    again.restore(tensors, json.loads(json.dumps(document)))
    assert again == buffer
    assert list(again.kept) == list(buffer.kept)
    empty = ReplayBuffer(Replay(), 2)
    empty.restore(*ReplayBuffer(Replay(), 2).to_files())
    assert len(empty) == 0


def lucky(rollouts):
    """Right by chance at first, and then never again."""
    right = [r.token_ids[0] % 2 == 0 and r.policy_version < 5 for r in rollouts]
    return [Score(verdict="correct" if r else "wrong", value=float(r)) for r in right]


def test_a_past_completion_is_weighted_by_how_likely_it_is_now_up_to_the_bound(make_trainer, captured):
    trainer = make_trainer(*ON, "algorithm.sampler_correction_max=2.0", "guards.max_kl_stale=100")
    fresh = trainer.sample(trainer.prompts[:4], 0)
    trainer.updater.policy_version = 1
    fresh = [replace(r, policy_version=1) for r in fresh]
    gradients = []
    for shift in (0.0, 0.5, 1.0):  # its sampler found its tokens less likely by so many nats
        old = replace(fresh[0], policy_version=0, logprobs=tuple(x - shift for x in fresh[0].logprobs))
        trainer.replay.kept = {old.prompt: [Success(0, old, score("correct"))]}
        rollouts, scores = trainer.replay.rescue(
            fresh, verdicts("w" * 4 * G), batch=1, metrics=Metrics()
        )  # the other groups have nothing to learn from
        only = [rollouts[i] if i == G - 1 else fresh[i] for i in range(4 * G)]
        judged = trainer.judge(only, scores, Metrics())
        alone = [a if i == G - 1 else torch.zeros_like(a) for i, a in enumerate(judged.advantages)]
        trainer.updater.update(replace(judged, advantages=tuple(alone)), Metrics(), batch=1)
        trainer.updater.policy_version = 1
        gradients.append(captured[-1])
    for name, gradient in gradients[0].items():
        assert_close(gradients[1][name], gradient * torch.tensor(0.5).exp(), atol=1e-6, rtol=1e-3)
        assert_close(gradients[2][name], gradient * 2.0, atol=1e-6, rtol=1e-3)
    assert any(gradient.abs().max() > 1e-4 for gradient in gradients[0].values())


def test_a_run_with_replay_resumes_bit_for_bit_at_any_step(make_trainer):
    from test_resume import rows_of, weights_of

    options = (
        *ON, "training.num_batches=5", "training.passes_per_batch=2", "training.checkpoint_every_steps=1", "training.keep_checkpoints=100",
        "guards.max_kl_stale=100",
    )  # fmt: skip
    whole = make_trainer(*options, folder="whole", reward_fn=lucky)
    whole.train()
    rows, weights = rows_of(whole), weights_of(whole)
    assert any(row["replay/rescued"] > 0 for row in rows)
    for step in (5, 6, 8):
        name = f"step-{step:06d}"
        killed = whole.run.folder.with_name(name)
        shutil.copytree(whole.checkpoints / name, killed / "checkpoints" / name)
        shutil.copy(whole.metrics_file, killed)
        resumed = make_trainer(*options, folder=name, reward_fn=lucky)
        resumed.train()
        assert rows_of(resumed) == rows, name
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True)), name
        assert resumed.replay == whole.replay


def test_without_a_correction_or_a_group_of_now_replay_is_refused():
    for changes, message in (
        (["replay={}"], "algorithm.sampler_correction is none"),
        ([ON[1], f"replay={{per_group: {G}}}"], "no completion of now would be left"),
        ([ON[1], "replay={}", "rollout.record_experts=true"], "routers of older policies"),
    ):
        with pytest.raises(ValueError, match=message):
            config(*changes)
