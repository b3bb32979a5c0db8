"""The process model: targets, loss, training, files, and the scores of live rollouts."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification

from data.catalog import CATALOG
from data.records import LabelledSteps, parse_record, write_records
from data.sources import read_source
from reward_models.process import (
    DESCRIPTION,
    ProcessModel,
    Solution,
    aggregate,
    batches_within,
    example_of,
    targets_of,
    train,
)
from reward_models.processbench import first_error
from rlhf.config import load_config
from rlhf.run import open_run
from rlhf.trainers.process import StepCollator, StepExample, step_logits
from rlhf.types import Prompt, Rollout

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/tiny/process_reward_model.yaml"
NEXT_TOKEN = ["head=next_token", "right_token=+", "wrong_token='-'"]


# ------------------------------------------------------------------------------------------------------------- pure functions


@pytest.mark.parametrize(("how", "value"), [("min", 0.25), ("product", 0.1), ("mean", 1.55 / 3), ("last", 0.5)])
def test_the_steps_of_a_solution_become_one_number(how, value):
    assert aggregate([0.8, 0.25, 0.5], how) == pytest.approx(value)
    assert aggregate([0.7], how) == 0.7


def test_a_solution_without_steps_has_no_score():
    with pytest.raises(ValueError, match="without steps"):
        aggregate([], "product")


def test_batches_hold_sequences_of_similar_length_within_the_budget():
    # sorted: 1 2 3 5 9; 3 x 3 = 9 fits into 10, a fourth one of 5 would be 20
    assert batches_within([3, 9, 1, 5, 2], 10) == [[2, 4, 0], [3], [1]]
    assert batches_within([30], 10) == [[0]]
    assert batches_within([], 10) == []


@pytest.mark.parametrize(
    ("soft", "after", "targets"),
    [
        (False, "ignore", [1.0, 0.0]),
        (False, "train", [1.0, 0.0, 0.0]),
        (True, "ignore", [0.75, 0.0]),
        (True, "train", [0.75, 0.0, 0.25]),
    ],
)
def test_steps_are_trained_on_up_to_the_first_wrong_one_or_all_of_them(soft, after, targets):
    assert targets_of([True, False, False], [0.75, 0.0, 0.25], soft=soft, after_first_error=after) == targets
    assert targets_of([True, True], [], soft=False) == [1.0, 1.0]


@pytest.mark.parametrize("labels", [[-100], [True, 1], [1.0], [None], ["false"]])
def test_labels_that_are_no_booleans_are_refused_rather_than_cast(labels):
    with pytest.raises(ValueError, match="labels must be booleans"):
        targets_of(labels, [], soft=False)
    with pytest.raises(ValueError, match="'labels' must be a list of bool"):
        LabelledSteps(id="a", question="q", steps=["s"] * len(labels), labels=labels)


@pytest.mark.parametrize("targets", [[-100.0], [True], [1], [1.5], [float("nan")]])
def test_a_target_that_is_no_probability_is_refused(targets):
    with pytest.raises(ValueError, match=r"targets must be probabilities in \[0, 1\]"):
        StepExample(input_ids=[5, 6], start=1, ends=[1], targets=targets)


def test_soft_targets_need_values():
    with pytest.raises(ValueError, match="has no values; label it with scripts/label_steps.py, or set labels to hard"):
        targets_of([True], [], soft=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([0.5], "2 steps but 1 values"),
        ([0.5, 1.5], "probabilities in"),
        ([0.5, True], "'values' must be a list of float"),
    ],
)
def test_values_are_one_probability_a_step(values, message):
    row = {"id": "a", "question": "q", "steps": ["s", "t"], "labels": [True, False]}
    assert parse_record(LabelledSteps, row).values == []
    assert parse_record(LabelledSteps, {**row, "values": [0.5, 0]}).values == [0.5, 0]
    with pytest.raises(ValueError, match=message):
        parse_record(LabelledSteps, {**row, "values": values})


def test_the_two_tokens_belong_to_the_head_that_writes_them():
    with pytest.raises(ValueError, match="head is next_token and right_token is not set; give both tokens"):
        load_config(RECIPE, ["head=next_token", "wrong_token='-'"])
    with pytest.raises(ValueError, match="head is likelihood and wrong_token is '-', which nothing would read"):
        load_config(RECIPE, ["wrong_token='-'"])


# ------------------------------------------------------------------------------------------------------------- logits and loss


def heads(folder):
    torch.manual_seed(0)
    classifier = AutoModelForTokenClassification.from_pretrained(folder, num_labels=1).eval()
    speaker = AutoModelForCausalLM.from_pretrained(folder).eval()
    return {"classification": classifier, "next_token": speaker, "likelihood": speaker}


@pytest.mark.parametrize("head", ["classification", "next_token", "likelihood"])
def test_a_logit_is_read_at_the_end_of_each_step_whatever_shares_the_batch(model_folder, head):
    model = heads(model_folder)[head]
    rows = [
        {"input_ids": [20, 21, 22, 23, 24], "start": 1, "ends": [1, 3], "targets": [1.0, 0.0]},
        {"input_ids": [30, 31, 32], "start": 1, "ends": [2], "targets": [1.0]},
    ]
    batch = StepCollator(0)(rows)
    labels = batch.pop("labels")
    assert labels.tolist() == [[-100, 1, -100, 0, -100], [-100, -100, 1, -100, -100]]
    with torch.no_grad():
        together = step_logits(model, **batch, at=labels != -100, head=head, tokens=(9, 11))
        expected = []
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0]
            begin = row["start"]
            for end in row["ends"]:
                said = logits.log_softmax(-1)
                if head == "classification":
                    expected.append(logits[end, 0])
                elif head == "next_token":  # the odds of two tokens: log p(9) - log p(11)
                    expected.append(said[end, 9] - said[end, 11])
                else:  # the odds that the step's tokens, each predicted by the one before it, would be written
                    p = torch.stack([said[t - 1, row["input_ids"][t]] for t in range(begin, end + 1)]).sum().exp()
                    expected.append((p / (1 - p)).log())
                begin = end + 1
    torch.testing.assert_close(together, torch.stack(expected), atol=1e-4, rtol=1e-4)


def config(folder, output, *overrides):
    base = [
        f"output_dir={output}",
        f"model.path={folder}",
        "training.log_every=1",
        "optimizer.warmup_steps=0",
        "head=classification",
    ]
    return load_config(RECIPE, [*base, *overrides])


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_is_the_mean_over_labelled_steps_however_a_step_is_cut(model_folder, tokenizer, tmp_path):
    # 1, 2, 3 and 1 labelled steps: a mean of the micro-batches' means would be another number
    examples = [
        StepExample(input_ids=list(range(20 + n, 30 + n)), start=2, ends=list(range(2, 2 + n)), targets=[0.25 * n] * n)
        for n in (1, 2, 3, 1)
    ]
    heldout = [Solution(input_ids=[5, 6], start=1, ends=[1], first_error=i % 2 - 1) for i in range(40)]
    rows = {}
    for size in (4, 2, 1):
        output = tmp_path / str(size)
        output.mkdir()
        changes = ["training.num_steps=1", "training.sequences_per_step=4", f"training.micro_batch_size={size}"]
        train(config(model_folder, output, *changes, *NEXT_TOKEN), tokenizer, examples=examples, heldout=heldout)
        (rows[size],) = lines(output)
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    plus, minus = (tokenizer.encode(t, add_special_tokens=False)[0] for t in "+-")
    losses = []
    for e in examples:
        right = model(torch.tensor([e.input_ids])).logits[0, e.ends][:, [plus, minus]].softmax(-1)[:, 0].tolist()
        losses += [
            -(t * torch.tensor(p).log() + (1 - t) * torch.tensor(1 - p).log()).item()
            for p, t in zip(right, e.targets, strict=True)
        ]
    for row in rows.values():
        assert row["loss"] == pytest.approx(sum(losses) / 7, rel=1e-4)
        assert row["grad_norm"] == pytest.approx(rows[4]["grad_norm"], rel=1e-4)


# ------------------------------------------------------------------------------------------------------------ training, files


def record(number, *, wrong_at):
    """Three steps of which the wrong one ends in an 8."""
    steps = [f"{number % 7} + {i} = {8 if i == wrong_at else 7}" for i in range(3)]
    labels = [i < wrong_at for i in range(3)]
    return LabelledSteps(id=f"r{number}-{wrong_at}", question="How many?", steps=steps, labels=labels)


RECORDS = [record(n, wrong_at=w) for n in range(60) for w in (0, 1, 2, 3)]


@pytest.fixture(scope="module")
def stage(model_folder, tmp_path_factory):
    """The stage itself, on steps of which some are wrong."""
    folder = tmp_path_factory.mktemp("process")
    write_records(RECORDS[40:], folder / "train.jsonl")
    write_records(RECORDS[:40], folder / "heldout.jsonl")
    sys.path.insert(0, str(ROOT / "scripts"))
    from train_process_reward_model import train_process_reward_model

    def run(name, *overrides):
        files = [f"train_steps={folder}/train.jsonl", f"heldout_steps={folder}/heldout.jsonl"]
        cfg = config(model_folder, folder / name, *files, "optimizer.learning_rate=0.003", *overrides)
        train_process_reward_model(cfg, open_run(cfg))
        return folder / name

    yield run
    sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="module")
def trained(stage):
    return {
        "classification": stage("classification", "training.num_steps=50"),
        "next_token": stage("next_token", "training.num_steps=80", *NEXT_TOKEN),
        "likelihood": stage("likelihood", "training.num_steps=60", "head=likelihood"),
    }


def encoded(model, renderer, records):
    return [model.encode(renderer.prompt_ids(r.question), r.steps) for r in records]


@pytest.mark.parametrize("head", ["classification", "next_token", "likelihood"])
def test_every_head_finds_the_first_wrong_step_and_keeps_it_through_the_file(trained, renderer, head):
    figures = json.loads((trained[head] / "run.json").read_text())
    assert figures["f1"]["mean"] > 0.9
    model = ProcessModel.load(str(trained[head]), device="cpu")
    assert model.separator == "\n"
    solutions = encoded(model, renderer, RECORDS[:40])
    for r, p in zip(RECORDS[:40], model.probabilities(solutions, tokens_per_batch=2048), strict=True):
        below = [i for i, value in enumerate(p) if value < model.description.threshold]
        assert (below[0] if below else 3) == r.labels.count(True), (r, p)


def test_probabilities_do_not_depend_on_what_shares_the_batch(trained, renderer):
    model = ProcessModel.load(str(trained["next_token"]), device="cpu")
    solutions = encoded(model, renderer, [*RECORDS[:4], record(7, wrong_at=1)])
    shorter = replace(
        solutions[2], input_ids=solutions[2].input_ids[: solutions[2].ends[1] + 1], ends=solutions[2].ends[:2]
    )
    solutions[2] = shorter
    together = model.probabilities(solutions, tokens_per_batch=10_000)
    for order in ([0, 1, 2, 3, 4], [4, 2, 0, 3, 1]):
        alone = model.probabilities([solutions[i] for i in order], tokens_per_batch=1)
        for i, p in zip(order, alone, strict=True):
            assert p == pytest.approx(together[i], abs=1e-5)
    assert [len(p) for p in together] == [3, 3, 2, 3, 3]
    assert model.probabilities([], tokens_per_batch=1) == []


def test_a_rollout_earns_the_probability_of_each_step_where_the_step_ends(trained, renderer):
    model = ProcessModel.load(str(trained["classification"]), device="cpu")
    steps = [*record(3, wrong_at=1).steps, "\\boxed{6}"]
    text = "<think>\n" + "\n".join(steps[:3]) + "\n</think>\n" + steps[3]

    def rollout(text):
        ids = tuple(renderer.response_ids(text))
        prompt = Prompt(id="p", token_ids=tuple(renderer.prompt_ids("How many?")), question="How many?", reference="6")
        return Rollout(
            prompt=prompt, token_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="stop", text=text, policy_version=0
        )

    first, empty = model.scorer(tokens_per_batch=512)([rollout(text), rollout("<think>\n</think>")])
    [expected] = model.probabilities(encoded(model, renderer, [record(3, wrong_at=1)]), tokens_per_batch=512)
    assert [step.value for step in first[:3]] == pytest.approx(expected, abs=1e-5)
    assert first[0].value > 0.5 > first[1].value
    ids = rollout(text).token_ids
    for step, said in zip(first, steps, strict=True):
        assert renderer.tokenizer.decode(ids[: step.position + 1]).rstrip().endswith(said)
    assert len(empty) == 1
    assert empty[0].position == len(rollout("<think>\n</think>").token_ids) - 1


def test_what_follows_the_first_error_is_not_trained_on():
    solution = Solution(input_ids=list(range(10)), start=2, ends=[3, 6, 9], first_error=1)
    example = example_of(solution, targets_of([True, False, False], [], soft=False))
    assert (example.ends, example.targets) == ([3, 6], [1.0, 0.0])


def test_a_model_trained_with_adapters_loads_whole(stage, model_folder):
    folder = stage("lora", "training.num_steps=2", "model.lora={rank: 4}", "after_first_error=train")
    model = ProcessModel.load(str(folder), device="cpu")
    before = load_file(f"{model_folder}/model.safetensors")
    after = load_file(folder / "model.safetensors")
    assert any(not torch.equal(after[name], before[name]) for name in before if name in after)
    assert model.description.head == "classification"


# ------------------------------------------------------------------------------------------------------------------ real data

REAL = ROOT.parent / "shared/data/steps"


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
def test_a_model_trained_on_processbench_is_scored_on_processbench(stage, tmp_path, capsys):
    from evaluate_process import evaluate_process

    for name in ("math", "gsm8k"):
        rows = json.loads((REAL / f"processbench_{name}.json").read_text())
        kinds = ([row for row in rows if (row["label"] < 0) == correct][:16] for correct in (True, False))
        (tmp_path / f"{name}.json").write_text(json.dumps([row for kind in kinds for row in kind]))
    math, refused = read_source(CATALOG["processbench"], path=str(tmp_path), revision=None, split="math")
    assert (len(math), refused) == (32, [])
    write_records(math, tmp_path / "math.jsonl")
    files = [f"train_steps={tmp_path}/math.jsonl", f"heldout_steps={tmp_path}/math.jsonl"]
    steps = ["training.num_steps=2", "training.sequences_per_step=8", "training.micro_batch_size=4", "max_tokens=1024"]
    model = stage("real", *files, *steps, "separator='\n\n'")
    sets = ", ".join(f"{name}: {{name: processbench, split: {name}, path: {tmp_path}}}" for name in ("gsm8k", "math"))
    overrides = [f"output_dir={tmp_path}/scored", f"model={model}", "threshold_on=math", f"solutions={{{sets}}}"]
    cfg = load_config(ROOT / "recipes/eval/processbench.yaml", overrides)
    cfg = cfg.model_copy(update={"solutions": {name: cfg.solutions[name] for name in ("gsm8k", "math")}})
    evaluate_process(cfg, open_run(cfg))
    result = json.loads((tmp_path / "scored/run.json").read_text())
    counts = {name: figures["num_solutions"] for name, figures in result["solutions"].items()}
    assert counts == {"math": 24, "gsm8k": 32}  # a quarter of math gave the threshold
    kept = json.loads((tmp_path / "scored/probabilities.json").read_text())
    for name, of_rows in kept.items():
        hits = [first_error(row["probabilities"], result["threshold"]) == row["first_error"] for row in of_rows]
        wrong = [hit for hit, row in zip(hits, of_rows, strict=True) if row["first_error"] >= 0]
        assert name == "math" or sum(wrong) / len(wrong) == result["solutions"][name]["erroneous"]["mean"]
    assert "F1" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------- what must not go unnoticed


def copy(folder, to, *, without="", **changes):
    to.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, to / name)
    description = json.loads((folder / DESCRIPTION).read_text()) | changes
    (to / DESCRIPTION).write_text(json.dumps(description))
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not without or without not in name}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def test_a_process_model_whose_head_is_missing_or_left_over_is_refused(trained, tmp_path):
    folder = trained["classification"]
    with pytest.raises(ValueError, match=r"score\.bias, score\.weight missing or unexpected"):
        ProcessModel.load(copy(folder, tmp_path / "a", without="score"), device="cpu")
    tokens = {"head": "next_token", "right_token": "+", "wrong_token": "-"}
    with pytest.raises(ValueError, match=r"score\.bias, score\.weight missing or unexpected"):
        ProcessModel.load(copy(folder, tmp_path / "b", **tokens), device="cpu")
    with pytest.raises(ValueError, match=r"score\.bias, score\.weight missing or unexpected"):
        ProcessModel.load(copy(trained["next_token"], tmp_path / "c", head="classification"), device="cpu")


def test_a_language_model_is_no_process_model(model_folder):
    with pytest.raises(ValueError, match=r"has no process_model.json; train the model with scripts/train_process"):
        ProcessModel.load(model_folder, device="cpu")


def test_a_word_of_several_tokens_is_no_label(trained, tmp_path):
    folder = copy(trained["next_token"], tmp_path / "a", right_token="certainly right")
    with pytest.raises(
        ValueError, match="right_token is 'certainly right', which is .* tokens; choose a text that is one"
    ):
        ProcessModel.load(folder, device="cpu")


def test_held_out_solutions_of_one_kind_stop_before_the_model_is_loaded(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="heldout_steps.jsonl holds no correct solution among 1"):
        train(
            config("nowhere", tmp_path),
            tokenizer,
            examples=[],
            heldout=[Solution(input_ids=[1, 2], start=1, ends=[1], first_error=0)],
        )
