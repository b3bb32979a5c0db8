"""What the watch sees in histories made by hand, what it leaves behind in a run, and that it resumes."""

import dataclasses
import json
import math
import random

import pytest
import torch
from online_helpers import config

from data.chat import render_response
from reward_models.composite import build_reward
from reward_models.grading import Grade
from rlhf.config import Watch as Thresholds
from rlhf.metrics import CLOCK, read_jsonl
from rlhf.models import load_causal_lm
from rlhf.types import Score
from rlhf.watch import SURFACE, Alarm, Watch, best_window, find_alarms, most_telling, rise, slope, standard_error

LIMITS = Thresholds(window=3)
KEY = {
    "total": "reward/total", "correct": "reward/correctness", "std": "reward/group_std", "length": "rollout/length",
    "repetition": "rollout/repetition", "kl": "policy/kl_reference", "surface": SURFACE,
    "distinct": "rollout/distinct_scratchpads",
}  # fmt: skip


def history(**columns):
    """One row a batch, two optimizer steps each."""
    return [
        {"batch": i + 1, "step": 2 * i + 2, **{KEY[name]: values[i] for name, values in columns.items()}}
        for i in range(len(next(iter(columns.values()))))
    ]


def names(rows, limits=LIMITS):
    return [alarm.name for alarm in find_alarms(rows, limits)]


FLAT = [0.50, 0.52, 0.49, 0.51, 0.50, 0.50]
RISING = [0.50, 0.52, 0.54, 0.66, 0.68, 0.70]
FALLING = [0.50, 0.52, 0.49, 0.31, 0.28, 0.29]


def test_the_standard_error_of_a_mean_is_that_of_its_neighbours_and_not_of_its_trend():
    rows = history(total=[1.0, 3.0, 5.0, 7.0])
    assert standard_error(rows, "reward/total") == math.sqrt(12 / (2 * 3) / 4)
    assert standard_error(rows[:1], "reward/total") == math.inf
    assert rise(rows[2:], rows[:2], "reward/total") == (4.0, pytest.approx(math.sqrt(2 * 4 / 2 / 2)))
    assert slope(history(total=[1.0, 5.0, 3.0]), "reward/total") == 0.5  # least squares over the steps 2, 4, 6


def test_the_best_window_is_that_of_highest_correctness():
    rows = history(correct=[0.1, 0.5, 0.9, 0.8, 0.7, 0.0])
    assert [row["batch"] for row in best_window(rows, 3)] == [3, 4, 5]


def test_a_reward_that_rises_while_correctness_falls_is_an_alarm_with_metric_step_and_figures():
    [alarm] = find_alarms(history(total=RISING, correct=FALLING), LIMITS)
    assert (alarm.name, alarm.metric, alarm.batch, alarm.step) == ("divergence", "reward/total", 6, 12)
    assert "rose from 0.520 to 0.680 while correctness fell from 50.3% to 29.3%" in alarm.sentence


@pytest.mark.parametrize(
    ("total", "correct"),
    [
        (RISING, RISING),
        (RISING, FLAT),
        (FALLING, FALLING),
        (RISING, [0.50, 0.52, 0.49, 0.43, 0.44, 0.42]),  # less than max_correctness_loss
        (RISING, [0.2, 0.8, 0.5, 0.7, 0.1, 0.3]),  # more, and no more than chance
    ],
)
def test_a_reward_that_rises_with_correctness_or_falls_with_it_is_none(total, correct):
    assert names(history(total=total, correct=correct)) == []


def test_a_policy_is_compared_with_the_best_it_was_not_with_where_it_began():
    up_and_down = [*RISING, 0.5, 0.45, 0.5]
    assert names(history(total=[*RISING, 0.8, 0.85, 0.87], correct=up_and_down)) == ["divergence"]
    assert names(history(total=[*RISING, 0.6, 0.6, 0.6], correct=up_and_down)) == []


