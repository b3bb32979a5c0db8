"""The evaluation as a user runs it: benchmarks, a kill, another grading, a comparison, and what can be wrong with the input."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from data.benchmarks import read_problems
from rlhf.config import Selection, load_config
from rlhf.evaluation_files import read_samples
from rlhf.run import open_run

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared/data"
HOSTILE = "\x1b[2J\x07|`<script>"


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("evaluate_script", ROOT / "scripts/evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    rows = [
        {"problem": f"What is {i} + 1?", "answer": f"{i + 1}", "level": 1 + i % 2, "subject": "sums"} for i in range(6)
    ]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(folder, name, model_folder, **changes):
    raw = {
        "stage": "evaluate",
        "output_dir": str(folder / name),
        "models": {"base": {"path": model_folder}, "same": {"path": model_folder}},
        "benchmark": {"name": "jsonl", "path": str(folder / "sums.jsonl")},
        "rollout": {
            "engine": "transformers", "samples_per_prompt": 2, "max_prompt_tokens": 150, "max_new_tokens": 8, "dtype": "float32",
            "problems_per_chunk": 2,
        },
        "pass_at": [1, 2],
        **changes,
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def run(script, path):
    config = load_config(path)
    script.evaluate(config, open_run(config))
    return Path(config.output_dir)


@pytest.fixture(scope="module")
def done(script, folder, model_folder):
    """A finished evaluation of an untrained model."""
    return run(script, recipe(folder, "done", model_folder, perturbations=["reworded", "distraction", "typos"]))


def test_an_evaluation_keeps_every_sample_with_its_question_reference_and_verdict(done):
    samples = read_samples(done / "samples.base.jsonl")
    assert len({p.id for p in samples}) == 24
    assert [p.variant for p in samples].count("original") == 6
    assert len(samples) == 24
    for problem in samples:
        assert len(problem.texts) == len(problem.weights) == len(problem.reasons) == 2
        assert problem.question
        assert problem.reference
    assert not list(done.glob("generations.*"))


def test_the_card_says_everything_the_score_depends_on(done):
    card = json.loads((done / "card.base.json").read_text())
    assert set(card["prompt"]) >= {"system_prompt", "template", "prefill", "example"}
    assert len(card["model"]["weights"]) == len(card["prompt"]["template"]) == 16
    assert card["sampling"]["temperature"] == 1.0
    assert card["sampling"]["seed"] == 0
    assert card["engine"]["name"] == "transformers"
    assert card["engine"]["torch"].startswith("2.")
    assert card["grader"].keys() >= {"version", "source", "accept", "truncated", "undecided"}
    assert card["benchmark"]["problems"] == 6
    assert card["benchmark"]["perturbed"] == {"reworded": 6, "distraction": 6, "typos": 6}
    assert card["contamination"] is None
    assert card["hardware"]["cores"] >= 1
    assert card["cost"]["sampled_tokens"] > 0
    assert card["scores"]["robustness"]["variants"].keys() == {"reworded", "distraction", "typos"}
    text = (done / "card.base.md").read_text()
    assert "Contamination: unknown: the recipe names no data_manifest" in text
    assert "What is 0 + 1?" in text
    assert (done / "card.base.png").read_bytes().startswith(b"\x89PNG")


def test_two_runs_of_the_same_model_with_the_same_seed_do_not_differ(done, script, capsys):
    script.compare_command([f"{done}:base", f"{done}:same"])
    printed = capsys.readouterr().out
    assert "paired difference over 6 problems: +0.000 [+0.000, +0.000]" in printed
    assert "p = 1 " in printed
    assert "not alike" not in printed


def test_kept_samples_are_graded_again_without_a_model(done, script, folder, model_folder, capsys, monkeypatch):
    import shutil

    again = folder / "again"
    shutil.copytree(done, again, dirs_exist_ok=True)
    for name in ("recipe.yaml",):
        (again / name).write_text((again / name).read_text().replace(str(done), str(again)))
    rows = [json.loads(line) for line in (again / "samples.base.jsonl").read_text().splitlines()]
    for row in rows:
        row["texts"] = [f"\\boxed{{{row['reference']}}}", f"so it is \\boxed{{0}}{HOSTILE}"]
    (again / "samples.base.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(sys.modules, "rlhf.rollout.transformers", None)  # any use of an engine would fail
    config = load_config(
        recipe(folder, "again", model_folder, perturbations=["reworded", "distraction", "typos"], truncated="grade")
    )
    script.regrade(config)
    printed = capsys.readouterr().out
    assert "base: 24 of 48 verdicts changed {'wrong -> correct': 24}" in printed
    assert "\x1b" not in printed
    results = json.loads((again / "results.json").read_text())
    assert results["models"]["base"]["pass_at_1"]["mean"] == 0.5
    assert results["models"]["base"]["pass_at_k"]["2"]["mean"] == 1.0
    assert results["paired_difference"]["mean"] == pytest.approx(-0.5, abs=0.2)
    assert "\x1b" not in (again / "card.base.md").read_text()


def test_grading_again_refuses_to_pass_for_another_sampling(done, script, folder, model_folder):
    other = load_config(recipe(folder, "done", model_folder, seed=5))
    with pytest.raises(ValueError, match="holds samples of another evaluation"):
        script.regrade(other)
    with pytest.raises(ValueError, match="holds no evaluation to grade again"):
        script.regrade(load_config(recipe(folder, "nothing", model_folder)))


def test_a_sample_file_that_was_edited_badly_names_file_and_line(tmp_path, done):
    lines = (done / "samples.base.jsonl").read_text().splitlines()
    (tmp_path / "samples.jsonl").write_text("\n".join([lines[0], lines[1][:50]]))
    with pytest.raises(ValueError, match=r"samples\.jsonl:2: "):
        read_samples(tmp_path / "samples.jsonl")


def test_a_truncated_completion_counts_as_wrong_where_the_recipe_says_so(script, folder, model_folder, monkeypatch):
    problem = script.GradedProblem(
        id="a", level=0, reference="7", texts=("\\boxed{7} and", "\\boxed{7}"), lengths=(8, 8), truncated=(True, False),
        answers=(None, None), verdicts=("undecided", "undecided"),
    )  # fmt: skip
    for rule, expected in (("wrong", ("wrong", "correct")), ("grade", ("correct", "correct"))):
        config = load_config(recipe(folder, "rule", model_folder, truncated=rule))
        assert script.grade_problems([problem], config)[0].verdicts == expected


def test_answers_of_one_value_vote_together(script, folder, model_folder):
    problem = script.GradedProblem(
        id="a", level=0, reference="1/2", texts=("\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "\\boxed{1/3}", "no answer"),
        lengths=(8,) * 4, truncated=(False,) * 4, answers=(None,) * 4, verdicts=("undecided",) * 4,
    )  # fmt: skip
    (graded,) = script.grade_problems([problem], load_config(recipe(folder, "votes", model_folder)))
    assert graded.answers[0] == graded.answers[1] != graded.answers[2]
    assert graded.answers[3] is None
    assert graded.verdicts == ("correct", "correct", "wrong", "wrong")


def test_the_data_manifest_is_shown_beside_the_score_and_leaked_problems_are_told_apart(
    script, folder, model_folder, capsys
):
    leaked = read_problems("jsonl", path=str(folder / "sums.jsonl"), revision=None)[0][0].id
    report = {
        "rules": {}, "rows_scanned": 1234,
        "benchmarks": {"jsonl": {"problems": 6, "sha256": {}, "found": 3, "left": 1, "left_ids": [leaked], "by_rule": {}}},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({"decontamination": report}))
    out = run(script, recipe(folder, "leaks", model_folder, data_manifest=str(folder / "manifest.json")))
    assert "1 of 6 problems occur in the 1,234 training rows (3 before they were cleaned)" in capsys.readouterr().out
    card = json.loads((out / "card.base.json").read_text())
    assert card["contamination"]["left_ids"] == [leaked]
    assert card["scores"]["without_leaks"]["n"] == 5
    (folder / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="no decontamination report that can be read"):
        run(script, recipe(folder, "leaks2", model_folder, data_manifest=str(folder / "other.json")))
    with pytest.raises(ValueError, match="data_manifest nowhere.json does not exist"):
        run(script, recipe(folder, "leaks3", model_folder, data_manifest="nowhere.json"))


def test_a_malformed_row_is_refused_with_file_and_line_and_counted(script, folder, model_folder, capsys):
    lines = (folder / "sums.jsonl").read_text().splitlines()
    (folder / "broken.jsonl").write_text(
        "\n".join([lines[0], '{"problem": "no answer"}', "{half a", *lines[1:]]) + "\n"
    )
    asked = script.ask(
        load_config(
            recipe(folder, "broken", model_folder, benchmark={"name": "jsonl", "path": str(folder / "broken.jsonl")})
        )
    )
    printed = capsys.readouterr().out
    assert "2 of 8 rows refused" in printed
    assert "broken.jsonl:2" in printed
    assert "broken.jsonl:3" in printed
    assert len(asked.problems) == 6
    assert asked.block()["refused_rows"] == 2


def test_how_many_problems_could_be_told_differently_is_said(script, folder, model_folder, capsys):
    script.ask(load_config(recipe(folder, "told", model_folder, perturbations=["numbers", "typos"])))
    assert "told differently: numbers 0 of 6, typos 6 of 6" in capsys.readouterr().out


def test_unknown_benchmarks_and_missing_files_say_what_there_is(folder):
    with pytest.raises(ValueError, match=r"unknown benchmark 'gsm9k'; known: gsm8k, math500, .*jsonl, stories"):
        read_problems("gsm9k", path=None, revision=None)
    with pytest.raises(ValueError, match="aime24: .* does not exist; get .* from .* on the Hugging Face hub"):
        read_problems("aime24", path=str(folder / "nowhere"), revision=None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_a_folder_that_holds_another_benchmark_under_the_same_name_is_found_out():
    with pytest.raises(ValueError, match="math500 has 500 problems and .* gave 5000"):
        read_problems("math500", path=str(SHARED / "math"), revision=None)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("name", "file", "first_answer"),
    [
        ("gsm8k", "gsm8k/test.jsonl", "18"),
        ("math500", "math/math500_test.jsonl", None),
        ("aime24", "aime/aime24.jsonl", "204"),
        ("aime25", "aime/aime25.jsonl", "70"),
        ("amc23", "bench/amc23.jsonl", "27"),
        ("olympiadbench", "bench/olympiadbench_oe_maths_en.jsonl", "2"),
        ("minerva", "bench/minerva_math.jsonl", "1.6"),
    ],
)
def test_every_benchmark_is_read_whole_from_the_file_its_authors_ship(name, file, first_answer):
    problems, refused = read_problems(name, path=str(SHARED / file), revision=None)
    assert not refused
    assert first_answer in (None, problems[0].answer)
    assert len({p.id for p in problems}) == len(problems)


def test_the_embedded_task_is_a_benchmark_too():
    problems, _ = read_problems("stories", path=None, revision=None)
    assert len(problems) == 500
    assert {p.level for p in problems} == {3, 4, 5}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["power", "--benchmark", "aime42", "--k", "64"], "unknown benchmark 'aime42'; known: gsm8k"),
        (["power", "--benchmark", "jsonl"], "'jsonl' has no published size"),
        (["power", "--problems", "1"], "--problems is 1; give a number from 2"),
        (["compare", "nowhere", "nothing"], "nowhere holds no finished evaluation"),
        (["--config", "recipes/tiny/grpo.yaml", "--regrade"], "recipe for the stage grpo; run scripts/train_grpo.py"),
        (["--config", "recipes/tiny/evaluate.yaml", "benchmark.name=aime24"], "both of problems and benchmark are set"),
        (["--config", "recipes/tiny/evaluate.yaml", "problems=null"], "neither of problems and benchmark are set"),
        (
            ["--config", "recipes/tiny/evaluate.yaml", "rollout.temperature=0"],
            "all 4 samples of a problem would be the same",
        ),
        (
            ["--config", "recipes/tiny/evaluate.yaml", "perturbations=[sarcasm]"],
            "perturbations.0' has the value 'sarcasm'",
        ),
        (
            ["--config", "recipes/tiny/evaluate.yaml", "selection={}"],
            "selection.ns asks for 8 samples to choose from and rollout.samples_per_prompt is 4",
        ),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message):
    done = subprocess.run(
        [sys.executable, "scripts/evaluate.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr.startswith("error: "), done.stderr.strip().count("\n")) == (2, True, 0), (
        done.stderr
    )
    assert message in done.stderr


@pytest.fixture(scope="module")
def judge(folder, model_folder, tokenizer):
    """A reward model nobody trained, saved as one that was."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=1)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    (folder / "judge/reward_statistics.json").write_text('{"mean": 0.1, "std": 1.0}')
    return folder / "judge"


