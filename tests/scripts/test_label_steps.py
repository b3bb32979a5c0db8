"""The labelling stage as a user runs it, on a policy that was taught at which steps to go wrong."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from data.records import LabelledSteps, Problem, read_records, write_records
from reward_models.grading import GraderPool, grade
from reward_models.grading.grade import Grade
from rlhf.config import load_config
from rlhf.models import build_qwen3
from rlhf.rollout.engine import build_engine
from rlhf.run import open_run

ROOT = Path(__file__).parents[2]
QUESTION = "How many eggs does she have?"
SAID = {"111": 0.5, "122": 0.25, "222": 0.25}
"""What the policy says, and how often: the first step is wrong in a quarter, the second in a third of the others, the last one never."""


def written(digits):
    a, b, c = digits
    return f"<think>\nfinds {a}\nfinds {b}\n</think>\n\\boxed{{{c}}}"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("label_steps_script", ROOT / "scripts/label_steps.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def policy(tmp_path_factory, renderer, tiny_architecture):
    """Overfitted on the three solutions."""
    model = build_qwen3(tiny_architecture.model_copy(update={"initializer_range": 0.1}), renderer.tokenizer, seed=0)
    prompt = renderer.prompt_ids(QUESTION)
    responses = [renderer.response_ids(written(digits)) for digits in SAID]
    assert len({len(r) for r in responses}) == 1
    input_ids = torch.tensor([[*prompt, *r] for r in responses])
    weights = torch.tensor(list(SAID.values())).unsqueeze(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        logits = model(input_ids=input_ids).logits[:, len(prompt) - 1 : -1]
        nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, len(prompt) :], reduction="none")
        optimizer.zero_grad()
        (nats * weights).sum().backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labels")
    answers = ["1", "1", "1", "$$"]  # nobody can compare anything with the last one
    problems = [Problem(id=f"p{i}", question=QUESTION, answer=answer) for i, answer in enumerate(answers)]
    write_records(problems, folder / "problems.jsonl")
    return folder


def config_of(folder, name, policy, **changes):
    raw = {
        "stage": "label_steps",
        "output_dir": str(folder / name),
        "policy": {"path": policy},
        "problems": str(folder / "problems.jsonl"),
        "correct_share": None,
        "rollout": {
            "engine": "transformers", "samples_per_prompt": 16, "max_prompt_tokens": 100, "max_new_tokens": 40, "dtype": "float32",
            "problems_per_chunk": 2, "completions_per_prefix": 12,
        },
        **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return load_config(path)


def run(script, config):
    script.label_steps(config, open_run(config))
    return Path(config.output_dir) / script.LABELS


@pytest.fixture(scope="module")
def soft(script, folder, policy):
    return run(script, config_of(folder, "soft", policy))


def by_digits(path):
    return {"".join(c for c in " ".join(r.steps) if c.isdigit()): r for r in read_records(LabelledSteps, path)}


def test_labels_are_what_the_policy_was_taught_to_make_of_each_step(soft):
    found = by_digits(soft)
    assert {digits: found[digits].labels for digits in SAID} == {
        "111": [True, True, True],
        "122": [True, False, False],
        "222": [False, False, False],
    }
    assert found["111"].steps == ["<think>\nfinds 1", "finds 1", "</think>\n\\boxed{1}"]
    for digits in ("111", "122"):
        assert found[digits].values[0] == pytest.approx(2 / 3, abs=0.35)  # 12 completions: 2.5 standard errors
    assert found["111"].values[1:] == [1.0, 1.0]
    assert found["222"].values == [0.0, 0.0, 0.0]


def test_halving_gives_the_same_labels_without_values_and_asks_about_wrong_solutions_only(script, folder, policy, soft):
    halved = run(script, config_of(folder, "halved", policy, estimate="binary_search"))
    before, after = by_digits(soft), by_digits(halved)
    assert {digits: after[digits].labels for digits in SAID} == {digits: before[digits].labels for digits in SAID}
    assert all(r.values == [] for r in after.values())
    counts = [json.loads((path.parent / "run.json").read_text()) for path in (soft, halved)]
    assert counts[0]["solutions"] == counts[1]["solutions"] == 64
    assert counts[0]["labelled_wrong"] == counts[1]["labelled_wrong"]
    assert counts[0]["prefixes"] == 2 * (counts[0]["labelled_wrong"] + counts[0]["labelled_correct"])
    assert counts[1]["prefixes"] <= 2 * counts[1]["labelled_wrong"]


def test_what_is_not_labelled_is_counted(soft):
    counts = json.loads((soft.parent / "run.json").read_text())
    assert 13 <= counts["undecided_solutions"] <= 16  # the 16 of the last problem, but for a slip without a box
    others = ("repeated_solutions", "truncated_solutions", "of_problems_never_solved", "of_too_few_steps")
    left = sum(counts.get(name, 0) for name in others)
    assert left + counts["undecided_solutions"] + counts["records"] == counts["solutions"]


def test_the_expected_cost_is_said_before_the_first_completion_and_is_near_what_it_took(script, folder, policy, capsys):
    path = run(script, config_of(folder, "cost", policy, rollout={
        "engine": "transformers", "samples_per_prompt": 8, "max_prompt_tokens": 100, "max_new_tokens": 40, "dtype": "float32",
        "completions_per_prefix": 4,
    }))  # fmt: skip
    printed = capsys.readouterr().out
    expected = int(printed.split("expected cost: ")[1].split(" ")[0].replace(",", ""))
    assert printed.index("expected cost") < printed.index("chunk 1 of 1")
    assert "at most 1,280 tokens" in printed  # 4 x 8 x 40
    assert json.loads((path.parent / "run.json").read_text())["sampled_tokens"] == pytest.approx(expected, rel=0.1)


def test_a_run_killed_between_two_chunks_ends_with_the_same_file(script, folder, policy, soft, monkeypatch, capsys):
    config = config_of(folder, "killed", policy)
    write = script.Chunks.write

    def dying(self, number, *rest):
        if number == 1:
            raise KeyboardInterrupt
        write(self, number, *rest)

    with monkeypatch.context() as dies:
        dies.setattr(script.Chunks, "write", dying)
        with pytest.raises(KeyboardInterrupt):
            run(script, config)
    assert not (folder / "killed" / script.LABELS).exists()
    assert run(script, config).read_bytes() == soft.read_bytes()
    assert "1 of 2 chunks were done before; going on" in capsys.readouterr().out
    counts = [json.loads((folder / name / "run.json").read_text()) for name in ("soft", "killed")]
    assert counts[0]["sampled_tokens"] == counts[1]["sampled_tokens"]


@pytest.mark.slow
def test_two_ranks_label_chunks_in_turn_and_end_with_the_file_of_one(folder, policy, soft):
    config_of(folder, "two_ranks", policy)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", ROOT / "recipes/accelerate/ddp.yaml", "--num_processes", "2",
        "--main_process_port", "0", ROOT / "scripts/label_steps.py", "--config", folder / "two_ranks.yaml",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "chunk 1 of 1:" in done.stdout  # of two: the other rank, which says nothing, has labelled the other
    assert (folder / "two_ranks/labelled_steps.jsonl").read_bytes() == soft.read_bytes()
    counts = [json.loads((folder / name / "run.json").read_text()) for name in ("soft", "two_ranks")]
    assert counts[0]["sampled_tokens"] == counts[1]["sampled_tokens"]


def test_chunks_of_other_weights_or_half_a_chunk_are_labelled_again(script, folder, policy, renderer):
    prompts = [[renderer.prompt("a", QUESTION, "1")]]
    chunks = script.Chunks(folder / "chunks", prompts, "weights 1")
    chunks.write(0, [], script.Counter(solutions=1), 0.0)
    assert chunks.read(0)["counts"] == {"solutions": 1}
    assert script.Chunks(folder / "chunks", prompts, "weights 2").read(0) is None
    (folder / "chunks/000000.json.tmp").write_text('{"key": ')  # what a kill in the middle of writing leaves
    assert chunks.read(0) is not None


class Failing(GraderPool):
    """Judges no completion that boxes a 2, as a grader whose worker dies of it."""

    def grade_many(self, cases):
        return [Grade("undecided", "timeout") if "{2}" in text else grade(text, ref) for text, ref in cases]


def test_completions_that_nobody_could_judge_are_left_out_and_counted_not_taken_for_wrong(
    script, folder, policy, renderer
):
    config = config_of(folder, "failing", policy)
    engine = build_engine(config.rollout, policy, stop_token_id=renderer.stop_token_id, decode=renderer.decode)
    labeller = script.Labeller(config, engine, renderer, Failing())
    kept, counts = labeller.solve([renderer.prompt("a", QUESTION, "1")], 0)
    assert [k.steps for k in kept] == [["<think>\nfinds 1", "finds 1", "</think>\n\\boxed{1}"]]
    records, more = labeller.label(kept, 1)
    assert records[0].values == [1.0, 1.0, 1.0]  # a third of the completions after the first step box a 2
    assert counts["undecided_solutions"] > 0
    assert 0 < more["undecided_completions"] < 12
    assert more["completions"] == 24


def test_a_recipe_with_one_solution_a_problem_says_why_it_is_not_enough(folder, policy):
    with pytest.raises(ValueError, match="samples_per_prompt is 1; a wrong solution is labelled only where"):
        config_of(folder, "one", policy, rollout={"samples_per_prompt": 1, "max_prompt_tokens": 9, "max_new_tokens": 9})


def test_a_policy_that_never_goes_wrong_leaves_nothing_to_balance_and_the_error_says_what_to_change(
    script, folder, policy
):
    config = config_of(folder, "nothing", policy, min_steps=9)
    with pytest.raises(
        ValueError, match=r"none of 64 solutions was labelled .*'of_too_few_steps'.* a higher rollout.temperature"
    ):
        run(script, config)