@pytest.mark.parametrize(
    ("name", "metric", "column", "trips", "close"),
    [
        ("surface", "surface", SURFACE, [0.1] * 3 + [0.6] * 3, [0.1] * 3 + [0.45] * 3),
        ("repetition", "repetition", "rollout/repetition", [0.1] * 3 + [0.4] * 3, [0.25] * 3 + [0.4] * 3),
        ("kl", "kl", "policy/kl_reference", [0.0] * 3 + [0.1, 0.2, 0.3], [0.0, 0.01, 0.02, 0.03, 0.04, 0.05]),
        ("collapse", "std", "reward/group_std", [0.4] * 3 + [0.05] * 3, [0.4] * 3 + [0.15] * 3),
        ("sameness", "distinct", "rollout/distinct_scratchpads", [0.8] * 3 + [0.1] * 3, [0.8] * 3 + [0.3] * 3),
        ("length", "length", "rollout/length", [40.0] * 3 + [90.0] * 3, [40.0] * 3 + [70.0] * 3),
    ],
)
def test_every_other_sign_is_an_alarm_only_beyond_its_bound_and_while_correctness_does_not_rise(
    name, metric, column, trips, close
):
    [alarm] = find_alarms(history(**{metric: trips}, correct=FLAT), LIMITS)
    assert (alarm.name, alarm.metric) == (name, column)
    assert names(history(**{metric: close}, correct=FLAT)) == []
    assert names(history(**{metric: trips}, correct=RISING)) == []
    assert names(history(**{metric: trips}, correct=[0.95, 0.96, 0.94, 0.95, 0.95, 0.96])) == []
    assert names(history(correct=FLAT)) == []  # a metric that nobody measured
    assert names(history(**{metric: trips}, correct=FLAT)[:5]) == []  # not yet two windows


def test_a_slope_of_the_kl_is_per_optimizer_step():
    rows = history(kl=[0.0, 0.0, 0.0, 0.1, 0.2, 0.3], correct=FLAT)
    assert "grows by 0.05 nats per token" in find_alarms(rows, LIMITS)[0].sentence


def row_of(i, *, length=40.0, share=0.2):
    return {
        "batch": i, "step": 2 * i, "reward/correctness": 0.5, "rollout/length": length, "seconds/train": 1.0,
        "variance_share/correctness": 1 - 2 * share, "variance_share/format": share, "variance_share/brief": share,
    }  # fmt: skip


def test_form_is_what_the_recipe_calls_format_length_overlong_or_repetition_under_any_name():
    rewards = "[{name: correctness}, {name: format}, {name: brief, kind: length}, {name: mine, kind: 'a.b:c'}]"
    watch = Watch.of(config(f"rewards={rewards}", "watch.window=3"))
    assert watch.surface == ("format", "brief")
    rows = [row_of(i, share=0.3) for i in range(1, 7)]
    assert [alarm.name for row in rows for alarm in watch.look({**row, **watch.measure(row)})] == ["surface"]
    assert watch.history[-1][SURFACE] == 0.6
    assert "seconds/train" not in watch.history[-1]


def test_an_alarm_that_lasts_is_repeated_once_a_window_and_the_watch_goes_on_from_its_state():
    watch = Watch(LIMITS, ())
    raised = {}
    for i in range(1, 14):
        if i == 8:  # killed and resumed, through JSON
            state = json.loads(json.dumps(watch.state()))
            watch = Watch(LIMITS, ())
            watch.restore(state)
        raised[i] = [alarm.name for alarm in watch.look(row_of(i, length=40.0 if i < 4 else 100.0))]
    assert [i for i, found in raised.items() if found] == [6, 9, 12]


def test_an_alarm_shows_the_ten_completions_that_say_it_best():
    rows = [
        {"verdict": "correct" if i % 2 else "wrong", "value": i / 10, "tokens": 100 - i, "repetition": i % 5, "weighted": {"brief": -i}}
        for i in range(30)
    ]  # fmt: skip

    def shown(name):
        return most_telling(Alarm(name, "m", 1, 2, "s"), rows, ("brief",))

    assert [row["value"] for row in shown("divergence")] == [i / 10 for i in range(28, 8, -2)]  # wrong and best paid
    assert [row["tokens"] for row in shown("length")] == list(range(100, 90, -1))
    assert [row["weighted"]["brief"] for row in shown("surface")] == list(range(0, -10, -1))
    assert {row["repetition"] for row in shown("repetition")} == {4, 3}


