"""Which problems come next: the arithmetic by hand, what is measured, and an exact resume."""

import json
import shutil
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from online_helpers import G, config, experience, sample
from pydantic import TypeAdapter
from test_resume import rows_of, weights_of

from rlhf.config import Curriculum as Settings
from rlhf.curriculum import Choice, Curriculum, Outcome, outcomes, prompt_stream
from rlhf.learning_signal import (
    beta_posterior,
    draw,
    effective_number,
    expected_signal,
    faded,
    histogram,
    importance_weights,
    kind_rates,
    paced_share,
    replay_probabilities,
    with_floor,
)
from rlhf.metrics import Metrics
from rlhf.types import Prompt, Score


def array(*values):
    return np.array(values, dtype=float)


def make(count=4, *, columns=None, seed=0, **options):
    prompts = [
        Prompt(id=f"{i}", token_ids=(1,), question="", reference="", columns=columns[i] if columns else {})
        for i in range(count)
    ]
    return Curriculum(TypeAdapter(Settings).validate_python(options), prompts, seed=seed)


def verdicts(*names):
    return [Score(verdict=name, value=None if name == "undecided" else 0.0) for name in names]


# -------------------------------------------------------------------------------------------------------------- by hand


def test_a_measurement_counts_half_after_a_half_life_and_for_ever_without_one():
    assert_allclose(faded(array(8, 8), array(0, 20), 20.0), [8, 4])
    assert_allclose(faded(array(8), array(20), None), [8])


def test_the_posterior_adds_completions_to_what_the_prior_is_worth():
    alpha, beta = beta_posterior(array(3), array(5), rates=array(0.25), strength=4.0)
    assert_allclose([alpha[0], beta[0]], [4, 8])


@pytest.mark.parametrize(
    ("alpha", "beta", "signal"), [(1, 1, 1 / 6), (3, 1, 0.15), (5000, 5000, 0.25), (5000, 1e-9, 0.0)]
)
def test_the_expected_signal_is_the_mean_of_p_times_one_minus_p(alpha, beta, signal):
    assert_allclose(expected_signal(array(alpha), array(beta)), [signal], atol=1e-4)  # of Beta(3, 1): 3/4 - 3/5


def test_problems_of_a_kind_share_what_was_measured_on_any_of_them():
    rates = kind_rates(array(6, 0, 0), array(1, 0, 0), np.array([0, 0, 1]), rate=0.5, strength=2.0)
    assert_allclose(rates, [7 / 9, 7 / 9, 0.5])


def test_a_floor_goes_to_every_problem():
    assert_allclose(with_floor(array(1, 0, 0, 0), 0.2), [0.85, 0.05, 0.05, 0.05])


def test_replay_is_by_rank_and_by_age_and_a_share_goes_to_the_unseen():
    seen = np.array([True, True, False, False])
    options = {"temperature": 1.0, "stale_share": 0.25, "new_share": 0.4}
    # seen: ranks 2 and 1, so 1/3 and 2/3; ages 3 and 1, so 3/4 and 1/4
    expected = [0.6 * (0.75 / 3 + 0.25 * 0.75), 0.6 * (0.75 * 2 / 3 + 0.25 * 0.25), 0.2, 0.2]
    assert_allclose(replay_probabilities(array(0.1, 0.2, 0, 0), array(3, 1, 9, 9), seen, **options), expected)
    assert_allclose(
        replay_probabilities(array(0.1, 0.1), array(1, 1), np.array([True, True]), **options), [0.5, 0.5]
    )  # a tie shares its places, and without unseen problems their share goes to the others
    assert_allclose(replay_probabilities(array(1, 2), array(0, 0), np.array([False, False]), **options), [0.5, 0.5])


@pytest.mark.parametrize(("batch", "power", "share"), [(0, 1, 0.2), (5, 1, 0.6), (10, 1, 1), (99, 1, 1), (5, 2, 0.4)])
def test_the_pace_goes_from_the_start_to_everything(batch, power, share):
    assert paced_share(batch, start=0.2, batches=10, power=power) == pytest.approx(share)


def test_importance_weights_undo_a_choice_and_are_at_most_one():
    weights = importance_weights(array(0.5, 0.25, 0.125, 0.125), [0, 1, 2], 1.0)
    assert_allclose(weights, [0.25, 0.5, 1.0])
    assert_allclose(importance_weights(array(0.5, 0.5), [0, 1], 0.0), [1, 1])
    # the mean over draws of a weighted value is the mean over all problems, up to the scale of the largest weight
    q, values = array(0.7, 0.2, 0.1), array(1, 2, 6)
    assert_allclose((q * importance_weights(q, [0, 1, 2], 1.0) * values).sum() / (1 / (3 * 0.1)) ** -1, 3.0)


