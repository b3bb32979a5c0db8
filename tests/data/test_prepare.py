"""A whole preparation: every row is accounted for, whatever is killed, however the input is cut."""

import gzip
import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data.decontamination import Rules
from data.difficulty import annotate, pass_rate
from data.filters import Filters
from data.plan import BenchmarkPlan, Plan, SourcePlan
from data.prepare import prepare
from data.records import LabelledSteps, PreferencePair, Problem, read_records

ROOT = Path(__file__).parents[2]
REAL = ROOT.parent / "shared/data"


def silent(_text):
    pass


def question(i):
    names = ("Ana", "Ben", "Eve", "Tom", "Zoe", "Leo", "Ida")
    things = ("coins of old silver", "books about far seas", "pens made of glass", "eggs from the farm next door")
    return f"{names[i % 7]} number {i * 7919} keeps {i} {things[i % 4]} in box {i * 31 % 997} and shelf {i * 17 % 1009}; how many are there?"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def mine(tmp_path):
    """130 rows: 100 good ones of two levels, and 30 with something wrong, ten of each kind."""
    rows = [{"problem": question(i), "answer": str(i), "level": i % 2 + 1} for i in range(100)]
    rows += [{"problem": question(i)} for i in range(10)]
    rows += [{"problem": f"  {question(i)}\n", "answer": "1"} for i in range(10)]
    rows += [{"problem": f"Wie viele sind in der Kiste mit der Nummer {i}?", "answer": "1"} for i in range(10)]
    return write(tmp_path / "mine.jsonl", rows)


def plan(path, **changes):
    defaults = {
        "sources": (SourcePlan(name="jsonl", path=path),),
        "filters": Filters(languages=("en",)),
        "near_threshold": None,
    }
    return Plan(**{**defaults, **changes})


def run(plan, folder, **options):
    folder.mkdir(parents=True, exist_ok=True)
    return prepare(plan, folder, say=silent, **options)


def dropped(manifest):
    return {reason: drop["rows"] for reason, drop in manifest["dropped"].items()}


def test_every_row_is_kept_or_dropped_for_a_reason_with_examples(mine, tmp_path):
    manifest = run(plan(mine), tmp_path / "out")
    assert (manifest["rows_in"], manifest["kept"]) == (130, 100)
    assert dropped(manifest) == {"malformed": 10, "exact duplicate": 10, "language": 10}
    examples = manifest["dropped"]
    assert examples["malformed"]["examples"][0]["row"] == f"{mine}:101"
    assert "is missing" in examples["malformed"]["examples"][0]["detail"]
    assert examples["exact duplicate"]["examples"][0] == {"row": "jsonl-train-110", "detail": "of jsonl-train-0"}
    assert len(examples["language"]["examples"]) == 3
    (source,) = manifest["sources"]
    assert source["files"]["mine.jsonl"] == hashlib.sha256(Path(mine).read_bytes()).hexdigest()
    assert (source["licence"], source["path"], source["rows_in"]) == ("as the file's owner states it", mine, 130)
    records = read_records(Problem, tmp_path / "out/train.parquet")
    assert {r.question for r in records} == {question(i) for i in range(100)}
    assert not (tmp_path / "out/work").exists()


def test_a_record_that_is_lost_on_the_way_stops_the_run(mine, tmp_path, monkeypatch):
    import data.prepare

    honest = data.prepare.write_splits

    def careless(plan, left, alive, *rest):
        alive[5] = False
        return honest(plan, left, alive, *rest)

    monkeypatch.setattr(data.prepare, "write_splits", careless)
    with pytest.raises(AssertionError, match="1 rows disappeared: 130 in, 99 kept"):
        run(plan(mine), tmp_path / "out")


def test_how_the_input_is_cut_and_how_many_processes_read_it_changes_nothing(mine, tmp_path):
    shares = {"train": 0.8, "test": 0.2}
    whole = run(plan(mine, splits=shares), tmp_path / "whole")
    parts = run(plan(mine, splits=shares, shard_bytes=500, processes=2), tmp_path / "parts")
    for split in shares:
        assert whole["splits"][split]["rows"] == parts["splits"][split]["rows"]
        a, b = (pq.read_table(tmp_path / f"{name}/{split}.parquet") for name in ("whole", "parts"))
        assert a.sort_by("id").equals(b.sort_by("id"))
    assert dropped(whole) == dropped(parts)


