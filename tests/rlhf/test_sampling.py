"""A kill costs one chunk, never a wrong or a doubled sample."""

import json

import pytest

from rlhf.sampling import Completion, Question, confidence, read_sampled, sample_all

QUESTIONS = [Question(id=f"p{i}", text=f"{i} + 1?", token_ids=(1, i)) for i in range(10)]
SETTINGS = {"temperature": 1.0, "weights": "abc"}


class Engine:
    """Draws that depend on the seed and the place in the chunk, as a real engine's do; may be killed before some chunk."""

    def __init__(self, killed_before=None):
        self.calls, self.killed_before = [], killed_before

    def __call__(self, questions, seed):
        if len(self.calls) == self.killed_before:
            raise KeyboardInterrupt
        self.calls.append((seed, [q.id for q in questions]))
        return [
            [Completion(text=f"{seed} {i} {q.id} {s}", num_tokens=i + s + 1, finish_reason="stop", confidence=0.5) for s in range(2)]
            for i, q in enumerate(questions)
        ]  # fmt: skip


def run(file, engine, questions=QUESTIONS, settings=SETTINGS, seed=7, say=lambda text: None):
    return sample_all(
        questions, file, settings=settings, seed=seed, problems_per_chunk=4, build=lambda: engine, say=say
    )


def texts(sampled):
    return [(s.id, s.texts) for s in sampled]


@pytest.mark.parametrize("chunks_before_the_kill", [0, 1, 2])
def test_a_killed_run_goes_on_with_the_samples_of_an_uninterrupted_one(tmp_path, chunks_before_the_kill):
    whole = texts(run(tmp_path / "whole.jsonl", Engine()))
    file = tmp_path / "killed.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(file, Engine(killed_before=chunks_before_the_kill))
    second = Engine()
    assert texts(run(file, second)) == whole
    assert len(second.calls) == 3 - chunks_before_the_kill


@pytest.mark.parametrize("cut", [2, 60, 200])
def test_a_line_cut_in_the_middle_is_sampled_again_and_nothing_else(tmp_path, cut):
    file = tmp_path / "samples.jsonl"
    whole = texts(run(file, Engine()))
    file.write_bytes(file.read_bytes()[:-cut])
    again, said = Engine(), []
    assert texts(run(file, again, say=said.append)) == whole
    assert [ids for _, ids in again.calls] == [["p8", "p9"]]
    assert any("cut by a kill" in line for line in said)
    assert texts(run(file, Engine(killed_before=0))) == whole  # nothing is missing any more


def test_no_engine_is_built_when_every_sample_is_there(tmp_path):
    file = tmp_path / "samples.jsonl"
    run(file, Engine())
    sampled = sample_all(
        QUESTIONS, file, settings=SETTINGS, seed=7, problems_per_chunk=4, build=lambda: pytest.fail("built an engine")
    )
    assert len(sampled) == 10


@pytest.mark.parametrize(
    "changed",
    [
        {"settings": {**SETTINGS, "temperature": 0.6}},
        {"settings": {**SETTINGS, "weights": "abd"}},
        {"seed": 8},
        {"questions": [Question(id=q.id, text=q.text, token_ids=(2, 5)) for q in QUESTIONS]},
    ],
)
def test_samples_drawn_otherwise_are_not_taken_for_these(tmp_path, changed):
    file = tmp_path / "samples.jsonl"
    run(file, Engine())
    engine, said = Engine(), []
    run(file, engine, say=said.append, **changed)
    assert len(engine.calls) == 3
    assert any("10 problems were sampled with other settings" in line for line in said)


def test_only_the_chunk_of_a_changed_problem_is_sampled_again(tmp_path):
    file = tmp_path / "samples.jsonl"
    run(file, Engine())
    changed = [*QUESTIONS[:5], Question(id="p5", text="corrected", token_ids=(9,)), *QUESTIONS[6:]]
    engine = Engine()
    run(file, engine, questions=changed)
    assert engine.calls == [(8, ["p4", "p5", "p6", "p7"])]


def test_each_chunk_has_a_seed_of_its_own_and_the_first_the_recipes(tmp_path):
    engine = Engine()
    run(tmp_path / "samples.jsonl", engine)
    assert [seed for seed, _ in engine.calls] == [7, 8, 9]


def test_control_characters_are_stored_escaped(tmp_path):
    def hostile(questions, seed):
        text = "\x1b[2J\u202e\n"
        return [[Completion(text=text, num_tokens=1, finish_reason="length", confidence=None)] for _ in questions]

    file = tmp_path / "samples.jsonl"
    (sampled,) = run(file, hostile, questions=QUESTIONS[:1])
    assert sampled.texts == ("\x1b[2J\u202e\n",)
    assert (sampled.truncated, sampled.weights) == ((True,), ())
    assert file.read_text().isascii()
    assert "\x1b" not in file.read_text()
    assert json.loads(file.read_text())["texts"] == list(sampled.texts)


def test_rows_of_another_form_count_as_broken_not_as_samples(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"id": 1}\n[]\nnull\n"text"\n\n')
    assert read_sampled(tmp_path / "x.jsonl") == ({}, 5)


def test_confidence_is_the_geometric_mean_of_the_token_probabilities():
    assert confidence([-0.6931471805599453, -2.0794415416798357]) == pytest.approx(0.25)  # sqrt(1/2 x 1/8)
