"""Sources: what a row becomes, what is refused and why, and that the real files are read whole."""

import copy
import gzip
import json
from pathlib import Path

import pytest

from data.catalog import BENCHMARKS, CATALOG, load_benchmark, read_benchmark
from data.files import slices
from data.shards import to_table
from data.sources import Refused, last_boxed, read_slice, read_source

REAL = Path(__file__).parents[3] / "shared/data"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="needs ../shared/data")


def convert(name, row):
    return CATALOG[name].convert(row, "key")


def refusal(name, row):
    with pytest.raises(ValueError) as error:
        convert(name, row)
    return str(error.value)


# ------------------------------------------------------------------------------------------------------------------ problems


def test_math_takes_its_answer_from_the_last_box_and_its_level_from_the_words():
    row = {"problem": "p", "level": "Level 3", "type": "Algebra", "solution": r"\boxed{1}, so $\boxed{\frac{1}{2}}$."}
    (problem,) = convert("math", row)
    assert (problem.answer, problem.level, problem.subject) == (r"\frac{1}{2}", 3, "Algebra")
    assert "no \\boxed{}" in refusal("math", {"problem": "p", "solution": "so it is 3"})
    assert "'answer' is null" in refusal("math", {"problem": "p", "answer": None})


@pytest.mark.parametrize(
    ("text", "box"),
    [(r"\boxed{a{b}c}", "a{b}c"), (r"\boxed{\{1,2\}}", r"\{1,2\}"), (r"\boxed{1} and \boxed{2", "1"), ("none", None)],
)
def test_the_last_complete_box_counts_with_its_braces_matched(text, box):
    assert last_boxed(text) == box


def test_an_aime_answer_loses_its_leading_zeros_and_is_never_more_than_999():
    assert convert("aime24", {"problem": "p", "answer": "073"})[0].answer == "73"
    assert "from 0 to 999" in refusal("aime24", {"problem": "p", "answer": "1000"})
    assert "from 0 to 999" in refusal("aime24", {"problem": "p", "answer": "-1"})


def test_an_amc_answer_stored_as_a_float_becomes_a_whole_number():
    assert convert("amc23", {"problem": "p", "answer": 27.0})[0].answer == "27"


def test_olympiadbench_joins_several_answers_and_refuses_pictures():
    row = {"id": 7, "question": "q", "context": "c", "final_answer": ["$1$", "$2$"]}
    (problem,) = convert("olympiadbench", row)
    assert (problem.id, problem.question, problem.answer) == ("olympiadbench-7", "c\nq", "$1$, $2$")
    assert "pictures" in refusal("olympiadbench", {**row, "modality": "Multimodal"})


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "p", "answer": "x"}, "x"),
        ({"question": "p", "expected_answer": 12}, "12"),
        ({"prompt": "p", "answer": 0.5}, "0.5"),
    ],
)
def test_any_file_of_questions_is_a_benchmark(row, answer):
    assert convert("jsonl", row)[0].answer == answer


def test_an_unknown_benchmark_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown benchmark 'gsm9k'; known: gsm8k, math500, math, aime24"):
        load_benchmark("gsm9k", path=None, revision=None)


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_a_missing_file_says_where_to_get_it(name, tmp_path):
    source = CATALOG[name]
    with pytest.raises(ValueError) as error:
        read_source(source, path=str(tmp_path / "nowhere"), revision=None, split=source.default_split)
    assert "does not exist; get" in str(error.value)
    with pytest.raises(ValueError, match="has no .*; get"):
        read_source(source, path=str(tmp_path), revision=None, split=source.default_split)


def test_the_hub_is_read_only_at_a_pinned_revision():
    with pytest.raises(ValueError, match="set revision to a commit of math-ai/minervamath"):
        load_benchmark("minerva", path=None, revision=None)
    with pytest.raises(ValueError, match="revision 'main' may move; name a commit"):
        load_benchmark("gsm8k", path=None, revision="main")
    for source in CATALOG.values():
        assert source.revision is None or len(source.revision) == 40