def test_near_duplicates_name_the_row_they_repeat(tmp_path):
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(80)]
    rows = [{"problem": " ".join(words), "answer": "1"}, {"problem": " ".join([*words, "more"]), "answer": "$1$"}]
    rows.append({"problem": " ".join([*words, "less"]), "answer": "2"})
    manifest = run(plan(write(tmp_path / "a.jsonl", rows), near_threshold=0.8), tmp_path / "out")
    assert manifest["dropped"]["near duplicate"]["examples"] == [{"row": "jsonl-train-1", "detail": "of jsonl-train-0"}]


def test_two_problems_that_differ_in_an_operator_or_a_bracket_are_no_exact_duplicates(tmp_path):
    rows = [{"problem": p, "answer": "1"} for p in ("What is 2*(3+4)?", "What is (2*3)+4?", "What is 2*(3-4)?")]
    assert run(plan(write(tmp_path / "a.jsonl", rows)), tmp_path / "out")["kept"] == 3


def test_splits_are_stratified_and_keep_a_question_together(mine, tmp_path):
    p = plan(mine, splits={"train": 0.8, "test": 0.2}, stratify_by=("level",), exact_duplicates=False)
    manifest = run(p, tmp_path / "out")
    assert manifest["kept"] == 110
    splits = {name: read_records(Problem, tmp_path / f"out/{name}.parquet") for name in ("train", "test")}
    asked = {name: {" ".join(r.question.split()) for r in records} for name, records in splits.items()}
    assert not asked["train"] & asked["test"]
    assert (len(asked["train"]), len(asked["test"])) == (80, 20)
    for level in ("1", "2"):
        assert manifest["splits"]["test"]["strata"][level] in (10, 11, 12)
        assert sum(r.level == int(level) for r in splits["test"]) == manifest["splits"]["test"]["strata"][level]


def test_a_mix_keeps_to_its_weights_and_interleaves_its_sources(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"problem": question(i), "answer": "1"} for i in range(300)])
    b = write(tmp_path / "b.jsonl", [{"problem": question(i), "answer": "2"} for i in range(1000, 1100)])
    sources = (SourcePlan(name="jsonl", path=a, weight=1), SourcePlan(name="jsonl", path=b, weight=3))
    manifest = run(plan("", sources=sources, mixed=True), tmp_path / "out")
    assert dropped(manifest) == {"mix": 267}
    records = read_records(Problem, tmp_path / "out/train.parquet")
    assert [sum(r.answer == str(n) for r in records) for n in (1, 2)] == [33, 100]
    assert {"1", "2"} == {r.answer for r in records[:20]}
    with pytest.raises(ValueError, match="no more than 133 are possible"):
        run(plan("", sources=sources, mixed=True, num_rows=500), tmp_path / "more")


def test_the_earlier_source_keeps_the_row_that_both_have(tmp_path):
    a = write(tmp_path / "a.jsonl", [{"problem": question(1), "answer": "a"}])
    b = write(tmp_path / "b.jsonl", [{"problem": question(1), "answer": "b"}, {"problem": question(2), "answer": "b"}])
    both = tuple(SourcePlan(name="jsonl", path=path) for path in (b, a))
    manifest = run(plan("", sources=both), tmp_path / "out")
    assert [source["kept"] for source in manifest["sources"]] == [2, 0]
    assert manifest["sources"][1]["dropped"] == {"exact duplicate": 1}
    assert len({r.id for r in read_records(Problem, tmp_path / "out/train.parquet")}) == 2


def contaminated(tmp_path, rule="drop"):
    held = "A farmer has seventeen goats and sells five of them on the market before noon; how many goats are left?"
    rows = [{"problem": question(i), "answer": "1"} for i in range(20)]
    rows.append({"problem": held, "answer": "12"})
    rows.append({"problem": held.replace("seventeen", "18").replace("five", "6"), "answer": "12"})
    bench = write(tmp_path / "bench.jsonl", [{"id": "goats", "problem": held.replace("five", "4"), "answer": "13"}])
    return plan(
        write(tmp_path / "rows.jsonl", rows),
        rules=Rules(numbers_blind=rule, overlap=0.9),
        benchmarks={"jsonl": BenchmarkPlan(path=bench)},
    )


