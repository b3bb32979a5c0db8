"""A reward model behind a server that fails, or answers for something else than it was asked."""

import json
from pathlib import Path

import pytest
from scripted_server import Reply, free_url, serving

import rlhf.endpoint as endpoint
from reward_models.outcome import STATISTICS
from reward_models.outcome_server import ServedOutcomeModel
from rlhf.config import RewardModelReward, RewardServerReward, load_config
from rlhf.types import Prompt, Rollout


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / STATISTICS).write_text(json.dumps({"mean": 10.0, "std": 4.0}))
    return str(tmp_path)


def model(url, folder, **changes):
    return ServedOutcomeModel(
        RewardServerReward(
            name="rm", kind="reward_model", url=url, path=folder, **({"attempts": 3, "batch_size": 2} | changes)
        )
    )


def answer(body, value=lambda sequence: float(sum(sequence)), extra=0):
    rows = [{"index": i, "probs": [value(s)]} for i, s in enumerate(body["input"])]
    return {"data": rows[::-1], "usage": {"prompt_tokens": sum(map(len, body["input"])) + extra}}


def test_each_sequence_gets_its_own_score_whatever_the_order_of_batches_and_answers(folder):
    with serving(lambda body, attempt: answer(body)) as server:
        given = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10], [11]]
        assert model(server.url, folder).raw_scores(given) == [6.0, 4.0, 11.0, 34.0, 11.0]
        assert len(server.requests) == 3
        assert server.requests[0]["use_activation"] is False
        assert server.requests[0]["add_special_tokens"] is False


def test_a_score_is_standardised_by_the_models_statistics(folder):
    prompt = Prompt(id="p", token_ids=(1, 2), question="q", reference="2")
    given = [
        Rollout(prompt=prompt, token_ids=(t,), logprobs=(0.0,), finish_reason="stop", text="", policy_version=0)
        for t in (3, 15)
    ]
    with serving(lambda body, attempt: answer(body)) as server:
        assert model(server.url, folder).scorer()(given) == [-1.0, 2.0]  # (6 - 10) / 4 and (18 - 10) / 4
        assert model(server.url, folder).scorer()([]) == []


@pytest.mark.parametrize(
    "fault",
    [
        lambda body: Reply({}, status=500),
        lambda body: Reply(b'{"data": ['),
        lambda body: Reply(answer(body), delay=30.0),
        lambda body: answer(body, extra=1),
        lambda body: answer(body, extra=-1),
        lambda body: answer(body, value=lambda s: None),
        lambda body: answer(body, value=lambda s: float("nan")),
        lambda body: {"data": [{"index": 0, "probs": [0.1, 0.9]}] * 2, "usage": {"prompt_tokens": 4}},
        lambda body: {"data": [{"index": 0, "probs": [0.1]}], "usage": {"prompt_tokens": 4}},
        lambda body: {"data": []},
        lambda body: {"choices": [{"text": "0"}]},
    ],
    ids=["500", "half", "30_s", "added_bos", "cut", "null", "nan", "two_labels", "one_missing", "empty", "chat"],
)
def test_what_is_no_score_is_none_and_never_a_number(folder, fault, capsys):
    def script(body, attempt):
        return fault(body) if [1, 2] in body["input"] else answer(body)

    with serving(script) as server:
        found = model(server.url, folder, timeout_seconds=4.0).raw_scores([[1, 2], [5, 6], [7, 8], [9, 1]])
    assert found == [None, None, 15.0, 10.0]
    assert "rewards.rm: 2 of 4 completions without a score" in capsys.readouterr().out


def test_a_fault_that_passes_is_retried(folder):
    with serving(lambda body, attempt: answer(body) if attempt == 2 else Reply({}, status=503)) as server:
        assert model(server.url, folder).raw_scores([[1, 2], [5, 6]]) == [3.0, 11.0]


def test_a_server_that_is_not_there_or_holds_no_reward_model_is_named_before_training(folder):
    with pytest.raises(ValueError, match=r"rewards.rm.url .*Connect.*--runner pooling"):
        model(free_url(), folder).connect()
    with (
        serving(lambda body, attempt: Reply({"error": "no classify"}, status=404)) as server,
        pytest.raises(ValueError, match="HTTP 404.*no classify"),
    ):
        model(server.url, folder).connect()
    two = {"data": [{"index": 0, "probs": [0.1, 0.9]}], "usage": {"prompt_tokens": 1}}
    with serving(lambda body, attempt: two) as server, pytest.raises(ValueError, match="it answered .*of one label"):
        model(server.url, folder).connect()


def test_without_its_statistics_a_served_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rewards.rm.path is .*has no reward_statistics.json; copy it there"):
        model("http://h", str(tmp_path))


def test_a_likelihood_is_not_asked_of_a_server_that_gives_classifications(folder):
    (Path(folder) / STATISTICS).write_text(json.dumps({"mean": 10.0, "std": 4.0, "head": "likelihood"}))
    with pytest.raises(ValueError, match="head likelihood, which vLLM does not serve; leave out rewards.rm.url"):
        model("http://h", folder)


def test_a_url_decides_where_the_model_is():
    def reward(options):
        return load_config(
            "recipes/tiny/grpo.yaml", [f"rewards=[{{name: correctness}}, {{name: reward_model, path: x{options}}}]"]
        ).rewards[1]

    assert type(reward("")) is RewardModelReward
    assert type(reward(", url: 'http://h:1'")) is RewardServerReward
    with pytest.raises(ValueError, match="unknown key 'rewards.1.RewardServerReward.placement'"):
        reward(", url: 'http://h:1', placement: sharded")