def test_a_hub_out_of_reach_says_which_local_copy_would_do():
    with pytest.raises(ValueError, match="could not be downloaded .*; set path to a local copy: get amc23.jsonl or"):
        load_benchmark("amc23", path=None, revision="0" * 40)


def test_a_malformed_row_is_named_counted_and_left_out(tmp_path, caplog):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"problem": "p", "answer": "1"}\n{"problem": "p"}\n\n{broken\n{"problem": "q", "answer": ""}\n')
    problems, refused = read_benchmark("jsonl", path=str(path), revision=None)
    assert [p.answer for p in problems] == ["1"]
    assert [r.origin for r in refused] == [f"{path}:2", f"{path}:4", f"{path}:5"]
    assert "is missing (has: problem)" in refused[0].reason
    assert "not valid JSON" in refused[1].reason
    load_benchmark("jsonl", path=str(path), revision=None)
    assert "3 of 4 rows refused" in caplog.text


def test_a_benchmark_without_a_readable_row_is_an_error(tmp_path):
    (tmp_path / "mine.jsonl").write_text("[1]\n")
    with pytest.raises(ValueError, match="no readable problem among 1 rows: .*mine.jsonl:1: expected an object"):
        load_benchmark("jsonl", path=str(tmp_path / "mine.jsonl"), revision=None)


# --------------------------------------------------------------------------------------------------------------- preferences


def test_hh_is_cut_into_turns_and_keeps_what_was_said_before():
    before = "\n\nHuman: one?\n\nAssistant: 1\n\nHuman: two?\n\nAssistant:"
    (pair,) = convert("hh_rlhf", {"chosen": before + " 2", "rejected": before + " 3"})
    assert (pair.history, pair.question, pair.chosen, pair.rejected) == (["one?", "1"], "two?", "2", "3")
    assert "differ before" in refusal("hh_rlhf", {"chosen": before + " 2", "rejected": "\n\nHuman: x\n\nAssistant: y"})
    assert "empty turn" in refusal("hh_rlhf", {"chosen": before, "rejected": before + " 3"})
    assert "the same text" in refusal("hh_rlhf", {"chosen": before + " 2", "rejected": before + " 2"})


def messages(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": messages("q", "a"), "rejected": messages("q", "b"), "score_chosen": 8.0, "score_rejected": 7.5},
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"prompt": messages("q"), "chosen": "a", "rejected": "b"},
        {"input": "q", "output_1": "b", "output_2": "a", "label": 2},
    ],
)  # fmt: skip
def test_every_form_of_a_pair_becomes_the_same_record(row):
    (pair,) = convert("pairs", row)
    assert (pair.question, pair.chosen, pair.rejected, pair.history) == ("q", "a", "b", [])


@pytest.mark.parametrize(
    ("more", "margin"),
    [
        ({"score_chosen": 8.0, "score_rejected": 7.5}, 0.5),
        ({"margin": 2}, 2.0),
        ({}, None),
        ({"score_chosen": 8.0}, None),
    ],
)
def test_a_margin_is_the_rows_own_or_the_difference_of_its_scores(more, margin):
    (pair,) = convert("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", **more})
    assert pair.margin == margin


@pytest.mark.parametrize("margin", [-1, float("nan"), float("inf"), "2", True])
def test_a_margin_that_is_none_is_refused(margin):
    assert "margin" in refusal("pairs", {"prompt": "q", "chosen": "a", "rejected": "b", "margin": margin})


def test_a_tie_is_no_preference():
    tie = {"prompt": "q", "chosen": messages("q", "a"), "rejected": messages("q", "b"), "score_chosen": 8.0, "score_rejected": 8.0}  # fmt: skip
    assert "no preference to learn" in refusal("ultrafeedback", tie)
    assert "must be 1 or 2" in refusal("pairs", {"input": "q", "output_1": "b", "output_2": "a", "label": True})


# --------------------------------------------------------------------------------------------------------------------- steps


