"""Real vLLM servers: two replicas of a tiny model on this machine."""

import dataclasses
import shutil
import signal
import socket
import threading
import time

import psutil
import pytest
import torch
from online_helpers import config

import rlhf.rollout.replicas as replicas
from rlhf.config import to_yaml
from rlhf.logprobs import token_logprobs
from rlhf.metrics import CLOCK
from rlhf.models import load_causal_lm
from rlhf.rollout.engine import Sampling, build_engine
from rlhf.run import RECIPE
from rlhf.weight_sync import Probe, WeightSync, send_weights

pytestmark = pytest.mark.slow


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def server_config(model_folder, first_port, *overrides):
    return config(
        f"policy.path={model_folder}", "rollout.engine=server", f"rollout.server={{replicas: 2, first_port: {first_port}}}",
        "rollout.max_new_tokens=30", "training.tokens_per_micro_batch=800", *overrides,
    )  # fmt: skip


@pytest.fixture(scope="module")
def engine(model_folder, renderer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("servers")
    cfg = server_config(model_folder, min(free_ports(9)))
    (folder / RECIPE).write_text(to_yaml(cfg))
    engine = build_engine(
        cfg.rollout, model_folder, stop_token_id=renderer.stop_token_id, decode=renderer.decode, run_folder=folder
    )
    send_weights(engine, load_causal_lm(model_folder, revision=None, dtype="float32"), policy_version=0)
    until(lambda: engine._replicas.num_ready == 2)
    yield engine
    engine.close()
    until(lambda: not servers(), 10)


def until(condition, seconds=240.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def servers():
    """Processes of replicas, by port."""
    found = [
        p for p in psutil.Process().children(recursive=True) if "vllm.entrypoints.openai.api_server" in p.cmdline()
    ]
    return {int(p.cmdline()[p.cmdline().index("--port") + 1]): p for p in found}


@pytest.fixture(scope="module")
def prompts(renderer, demonstrations):
    return [renderer.prompt(d.id, d.question, d.answer) for d in demonstrations[:10]]


SAMPLING = Sampling(samples_per_prompt=3, temperature=0.8, max_new_tokens=30)


def test_the_servers_logprobs_are_the_trainers_and_a_seed_repeats_its_samples(engine, prompts, model_folder):
    policy = load_causal_lm(model_folder, revision=None, dtype="float32")
    rollouts = engine.generate(prompts, SAMPLING, seed=1)
    assert len(rollouts) == 30
    for r in rollouts[::7]:
        tokens = torch.tensor([[*r.prompt.token_ids, *r.token_ids]])
        logits = policy(input_ids=tokens[:, :-1]).logits[0, len(r.prompt.token_ids) - 1 :]
        expected = token_logprobs(logits, torch.tensor(r.token_ids), temperature=0.8)
        assert torch.tensor(r.logprobs).sub(expected).abs().max() < 1e-4
    again = engine.generate(prompts, SAMPLING, seed=1)
    assert [r.token_ids for r in again] == [r.token_ids for r in rollouts]
    assert [r.token_ids for r in engine.generate(prompts, SAMPLING, seed=2)] != [r.token_ids for r in rollouts]


def moved(model_folder):
    policy = load_causal_lm(model_folder, revision=None, dtype="float32")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return policy


def test_every_replica_answers_for_new_weights_and_one_that_kept_the_old_ones_is_found(
    engine, prompts, model_folder, monkeypatch
):
    policy = moved(model_folder)
    send_weights(engine, policy, policy_version=1)
    probes = [Probe(p.token_ids, (5, 6, 7)) for p in prompts[:2]]
    sync = WeightSync(engine, policy, probes, tolerance=0.05)
    assert len(engine.score(prompts[0].token_ids, (5, 6, 7))) == 2
    assert sync.push(policy_version=2).error < 1e-5
    assert {r.policy_version for r in engine.generate(prompts, SAMPLING, seed=1)} == {2}

    load = engine._load

    async def withheld(replica):  # one replica is told a new version and gets no weights
        if replica.url.endswith(str(min(servers()))):
            await replica.call("POST", "/update_weight_version", {"new_version": engine._replicas.wanted})
        else:
            await load(replica)

    monkeypatch.setattr(engine._replicas, "_loader", withheld)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)
    with pytest.raises(RuntimeError, match="stale rollout weights"):
        sync.push(policy_version=3)
    monkeypatch.undo()
    send_weights(engine, moved(model_folder), policy_version=4)


def test_a_replica_killed_in_the_middle_costs_its_own_requests_and_returns_at_the_right_weights(
    engine, prompts, capsys
):
    long = dataclasses.replace(SAMPLING, samples_per_prompt=16)
    expected = engine.generate(prompts * 3, long, seed=5)
    assert {r.policy_version for r in expected} == {4}
    port = max(servers())
    victim, retried = servers()[port], engine._replicas.num_retried

    def kill():
        until(lambda: sum(len(r.requests) for r in engine._replicas._replicas if r.url.endswith(str(port))) > 5)
        victim.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    rollouts = engine.generate(prompts * 3, long, seed=5)
    killer.join()
    assert [(r.prompt.id, r.token_ids) for r in rollouts] == [(r.prompt.id, r.token_ids) for r in expected]
    assert engine._replicas.num_retried > retried
    assert engine._replicas.num_ready == 1
    until(lambda: engine._replicas.num_ready == 2)  # started again, with weights that came by no push
    assert len(engine.score(prompts[0].token_ids, (5, 6, 7))) == 2
    one, other = engine.score(prompts[0].token_ids, (5, 6, 7))
    assert one == pytest.approx(other, abs=1e-5)
    said = capsys.readouterr().out
    assert "is lost" in said
    assert f"its weights are {engine._label}" in said


def test_a_replica_that_hangs_is_given_up_and_taken_back_when_it_goes_on(engine, prompts, monkeypatch):
    monkeypatch.setattr(replicas, "HEALTH_SECONDS", 1.0)
    victim = servers()[max(servers())]
    expected = engine.generate(prompts, SAMPLING, seed=6)
    victim.send_signal(signal.SIGSTOP)
    try:
        assert [r.token_ids for r in engine.generate(prompts, SAMPLING, seed=6)] == [r.token_ids for r in expected]
        assert engine._replicas.num_ready == 1
    finally:
        victim.send_signal(signal.SIGCONT)
    until(lambda: engine._replicas.num_ready == 2)


def train(make_trainer, engine, folder, *overrides, **options):
    trainer = make_trainer(
        "rollout.engine=server", "rollout.server={replicas: 2}", "rollout.max_new_tokens=30", "training.tokens_per_micro_batch=800",
        "algorithm.sampler_correction=truncate", "training.num_batches=5", "optimizer.learning_rate=0.003", *overrides, folder=folder, engine=engine, **options,
    )  # fmt: skip
    rows = trainer.train()
    return trainer, [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in rows]


def test_sampling_ahead_by_one_batch_is_repeatable_and_trains_on_rollouts_of_the_policy_before(make_trainer, engine):
    trainer, rows = train(make_trainer, engine, "ahead", "training.max_staleness=1", "training.minibatches_per_batch=2")
    assert [row["rollout/age"] for row in rows] == [0, 2, 2, 2, 2]  # optimizer steps: a batch takes two
    assert all(row["policy/kl_sampler"] > 1e-5 for row in rows[1:])
    assert rows[0]["policy/kl_sampler"] < 1e-8
    again, same = train(make_trainer, engine, "again", "training.max_staleness=1", "training.minibatches_per_batch=2")
    assert same == rows
    assert all(map(torch.equal, trainer.unwrapped.parameters(), again.unwrapped.parameters()))


def test_a_run_that_samples_ahead_goes_on_from_any_step_as_if_it_had_not_stopped(make_trainer, engine):
    options = (
        "training.max_staleness=1", "training.minibatches_per_batch=2", "training.num_batches=3", "training.checkpoint_every_steps=1",
        "training.keep_checkpoints=9",
    )  # fmt: skip
    whole, rows = train(make_trainer, engine, "whole", *options)
    checkpoints = sorted(path.name for path in whole.checkpoints.iterdir())
    assert len(checkpoints) == 5
    for name in checkpoints[1:4]:  # after a rollout batch, and in the middle of one
        killed = whole.run.folder.with_name(name)
        shutil.copytree(whole.checkpoints / name, killed / "checkpoints" / name)
        resumed, rest = train(make_trainer, engine, name, *options)
        assert rest == rows[int(name[5:]) // 2 :]
        assert all(map(torch.equal, whole.unwrapped.parameters(), resumed.unwrapped.parameters()))


def test_a_server_killed_in_a_synchronous_run_changes_nothing_of_it(make_trainer, engine):
    options = ("training.max_staleness=0", "algorithm.sampler_correction=none")
    left_alone, rows = train(make_trainer, engine, "left-alone", *options)
    assert all(row["policy/kl_sampler"] < 1e-8 for row in rows)
    victim = servers()[min(servers())]
    threading.Timer(0.5, lambda: victim.send_signal(signal.SIGKILL)).start()
    killed, same = train(make_trainer, engine, "killed", *options)
    assert not victim.is_running()
    assert same == rows
    assert all(map(torch.equal, left_alone.unwrapped.parameters(), killed.unwrapped.parameters()))


def test_weights_replaced_in_flight_mix_within_completions_and_stay_within_the_bound(
    make_trainer, engine, prompts, model_folder
):
    engine._server = engine._server.model_copy(update={"update_in_flight": True})
    found = []
    long = dataclasses.replace(SAMPLING, samples_per_prompt=32, max_new_tokens=60)
    before = engine.policy_version
    sampling = threading.Thread(target=lambda: found.extend(engine.generate(prompts * 6, long, seed=5)))
    sampling.start()
    until(lambda: sum(len(r.requests) for r in engine._replicas._replicas) > 5)
    time.sleep(0.3)
    send_weights(engine, moved(model_folder), policy_version=before + 1)
    sampling.join()
    assert {r.policy_version for r in found} == {before, before + 1}