# ------------------------------------------------------------------------------------------------------------------- in the loop


def every_token_even(rollouts):
    """A verdict by the parity of the first token, and a reward for even tokens anywhere."""
    scores = []
    for rollout in rollouts:
        right, even = (
            float(rollout.token_ids[0] % 2),
            sum(t % 2 == 0 for t in rollout.token_ids) / len(rollout.token_ids),
        )
        scored = {"correctness": right, "evenness": even}
        weights = {"correctness": 0.1, "evenness": 1.0}
        scores.append(
            Score(
                verdict="correct" if right else "wrong",
                value=0.1 * right + even,
                components=scored,
                scaled=scored,
                weights=weights,
            )
        )
    return scores


THOUGHTS = "On Monday, On Tuesday, On Wednesday, On Thursday"


def with_thoughts(cases):
    """A grader that wants to see how the answer was found."""
    return [Grade("correct" if THOUGHTS in text else "wrong", "tested", None, 0.0) for text, _ in cases]


@pytest.fixture(scope="module")
def habits(model_folder, renderer, tmp_path_factory):
    """A policy that thinks half of the time, and half of the time answers at once."""
    torch.manual_seed(0)
    draw = random.Random(0)
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(80):
        rows = []
        for _ in range(32):
            rows.append(
                (
                    renderer.prompt_ids("Say seven."),
                    renderer.response_ids(render_response(THOUGHTS * draw.randrange(2), "7")),
                )
            )
        longest = max(len(p) + len(r) for p, r in rows)
        ids = torch.tensor([p + r + [0] * (longest - len(p) - len(r)) for p, r in rows])
        labels = torch.tensor([[-100] * len(p) + r + [-100] * (longest - len(p) - len(r)) for p, r in rows])
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "habits"
    model.save_pretrained(folder)
    renderer.tokenizer.save_pretrained(folder)
    return str(folder)


def train_on(make_trainer, habits, renderer, rewards, *overrides):
    """15 batches of two steps each on one question, with the reward of a recipe."""
    options = (
        "training.num_batches=15", "training.minibatches_per_batch=2", "training.checkpoint_every=100", "training.tokens_per_micro_batch=4000",
        "rollout.prompts_per_batch=8", "rollout.samples_per_prompt=8", "rollout.max_new_tokens=48", "optimizer.learning_rate=0.001",
        f"rewards=[{rewards}]", *overrides,
    )  # fmt: skip
    trainer = make_trainer(*options, model=habits)
    trainer.prompts = [renderer.prompt(str(i), "Say seven.", "7") for i in range(16)]
    trainer.reward_fn = dataclasses.replace(build_reward(trainer.config, prefill="", device="cpu"), judge=with_thoughts)
    trainer.train()
    return trainer


@pytest.mark.slow
def test_a_policy_that_is_paid_for_being_short_trips_the_watch_within_30_steps(make_trainer, habits, renderer, capsys):
    flawed = "{name: correctness}, {name: format, weight: 0.1}, {name: brief, kind: length, scale: 0.01}"
    trainer = train_on(make_trainer, habits, renderer, flawed)
    rows, alarms = read_jsonl(trainer.metrics_file), read_jsonl(trainer.alarms_file)
    assert rows[-1]["reward/total"] > rows[0]["reward/total"]
    assert rows[-1]["reward/correctness"] < rows[0]["reward/correctness"] - 0.2
    assert rows[-1]["step"] == 30
    first = next(alarm for alarm in alarms if alarm["name"] == "divergence")
    assert (first["metric"], first["step"]) == ("reward/total", 2 * first["batch"])
    assert f"(step {first['step']}, batch {first['batch']})" in capsys.readouterr().out
    shown = read_jsonl(trainer.run.folder / first["completions"])
    assert [(row["verdict"], row["batch"]) for row in shown] == [("wrong", first["batch"])] * 10


@pytest.mark.slow
def test_the_same_policy_that_is_paid_for_the_right_answer_trips_nothing(make_trainer, habits, renderer):
    healthy = "{name: correctness}, {name: format, weight: 0.1}, {name: brief, kind: length, scale: 0.01, weight: 0.1, applies: {verdict: correct}}"
    trainer = train_on(make_trainer, habits, renderer, healthy)
    rows = read_jsonl(trainer.metrics_file)
    assert rows[-1]["reward/correctness"] > rows[0]["reward/correctness"] + 0.2
    assert not trainer.alarms_file.exists()