def prm800k(*ratings, chosen=0):
    steps = [
        {"completions": [{"text": f"s{i}", "rating": r}], "chosen_completion": chosen, "human_completion": None}
        for i, r in enumerate(ratings)
    ]
    return {"question": {"problem": "p"}, "label": {"steps": steps, "finish_reason": "solution"}}


def test_prm800k_neutral_counts_as_right_and_a_missing_rating_ends_the_path():
    (record,) = convert("prm800k", prm800k(1, 0, -1))
    assert (record.steps, record.labels) == (["s0", "s1", "s2"], [True, True, False])
    (record,) = convert("prm800k", prm800k(1, None, 1))
    assert record.labels == [True]


def test_prm800k_alternatives_are_records_of_their_own_on_the_path_so_far():
    row = prm800k(1, 1)
    row["label"]["steps"][1]["completions"].append({"text": "alt", "rating": -1})
    main, branch = convert("prm800k", row)
    assert (main.steps, main.labels) == (["s0", "s1"], [True, True])
    assert (branch.steps, branch.labels) == (["s0", "alt"], [True, False])


@pytest.mark.parametrize("label", [-100, 1.0, True, "1", 2])
def test_a_prm800k_rating_that_does_not_exist_is_refused_rather_than_cast(label):
    assert "a rating must be -1, 0, 1 or null" in refusal("prm800k", prm800k(1, label))


def test_math_shepherd_reads_its_marks_by_position():
    written = "How many + why? Step 1: 1 + 1 = 2. ки\nStep 2: 2 - 3 = 1. ки"
    labelled = "How many + why? Step 1: 1 + 1 = 2. +\nStep 2: 2 - 3 = 1. -"
    (record,) = convert("math_shepherd", {"input": written, "label": labelled})
    assert record.question == "How many + why?"
    assert record.steps == ["Step 1: 1 + 1 = 2.", "Step 2: 2 - 3 = 1."]
    assert record.labels == [True, False]
    assert "is not 'input'" in refusal("math_shepherd", {"input": written, "label": labelled.replace("+\n", "?\n")})


def test_processbench_counts_from_zero_and_minus_one_means_all_right():
    row = {"id": "m-1", "problem": "p", "steps": ["a", "b", "c"]}
    assert convert("processbench", {**row, "label": 1})[0].labels == [True, False, False]
    assert convert("processbench", {**row, "label": -1})[0].labels == [True, True, True]
    for wrong in (-100, 3, 1.0, True, None):
        assert "from -1 to 2" in refusal("processbench", {**row, "label": wrong})


def test_prmbench_counts_from_one():
    row = {"question": "p", "modified_process": ["a", "b", "c"], "error_steps": [2]}
    assert convert("prmbench", row)[0].labels == [True, False, True]
    for wrong in ([0], [4], [-100], [1.0], None):
        assert "from 1 to 3" in refusal("prmbench", {**row, "error_steps": wrong})


@pytest.mark.parametrize("labels", [[-100], [1.0], [1], ["true"], [None]])
def test_stepwise_labels_are_booleans_or_nothing(labels):
    row = {"prompt": "p", "completions": ["a"], "labels": labels}
    assert "must be a list of bool" in refusal("steps", row)


# ------------------------------------------------------------------------------------------------------------ demonstrations


def openr1(**changes):
    row = {"problem": "p", "answer": "2", "generations": ["<think>bad</think>so 3", "<think>good</think>so 2"]}
    return {**row, "correctness_math_verify": [False, True], "is_reasoning_complete": [True, True], **changes}


def test_openr1_takes_the_first_generation_that_was_verified_word_for_word():
    (record,) = convert("openr1_math", openr1())
    assert (record.scratchpad, record.answer, record.response) == ("good", "2", "<think>good</think>so 2")
    assert "none of its 2" in refusal("openr1_math", openr1(correctness_math_verify=[False, False]))
    assert "none of its 2" in refusal("openr1_math", openr1(is_reasoning_complete=[True, False]))
    assert "list of 2 bool" in refusal("openr1_math", openr1(correctness_math_verify=[0, 1]))