def test_the_effective_number_is_that_of_an_even_draw():
    assert effective_number(array(0.25, 0.25, 0.25, 0.25)) == pytest.approx(4)
    assert effective_number(array(1, 0, 0)) == pytest.approx(1)


def test_a_histogram_has_a_rate_of_one_in_its_last_part():
    assert histogram(array(0, 0.05, 0.5, 1), 10) == [0.5, 0, 0, 0, 0, 0.25, 0, 0, 0, 0.25]
    assert histogram(array(), 2) == [0, 0]


def test_draws_follow_the_probabilities_and_repeat_nothing_before_all_have_come():
    q = array(0.6, 0.3, 0.1, 0.0)
    first = [draw(q, 1, seed=f"{i}")[0] for i in range(4000)]
    assert_allclose(np.bincount(first, minlength=4) / 4000, q, atol=0.03)
    # sequential draws without replacement: 0 then 1 has probability 0.6 * 0.3 / 0.4
    pairs = [tuple(draw(q, 2, seed=f"{i}")) for i in range(4000)]
    assert pairs.count((0, 1)) / 4000 == pytest.approx(0.45, abs=0.03)
    whole = draw(q, 8, seed="x")
    assert whole[3] == whole[7] == 3
    assert sorted(whole[:4]) == sorted(whole[4:]) == [0, 1, 2, 3]


# ------------------------------------------------------------------------------------------------------------- choosing


def test_the_default_is_the_stream_of_permutations():
    curriculum = make(10, kind="uniform")
    chosen = [c for start in range(0, 30, 6) for c in curriculum.choose(start, 6, batch=start)]
    assert chosen == [Choice(i, 1.0) for i in prompt_stream(10, 0, 30, seed=0)]
    assert not curriculum.measures


def test_only_the_easiest_problems_come_at_first():
    levels = [5, 1, 4, 2, 3]
    curriculum = make(
        5, columns=[{"level": level} for level in levels], kind="difficulty", pacing={"start": 0.4, "batches": 10}
    )
    at_first = {levels[c.problem] for start in range(20) for c in curriculum.choose(start, 2, batch=0)}
    assert at_first == {1, 2}
    assert {levels[c.problem] for c in curriculum.choose(0, 5, batch=10)} == {1, 2, 3, 4, 5}


def test_a_difficulty_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="problem '1' has 'hard' there, which is no number"):
        make(2, columns=[{"level": 1}, {"level": "hard"}], kind="difficulty", pacing={"batches": 3})
    with pytest.raises(ValueError, match="'topic', which no problem has; they have level"):
        make(1, columns=[{"level": 1}], kind="signal", prior_column="topic")


def test_problems_that_are_always_right_or_always_wrong_are_chosen_least():
    curriculum = make(4, kind="signal", floor=0.0, sharpness=1.0, half_life=None, prior_strength=2.0, rest_batches=0)
    curriculum.observe([Outcome(0, 8, 0), Outcome(1, 0, 8), Outcome(2, 4, 4)], batch=0)
    # Beta(9, 1), Beta(1, 9), Beta(5, 5), Beta(1, 1): 9/110, 9/110, 25/110, 1/6
    weights = array(9 / 110, 9 / 110, 25 / 110, 1 / 6)
    assert_allclose(curriculum.probabilities(1), weights / weights.sum())


def test_a_problem_that_was_solved_is_doubted_again_as_its_measurement_fades():
    curriculum = make(2, kind="signal", half_life=5.0, rest_batches=0)
    curriculum.observe([Outcome(0, 8, 0), Outcome(1, 4, 4)], batch=0)
    assert curriculum.probabilities(1)[0] < curriculum.probabilities(20)[0] < 0.5


def test_outside_the_band_only_the_floor_chooses():
    curriculum = make(3, kind="signal", band=[0.3, 0.7], floor=0.3, rest_batches=0)
    curriculum.observe([Outcome(0, 7, 1), Outcome(1, 4, 4), Outcome(2, 0, 8)], batch=0)
    assert_allclose(curriculum.probabilities(0), [0.1, 0.8, 0.1])


@pytest.mark.parametrize("kind", ["signal", "replay"])
def test_a_problem_rests_after_it_was_sampled_and_comes_again(kind):
    """Of three with the same signal, one sampled in batch 2, one in batch 5: by the floor alone, 0.3 / 3, until five batches later."""
    curriculum = make(
        3, kind=kind, floor=0.3, rest_batches=5, half_life=None, **({"new_share": 1.0} if kind == "replay" else {})
    )
    curriculum.observe([Outcome(0, 4, 4)], batch=2)
    curriculum.observe([Outcome(1, 4, 4)], batch=5)
    assert_allclose(curriculum.probabilities(6), [0.1, 0.1, 0.8])
    curriculum.observe([Outcome(2, 4, 4)], batch=6)
    assert_allclose(curriculum.probabilities(7), [0.8, 0.1, 0.1])
    assert_allclose(curriculum.probabilities(9), [0.8, 0.1, 0.1])
    assert (curriculum.probabilities(10)[:2] > 0.1).all()
    curriculum.observe([Outcome(i, 4, 4) for i in range(3)], batch=11)
    assert_allclose(curriculum.probabilities(12), [1 / 3] * 3)  # where all rest, any may come