def test_rows_that_hold_an_evaluation_problem_are_dropped_and_named(tmp_path):
    manifest = run(contaminated(tmp_path), tmp_path / "out")
    assert dropped(manifest) == {"contaminated": 2}
    found = manifest["decontamination"]["benchmarks"]["jsonl"]
    assert (found["problems"], found["found"], found["left"]) == (1, 1, 0)
    assert list(found["sha256"]) == ["bench.jsonl"]
    pairs = [json.loads(line) for line in (tmp_path / "out/contamination.jsonl").read_text().splitlines()]
    assert pairs == manifest["decontamination"]["pairs"]
    assert {(p["row"], p["problem"], p["dropped"]) for p in pairs} == {
        ("jsonl-train-20", "goats", True),
        ("jsonl-train-21", "goats", True),
    }
    assert pairs[0]["origin"].endswith("rows.jsonl:21")
    assert manifest["decontamination"]["rows_scanned"] == 22


def test_rows_that_are_only_reported_stay_and_the_manifest_says_so(tmp_path):
    manifest = run(contaminated(tmp_path, "report"), tmp_path / "out")
    assert manifest["kept"] == 22
    found = manifest["decontamination"]["benchmarks"]["jsonl"]
    assert (found["found"], found["left"], found["left_ids"]) == (1, 1, ["goats"])


# ------------------------------------------------------------------------------------------------------------------- resuming