def test_numina_needs_an_answer_to_compare_with():
    assert convert("numina_math", {"problem": "p", "solution": r"1+1=\boxed{2}"})[0].answer == "2"
    assert "asks for a proof" in refusal("numina_math", {"problem": "p", "solution": "s", "answer": "proof"})


def test_a_conversation_keeps_its_system_prompt_and_earlier_turns():
    talk = [{"role": "system", "content": "S"}, *messages("a", "b", "c", "<think>t</think>\\boxed{4}")]
    (record,) = convert("chat", {"messages": talk})
    assert (record.system, record.history, record.question) == ("S", ["a", "b"], "c")
    assert (record.scratchpad, record.answer) == ("t", "4")
    assert "must alternate" in refusal("chat", {"messages": messages("a", "b", "c")})
    assert "has the role 'tool'" in refusal("chat", {"messages": [{"role": "tool", "content": "x"}]})


# --------------------------------------------------------------------------------------------------------------------- files


def test_a_file_cut_anywhere_gives_the_same_rows_with_the_same_lines(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps({"problem": f"p{i}", "answer": "é" * (i % 7 + 1)}) + "\n" for i in range(50)))
    whole = list(read_slice(CATALOG["jsonl"], slices(path, bytes_per_slice=1 << 30)[0], prefix="x"))
    assert [origin for origin, _ in whole] == [f"{path}:{i}" for i in range(1, 51)]
    for size in (1, 37, 100, 999):
        parts = slices(path, bytes_per_slice=size)
        assert [row for part in parts for row in read_slice(CATALOG["jsonl"], part, prefix="x")] == whole


def test_gzipped_lines_arrays_and_objects_in_a_row_are_read_alike(tmp_path):
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(3)]
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "c.json").write_text("\n".join(json.dumps(r, indent=2) for r in rows))
    (tmp_path / "d.txt").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in ("a.jsonl.gz", "b.json", "c.json", "d.txt"):
        problems, refused = read_benchmark("jsonl", path=str(tmp_path / name), revision=None)
        assert ([p.question for p in problems], refused) == (["p0", "p1", "p2"], []), name


# ----------------------------------------------------------------------------------------------------------------- real files


@needs_real
@pytest.mark.parametrize(
    ("name", "path", "problems"),
    [
        ("gsm8k", "gsm8k", 1319),
        ("math500", "math/math500_test.jsonl", 500),
        ("math", "math", 5000),
        ("aime24", "aime", 30),
        ("aime25", "aime", 30),
        ("amc23", "bench", 40),
        ("olympiadbench", "bench", 675),
        ("minerva", "bench", 272),
    ],
)
def test_the_real_benchmarks_are_read_whole(name, path, problems):
    assert name in BENCHMARKS
    read, refused = read_benchmark(name, path=str(REAL / path), revision=None)
    assert (len(read), refused, len({p.id for p in read})) == (problems, [], problems)


@needs_real
@pytest.mark.parametrize(
    ("name", "split", "path", "kept", "refused"),
    [
        ("math", "train", "math", 7470, 4),
        ("aime", "train", "aime", 975, 0),
        ("hh_rlhf", "test", "preference", 2299, 13),
        ("pairs", "train", "preference/lf_dpo_en_demo.json", 300, 0),
        ("pairs", "train", "preference/llmbar_adv_neighbor.json", 134, 0),
        ("chat", "train", "preference/lf_alpaca_en_demo.json", 999, 0),
        ("processbench", "gsm8k", "steps", 400, 0),
        ("processbench", "math", "steps", 1000, 0),
        ("prmbench", "test", "steps", 383, 11),
        ("prm800k", "train", "steps/prm800k_phase1_train_example.json", 123, 0),
    ],
)
def test_the_real_files_are_read_and_what_is_refused_is_counted(name, split, path, kept, refused):
    records, out = read_source(CATALOG[name], path=str(REAL / path), revision=None, split=split)
    assert (len(records), len(out)) == (kept, refused)
    assert len({r.id for r in records}) == kept
    assert all(isinstance(r, Refused) and r.reason for r in out)