def test_an_alarm_may_stop_the_run_before_its_batch_is_in_a_checkpoint(make_trainer):
    options = (
        "watch={window: 3, action: stop, min_spread: 1, max_surface_share: 0}",
        "training.num_batches=12",
        "rollout.prompts_per_batch=2",
    )
    trainer = make_trainer(*options, "rewards=[{name: correctness}, {name: evenness, kind: length}]", "training.checkpoint_every=1", reward_fn=every_token_even)  # fmt: skip
    with pytest.raises(RuntimeError, match=r"stopped by watch.action: watch: .*step \d+.*set watch.action to warn"):
        trainer.train()
    stopped = read_jsonl(trainer.alarms_file)[0]["batch"]
    assert sorted(path.name for path in trainer.checkpoints.iterdir())[-1] == f"step-{stopped - 1:06d}"
    assert len(read_jsonl(trainer.metrics_file)) == stopped


def test_a_resumed_run_raises_the_alarms_and_keeps_the_completions_of_the_uninterrupted_one(make_trainer):
    options = (
        "watch={window: 3, max_repetition: 0, max_correctness_loss: 0, significance: 0.01}",
        "training.num_batches=8",
        "training.checkpoint_every=4",
    )
    whole = make_trainer(*options, folder="whole", reward_fn=every_token_even)
    whole.train()
    killed = make_trainer(*options, folder="killed", reward_fn=every_token_even)
    killed.config.training.__dict__["num_batches"] = 7
    killed.train()
    resumed = make_trainer(*options, folder="killed", reward_fn=every_token_even)
    assert resumed.first_batch == 4
    assert not (resumed.run.folder / "completions/batch-000005.jsonl").exists()
    resumed.train()
    assert len(read_jsonl(whole.alarms_file)) > 0
    assert read_jsonl(resumed.alarms_file) == read_jsonl(whole.alarms_file)
    for batch in range(1, 9):
        name = f"completions/batch-{batch:06d}.jsonl"
        assert (resumed.run.folder / name).read_text() == (whole.run.folder / name).read_text()
    rows = [
        [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_jsonl(t.metrics_file)]
        for t in (whole, resumed)
    ]
    assert rows[0] == rows[1]


def test_a_weight_that_moves_is_that_of_the_batch_also_after_a_resume(make_trainer):
    class Scheduled:
        def __init__(self, batch=None):
            self.batch = batch

        def at(self, batch):
            return Scheduled(float(batch))

        def __call__(self, rollouts):
            scored = {"evenness": 1.0}
            return [Score(verdict="wrong", value=self.batch, components=scored, scaled=scored, weights={"evenness": self.batch}) for _ in rollouts]  # fmt: skip

    options = ("training.num_batches=3", "training.checkpoint_every=2", "rollout.prompts_per_batch=1")
    trainer = make_trainer(*options, reward_fn=Scheduled())
    assert [row["weighted/evenness"] for row in trainer.train()] == [1.0, 2.0, 3.0]
    assert [row["weighted/evenness"] for row in make_trainer(*options, reward_fn=Scheduled()).train()] == [3.0]


@pytest.mark.parametrize(("every", "kept"), [(0, []), (2, [2, 4])])
def test_completions_are_kept_as_often_as_the_recipe_says_with_each_component_raw_and_weighted(
    make_trainer, every, kept
):
    trainer = make_trainer(
        f"training.completions_every={every}", "rollout.prompts_per_batch=2", reward_fn=every_token_even
    )
    trainer.train()
    files = sorted((trainer.run.folder / "completions").glob("*.jsonl"))
    assert [int(file.stem[6:]) for file in files] == kept
    for file in files:
        rows = read_jsonl(file)
        assert len(rows) == 2 * trainer.config.rollout.samples_per_prompt
        for row in rows:
            assert row["value"] == pytest.approx(sum(row["weighted"].values()))
            assert row["weighted"]["correctness"] == pytest.approx(0.1 * row["components"]["correctness"])
