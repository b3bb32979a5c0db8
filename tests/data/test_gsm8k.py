import json
import os
import random
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from data.gsm8k import prepare, read_gsm8k, spoil
from reward_models.grading import grade

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k"


def write(tmp_path, *rows):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(
            "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        )
    return str(tmp_path)


def test_calculator_marks_and_thousands_separators_go_and_the_steps_stay(tmp_path):
    path = write(
        tmp_path, {"question": " How many? ", "answer": "She has 2*500=<<2*500=1000>>1000.\nThen 1.\n#### 1,001"}
    )
    assert list(read_gsm8k("train", path=path, revision="main")) == [
        ("How many?", "She has 2*500=1000.\nThen 1.", "1001")
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "no marker"}, "train.jsonl:2: 'answer' has no '#### number' at its end"),
        ({"question": "q"}, "train.jsonl:2: expected an object with the texts"),
        ("{broken\n", "train.jsonl:2: Expecting property name"),
    ],
)
def test_a_row_that_is_not_as_the_source_has_it_is_named(tmp_path, row, message):
    path = write(tmp_path, {"question": "q", "answer": "#### 1"}, row)
    with pytest.raises(ValueError) as error:
        list(read_gsm8k("train", path=path, revision="main"))
    assert message in str(error.value)


def test_a_folder_without_the_file_says_what_belongs_there(tmp_path):
    with pytest.raises(ValueError, match=r"has no train.jsonl; point it at a folder with GSM8K's"):
        list(read_gsm8k("train", path=str(tmp_path), revision="main"))


def test_a_spoiled_solution_has_a_wrong_number_in_the_step_it_names():
    step, scratchpad, answer = spoil(random.Random(0), "2 + 3 = 5\n5 + 1 = 6", "6")
    right, wrong = ["2 + 3 = 5", "5 + 1 = 6"], scratchpad.split("\n")
    assert [a != b for a, b in zip(right, wrong, strict=True)] == [i == step for i in range(2)]
    assert answer != "6"


@pytest.mark.skipif(not GSM8K.is_dir(), reason="needs ../shared/data/gsm8k")
def test_the_real_files_are_read_whole_and_every_pair_prefers_the_right_answer():
    rows = list(read_gsm8k("test", path=str(GSM8K), revision="main"))
    assert len(rows) == 1319
    assert not any("<<" in scratchpad for _, scratchpad, _ in rows)
    p = prepare(
        seed=0,
        path=str(GSM8K),
        revision="main",
        demonstrations=10,
        train_problems=10,
        test_problems=10,
        train_pairs=300,
        heldout_pairs=10,
    )
    answers = {
        f"gsm8k-train-{i}": row[2]
        for i, row in enumerate(islice(read_gsm8k("train", path=str(GSM8K), revision="main"), 300))
    }
    for pair in p.train_pairs:
        assert grade(pair.chosen, answers[pair.id]).verdict == "correct"
        assert grade(pair.rejected, answers[pair.id]).verdict == "wrong"


def test_without_the_hub_the_recipe_is_told_to_name_a_folder():
    script = "from data.gsm8k import _rows; list(_rows('train', path=None, revision='main'))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": "/nonexistent"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert "ValueError: openai/gsm8k at main could not be downloaded (ConnectionError); set source.path" in done.stderr