def test_samples_are_chosen_by_vote_and_by_a_reward_model_and_chosen_anew_without_sampling(
    script, folder, model_folder, judge, capsys, monkeypatch
):
    for key in ("outcome_model", "process_model"):
        with pytest.raises(ValueError, match=rf"selection.{key} is .*train_(process_)?reward_model"):
            script.require_reward_models(Selection(ns=(1,), **{key: model_folder}))
    selection = {"ns": [1, 2], "outcome_model": str(judge)}
    out = run(script, recipe(folder, "chosen", model_folder, selection=selection))
    printed = capsys.readouterr().out
    assert "best by outcome model - majority, n = 2: " in printed
    result = json.loads((out / "results.json").read_text())["models"]["base"]
    assert list(result["selection"]["accuracy"]) == [
        "pass", "majority", "best by confidence", "best by outcome model", "weighted by confidence", "weighted by outcome model",
    ]  # fmt: skip
    assert result["selection"]["accuracy"]["weighted by confidence"]["2"] == {
        k: v for k, v in result["weighted_majority"].items() if k != "k"
    }
    assert (out / "selection.png").read_bytes().startswith(b"\x89PNG")
    samples = read_samples(out / "samples.base.jsonl")
    assert all(0 < score < 1 for p in samples for score in p.scores["outcome model"])
    monkeypatch.setitem(sys.modules, "rlhf.rollout.transformers", None)  # any use of an engine would fail
    script.regrade(load_config(recipe(folder, "chosen", model_folder, selection={**selection, "ns": [2]})))
    again = json.loads((out / "results.json").read_text())["models"]["base"]["selection"]
    assert again["accuracy"]["majority"] == {"2": result["selection"]["accuracy"]["majority"]["2"]}
    assert read_samples(out / "samples.base.jsonl") == samples


