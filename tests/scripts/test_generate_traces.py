"""The stage as a user runs it: a policy of this process, or one behind a server."""

import json
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import generate_traces as script
from scripted_server import serving

from data.records import Demonstration, Problem, read_records, write_records
from rlhf.config import load_config
from rlhf.run import open_run

RIGHT = "<think>\n3 + 4 = 7\n</think>\n\\boxed{7}"
SAID = {
    "a?": [RIGHT, RIGHT, "<think>\n4 + 3 = 7\n</think>\n\\boxed{7}", "<think>\n</think>\n\\boxed{7}"],
    "b?": ["<think>\n3 + 4 = 8\n</think>\n\\boxed{8}"] * 4,
    "c?": ["<think>\n3 + 4"] * 4,
    "d?": [RIGHT] * 4,
}
"""What the policy says of each question, sample by sample; what has no answer was cut off."""


@pytest.fixture
def server():
    asked = {}

    def reply(body, attempt):
        question = body["messages"][-1]["content"]
        n = asked[question] = asked.get(question, -1) + 1
        text = SAID[question.partition("\n\n")[0]][n % 4]
        return {
            "choices": [{"message": {"content": text}, "finish_reason": "stop" if "boxed" in text else "length"}],
            "usage": {"completion_tokens": len(text)},
        }

    with serving(reply) as running:
        yield running


@pytest.fixture
def config_of(tmp_path, model_folder, server):
    def make(name="traces", **changes):
        problems = [Problem(id=q[0], question=q, answer="7" if q != "d?" else "$$") for q in SAID]
        write_records(problems, tmp_path / "problems.jsonl")
        raw = {
            "stage": "generate_traces",
            "output_dir": str(tmp_path / name),
            "policy": {
                "path": model_folder,
                "server": {"url": server.url, "prompts": "messages", "logprobs": False, "concurrency": 1},
            },
            "problems": str(tmp_path / "problems.jsonl"),
            "rollout": {
                "samples_per_prompt": 4,
                "max_prompt_tokens": 100,
                "max_new_tokens": 40,
                "problems_per_chunk": 2,
            },
            **changes,
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_config(path)

    return make


def run(config):
    script.generate_traces(config, open_run(config))
    folder = Path(config.output_dir)
    return read_records(Demonstration, folder / script.TRACES), json.loads((folder / "manifest.json").read_text())


def test_what_the_grader_accepts_becomes_demonstrations_and_everything_else_is_counted(config_of, model_folder):
    traces, manifest = run(config_of(max_per_problem=9))
    assert sorted(t.response for t in traces) == sorted({RIGHT, SAID["a?"][2]})
    assert {t.scratchpad for t in traces} == {"3 + 4 = 7", "4 + 3 = 7"}
    assert all(t.answer == "7" and t.sampler.startswith(model_folder) for t in traces)
    assert manifest["problems"] == {"in": 4, "with_traces": 1, "skipped": {"wrong": 1, "truncated": 1, "undecided": 1}}
    assert manifest["completions"] == {
        "in": 16, "kept": 2, "exact duplicate": 1, "without thoughts": 1, "wrong": 4, "truncated": 4, "undecided": 4,
    }  # fmt: skip


def test_a_record_is_trained_on_as_the_policy_wrote_it(config_of, renderer):
    [trace], _ = run(config_of())
    prompt, response = renderer.demonstration_ids(trace)
    assert prompt == renderer.prompt_ids("a?")
    assert response == renderer.response_ids(trace.response)


def test_a_served_policy_is_asked_with_the_thinking_budget_and_the_trace_carries_it_on(config_of, server, tmp_path):
    config = config_of()
    write_records([Problem(id="a", question="a?", answer="7", think="long")], tmp_path / "problems.jsonl")
    [trace], _ = run(config)
    assert trace.think == "long"
    assert {body["messages"][-1]["content"] for body in server.requests} == {"a?\n\nthink: long"}


def test_where_nothing_is_left_the_error_says_what_everything_failed_by(config_of):
    with pytest.raises(ValueError, match=r"none of 4 completions became a trace .*'wrong': 4"):
        run(config_of("nothing", first_problem=1, num_problems=1))


def test_a_process_model_that_is_not_there_is_named_before_anything_is_sampled(config_of, server):
    with pytest.raises(ValueError, match="process_model.path"):
        run(config_of("unjudged", process_model={"path": "/nowhere"}))
    assert not server.requests
