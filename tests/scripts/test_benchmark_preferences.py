"""A small outcome model on real preference pairs, against a bag of words on the same split."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from data.records import PreferencePair

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/data/preference"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_preferences", ROOT / "scripts/benchmark_preferences.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def pair(chosen, rejected, question="q", history=()):
    return PreferencePair(id="p", question=question, chosen=chosen, rejected=rejected, history=list(history))


def test_the_bag_of_words_learns_which_words_are_preferred_and_knows_nothing_of_others(script):
    train = [pair("thank you", "go away")] * 5 + [pair("thank them", "go home")] * 5
    polite, rude, unknown = script.bag_of_words(
        train, [pair("Thank", "go"), pair("go away", "thank you"), pair("x", "y")]
    )
    assert polite > 0
    assert rude < 0
    assert unknown == 0


def test_dialogues_that_begin_alike_are_on_the_same_side_of_the_split(script):
    for i in range(50):
        first = script.is_held_out(pair("a", "b", question=f"{i}"))
        assert script.is_held_out(pair("c", "d", question="and?", history=[f"{i}", "yes"])) == first
    sides = [script.is_held_out(pair("a", "b", question=f"{i}")) for i in range(1000)]
    assert 250 < sum(sides) < 350


@needs_real
@pytest.mark.slow
def test_a_small_outcome_model_is_above_chance_on_real_pairs_and_every_row_is_used_or_refused(script, tmp_path):
    found = script.run(REAL, tmp_path, steps=30, max_tokens=224)
    rows = {name: r["used"] + sum(r["refused"].values()) for name, r in found["rows"].items()}
    inside = {f.name.partition(".")[0]: len(json.loads(f.read_text())) for f in REAL.glob("*.json")}
    with gzip.open(REAL / "hh_harmless_base_test.jsonl.gz") as lines:
        inside["hh_harmless_base_test"] = sum(1 for _ in lines)
    assert rows == {name: inside[name] for name in rows}
    assert (
        sum(r["used"] for r in found["rows"].values()) == found["training_pairs"] + found["outcome_model"]["num_pairs"]
    )
    for model in ("outcome_model", "bag_of_words"):
        assert found[model]["interval"]["low"] > 0.5, script.describe(found)
    assert found["difference"]["low"] < 0.1
