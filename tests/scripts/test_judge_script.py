"""scripts/judge.py: the figures of a judge whose bias is known, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from scripted_server import Reply, chat, serving

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))

import judge as script

import rlhf.endpoint as endpoint
from data.records import PreferencePair
from rlhf.config import load_config, parse_config
from rlhf.run import Run

ROOT = Path(__file__).parents[2]
LLMBAR = ROOT / "../shared/data/preference"


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.01)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(url, folder, **changes):
    judge = {"url": url, "attempts": 2, "concurrency": 8}
    return parse_config({"stage": "judge", "output_dir": str(folder), "judge": judge, **changes}, "test")


def run(config):
    folder = Path(config.output_dir)
    folder.mkdir(exist_ok=True)
    script.judge_rows(config, Run(folder))
    return json.loads((folder / "run.json").read_text())


def shown(body, title):
    text = body["messages"][1]["content"]
    return text.split(f"==== {title} ", 1)[1].split("\n", 1)[1].split("\n==== END OF", 1)[0]


def better(who):
    return chat(json.dumps({"better": who}))


PAIR_ROWS = [{"prompt": f"question {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(8)]


def test_the_figures_of_a_judge_that_is_right_except_where_it_is_known_to_be_wrong(tmp_path, capsys):
    """Of 8 pairs: 4 as people say, 2 against them, 1 decided by the order, 1 without a verdict."""

    def script(body, attempt):
        if not shown(body, "QUESTION").startswith("question"):
            return chat("the one at the start")
        i, first_is_good = int(shown(body, "QUESTION").split()[1]), shown(body, "ANSWER A").startswith("good")
        if i == 7:
            return chat("neither")
        return better("A" if i == 6 or (i < 4) == first_is_good else "B")

    pairs = write(tmp_path / "pairs.jsonl", PAIR_ROWS)
    with serving(script) as server:
        found = run(config(server.url, tmp_path / "out", pairs=pairs))
    assert found["status"] == {"decided": 6, "endpoint": 0, "unparsable": 1, "contradictory": 1}
    assert found["agreement"]["mean"] == pytest.approx(4 / 6)
    assert found["agreement_undecided_half"]["mean"] == (4 + 2 * 0.5) / 8
    assert found["position_bias"]["pairs"] == 7
    assert found["position_bias"]["flipped"]["mean"] == pytest.approx(1 / 7)
    assert found["position_bias"]["first_wins"]["mean"] == pytest.approx((6 * 0.5 + 1) / 7)
    lines = [json.loads(line) for line in (tmp_path / "out/judgements.jsonl").read_text().splitlines()]
    assert [line["value"] for line in lines] == [1.0] * 4 + [0.0] * 2 + [None] * 2
    assert lines[0]["verdicts"] == ["A", "B"]
    assert "agreement where decided" in capsys.readouterr().out


def test_completions_are_scored_and_a_server_that_goes_away_leaves_the_run_unfinished(tmp_path):
    rows = [{"id": str(i), "question": "1 + 1?", "completion": str(i), "reference": "2"} for i in range(6)]
    up = []

    def script(body, attempt):
        n = int(shown(body, "ANSWER"))
        return Reply({}, status=503) if n >= 3 and not up else chat(json.dumps({"score": 1 + n}))

    cfg_rows = write(tmp_path / "rows.jsonl", rows)
    with serving(script) as server:
        cfg = config(server.url, tmp_path / "out", completions=cfg_rows)
        with pytest.raises(ValueError, match="3 of 6 rows got no answer .*HTTP 503.*run the same command again"):
            run(cfg)
        assert not (tmp_path / "out/run.json").exists()
        up.append(True)
        found = run(cfg)
    assert found["score"]["mean"] == pytest.approx(sum(range(6)) / 9 / 6)
    assert (found["requests"], found["status"]["decided"]) == (3 + 1, 6)  # the three, and the one at the start


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path):
    rows = [{"question": "1 + 1?", "completion": str(i)} for i in range(60)]
    recipe = tmp_path / "judge.yaml"
    with serving(lambda body, attempt: Reply(chat('{"score": 4}'), delay=0.05)) as server:
        raw = config(server.url, tmp_path / "out", completions=write(tmp_path / "rows.jsonl", rows)).model_dump(
            mode="json"
        )
        recipe.write_text(yaml.safe_dump(raw))
        command = [sys.executable, str(ROOT / "scripts/judge.py"), "--config", str(recipe)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while len(server.requests) < 30:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
        first.wait()
        asked = len(server.requests)
        subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
        again = len(server.requests) - asked
    found = json.loads((tmp_path / "out/run.json").read_text())
    assert found["status"]["decided"] == 60
    assert asked < 61
    assert again <= 61 - asked + 8 + 1  # those that were under way, and the one at the start


def test_llmbars_files_are_pairs_and_the_recipe_reads_them():
    recipe = load_config(ROOT / "recipes/judge/llmbar.yaml", [f"pairs={LLMBAR / 'llmbar_natural.json'}"])
    rows = script.read_pairs(recipe)
    assert len(rows) == 100
    assert len(script.read_pairs(recipe.model_copy(update={"num_rows": 7}))) == 7
    chosen, rejected = rows[0][1]
    assert chosen.question == rejected.question
    assert chosen.answer != rejected.answer


def test_earlier_turns_and_the_system_prompt_are_part_of_the_question():
    pair = PreferencePair(id="a", question="And 2?", chosen="x", rejected="y", history=["1?", "one"], system="Count.")
    assert script.conversation(pair) == "System: Count.\n\nUser: 1?\n\nAssistant: one\n\nUser: And 2?"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"rows.jsonl:2: field 'completion' is missing"),
        ({"completion": "c"}, r"rows.jsonl:2: field 'question' is missing"),
        ([1], r"rows.jsonl:2: "),
    ],
)
def test_a_row_that_cannot_be_judged_is_named(tmp_path, row, message):
    path = write(tmp_path / "rows.jsonl", [{"question": "q", "completion": ""}, row])
    with pytest.raises(ValueError, match=message):
        script.read_completions(config("http://h/v1", tmp_path, completions=path))


def test_one_file_is_named_and_it_is_there(tmp_path):
    with pytest.raises(ValueError, match="neither of completions and pairs are set"):
        config("http://h/v1", tmp_path)
    with pytest.raises(ValueError, match="no JSON lines; correct the path"):
        script.read_completions(config("http://h/v1", tmp_path, completions=str(tmp_path / "missing.jsonl")))


def test_the_check_before_a_launch_looks_at_judges_and_says_what_is_missing(tmp_path, capsys):
    import check

    def checked(**judge):
        raw = config("http://127.0.0.1:1/v1", tmp_path / "out", pairs=write(tmp_path / "pairs.jsonl", PAIR_ROWS))
        raw = raw.model_dump(mode="json")
        raw["judge"] |= judge
        (tmp_path / "judge.yaml").write_text(yaml.safe_dump(raw))
        passed = check.check(str(tmp_path / "judge.yaml"), [], None)
        return passed, capsys.readouterr().out

    passed, out = checked()
    assert passed
    assert "warning judge.url: judge.url http://127.0.0.1:1/v1 gives no verdict (ConnectError" in out
    with serving(lambda body, attempt: chat('{"score": 4}')) as server:
        assert "ok      judge.url: the server answers" in checked(url=server.url)[1]
    passed, out = checked(rubric_file="missing.txt")
    assert not passed
    assert "error   judge: judge.rubric_file missing.txt does not exist" in out