def test_solved_problems_retire_impossible_ones_are_shelved_and_both_come_back():
    pools = {"min_completions": 8, "revisit_batches": 10}
    for kind in ("signal", "replay"):
        curriculum = make(4, kind=kind, floor=0.0, pools=pools, half_life=None)
        curriculum.observe([Outcome(0, 8, 0), Outcome(1, 0, 8), Outcome(2, 0, 4)], batch=3)
        sizes = {name: mask.tolist() for name, mask in curriculum.pools(curriculum.config.pools).items()}
        assert sizes["solved"] == [True, False, False, False]
        assert sizes["impossible"] == [False, True, False, False]
        assert sizes["active"] == [False, False, True, False]  # four completions are too few to say
        assert sizes["unseen"] == [False, False, False, True]
        assert (curriculum.probabilities(12) > 0).tolist() == [False, False, True, True]
        assert (curriculum.probabilities(13) > 0).all()


def test_a_choice_counts_the_less_the_likelier_it_was():
    curriculum = make(4, kind="replay", importance=1.0, floor=0.2, new_share=0.5, rest_batches=0)
    curriculum.observe([Outcome(0, 4, 4)], batch=0)
    weights = {c.problem: c.weight for c in curriculum.choose(0, 4, batch=1)}
    # 0 alone was seen: 0.8 * 0.5 + 0.2 / 4 = 0.45; the others share 0.55
    assert weights == pytest.approx({0: 0.55 / 3 / 0.45, 1: 1, 2: 1, 3: 1})


def test_an_undecided_completion_is_no_failure():
    scores = verdicts("correct", "undecided", "wrong", "undecided", "undecided", "undecided")
    assert outcomes([7, 2], scores) == [Outcome(7, 1, 1), Outcome(2, 0, 0)]
    curriculum = make(3, kind="signal")
    before = curriculum.posterior(0)
    curriculum.observe([Outcome(2, 0, 0)], batch=0)
    assert_allclose(curriculum.posterior(0), before)


# -------------------------------------------------------------------------------------------------------------- in a run


def test_choices_depend_on_what_was_measured_and_not_on_how_it_was_split_over_ranks():
    found = [Outcome(i, i % 3, 2 - i % 3) for i in range(8)]
    one, two = (make(8, kind="replay") for _ in range(2))
    one.observe(found, batch=0)
    two.observe(found[:4] + found[4:], batch=0)
    assert one.choose(8, 4, batch=1) == two.choose(8, 4, batch=1)
    other = make(8, kind="replay")
    other.observe([Outcome(i, 2 - i % 3, i % 3) for i in range(8)], batch=0)
    assert one.state() != other.state()


def test_a_curriculum_goes_on_from_its_state_as_if_nothing_had_happened():
    curriculum = make(6, kind="replay", pools={})
    curriculum.observe([Outcome(0, 3, 1), Outcome(4, 0, 3)], batch=2)
    curriculum.observe([Outcome(0, 1, 3)], batch=5)
    again = make(6, kind="replay", pools={})
    again.restore(json.loads(json.dumps(curriculum.state())))
    assert np.array_equal(again.probabilities(7), curriculum.probabilities(7))
    assert again.choose(12, 6, batch=7) == curriculum.choose(12, 6, batch=7)
    with pytest.raises(ValueError, match="knows 6 problems and there are 5 now"):
        make(5, kind="replay").restore(curriculum.state())


def test_metrics_say_how_many_problems_are_in_which_pool_and_which_were_chosen():
    curriculum = make(4, kind="signal")
    curriculum._drawn = [0, 1]
    curriculum.observe([Outcome(0, 8, 0), Outcome(1, 2, 6)], batch=0)
    metrics = Metrics()
    curriculum.describe(metrics, batch=0)
    row = {key: total / count for key, (total, count) in metrics.pairs().items()}
    assert [row[f"curriculum/{pool}"] for pool in ("unseen", "active", "solved", "impossible")] == [2, 1, 1, 0]
    assert row["curriculum/pass_rate"] == (1 + 0.25) / 2
    assert row["curriculum/chosen_2"] == row["curriculum/chosen_9"] == row["curriculum/rates_9"] == 0.5


def by_prompt(rollouts):
    """Some prompts are always right, some never, some sometimes; now and then the grader fails."""
    found = []
    for i, rollout in enumerate(rollouts):
        number = sum(rollout.prompt.token_ids) % 4
        right = number == 0 or (number == 1 and i % G == 0)
        undecided = number == 3 and rollout.token_ids[0] % 5 == 0
        value = None if undecided else float(right)
        found.append(Score(verdict="undecided" if undecided else "correct" if right else "wrong", value=value))
    return found