def test_a_killed_run_is_taken_up_where_it_was_and_gives_the_same_files(mine, tmp_path, monkeypatch):
    import data.prepare
    from data.shards import process

    p = plan(mine, shard_bytes=500)
    straight = run(p, tmp_path / "straight")
    seen = []

    def dies_at_the_third(task, tools):
        seen.append(task.number)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return process(task, tools)

    monkeypatch.setattr(data.prepare, "process", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(p, tmp_path / "killed")
    assert not (tmp_path / "killed/train.parquet").exists()
    assert not (tmp_path / "killed/manifest.json").exists()
    manifest = run(p, tmp_path / "killed")
    assert seen[:4] == [0, 1, 2, 2]  # the first two were not read again
    assert (manifest["kept"], dropped(manifest)) == (straight["kept"], dropped(straight))
    for name in ("killed", "straight"):
        assert pq.read_table(tmp_path / name / "train.parquet").num_rows == 100
    assert (tmp_path / "killed/train.parquet").read_bytes() == (tmp_path / "straight/train.parquet").read_bytes()


def test_shards_of_another_recipe_or_other_files_are_not_taken_up(mine, tmp_path, monkeypatch):
    import data.prepare
    from data.shards import process

    count = []
    monkeypatch.setattr(data.prepare, "process", lambda task, tools: count.append(1) or process(task, tools))
    monkeypatch.setattr(data.prepare, "drop_duplicates", _killed)
    for changed in (plan(mine), replace(plan(mine), filters=Filters()), plan(mine)):
        with pytest.raises(KeyboardInterrupt):
            run(changed, tmp_path / "out")
    assert len(count) == 3
    with pytest.raises(KeyboardInterrupt):
        run(replace(plan(mine), splits={"a": 0.5, "b": 0.5}), tmp_path / "out")
    assert len(count) == 3  # splits come later: the shards serve
    with Path(mine).open("a") as file:
        file.write('{"problem": "one more in the box", "answer": "1"}\n')
    with pytest.raises(KeyboardInterrupt):
        run(plan(mine), tmp_path / "out")
    assert len(count) == 4


def _killed(*_):
    raise KeyboardInterrupt


RECIPE = """
stage: curate_data
output_dir: {out}
sources: [{{name: jsonl, path: {path}}}]
duplicates: {{near_threshold: 0.8}}
processes: 2
shard_megabytes: 0.05
"""


def test_the_script_killed_outright_leaves_no_process_behind_and_finishes_when_run_again(tmp_path):
    path = write(tmp_path / "many.jsonl", [{"problem": question(i), "answer": "1"} for i in range(20_000)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(out=tmp_path / "out", path=path))
    command = [sys.executable, "scripts/prepare_data.py", "--config", str(recipe)]
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    markers = lambda: len(list((tmp_path / "out/work").glob("*/shard-*.json")))  # noqa: E731
    deadline = time.time() + 60
    while markers() < 3 and first.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    children = [int(p) for p in Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()]
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = markers()
    assert done >= 3
    deadline = time.time() + 60  # a worker that was still starting sees it when it has started
    while any(alive(pid) for pid in children) and time.time() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in children if alive(pid)]
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "shards were done by an earlier run" in again.stdout
    assert json.loads((tmp_path / "out/manifest.json").read_text())["rows_in"] == 20_000
    third = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "holds this very run, finished" in third.stdout


def test_a_worker_whose_parent_died_while_it_started_ends_itself():
    late = "from rlhf.run import die_with_parent; die_with_parent({}); print('lives')"
    ended = subprocess.run([sys.executable, "-c", late.format(1 << 22)], cwd=ROOT, capture_output=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGKILL, b"")
    assert subprocess.check_output([sys.executable, "-c", late.format(os.getpid())], cwd=ROOT) == b"lives\n"


def alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_worker_that_dies_says_that_finished_shards_are_kept(mine, tmp_path):
    with pytest.raises(ValueError, match="a worker process died.*finished shards are kept"):
        run(plan(mine, shard_bytes=500, processes=2), tmp_path / "out", initializer=_die)


def _die():
    if multiprocessing.parent_process() is not None:
        os.kill(os.getpid(), signal.SIGKILL)


# ----------------------------------------------------------------------------------------------------------------- difficulty


def judge_by_answer(problems):
    return [None if p.answer == "7" else int(p.answer) % 5 / 4 for p in problems]


def test_problems_outside_the_pass_rates_asked_for_are_dropped_by_reason(mine, tmp_path):
    p = plan(mine, min_pass_rate=0.2, max_pass_rate=0.8)
    manifest = run(p, tmp_path / "out", judge=judge_by_answer)
    # of 100 problems: 20 with rate 0, 20 with rate 1, and number 7 (which would have had 0.5) was not judged
    assert (dropped(manifest)["too hard"], dropped(manifest)["too easy"], dropped(manifest)["not judged"]) == (
        20,
        20,
        1,
    )
    rates = {r.answer: r.pass_rate for r in read_records(Problem, tmp_path / "out/train.parquet")}
    assert rates["1"] == 0.25
    assert len(rates) == manifest["kept"] == 59


def test_pass_rates_measured_before_a_kill_are_not_measured_again(tmp_path):
    problems = [Problem(id=str(i), question="q", answer=str(i)) for i in range(10)]
    asked = []

    def judge(batch):
        if len(asked) == 2:
            raise KeyboardInterrupt
        asked.append([p.id for p in batch])
        return [0.5] * len(batch)

    with pytest.raises(KeyboardInterrupt):
        annotate(iter(problems), judge, tmp_path / "rates.jsonl", say=silent, problems_per_batch=3)
    with (tmp_path / "rates.jsonl").open("a") as file:
        file.write('{"id": "6", "pass_')  # cut off by the kill
    asked.clear()
    rates = annotate(iter(problems), judge, tmp_path / "rates.jsonl", say=silent, problems_per_batch=3)
    assert asked == [["6", "7", "8"], ["9"]]
    assert rates == {str(i): 0.5 for i in range(10)}


def test_an_undecided_sample_is_no_wrong_one():
    assert pass_rate(["correct", "wrong", "undecided"]) == 0.5
    assert pass_rate(["undecided"]) is None


# -------------------------------------------------------------------------------------------------------- other kinds, bad input


def test_pairs_and_steps_keep_their_fields_through_parquet(tmp_path):
    talk = "\n\nHuman: one?\n\nAssistant: 1\n\nHuman: two more?\n\nAssistant:"
    with gzip.open(tmp_path / "train.jsonl.gz", "wt") as file:
        file.write(json.dumps({"chosen": talk + " yes", "rejected": talk + " no"}) + "\n")
    run(plan("", sources=(SourcePlan(name="hh_rlhf", path=str(tmp_path)),)), tmp_path / "pairs")
    (pair,) = read_records(PreferencePair, tmp_path / "pairs/train.parquet")
    assert (pair.history, pair.chosen, pair.error_step) == (["one?", "1"], "yes", -1)
    steps = write(tmp_path / "s.jsonl", [{"prompt": "why", "completions": ["a", "b"], "labels": [True, False]}])
    run(plan("", sources=(SourcePlan(name="steps", path=steps),)), tmp_path / "steps")
    (record,) = read_records(LabelledSteps, tmp_path / "steps/train.parquet")
    assert record.labels == [True, False]


def test_parquet_is_read_by_row_groups_and_gives_what_json_lines_give(mine, tmp_path):
    import pyarrow as pa

    rows = [json.loads(line) for line in Path(mine).read_text().splitlines()]
    columns = {name: [row.get(name) for row in rows] for name in ("problem", "answer", "level")}
    pq.write_table(pa.table(columns), tmp_path / "mine.parquet", row_group_size=17)
    lines = run(plan(mine), tmp_path / "lines")
    groups = run(plan(str(tmp_path / "mine.parquet"), shard_bytes=100), tmp_path / "groups")
    assert dropped(lines) == dropped(groups)
    tables = [pq.read_table(tmp_path / name / "train.parquet").sort_by("id") for name in ("lines", "groups")]
    assert tables[0].equals(tables[1])
    assert groups["dropped"]["malformed"]["examples"][0]["row"].endswith("mine.parquet row 101")


def test_a_file_that_is_no_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"a.parquet is not a readable parquet file"):
        run(plan(str(tmp_path / "a.parquet")), tmp_path / "out")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows():
    command = [sys.executable, "scripts/benchmark_data.py", "memory", "--rows", "300000"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    gib = float(done.stdout.rsplit(" GiB at most", 1)[0].rsplit(" ", 1)[1])
    assert gib < 1.5, done.stdout  # 0.75 at 10 million rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": (SourcePlan(name="gsm9k"),)}, "unknown source 'gsm9k'; known: aime"),
        ({"sources": (SourcePlan(name="jsonl", path="nowhere.jsonl"),)}, "nowhere.jsonl does not exist; get"),
        ({"sources": (SourcePlan(name="gsm8k"), SourcePlan(name="pairs"))}, "one kind of record"),
        ({"stratify_by": ("colour",)}, "names 'colour'; problems have id, question"),
        ({"benchmarks": {"mth": BenchmarkPlan()}}, "unknown benchmark 'mth'; known: gsm8k"),
        ({"filters": Filters(tokenizer="nowhere", max_tokens=1)}, "has no tokenizer.json"),
    ],
)
def test_what_is_wrong_with_a_plan_is_one_sentence(mine, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(plan(mine, **changes), tmp_path / "out")


def test_difficulty_of_anything_but_problems_is_refused(tmp_path):
    steps = write(tmp_path / "s.jsonl", [{"prompt": "why", "completions": ["a"], "labels": [True]}])
    with pytest.raises(ValueError, match="difficulty measures problems"):
        run(plan("", sources=(SourcePlan(name="steps", path=steps),)), tmp_path / "out", judge=judge_by_answer)


def test_a_source_of_which_nothing_is_left_gives_an_empty_file_and_a_full_account(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"problem": "p"}, {"problem": "?!", "answer": "1"}])
    manifest = run(plan(path, near_threshold=0.8), tmp_path / "out")
    assert (manifest["kept"], dropped(manifest)) == (0, {"malformed": 1, "no words": 1})
    with pytest.raises(ValueError, match="holds no records"):
        read_records(Problem, tmp_path / "out/train.parquet")


DIFFICULTY = """
stage: curate_data
output_dir: {out}
sources: [{{name: jsonl, path: {path}}}]
duplicates: {{near_threshold: null}}
processes: 1
difficulty:
  policy: {{path: {model}}}
  rollout: {{engine: transformers, samples_per_prompt: 2, max_prompt_tokens: 100, max_new_tokens: 8, dtype: float32}}
  max_pass_rate: 0.5
"""


@pytest.mark.slow
def test_pass_rates_are_measured_by_a_real_policy_and_the_real_graders(tmp_path, model_folder):
    path = write(tmp_path / "a.jsonl", [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(5)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(DIFFICULTY.format(out=tmp_path / "out", path=path, model=model_folder))
    command = [sys.executable, "scripts/prepare_data.py", "--config", str(recipe)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "5 pass rates" in done.stdout
    assert [r.pass_rate for r in read_records(Problem, tmp_path / "out/train.parquet")] == [0.0] * 5
