"""The card names what a score depends on, and obeys nothing that a model or a file wrote."""

import json

import pytest

from rlhf import card as cards
from rlhf.card import (
    Card,
    contamination,
    fingerprint,
    markdown,
    show_contamination,
    versions,
    without_leaks,
    write_card,
)
from rlhf.evaluation import GradedProblem, summarise

HOSTILE = "a\x1b[2J|b\nc `d` <script>"


def problem(id, correct=True, **more):
    return GradedProblem(
        id=id, level=1, answers=("1",), verdicts=("correct" if correct else "wrong",), lengths=(3,), truncated=(False,), texts=("x",),
        **more,
    )  # fmt: skip


def card(problems, **more):
    blocks = {key: {"key": HOSTILE} for key in ("model", "sampling", "engine", "grader", "hardware", "cost")}
    return Card(**{
        "label": "base", **blocks, "benchmark": {"name": HOSTILE}, "prompt": {"system_prompt": HOSTILE, "example": HOSTILE},
        "contamination": None, "commit": "abc", "scores": summarise(problems, pass_at=(1,), seed=0), **more,
    })  # fmt: skip


def test_what_others_wrote_stays_in_its_cell_and_loses_its_control_characters():
    text = markdown(card([problem("a", subject=HOSTILE), problem("b", subject="other")]))
    assert "\x1b" not in text
    row = next(line for line in text.split("\n") if line.startswith("| model: key"))
    assert row == "| model: key | a�[2J\\|b c `d` <script> |"


def test_card_and_picture_are_written_whatever_the_names_are(tmp_path):
    problems = [problem(f"{i}", i % 2 == 0, subject=f"{HOSTILE}{i % 3}$\\frac") for i in range(6)]
    problems += [problem(f"{i}~typos", variant="typos", origin=f"{i}") for i in range(6)]
    write_card(card(problems), tmp_path)
    assert (tmp_path / "card.base.png").read_bytes().startswith(b"\x89PNG")
    assert "\x1b" not in (tmp_path / "card.base.json").read_text()
    assert json.loads((tmp_path / "card.base.json").read_text())["scores"]["robustness"]["worst"]["mean"] == 0.5


@pytest.mark.parametrize("limit", [2**28, 8])
def test_other_weights_of_the_same_size_have_another_fingerprint(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(cards, "WHOLE_FILE", limit)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"0123456789abcdef")
    first = fingerprint(str(tmp_path))
    assert len(first) == 16
    assert fingerprint(str(tmp_path)) == first
    file.write_bytes(b"0123456789abcdeX")
    assert fingerprint(str(tmp_path)) != first
    assert fingerprint("Qwen/nowhere") == "unknown"


def test_contamination_is_never_silent(tmp_path):
    report = {
        "rows_scanned": 10,
        "rules": {},
        "benchmarks": {"math500": {"problems": 500, "found": 64, "left": 2, "left_ids": ["a", "b"]}},
    }
    manifest = tmp_path / "manifest.json"
    manifest.write_text(json.dumps({"decontamination": report}))
    assert contamination(None, "math500") is None
    assert "unknown: the recipe names no data_manifest" in show_contamination(None)
    assert "not scanned for these problems (scanned for math500)" in show_contamination(
        contamination(str(manifest), "gsm8k")
    )
    found = contamination(str(manifest), "math500")
    assert show_contamination(found).startswith("2 of 500 problems occur in the 10 training rows (64 before")
    clean = without_leaks(
        found, [problem("a"), problem("b"), problem("c", False), problem("c~typos", origin="c", variant="typos")]
    )
    assert clean is not None
    assert (clean["mean"], clean["n"]) == (0.0, 1)
    assert without_leaks(None, [problem("a")]) is None


def test_versions_are_those_installed_and_nothing_else():
    assert versions("torch", "no-such-package").keys() == {"python", "torch"}
