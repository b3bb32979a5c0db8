"""What a user can get wrong, as they would meet it: one sentence, exit code 2, nothing loaded, nothing written."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from data.records import write_records
from data.stories import prepare
from rlhf.config import GRPO, load_config
from rlhf.run import open_run, run_stage

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes/tiny/grpo.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    prepared = prepare(
        seed=0, min_level=2, max_level=3, answers_at_once=0.0, demonstrations=8, train_problems=8, test_problems=4, train_pairs=4,
        heldout_pairs=2,
    )  # fmt: skip
    write_records(prepared.train_problems, folder / "problems.jsonl")
    write_records(prepared.demonstrations, folder / "demonstrations.jsonl")
    lines = (folder / "problems.jsonl").read_text().splitlines()
    (folder / "malformed.jsonl").write_text("\n".join([*lines[:3], '{"id": "x", "question": "How many?"}', *lines[3:]]))
    return folder


def arguments(folder, tmp_path, *overrides, recipe=RECIPE):
    base = [
        f"output_dir={tmp_path}/run",
        f"problems={folder}/problems.jsonl",
        f"demonstrations={folder}/demonstrations.jsonl",
    ]
    return list(map(str, [ROOT / "scripts/train_grpo.py", "--config", recipe, *base, *overrides]))


@pytest.fixture
def train_grpo(folder, tmp_path, monkeypatch, capsys):
    """The `main` of the script in this process, whose start would take longer than everything it does here."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def train(*overrides, recipe=RECIPE):
        from train_grpo import train_online

        monkeypatch.setattr(sys, "argv", arguments(folder, tmp_path, *overrides, recipe=recipe))
        with pytest.raises(SystemExit) as ended:
            run_stage(GRPO, train_online)
        printed = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=printed.out, stderr=printed.err)

    return train


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.temprature=1"], "unknown key 'rollout.temprature'; did you mean 'temperature'?"),
        (["seed=zero"], "key 'seed' has the value 'zero'"),
        (["algorithm.kl_coefficient=0.1"], "reference is not set"),
        (["problems=nowhere.jsonl"], "data file nowhere.jsonl does not exist; run the prepare_data stage first"),
        (["problems={folder}/malformed.jsonl"], "malformed.jsonl:4: field 'answer' is missing"),
        (
            ["policy.path=outputs/nothing"],
            "policy.path is outputs/nothing, which does not exist; run the stage that writes it first",
        ),
        (
            ["output_dir={folder}"],
            "is not empty and holds no run of this project; choose another output_dir or delete the folder",
        ),
        (["training.num_batches"], "override 'training.num_batches' is not of the form key.sub=value"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2_before_any_model_is_loaded(
    train_grpo, folder, tmp_path, overrides, message
):
    done = train_grpo(*(o.format(folder=folder) for o in overrides))
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.strip().count("\n") == 0
    assert not list(tmp_path.rglob("*.safetensors"))


def test_the_script_itself_prints_the_batch_arithmetic_and_ends_with_one_sentence_and_exit_code_2(folder, tmp_path):
    command = [sys.executable, *arguments(folder, tmp_path, "policy.path=outputs/nothing")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "completions per rollout batch     256 = 32 prompts x 8 samples" in done.stdout
    assert done.stderr.startswith("error: policy.path is outputs/nothing")
    assert done.stderr.strip().count("\n") == 0


def test_a_missing_recipe_is_named_with_the_nearest_one(train_grpo):
    missing = train_grpo(recipe="recipes/tiny/grp.yaml")
    assert (missing.returncode, "did you mean 'recipes/tiny/grpo.yaml'?" in missing.stderr) == (2, True)


def test_a_recipe_of_another_stage_names_its_script(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--config", str(ROOT / "recipes/tiny/sft.yaml")])
    with pytest.raises(SystemExit) as ended:
        run_stage(GRPO, lambda config, run: None)
    assert (ended.value.code, "run scripts/train_sft.py with it" in capsys.readouterr().err) == (2, True)


def test_an_output_folder_with_another_run_is_refused_and_the_difference_named(train_grpo, folder, tmp_path):
    open_run(
        load_config(
            RECIPE,
            [
                f"output_dir={tmp_path}/run",
                f"problems={folder}/problems.jsonl",
                f"demonstrations={folder}/demonstrations.jsonl",
            ],
        )
    )
    done = train_grpo("optimizer.learning_rate=0.5")
    assert done.returncode == 2
    assert "holds another run (optimizer.learning_rate is 0.0003 there and 0.5 here)" in done.stderr


def test_a_recipe_that_was_refused_does_not_stand_in_the_way_of_its_repair(train_grpo):
    refused = train_grpo("policy.path=outputs/nothing", "optimizer.learning_rate=0.5")
    again = train_grpo("policy.path=outputs/nothing")
    assert (refused.returncode, again.returncode) == (2, 2)
    assert "policy.path" in refused.stderr
    assert "holds another run" not in again.stderr


def test_a_copied_pipeline_runs_the_recipes_beside_it(tmp_path):
    shutil.copytree(ROOT / "recipes/gsm8k", tmp_path / "mine")
    pipeline = load_config(tmp_path / "mine/pipeline.yaml")
    assert [Path(stage.recipe).parent for stage in pipeline.stages] == [tmp_path / "mine"] * 5


def pipeline(tmp_path, *stages):
    recipe = tmp_path / "pipeline.yaml"
    lines = [f"  - recipe: {path}\n    overrides: [{', '.join(overrides)}]" for path, *overrides in stages]
    recipe.write_text(
        f"stage: pipeline\noutput_dir: {tmp_path}/pipeline\naccelerate_config: {ROOT}/recipes/accelerate/single.yaml\nstages:\n"
        + "\n".join(lines)
    )
    return [sys.executable, str(ROOT / "scripts/run_pipeline.py"), "--config", str(recipe)]


def small_stages(tmp_path):
    data = ["num_demonstrations=40", "num_train_problems=20", "num_test_problems=4", "num_preference_pairs=10"]
    return (
        (f"{ROOT}/recipes/tiny/prepare_data.yaml", f"output_dir={tmp_path}/data", *data),
        (
            f"{ROOT}/recipes/tiny/build_model.yaml",
            f"output_dir={tmp_path}/base",
            f"demonstrations={tmp_path}/data/demonstrations.jsonl",
        ),
    )


def test_a_pipeline_checks_every_stage_before_the_first_one_starts(tmp_path):
    first, second = small_stages(tmp_path)
    done = subprocess.run(
        pipeline(tmp_path, first, (*second, "vocab_sise=400")), cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "did you mean 'vocab_size'?" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_pipeline_killed_in_the_middle_goes_on_where_it_stopped_and_skips_what_is_finished(tmp_path):
    command = pipeline(tmp_path, *small_stages(tmp_path))
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "data/run.json").exists():
        assert running.poll() is None
        time.sleep(0.05)
    running.kill()
    running.wait()
    first = (tmp_path / "data/run.json").read_text()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "prepare_data: finished before, skipped" in done.stdout
    assert (tmp_path / "data/run.json").read_text() == first
    assert json.loads((tmp_path / "base/run.json").read_text())["vocab_size"] > 300


def test_a_finished_stage_whose_input_was_made_again_is_not_taken_for_current(tmp_path):
    import shutil

    command = pipeline(tmp_path, *small_stages(tmp_path))
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    shutil.rmtree(tmp_path / "data")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "stands on old inputs; delete it" in done.stderr
