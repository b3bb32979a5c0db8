"""Rules, their sum, and the outcome model."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from reward_models.composite import CompositeReward, Part, build_reward, each, require_reachable
from reward_models.grading import GraderPool
from reward_models.outcome import PICTURE, STATISTICS, OutcomeModel, TokenPair, pairwise_accuracy, train, training_rows
from reward_models.verifiable import find_rule, format_followed, overlong
from rlhf.config import RuleReward, load_config
from rlhf.types import Prompt, Rollout, StepReward

ROOT = Path(__file__).parents[2]


def rollout(text, reference="7", finish="stop", tokens=(5, 6)):
    prompt = Prompt(id="p", token_ids=(1, 2), question="q", reference=reference)
    return Rollout(
        prompt=prompt,
        token_ids=tokens,
        logprobs=(0.0,) * len(tokens),
        finish_reason=finish,
        text=text,
        policy_version=0,
    )


def part(name, rule=None, **options):
    """A component of a reward by its rule; correctness has none of its own."""
    raw = {"name": name, "kind": "correctness" if rule is None else "tests:rule", **options}
    return name, Part(RuleReward.model_validate(raw), rule and each(rule))


def reward(*others, prefill="", **options):
    parts = [
        part("correctness"),
        (
            "format",
            Part(RuleReward.model_validate({"name": "format", "weight": 0.5}), each(format_followed, prefill=prefill)),
        ),
    ]
    return CompositeReward(dict([*parts, *others]), prefill, **options)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>\n3 + 4 = 7\n</think>\n\\boxed{7}", 1.0),
        ("<think>\n</think>\n\\boxed{7}", 1.0),
        ("\\boxed{7}", 0.0),
        ("<think>\\boxed{7}", 0.0),
        ("<think>\n</think>\n\\boxed{7}<think>", 0.0),
        ("<think>\n</think>", 0.0),
    ],
)
def test_the_format_is_one_pair_of_tags_then_a_box(text, value):
    assert format_followed(rollout(text), text) == value


def test_a_completion_cut_short_does_not_follow_the_format():
    text = "<think>\n</think>\n\\boxed{7}"
    assert format_followed(rollout(text, finish="length"), text) == 0.0


def test_the_total_is_the_weighted_sum_and_every_component_is_reported():
    [score] = reward(part("reward_model", lambda r, text: -2.0, weight=0.1))([rollout("<think>\n</think>\n\\boxed{7}")])
    assert score.components == {"correctness": 1.0, "format": 1.0, "reward_model": -2.0}
    assert score.value == pytest.approx(1.0 + 0.5 - 0.2)
    assert score.verdict == "correct"


def test_an_unreadable_reference_is_undecided_and_worth_nothing_rather_than_zero():
    [score] = reward()([rollout("\\boxed{7}", reference=" ")])
    assert (score.verdict, score.value, score.reason) == ("undecided", None, "unreadable_reference of p")


def test_a_component_that_cannot_tell_makes_the_rollout_undecided():
    [score] = reward(part("mine", lambda r, text: None))([rollout("\\boxed{7}")])
    assert (score.verdict, score.value) == ("undecided", None)


@pytest.mark.parametrize(("truncated_is_wrong", "verdict"), [(True, "wrong"), (False, "correct")])
def test_a_boxed_answer_in_a_truncated_completion_counts_as_the_recipe_says(truncated_is_wrong, verdict):
    [score] = reward(truncated_is_wrong=truncated_is_wrong)([rollout("\\boxed{7} and so on", finish="length")])
    assert score.verdict == verdict
    assert score.components["correctness"] == float(verdict == "correct")


def test_a_template_that_opens_think_is_seen_by_the_format_reward():
    text = "3 + 4 = 7\n</think>\n\\boxed{7}"
    require_reachable(reward(prefill="<think>\n"), [rollout(text)])
    with pytest.raises(ValueError, match="cannot reach its maximum.*format 0 instead of 1"):
        require_reachable(reward(), [rollout(text)])


def test_a_reference_solution_that_is_not_correct_stops_before_training():
    with pytest.raises(ValueError, match="correctness 0 instead of 1"):
        require_reachable(reward(), [rollout("<think>\n</think>\n\\boxed{7.5}")])
    with pytest.raises(ValueError, match="correctness undecided"):
        require_reachable(reward(), [rollout("<think>\n</think>\n\\boxed{7.5}", reference="$")])


def test_a_reward_of_ones_own_is_found_by_its_dotted_path():
    assert find_rule("reward_models.verifiable:brevity")(rollout("x"), "x") == pytest.approx(1 / 1.002)
    with pytest.raises(ValueError, match="cannot be imported"):
        find_rule("no_such_package:rule")


@pytest.mark.parametrize(("tokens", "value"), [(1, 0.0), (6, 0.0), (7, -0.25), (9, -0.75), (10, -1.0), (11, -1.0)])
def test_the_overlong_punishment_grows_over_the_last_tokens_of_the_longest_completion(tokens, value):
    punish = overlong(max_tokens=10, buffer_tokens=4)
    assert punish(rollout("x", tokens=(5,) * tokens), "x") == value


def test_a_buffer_that_would_punish_every_completion_is_refused():
    with pytest.raises(ValueError, match="buffer_tokens 11, more than the 10 of rollout.max_new_tokens.*lower"):
        overlong(max_tokens=10, buffer_tokens=11)


def test_the_overlong_punishment_of_a_recipe_takes_its_length_from_the_rollout():
    longest = load_config(ROOT / "recipes/tiny/grpo.yaml").rollout.max_new_tokens
    config = load_config(
        ROOT / "recipes/tiny/grpo.yaml",
        ["rewards=[{name: correctness}, {name: overlong, weight: 0.5, buffer_tokens: 4}]"],
    )
    overlong_part = build_reward(config, prefill="", device="cpu").parts["overlong"]
    assert overlong_part.component([rollout("x", tokens=(5,) * (longest - 1))]) == [-0.75]
    assert overlong_part.options.weight == 0.5


@pytest.mark.parametrize(
    ("rewards", "sentence"),
    [
        ("[{name: correctness}, {name: overlong}]", "overlong has no buffer_tokens; say over how many"),
        ("[{name: correctness, buffer_tokens: 4}]", "correctness has buffer_tokens 4, which only overlong reads"),
    ],
)
def test_the_buffer_belongs_to_the_overlong_punishment(rewards, sentence):
    with pytest.raises(ValueError, match=sentence):
        load_config(ROOT / "recipes/tiny/grpo.yaml", [f"rewards={rewards}"])


def test_pairwise_accuracy_counts_a_tie_as_half():
    assert (
        pairwise_accuracy(torch.tensor([2.0, 1.0, 0.0, 3.0]), torch.tensor([1.0, 1.0, 5.0, 2.0]))
        == (1 + 0.5 + 0 + 1) / 4
    )


@pytest.fixture(scope="module")
def trained(model_folder, tmp_path_factory):
    """A reward model that prefers sequences ending in token 10 to those ending in 11."""
    folder = tmp_path_factory.mktemp("rm") / "run"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    heads = [
        torch.randint(20, 90, (int(n),), generator=generator).tolist()
        for n in torch.randint(4, 12, (256,), generator=generator)
    ]
    pairs = [TokenPair(chosen_ids=[*head, 10], rejected_ids=[*head, 11]) for head in heads]
    overrides = [
        f"output_dir={folder}", f"model.path={model_folder}", "training.num_steps=30", "optimizer.learning_rate=0.003", "optimizer.warmup_steps=0",
        "head=classification",
    ]  # fmt: skip
    statistics = train(
        load_config(ROOT / "recipes/tiny/reward_model.yaml", overrides),
        train_pairs=pairs[:200],
        heldout_pairs=pairs[200:],
    )
    return folder, statistics, pairs


def test_the_outcome_model_learns_a_preference_and_keeps_it_through_the_file(trained):
    folder, statistics, pairs = trained
    assert statistics["accuracy"] > 0.95
    model = OutcomeModel.load(str(folder), device="cpu")
    chosen = model.raw_scores([p.chosen_ids for p in pairs[200:]], batch_size=16)
    rejected = model.raw_scores([p.rejected_ids for p in pairs[200:]], batch_size=16)
    assert pairwise_accuracy(chosen, rejected) == statistics["accuracy"]


def test_a_score_does_not_depend_on_what_shares_its_batch(trained):
    folder, _, pairs = trained
    model = OutcomeModel.load(str(folder), device="cpu")
    sequences = [p.chosen_ids for p in pairs[:9]]
    torch.testing.assert_close(
        model.raw_scores(sequences, batch_size=9), model.raw_scores(sequences, batch_size=1), atol=1e-5, rtol=1e-5
    )


def test_scores_are_standardised_by_held_out_statistics_and_clipped(trained):
    folder, statistics, _ = trained
    model = OutcomeModel.load(str(folder), device="cpu")
    raw = model.raw_scores([(1, 2, 5, 6)], batch_size=1).item()
    [value] = model.scorer(clip=100.0, batch_size=4)([rollout("x")])
    assert value == pytest.approx((raw - statistics["mean"]) / statistics["std"], rel=1e-4)
    [clipped] = model.scorer(clip=1e-3, batch_size=4)([rollout("x")])
    assert abs(clipped) == pytest.approx(1e-3)


def test_a_reward_model_whose_head_is_missing_is_refused(trained, tmp_path):
    folder, _, _ = trained
    for name in ("config.json", STATISTICS):
        (tmp_path / name).write_text((folder / name).read_text())
    weights = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items() if "score" not in name}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)  # transformers itself only remarks on it
    with pytest.raises(ValueError, match="score.weight"):
        OutcomeModel.load(str(tmp_path), device="cpu")


@pytest.fixture(scope="module")
def likely(model_folder, tmp_path_factory):
    """A language model that finds sequences ending in token 10 likelier than those ending in 11, whatever comes before."""
    folder = tmp_path_factory.mktemp("likely")
    heads = torch.randint(20, 90, (96, 6), generator=torch.Generator().manual_seed(0)).tolist()
    pairs = [TokenPair(chosen_ids=[*h, 10, 2], rejected_ids=[*h, 11, 2], prompt_length=5) for h in heads]
    overrides = [
        f"output_dir={folder}",
        f"model.path={model_folder}",
        "training.num_steps=12",
        "optimizer.learning_rate=0.001",
    ]
    config = load_config(ROOT / "recipes/tiny/reward_model.yaml", overrides)
    assert config.head == "likelihood"
    return folder, train(config, train_pairs=pairs[:64], heldout_pairs=pairs[64:]), pairs


def test_a_likelihood_is_that_of_the_response_token_by_token_whatever_shares_its_batch(likely):
    folder, _, _ = likely
    lm = AutoModelForCausalLM.from_pretrained(folder)
    ids = [20, 30, 40, 10, 2]
    with torch.no_grad():
        logprobs = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = [logprobs[i, ids[i + 1]].item() for i in range(4)]
    model = OutcomeModel.load(str(folder), device="cpu")
    scores = model.raw_scores([ids, ids, [25, 10], [20, 30]], batch_size=4, starts=[3, 1, 1, 2])
    assert scores[:2].tolist() == pytest.approx([sum(by_hand[2:]), sum(by_hand)], abs=1e-4)
    assert scores[3] == 0  # no token of a response
    assert model.raw_scores([[25, 10]], batch_size=1).item() == pytest.approx(scores[2].item(), abs=1e-5)
    one = rollout("x")
    [score] = model.score_rollouts([one], batch_size=1)
    assert score == model.raw_scores(
        [(*one.prompt.token_ids, *one.token_ids)], batch_size=1, starts=[len(one.prompt.token_ids)]
    )


def test_a_likelihood_learns_a_preference_and_keeps_it_through_the_file(likely):
    folder, statistics, pairs = likely
    assert statistics["accuracy"] == 1.0
    model = OutcomeModel.load(str(folder), device="cpu")
    chosen, rejected = (
        model.raw_scores([getattr(p, side) for p in pairs[64:]], batch_size=64, starts=[5] * 32)
        for side in ("chosen_ids", "rejected_ids")
    )
    assert torch.cat([chosen, rejected]).mean().item() == pytest.approx(statistics["mean"], abs=1e-4)


def test_a_reward_model_whose_scores_were_all_alike_is_refused_rather_than_divided_by_0(trained, tmp_path):
    folder, statistics, _ = trained
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(folder / name)
    (tmp_path / STATISTICS).write_text(json.dumps({**statistics, "std": 0.0}))
    with pytest.raises(ValueError, match="scored all held-out responses alike"):
        OutcomeModel.load(str(tmp_path), device="cpu")


def test_a_reward_model_without_statistics_is_refused(tmp_path):
    with pytest.raises(ValueError, match="train_reward_model"):
        OutcomeModel.load(str(tmp_path), device="cpu")


def test_saved_statistics_are_those_of_the_held_out_scores(trained):
    folder, statistics, _ = trained
    assert json.loads((folder / STATISTICS).read_text()) == statistics


def test_the_picture_and_the_report_lie_beside_the_model(trained):
    folder, statistics, _ = trained
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert statistics["interval"]["mean"] == statistics["accuracy"]
    assert statistics["length_bias"]["same_length"]["n"] == 56  # both end in one token more than what they begin with


def test_the_chance_to_be_preferred_is_that_of_bradley_and_terry_against_an_average_response(trained):
    folder, statistics, _ = trained
    model = OutcomeModel.load(str(folder), device="cpu")
    raw = model.raw_scores([(1, 2, 5, 6)], batch_size=1).item()
    [chance] = model.chances(batch_size=4)([rollout("x")])
    assert chance == pytest.approx(1 / (1 + math.exp(statistics["mean"] - raw)), rel=1e-5)


def test_margins_are_scaled_and_a_pair_without_one_has_none_to_make_up():
    pairs = [TokenPair(chosen_ids=[1], rejected_ids=[2], margin=m) for m in (1.5, None, 0.5)]
    assert [row["margin"] for row in training_rows(pairs, margin_scale=2.0)] == [3.0, 0.0, 1.0]
    assert all("margin" not in row for row in training_rows(pairs, margin_scale=0.0))
    with pytest.raises(ValueError, match="margin_scale is 2 and no training pair has a margin; set margin_scale to 0"):
        training_rows(pairs[1:2], margin_scale=2.0)


def test_a_margin_is_what_the_chosen_response_must_be_ahead_by(model_folder, tmp_path):
    same = [TokenPair(chosen_ids=[20, 30, 10], rejected_ids=[20, 30, 10], margin=1.5)] * 4  # r_chosen - r_rejected = 0
    overrides = [
        f"output_dir={tmp_path}", f"model.path={model_folder}", "training={num_steps: 1, log_every: 1, sequences_per_step: 4, micro_batch_size: 4}",
        "margin_scale=2", "centering=0", "head=classification",
    ]  # fmt: skip
    train(load_config(ROOT / "recipes/tiny/reward_model.yaml", overrides), train_pairs=same, heldout_pairs=same)
    [row] = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert row["loss"] == pytest.approx(math.log(1 + math.exp(2 * 1.5)))


def test_a_recipes_reward_judges_in_processes_that_can_be_killed_with_the_recipes_limits():
    config = load_config(
        ROOT / "recipes/tiny/grpo.yaml",
        ["rewards=[{name: correctness}]", "grader={accept: marked, timeout_seconds: 7}"],
    )
    reward = build_reward(config, prefill="", device="cpu")
    pool = reward.judge.__self__
    assert isinstance(pool, GraderPool)
    assert (pool.accept, pool.timeout) == ("marked", 7.0)
    assert [s.verdict for s in reward([rollout("The answer is 7."), rollout("The answer is 8.")])] == [
        "correct",
        "wrong",
    ]
    pool.close()


def test_a_component_may_judge_single_steps_which_earn_their_weighted_reward_where_they_end():
    def steps(rollout, text):
        return [StepReward(0, 1.0), StepReward(1, -0.5)]

    [score] = reward(part("steps", steps, weight=2.0))([rollout("\\boxed{7}")])
    assert score.value == 1.0
    assert score.steps == (StepReward(0, 2.0), StepReward(1, -1.0))
    assert score.components == {"correctness": 1.0, "format": 0.0, "steps": 0.5}
    assert score.weighted == {"correctness": 1.0, "format": 0.0, "steps": 1.0}
