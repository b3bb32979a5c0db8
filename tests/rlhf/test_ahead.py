"""Sampling ahead: which batches are under way when, and what stops the run."""

import threading
import time

import pytest

from rlhf.ahead import Ahead
from rlhf.config import Guards
from rlhf.guards import require_fresh, require_same_policy
from rlhf.types import Prompt, Rollout

PROMPT = Prompt(id="p", token_ids=(1,), question="?", reference="1")


def rollout(version):
    return Rollout(
        prompt=PROMPT, token_ids=(1,), logprobs=(0.0,), finish_reason="stop", text="", policy_version=version
    )


class Sampler:
    """Batches that take until they are let through; tells what happened in which order."""

    def __init__(self):
        self.happened, self.gates = [], {}

    def __call__(self, batch):
        self.happened.append(f"begins {batch}")
        assert self.gates.setdefault(batch, threading.Event()).wait(5)
        self.happened.append(f"ends {batch}")
        return batch

    def let(self, *batches):
        for batch in batches:
            self.gates.setdefault(batch, threading.Event()).set()


def test_weights_are_replaced_between_batches_though_more_of_them_wait_in_the_queue():
    sampler = Sampler()
    ahead = Ahead(sampler, first=0, ready={})
    ahead.go_to(2)
    while "begins 0" not in sampler.happened:
        time.sleep(0.001)

    def push():
        with ahead.between_batches():
            sampler.happened.append("push")

    pushing = threading.Thread(target=push)
    pushing.start()
    while not ahead._wanted:
        time.sleep(0.001)
    sampler.let(0, 1, 2)
    assert [ahead.take(batch) for batch in (0, 1, 2)] == [0, 1, 2]
    pushing.join()
    assert sampler.happened == ["begins 0", "ends 0", "push", "begins 1", "ends 1", "begins 2", "ends 2"]
    ahead.close()


def test_batches_a_checkpoint_brought_are_not_sampled_again_and_all_that_wait_are_known():
    sampler = Sampler()
    sampler.let(6, 7)
    ahead = Ahead(sampler, first=5, ready={5: "stored"})
    ahead.go_to(6)
    assert ahead.all_that_wait() == {5: "stored", 6: 6}
    assert ahead.take(5) == "stored"
    ahead.go_to(7)
    assert (ahead.take(6), ahead.take(7)) == (6, 7)
    assert "begins 5" not in sampler.happened
    ahead.close()


def test_what_sampling_raises_stops_the_run():
    def sample(batch):
        raise RuntimeError("no vLLM server was ready")

    ahead = Ahead(sample, first=0, ready={})
    ahead.go_to(1)
    with pytest.raises(RuntimeError, match="no vLLM server"):
        ahead.take(0)
    ahead.close()


@pytest.mark.parametrize(
    ("version", "max_age", "fine"), [(6, 0, True), (5, 0, False), (5, 1, True), (4, 1, False), (7, 3, False)]
)
def test_rollouts_are_as_old_as_allowed_and_never_from_the_future(version, max_age, fine):
    if fine:
        require_fresh([rollout(6), rollout(version)], 6, max_age=max_age)
    else:
        with pytest.raises(RuntimeError, match=f"come from policy version {version} while the trainer is at 6"):
            require_fresh([rollout(6), rollout(version)], 6, max_age=max_age)


def test_stale_rollouts_have_a_bound_of_their_own():
    guards = Guards(max_kl_sampler=0.1, max_kl_stale=0.5)
    require_same_policy(0.3, guards, stale=True)
    with pytest.raises(RuntimeError, match="moved too far since these rollouts"):
        require_same_policy(0.6, guards, stale=True)
    with pytest.raises(RuntimeError, match=r"above guards.max_kl_sampler 0.1"):
        require_same_policy(0.3, guards)
    with pytest.raises(RuntimeError):
        require_same_policy(float("nan"), guards, stale=True)
