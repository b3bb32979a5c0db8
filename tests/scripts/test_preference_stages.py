"""ORPO and DPO as stages: where every row goes, on pairs made by hand and on published ones."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "rlhf"))
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import benchmark_real_pairs as real
import train_dpo
import train_orpo
from preference_helpers import recipe

from data.chat import render_response
from data.records import PreferencePair, write_records
from rlhf.run import open_run

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/data/preference"


@pytest.fixture
def file(demonstrations, tmp_path):
    pairs = [
        PreferencePair(
            id=d.id,
            question=d.question,
            chosen=render_response(d.scratchpad, d.answer),
            rejected=render_response("", d.answer),
            source="by hand",
        )
        for d in demonstrations[:8]
    ]
    pairs[2] = replace(pairs[2], rejected=pairs[2].chosen)
    pairs[5] = replace(pairs[5], chosen=pairs[5].chosen * 4)
    write_records(pairs, tmp_path / "pairs.jsonl")
    return tmp_path / "pairs.jsonl"


@pytest.mark.parametrize(("stage", "run"), [("orpo", train_orpo.run_orpo), ("dpo", train_dpo.run_dpo)])
def test_every_row_is_used_or_refused_with_its_id_and_reason(file, model_folder, tmp_path, stage, run):
    config = recipe(stage, tmp_path / "run", model_folder, f"pairs={file}", "training.num_steps=1")
    run(config, open_run(config))
    done = json.loads((tmp_path / "run/run.json").read_text())
    assert done["pairs"] == {
        "rows": 8, "used": 6, "refused: both responses are the same tokens": 1, "refused: longer than max_tokens 160": 1,
    }  # fmt: skip
    ids = [json.loads(line)["id"] for line in file.read_text().splitlines()]
    refused = [json.loads(line)["id"] for line in (tmp_path / "run/refused.jsonl").read_text().splitlines()]
    assert refused == [ids[2], ids[5]]
    assert (tmp_path / "run/model.safetensors").is_file()


def test_a_file_of_which_no_pair_can_be_used_says_why(file, model_folder, tmp_path):
    config = recipe("orpo", tmp_path / "run", model_folder, f"pairs={file}", "max_tokens=20")
    with pytest.raises(ValueError, match=r"no pair of .* can be trained on: 8 longer than max_tokens 20; raise"):
        train_orpo.run_orpo(config, open_run(config))


@pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")
@pytest.mark.slow
def test_no_row_of_published_pairs_is_lost(tmp_path):
    files = {"pairs": ("llmbar_natural.json",)}
    found = real.run(REAL, tmp_path, max_tokens=224, files=files)
    assert found["files"]["llmbar_natural"]["rows"] == 100
    assert real.lost(found) == 0
    for stage in ("orpo", "dpo"):
        assert 50 < found[stage]["used"] < 100
        assert found[stage]["passes"] == 1
    found["orpo"]["used"] -= 1
    assert real.lost(found) == 1
