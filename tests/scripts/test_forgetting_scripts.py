"""The Fisher information and the evaluation of what was forgotten, as a user runs them, on a model of two layers."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from rlhf.card import fingerprint
from rlhf.config import load_config
from rlhf.elastic import FISHER, load_fisher
from rlhf.run import open_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
ROLLOUT = {
    "engine": "transformers", "samples_per_prompt": 2, "max_prompt_tokens": 150, "max_new_tokens": 8, "dtype": "float32",
}  # fmt: skip


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sums(tmp_path):
    rows = [{"id": str(i), "question": f"What is {i} + 1?", "answer": f"{i + 1}", "level": 1} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "sums.jsonl")


def config_of(tmp_path, **recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "rollout": ROLLOUT, **recipe}))
    return load_config(path)


def test_fisher_information_is_of_the_models_own_completions_and_of_these_weights_only(tmp_path, sums, model_folder):
    config = config_of(tmp_path, stage="estimate_fisher", model={"path": model_folder}, problems=sums, num_sequences=3)
    script = load("estimate_fisher")
    script.estimate_fisher(config, open_run(config))
    said = json.loads((tmp_path / "out/run.json").read_text())
    assert (said["kind"], said["completions"]) == ("true, of sampled completions", 3)
    fisher = load_fisher(config.output_dir, weights=fingerprint(model_folder))
    weights = load_file(Path(model_folder) / "model.safetensors")
    assert {n: f.shape for n, f in fisher.items()} == {n: w.shape for n, w in weights.items()}
    assert all(f.min() >= 0 and f.max() > 0 for f in fisher.values())
    assert (tmp_path / "out" / FISHER).is_file()


@pytest.mark.slow
def test_a_model_against_itself_has_forgotten_nothing_and_a_gate_may_refuse_another(tmp_path, sums, model_folder):
    both = {"before": {"path": model_folder}, "after": {"path": model_folder}}
    recipe = {
        "stage": "forgetting",
        **both,
        "suites": {"sums": {"problems": sums}, "first": {"problems": sums, "num_problems": 3}},
    }
    config = config_of(tmp_path, **recipe, gate={"max_fall": 0.05})
    script = load("evaluate_forgetting")
    script.evaluate_forgetting(config, open_run(config))
    found = json.loads((tmp_path / "out/run.json").read_text())
    assert found["refused"] == []
    assert [found["suites"][name]["change"]["n"] for name in ("sums", "first")] == [4, 3]
    assert found["suites"]["sums"]["change"]["mean"] == 0
    assert (tmp_path / "out/forgetting.md").read_text().startswith("| suite | problems |")

    results = tmp_path / "out/first/results.json"  # of a finished suite, which is not sampled again
    fallen = json.loads(results.read_text())
    fallen["paired_difference"] |= {"mean": -0.3, "low": -0.4, "high": -0.2}
    results.write_text(json.dumps(fallen))
    (tmp_path / "out/run.json").unlink()
    with pytest.raises(SystemExit) as refused:
        script.evaluate_forgetting(config, open_run(config))
    assert refused.value.code == 3
    assert not (tmp_path / "out/run.json").exists()  # a pipeline would stop here
    written = json.loads((tmp_path / "out/forgetting.json").read_text())
    assert written["worst"] == "first"
    assert written["refused"][0].startswith("first changed by -0.300 [-0.400, -0.200], and its low end is below -0.050")