# ------------------------------------------------------------------------------------------------------- whatever a row holds

TALK = "\n\nHuman: one?\n\nAssistant:"
PROBLEM = {"problem": "p", "question": "p", "answer": "1", "level": "Level 3", "solution": r"\boxed{1}", "year": 1983}
VALID = {
    "gsm8k": {"question": "q", "answer": "a #### 1"},
    "gsm8k_solutions": {"question": "q", "answer": "a #### 1"},
    **dict.fromkeys(("math", "math500", "aime24", "aime25", "aime", "amc23", "minerva", "jsonl"), PROBLEM),
    "olympiadbench": {"id": 1, "question": "q", "context": None, "final_answer": ["1"], "solution": ["s"]},
    "hh_rlhf": {"chosen": TALK + " a", "rejected": TALK + " b"},
    "pairs": {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
    "ultrafeedback": {"prompt": "q", "chosen": messages("q", "a"), "rejected": messages("q", "b"), "score_chosen": 8.0, "score_rejected": 7.5},
    "chat": {"messages": messages("a", "b", "c", "d")},
    "openr1_math": openr1(),
    "numina_math": {"problem": "p", "solution": "s", "answer": "1"},
    "prm800k": prm800k(1, 0, -1),
    "math_shepherd": {"input": "q Step 1: a ки\nStep 2: b ки", "label": "q Step 1: a +\nStep 2: b -"},
    "processbench": {"id": "m-1", "problem": "p", "steps": ["a", "b"], "label": 1},
    "prmbench": {"question": "p", "modified_process": ["a", "b"], "error_steps": [2]},
    "steps": {"prompt": "p", "completions": ["a"], "labels": [True]},
}  # fmt: skip
JUNK = [None, True, 0, -100, 1.0, 4.5, float("nan"), float("inf"), "", " ", "x", "\ud800", "\0", [], [None], [[]], {}, [{}], [{"role": []}], 10**30]  # fmt: skip


def places(value, path=()):
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def test_there_is_a_row_of_every_source_here():
    assert set(VALID) == set(CATALOG)
    assert all(CATALOG[name].convert(row, "key") for name, row in VALID.items())


@pytest.mark.parametrize("name", sorted(VALID))
def test_a_row_becomes_records_that_parquet_can_hold_or_is_refused_whatever_it_holds(name, tmp_path):
    mutants = []
    for path in places(VALID[name]):
        for junk in JUNK:
            row = copy.deepcopy(VALID[name])
            inner = row
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = junk
            mutants.append(row)
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in mutants))
    (part,) = slices(tmp_path / "m.jsonl", bytes_per_slice=1 << 30)
    outcomes = [outcome for _, outcome in read_slice(CATALOG[name], part, prefix="x")]
    assert len(outcomes) == len(mutants)
    for outcome in outcomes:
        assert isinstance(outcome, Refused) or len(to_table(CATALOG[name].kind, list(outcome))) == len(outcome)


def test_nesting_without_end_is_no_json(tmp_path):
    (tmp_path / "mine.jsonl").write_text("[" * 100_000 + "\n" + '{"problem": "p", "answer": "1"}\n')
    problems, refused = read_benchmark("jsonl", path=str(tmp_path / "mine.jsonl"), revision=None)
    assert (len(problems), "not valid JSON" in refused[0].reason) == (1, True)


@pytest.mark.parametrize(
    ("level", "number"), [("Level 3", 3), (3.0, 3), ("4.5", 4), ("Level ?", 0), (None, 0), (1e30, 0)]
)
def test_a_level_that_is_no_number_is_unknown(level, number):
    assert convert("math", {"problem": "p", "answer": "1", "level": level})[0].level == number