@pytest.mark.parametrize(
    "options",
    [
        ("curriculum={kind: signal, pools: {min_completions: 3, revisit_batches: 2}}", "rollout.refill_rounds=1"),
        ("curriculum={kind: replay, importance: 1.0}",),
    ],
)
def test_a_run_with_a_curriculum_resumes_bit_for_bit_at_any_step(make_trainer, options):
    every = ("training.num_batches=3", "training.passes_per_batch=2", "training.checkpoint_every_steps=1")
    options = (*options, *every, "training.keep_checkpoints=100", "guards.max_undecided_share=1")
    whole = make_trainer(*options, folder="whole", reward_fn=by_prompt)
    whole.train()
    rows, weights = rows_of(whole), weights_of(whole)
    assert rows[-1]["curriculum/unseen"] < 10 - 4
    for step in (1, 3, 4):
        name = f"step-{step:06d}"
        killed = whole.run.folder.with_name(name)
        shutil.copytree(whole.checkpoints / name, killed / "checkpoints" / name)
        shutil.copy(whole.metrics_file, killed)
        resumed = make_trainer(*options, folder=name, reward_fn=by_prompt)
        resumed.train()
        assert rows_of(resumed) == rows, name
        assert all(torch.equal(a, b) for a, b in zip(weights, weights_of(resumed), strict=True)), name
        assert resumed.curriculum.state() == whole.curriculum.state()


def test_choices_go_on_behind_batches_that_were_sampled_ahead(make_trainer):
    options = ("curriculum={kind: signal}", "guards.max_undecided_share=1")
    whole = make_trainer(*options, folder="whole", reward_fn=by_prompt)
    whole.fill(0)
    ahead = whole.fill(1)
    whole.ahead = SimpleNamespace(all_that_wait=lambda: {1: ahead})
    whole._checkpoint(1)
    third = [r.prompt.id for r in whole.fill(2).experience.rollouts]
    shutil.copytree(whole.checkpoints, whole.run.folder.with_name("resumed") / "checkpoints")
    resumed = make_trainer(*options, folder="resumed", reward_fn=by_prompt)
    assert [r.prompt.id for r in resumed.fill(2).experience.rollouts] == third
    assert resumed.curriculum.state() == whole.curriculum.state()


def test_a_rank_learns_what_the_other_ranks_measured(make_trainer, monkeypatch):
    trainer = make_trainer("curriculum={kind: signal}", reward_fn=by_prompt)
    elsewhere = [Outcome(9, 2, 1)]

    def gather(_, items, group=None):
        of_problems = bool(items) and isinstance(items[0], Outcome)
        return [*(elsewhere if of_problems else items[:0]), *items]

    monkeypatch.setattr("rlhf.trainers.online.gather", gather)
    trainer.fill(0)
    assert [9, 2.0, 1.0, 0.0] in trainer.curriculum.state()["measured"]


def test_the_completions_of_a_problem_carry_the_weight_of_its_choice(make_trainer):
    trainer = make_trainer(
        "curriculum={kind: replay, importance: 1.0, rest_batches: 0}",
        "guards.max_undecided_share=1",
        reward_fn=by_prompt,
    )
    trainer.curriculum.observe([Outcome(i, 2, 2) for i in range(3)], batch=0)
    chosen = deepcopy(trainer.curriculum).choose(0, 4, batch=1)
    assert len({choice.weight for choice in chosen}) == 2  # of problems seen and not
    rollouts = trainer.fill(1).experience.rollouts
    assert [r.weight for r in rollouts] == [choice.weight for choice in chosen for _ in range(G)]


def test_the_advantages_of_a_problem_are_weighted_by_how_it_was_chosen(make_trainer):
    trainer = make_trainer()
    plain = experience(trainer)
    rollouts = [replace(r, weight=0.5 if i < G else 1.0) for i, r in enumerate(sample(trainer))]
    weighted = trainer.judge(rollouts, plain.scores, Metrics())
    for i, (a, b) in enumerate(zip(weighted.advantages, plain.advantages, strict=True)):
        assert torch.equal(a, b * 0.5 if i < G else b)


def test_a_recipe_names_what_contradicts_itself():
    for change, message in (
        ("curriculum={kind: signal, band: [0.8, 0.2]}", "give the lower pass rate first"),
        ("curriculum={kind: signal, pools: {solved_at: 0.1, impossible_at: 0.2}}", "leave problems between them"),
        ("curriculum={kind: uniform, floor: 0.1}", "floor"),
        ("curriculum={kind: best}", "best"),
    ):
        with pytest.raises(ValueError, match=message):
            config(change)
