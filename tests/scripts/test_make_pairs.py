"""The stage as a user runs it, on a policy that was taught how often to be right."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import make_pairs as script
from samples.chunks import Chunks

from data.records import PreferencePair, Problem, read_records, write_records
from reward_models.pairing import Candidate
from rlhf.config import load_config
from rlhf.models import build_qwen3
from rlhf.run import open_run

QUESTION = "How many eggs does she have?"
SAID = {"1": 0.5, "2": 0.25, "3": 0.25}
"""What the policy answers, and how often."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory, renderer, tiny_architecture):
    """Overfitted on the three answers; one in four completions is of a longer kind, which a limit of tokens cuts off."""
    model = build_qwen3(tiny_architecture.model_copy(update={"initializer_range": 0.1}), renderer.tokenizer, seed=0)
    prompt = renderer.prompt_ids(QUESTION)
    responses = [renderer.response_ids(f"<think>\n</think>\n\\boxed{{{answer}}}") for answer in SAID]
    input_ids = torch.tensor([[*prompt, *r] for r in responses])
    weights = torch.tensor(list(SAID.values())).unsqueeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(80):
        logits = model(input_ids=input_ids).logits[:, len(prompt) - 1 : -1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, len(prompt) :], reduction="none")
        optimizer.zero_grad()
        (nats * weights).sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("pairing_policy")
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config_of(tmp_path, policy):
    def make(name, **changes):
        answers = ["1", "1", "9", "$$"]  # the third is never right, nobody can compare anything with the last
        problems = [Problem(id=f"p{i}", question=QUESTION, answer=answer) for i, answer in enumerate(answers)]
        write_records(problems, tmp_path / "problems.jsonl")
        rollout = {
            "engine": "transformers", "samples_per_prompt": 12, "max_prompt_tokens": 100, "max_new_tokens": 40, "dtype": "float32",
            "problems_per_chunk": 2,
        }  # fmt: skip
        raw = {
            "stage": "make_pairs",
            "output_dir": str(tmp_path / name),
            "policy": {"path": policy},
            "problems": str(tmp_path / "problems.jsonl"),
            **changes,
            "rollout": rollout | changes.pop("rollout", {}),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_config(path)

    return make


def run(config):
    script.make_pairs(config, open_run(config))
    folder = Path(config.output_dir)
    return read_records(PreferencePair, folder / script.PAIRS), json.loads((folder / "manifest.json").read_text())


def answer_of(text):
    return text.rpartition("{")[2].rstrip("}")


def test_a_right_answer_is_chosen_over_a_wrong_one_and_every_problem_is_accounted_for(config_of, policy):
    pairs, manifest = run(config_of("pairs"))
    assert [p.id.partition("-")[0] for p in pairs] == ["p0", "p1"]
    assert {answer_of(p.chosen) for p in pairs} == {"1"}
    assert {answer_of(p.rejected) for p in pairs} <= {"2", "3"}
    assert manifest["problems"] == {"in": 4, "with_pairs": 2, "skipped": {"all undecided": 1, "all wrong": 1}}
    assert manifest["pairs"] == {"correct over wrong": 2}
    assert manifest["rules"]["truncated"] == "reject"
    assert manifest["examples"] == {"all wrong": ["p2"], "all undecided": ["p3"]}
    assert pairs[0].sampler == f"{policy} {manifest['policy']['weights']} seed 0 temperature 1"


def test_a_pair_names_the_completions_it_is_made_of(config_of):
    config = config_of("named", pairs_per_problem=3)
    pairs, manifest = run(config)
    rows = [json.loads(line) for line in (Path(config.output_dir) / script.COMPLETIONS).read_text().splitlines()]
    by_id = {row["id"]: row["candidates"] for row in rows}
    assert manifest["counts"]["completions"] == sum(map(len, by_id.values())) == 48
    for pair in pairs:
        problem, chosen, rejected = pair.id.split("-")
        assert by_id[problem][int(chosen)] | {"text": pair.chosen, "verdict": "correct"} == by_id[problem][int(chosen)]
        assert by_id[problem][int(rejected)]["text"] == pair.rejected


def test_completions_that_were_cut_off_are_marked_and_train_no_stop_token(config_of, policy, renderer):
    """Three tokens less than an answer takes, so that no box is ever closed, against answers in full."""
    whole = renderer.response_ids("<think>\n</think>\n\\boxed{1}")
    rewards = [{"name": "correctness"}, {"name": "length"}]
    config = config_of("cut", rollout={"max_new_tokens": len(whole) - 3}, pairing="best_worst", rewards=rewards)
    with pytest.raises(ValueError, match=r"none of 4 problems gave a pair .*all truncated"):
        run(config)
    problem = Problem(id="p", question=QUESTION, answer="1")
    of = script.Completions(
        id="p",
        candidates=[
            Candidate(text="<think>\n</think>\n\\boxed{1}", num_tokens=9, finish_reason="stop", verdict="correct"),
            Candidate(text="<think>\n</think>\n\\boxed{1", num_tokens=8, finish_reason="length", verdict="wrong"),
        ],
    )
    pair = script.to_record(config, problem, of, (0, 1), "a policy")
    assert (pair.source, pair.chosen_finish, pair.rejected_finish) == ("best over truncated", "stop", "length")
    _, chosen, rejected = renderer.pair_ids(pair)
    assert chosen[-1] == renderer.stop_token_id
    assert renderer.stop_token_id not in rejected


def test_the_best_and_the_worst_are_by_the_rewards_of_the_recipe(config_of):
    """All completions are as long, so only correctness tells them apart; a tenth of it is the margin."""
    rewards = [{"name": "correctness", "weight": 0.1}, {"name": "format"}]
    pairs, manifest = run(config_of("best", pairing="best_worst", rewards=rewards))
    assert {answer_of(p.chosen) for p in pairs} == {"1"}
    assert [p.margin for p in pairs] == [pytest.approx(0.1)] * 2
    assert manifest["problems"]["skipped"] == {"all scored alike": 1, "none scored": 1}


def test_a_run_killed_between_two_chunks_ends_with_the_same_files(config_of, monkeypatch, capsys):
    run(config_of("whole"))
    config = config_of("killed")
    write = Chunks.write

    def dying(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    with monkeypatch.context() as dies:
        dies.setattr(Chunks, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    run(config)
    assert "1 of 2 chunks were done before; going on" in capsys.readouterr().out
    for name in (script.PAIRS, script.COMPLETIONS):
        assert (Path(config.output_dir) / name).read_bytes() == (
            Path(config.output_dir).parent / "whole" / name
        ).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairing": "best_worst"}, "rewards is empty, so nothing says which completion is the best"),
        ({"rewards": [{"name": "correctness"}]}, "rewards is set, which nothing would read"),
        ({"min_margin": 0.1}, "which only best_worst reads; remove it"),
        ({"rollout": {"samples_per_prompt": 1}}, "a pair has two; set it to 2 or more"),
    ],
)
def test_a_recipe_that_contradicts_itself_is_a_sentence(config_of, changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("wrong", **changes)


def test_problems_to_pass_over_are_passed_over(config_of):
    _, manifest = run(config_of("second", first_problem=1, num_problems=1))
    assert manifest["problems"]["in"] == 1
    with pytest.raises(ValueError, match=r"first_problem is 4 and .* has 4 problems"):
        run(config_of("none", first_problem=4))
