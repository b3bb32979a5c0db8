"""scripts/check.py finds each fault that is put into a recipe's surroundings, and nothing in a healthy one."""

import dataclasses
import json
import shutil
import socket
import sys
from pathlib import Path

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import check
from checks.environment import check_versions
from checks.findings import Context, Report

from data.records import Problem, write_records
from rlhf.config import load_config
from rlhf.shapes import meta_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def surroundings(tmp_path, monkeypatch, demonstrations, model_folder):
    """A GRPO recipe with everything it needs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    write_records(demonstrations, "demonstrations.jsonl")
    write_records([Problem(id=d.id, question=d.question, answer=d.answer) for d in demonstrations], "problems.jsonl")
    shutil.copytree(model_folder, "model")
    recipe = yaml.safe_load((ROOT / "recipes/tiny/grpo.yaml").read_text()) | {
        "output_dir": "out",
        "policy": {"path": "model"},
        "problems": "problems.jsonl",
        "demonstrations": "demonstrations.jsonl",
        "rewards": [{"name": "correctness"}, {"name": "format"}],
    }
    Path("grpo.yaml").write_text(yaml.safe_dump(recipe))
    Path("accelerate.yaml").write_text((ROOT / "recipes/accelerate/single.yaml").read_text())
    return tmp_path


@pytest.fixture
def findings(capsys):
    """The lines of a check by level."""

    def run(recipe="grpo.yaml", *overrides, accelerate="accelerate.yaml"):
        capsys.readouterr()
        good = check.check(recipe, list(overrides), accelerate)
        lines = capsys.readouterr().out.splitlines()
        errors = [line.removeprefix("error   ") for line in lines if line.startswith("error")]
        assert good == (not errors)
        return errors, lines

    return run


def test_a_healthy_recipe_has_no_error_and_every_check_its_line(surroundings, findings):
    errors, lines = findings()
    assert errors == []
    for name in ("recipe", "batch", "output_dir", "versions", "ranks", "problems", "demonstrations", "policy.path", "tokenizer",
                 "round trip", "prompts", "rollout engine", "reward", "disk"):  # fmt: skip
        assert any(line.split()[1] == f"{name.split()[0]}:" or f" {name}:" in line for line in lines), name


def no_data(folder):
    (folder / "problems.jsonl").unlink()


def a_wrong_column(folder):
    lines = (folder / "problems.jsonl").read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), "anwser": "7"})
    (folder / "problems.jsonl").write_text("\n".join(lines))


def no_weights(folder):
    (folder / "model/model.safetensors").unlink()


def weights_cut_off(folder):
    file = folder / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def a_lost_shard(folder):
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (folder / "model/model.safetensors.index.json").write_text(json.dumps(index))


def no_config(folder):
    (folder / "model/config.json").unlink()


def no_chat_template(folder):
    for file in (folder / "model").glob("chat_template*"):
        file.unlink()


def a_template_without_the_question(folder):
    (folder / "model/chat_template.jinja").write_text("{{ messages[0]['role'] }}")


def an_unreachable_reward(folder, demonstrations=None):
    rows = [json.loads(line) for line in (folder / "demonstrations.jsonl").read_text().splitlines()]
    text = "\n".join(json.dumps({**row, "answer": "1}"}) for row in rows)
    (folder / "demonstrations.jsonl").write_text(text)


def a_foreign_output(folder):
    (folder / "out").mkdir()
    (folder / "out/thesis.tex").write_text("mine")


def a_missing_accelerate_configuration(folder):
    (folder / "accelerate.yaml").unlink()


@pytest.mark.parametrize(
    ("fault", "name", "says"),
    [
        (no_data, "problems", "run the stage that writes it first"),
        (a_wrong_column, "problems", "anwser"),
        (no_weights, "policy.path", "no .safetensors"),
        (weights_cut_off, "policy.path", "cannot be read"),
        (a_lost_shard, "policy.path", "model-00002-of-00002"),
        (no_config, "policy.path", "no config.json"),
        (no_chat_template, "tokenizer", "no chat template"),
        (a_template_without_the_question, "round trip", "does not show the question"),
        (an_unreachable_reward, "reward", "cannot reach its maximum"),
        (a_foreign_output, "output_dir", "holds no run of this project"),
        (a_missing_accelerate_configuration, "accelerate configuration", "does not exist"),
    ],
)
def test_an_injected_fault_is_the_one_error(surroundings, findings, fault, name, says):
    fault(surroundings)
    errors, _ = findings()
    assert len(errors) == 1
    assert errors[0].startswith(f"{name}: ")
    assert says in errors[0]


@pytest.mark.parametrize(
    ("override", "name", "says"),
    [
        ("rollout.max_prompt_tokens=5", "prompts", "more than rollout.max_prompt_tokens 5"),
        ("rollout.max_new_tokens=3", "reward", "no demonstration fits"),
        ("training.keep_checkpoints=1000000000", "disk", "training.keep_checkpoints"),
        ("rewards=[{name: reward_model, path: model}, {name: correctness}]", "rewards.reward_model.path", "reward_statistics.json"),
        ("policy.router_aux_coefficient=0.1", "routers", "policy.router_aux_coefficient is set and a qwen3 model has no router"),
        ("rollout.prompts_per_bach=4", "recipe", "did you mean 'prompts_per_batch'"),
    ],
)  # fmt: skip
def test_a_recipe_that_contradicts_its_inputs_is_one_error(surroundings, findings, override, name, says):
    errors, _ = findings("grpo.yaml", override)
    assert len(errors) == 1
    assert errors[0].startswith(f"{name}: ")
    assert says in errors[0]


def accelerate_with(**changes):
    settings = yaml.safe_load((ROOT / "recipes/accelerate/zero2.yaml").read_text())
    Path("accelerate.yaml").write_text(yaml.safe_dump(settings | changes))


def test_a_batch_that_does_not_divide_over_the_ranks_is_an_error(surroundings, findings):
    accelerate_with(num_processes=3)
    errors, _ = findings()
    assert [error.split(":")[0] for error in errors] == ["batch"]
    assert "ranks" in errors[0]


def test_a_port_that_is_taken_is_an_error_and_a_free_one_is_not(surroundings, findings):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        accelerate_with(main_process_port=port)
        errors, _ = findings()
        assert errors == [f"port: main_process_port {port} is in use; stop what holds it or name another one"]
    assert findings()[0] == []


def test_the_blocks_of_a_mixture_are_named(surroundings, findings):
    config = json.loads(Path("model/config.json").read_text())
    mixture = {
        "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "vocab_size": config["vocab_size"],
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "tie_word_embeddings": True,
    }  # fmt: skip
    model = meta_model(mixture, "test")
    type(model)(model.config).save_pretrained("model")
    errors, lines = findings()
    assert errors == []
    assert any("Qwen3MoeSparseMoeBlock route 2 of 4 experts in 2 layers" in line for line in lines)


def test_a_version_outside_its_bounds_is_named_with_the_repair(tmp_path):
    text = (ROOT / "pyproject.toml").read_text().replace('"trl>=1.16,<1.17"', '"trl>=9.0,<10"')
    (tmp_path / "pyproject.toml").write_text(text)
    report = Report(show=lambda _: None)
    config = load_config(ROOT / "recipes/tiny/sft.yaml")
    check_versions(report, config, Context(accelerate=None), pyproject=tmp_path / "pyproject.toml")
    assert [f.level for f in report.findings] == ["error"]
    assert "trl is 1." in report.findings[0].text
    assert "make install" in report.findings[0].text


@pytest.mark.parametrize(
    "recipe", sorted((ROOT / "recipes").glob("*/**/pipeline.yaml")), ids=lambda p: str(p.relative_to(ROOT / "recipes"))
)
def test_a_pipeline_is_checked_before_any_of_its_stages_has_run(tmp_path, monkeypatch, findings, recipe):
    for folder in ("recipes", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    (tmp_path / "shared").mkdir()
    monkeypatch.chdir(tmp_path)
    errors, lines = findings(str(recipe.relative_to(ROOT)), accelerate=None)
    assert errors == [e for e in errors if e.startswith("source: ")]  # a path outside the repository
    assert sum(line.startswith("[") for line in lines) == len(yaml.safe_load(recipe.read_text())["stages"])
    assert any("will be made by the stage" in line for line in lines)


def test_a_file_that_no_earlier_stage_makes_is_an_error(tmp_path, monkeypatch, findings):
    for folder in ("recipes", "scripts"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    raw = yaml.safe_load((ROOT / "recipes/tiny/pipeline.yaml").read_text())
    for stage in raw["stages"]:
        stage["recipe"] = f"recipes/tiny/{stage['recipe']}"
    raw["stages"][2]["overrides"] = ["demonstrations=outputs/demo/data/demos.jsonl"]
    Path("pipeline.yaml").write_text(yaml.safe_dump(raw))
    errors, _ = findings("pipeline.yaml", accelerate=None)
    assert len(errors) == 1
    assert "demos.jsonl is not among what the stage prepare_data makes" in errors[0]


def test_what_prepare_data_makes_is_known_to_the_check():
    from checks.findings import MADE_BY

    from data.records import Prepared

    assert MADE_BY["prepare_data"] == tuple(f"{field.name}.jsonl" for field in dataclasses.fields(Prepared))