def test_the_score_of_a_sample_is_the_reward_models_own_of_its_conversation(script, judge, renderer):
    from evaluating.selection import score_samples

    from reward_models.outcome import OutcomeModel
    from rlhf.config import Chat, Selection

    problem = script.GradedProblem(
        id="a", level=0, question="What is 1 + 1?", reference="2", texts=("\\boxed{2}", "\\boxed{3"), lengths=(8, 8),
        truncated=(False, True), answers=("2", None), verdicts=("correct", "wrong"),
    )  # fmt: skip
    (scored,) = score_samples([problem], Selection(outcome_model=str(judge)), Chat())
    prompt = renderer.prompt_ids("What is 1 + 1?")
    whole, cut = [*prompt, *renderer.response_ids("\\boxed{2}")], [*prompt, *renderer.response_ids("\\boxed{3")[:-1]]
    raw = OutcomeModel.load(str(judge), device="cpu").raw_scores([whole, cut], batch_size=2).double()
    assert scored.scores["outcome model"] == pytest.approx((raw - 0.1).sigmoid().tolist())
    with pytest.raises(ValueError, match="the kept samples have no questions"):
        score_samples([script.dataclasses.replace(problem, question="")], Selection(), Chat())


def test_power_is_printed_without_any_run(script, capsys):
    script.power_command(["--benchmark", "aime24", "--k", "64"])
    printed = capsys.readouterr().out
    assert "aime24: 30 problems" in printed
    assert "64   ± 0.109                    0.157   <- asked" in printed
    assert "No number of samples makes up for few problems" in printed


@pytest.mark.slow
def test_an_evaluation_killed_between_chunks_ends_with_the_samples_of_an_uninterrupted_one(folder, model_folder):
    whole, killed = (recipe(folder, name, model_folder) for name in ("whole", "killed"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def command(path):
        return [sys.executable, "scripts/evaluate.py", "--config", str(path)]

    subprocess.run(command(whole), cwd=ROOT, env=environment, capture_output=True, check=True, timeout=240)
    running = subprocess.Popen(command(killed), cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    file = folder / "killed/generations.base.0.jsonl"
    while not file.exists() or file.read_bytes().count(b"\n") < 2:
        assert running.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.wait()
    kept = file.read_bytes().count(b"\n")
    done = subprocess.run(command(killed), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert kept >= 6 or f"{kept} of 6 problems were sampled before; going on" in done.stdout
    for label in ("base", "same"):
        samples = [read_samples(folder / f"{name}/samples.{label}.jsonl") for name in ("whole", "killed")]
        assert samples[0] == samples[1]
