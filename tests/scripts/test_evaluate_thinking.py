"""The stage as a user runs it, on a policy that was taught to be right only when it thinks."""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import evaluate_thinking as script

from data.records import Problem, write_records
from rlhf.config import load_config
from rlhf.models import build_qwen3
from rlhf.run import open_run

QUESTION = "How many eggs does she have?"
THOUGHTS = "finds 1"
SAID = {"off": "<think>\n</think>\n\\boxed{2}", "long": f"<think>\n{THOUGHTS}\n</think>\n\\boxed{{1}}"}
"""The answer is 1."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory, renderer, tiny_architecture):
    model = build_qwen3(tiny_architecture.model_copy(update={"initializer_range": 0.1}), renderer.tokenizer, seed=0)
    rows = [(renderer.prompt_ids(QUESTION, think=t), renderer.response_ids(text)) for t, text in SAID.items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = torch.zeros(())
        for prompt, response in rows:
            logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
            loss = loss + torch.nn.functional.cross_entropy(logits, torch.tensor(response))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("thinking_policy")
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def config_of(tmp_path, policy):
    def make(name="thinking", **changes):
        write_records(
            [Problem(id=f"p{i}", question=QUESTION, answer="1") for i in range(4)], tmp_path / "problems.jsonl"
        )
        raw = {
            "stage": "evaluate_thinking",
            "output_dir": str(tmp_path / name),
            "models": {"policy": {"path": policy}},
            "problems": str(tmp_path / "problems.jsonl"),
            "budgets": ["off", "long"],
            "forcing": {"thinking_tokens": [0, 20], "think": "long", "answer_tokens": 8},
            "rollout": {
                "engine": "transformers", "samples_per_prompt": 2, "max_prompt_tokens": 100, "max_new_tokens": 60, "dtype": "float32",
                "temperature": 0.2, "problems_per_chunk": 3,
            },
            **changes,
        }  # fmt: skip
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(raw))
        return load_config(path)

    return make


def run(config):
    script.evaluate_thinking(config, open_run(config))
    results = json.loads((Path(config.output_dir) / "results.json").read_text())
    return {row["name"]: row for row in results["conditions"]}, results


def test_accuracy_rises_with_the_thoughts_and_they_are_counted(config_of, renderer):
    rows, results = run(config_of())
    thoughts = len(renderer.tokenizer.encode(f"{THOUGHTS}\n", add_special_tokens=False))
    found = {name: (row["accuracy"]["mean"], row["thinking_tokens"], row["was_cut"]) for name, row in rows.items()}
    assert found["think: off"] == (0.0, 0, 0.0)
    assert found["think: long"] == (1.0, thoughts, 0.0)
    assert found["forced: 20"] == (1.0, thoughts, 0.0)  # nothing was cut: the same as by itself
    assert found["forced: 0"][1:] == (0, 1.0)
    assert all(row["truncated"] == 0 for row in rows.values())
    [gain] = results["gains"]
    assert (gain["from"], gain["to"], gain["mean"]) == ("think: off", "think: long", 1.0)
    folder = Path(results["problems"]).parent / "thinking"
    assert (folder / "thinking.png").stat().st_size > 5000
    assert "| policy | think: long | 1.000" in (folder / "thinking.md").read_text()


def test_a_run_that_lost_a_chunk_samples_that_one_only(config_of, monkeypatch):
    config = config_of()
    first, _ = run(config)
    folder = Path(config.output_dir)
    file = folder / "generations.policy.long.0.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:3]))
    asked = []
    plain = script.from_engine

    def counting(*arguments, **named):
        generate = plain(*arguments, **named)
        return lambda questions, seed: asked.append([q.id for q in questions]) or generate(questions, seed)

    monkeypatch.setattr(script, "from_engine", counting)
    again, _ = run(config)
    assert asked == [["p3"]]
    assert {k: v["accuracy"] for k, v in again.items()} == {k: v["accuracy"] for k, v in first.items()}


@pytest.mark.parametrize(("rule", "accuracy"), [("wrong", 0.0), ("grade", 1.0)])
def test_an_answer_that_was_cut_behind_its_box_counts_as_the_recipe_says(config_of, renderer, rule, accuracy):
    """Forced to answer after all thoughts, and cut where only the stop token is missing."""
    answer = renderer.tokenizer.encode("1}", add_special_tokens=False)
    thoughts = len(renderer.tokenizer.encode(THOUGHTS, add_special_tokens=False))
    rows, _ = run(
        config_of(
            budgets=[],
            forcing={"thinking_tokens": [thoughts], "think": "long", "answer_tokens": len(answer)},
            truncated=rule,
        )
    )
    [row] = rows.values()
    assert (row["truncated"], row["was_cut"], row["accuracy"]["mean"]) == (1.0, 1.0, accuracy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"forcing": {"thinking_tokens": [58]}},
            r"tokens that are put in are more than rollout.max_new_tokens 60; set it to",
        ),
        ({"budgets": [], "forcing": None}, "there is nothing to measure"),
        ({"forcing": {"thinking_tokens": [4], "num_waits": 1, "wait": ""}}, "forcing.wait is empty"),
        ({"models": {"policy": {"path": "/nowhere"}}}, "models.policy.path"),
    ],
)
def test_what_cannot_work_is_a_sentence_before_a_model_is_loaded(config_of, changes, message):
    with pytest.raises(ValueError, match=message):
        run(config_of(**changes))
