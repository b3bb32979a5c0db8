"""Controls of forgetting: what each adds to the loss, once an optimizer step; and the evaluation that says what was forgotten."""

from types import SimpleNamespace

import pytest
import torch
from online_helpers import assert_same, config, expected_gradient, experience, fisher_of
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close

from rlhf.config import ForgettingGate, Retention, require_whole_weights
from rlhf.controllers import adapted_retention_factor
from rlhf.elastic import FISHER, Anchor, elastic_penalty, fisher_diagonal, load_fisher, save_fisher
from rlhf.forgetting import forgetting_table, refusals
from rlhf.logprobs import token_logprobs
from rlhf.lora import add_lora
from rlhf.metrics import Metrics
from rlhf.models import load_causal_lm
from rlhf.ptx import take_demonstrations
from rlhf.retention import Remembered
from rlhf.types import Prompt, Rollout, Score

ELASTIC = "retention.elastic={fisher: given, coefficient: 1000}"
PTX = "retention.ptx={demonstrations: given, coefficient: 0.5, tokens_per_step: 150}"


def completion(*token_ids, prompt=(0,)):
    return Rollout(
        prompt=Prompt(id="0", token_ids=prompt, question="", reference=""), token_ids=token_ids, logprobs=(0.0,) * len(token_ids),
        finish_reason="stop", text="", policy_version=0,
    )  # fmt: skip


class Coin(nn.Module):
    """Token 1 with the chance sigmoid(w), whatever came before."""

    device = torch.device("cpu")

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))

    def forward(self, input_ids, use_cache):
        zero = self.w * 0
        logits = torch.stack([zero, self.w]).expand(*input_ids.shape, 2)
        return SimpleNamespace(logits=logits)


# ---------------------------------------------------------------------------------------------- elastic weight consolidation


def test_fisher_information_is_the_mean_square_of_the_gradients_of_whole_completions():
    # d log p / dw is 1 - p for token 1 and -p for token 0; p = 0.5. Of "1 1": (0.5 + 0.5)^2, of "0": 0.5^2, of "1 0": (0.5 - 0.5)^2.
    found = fisher_diagonal(Coin(0.0), [completion(1, 1), completion(0), completion(1, 0)])
    assert_close(found["w"], torch.tensor((1.0 + 0.25 + 0.0) / 3))


def test_gradients_that_cancel_leave_fisher_information():
    found = fisher_diagonal(Coin(0.0), [completion(1), completion(0)])
    assert_close(found["w"], torch.tensor(0.25))  # p (1 - p), where the square of the mean gradient is 0


def test_the_penalty_and_its_gradient_are_those_worked_out_by_hand():
    change = torch.tensor([1.0, -2.0, 0.0], requires_grad=True)
    penalty = elastic_penalty(change, torch.tensor([3.0, 0.5, 7.0]))
    assert penalty.item() == (3.0 * 1 + 0.5 * 4) / 2
    penalty.backward()
    assert_close(change.grad, torch.tensor([3.0, -1.0, 0.0]))  # F (w - w*)


def test_a_model_that_has_not_moved_pays_nothing_and_one_that_has_pays_for_every_weight(model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    fisher = fisher_of(model)
    anchor = Anchor(model, fisher)
    assert anchor.penalty().item() == 0
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    assert_close(anchor.penalty().item(), sum(f.sum().item() for f in fisher.values()) * 0.01 / 2, rtol=1e-4, atol=0)


def test_with_adapters_the_penalty_is_that_of_the_merged_weights_however_a_and_b_share_the_change(model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    fisher = fisher_of(model)
    add_lora(model, config("policy.lora={rank: 2, alpha: 6, target_modules: [q_proj]}").policy.lora)
    anchor = Anchor(model, fisher)
    assert anchor.penalty().item() == 0  # B is 0
    layers = {n: m for n, m in model.named_modules() if n.endswith("q_proj")}
    expected = 0.0
    with torch.no_grad():
        for name, layer in layers.items():
            layer.lora_B["default"].weight.fill_(0.5)
            change = 3.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            expected += (fisher[f"{name}.weight"] * change.square()).sum().item() / 2
    assert_close(anchor.penalty().item(), expected, rtol=1e-5, atol=0)
    anchor.penalty().backward()
    assert all(layer.lora_A["default"].weight.grad.abs().max() > 0 for layer in layers.values())
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B["default"].weight.mul_(8)
            layer.lora_A["default"].weight.div_(8)
    assert_close(anchor.penalty().item(), expected, rtol=1e-5, atol=0)


def test_fisher_information_of_other_weights_is_refused(tmp_path):
    save_fisher(tmp_path, {"w": torch.ones(2)}, weights="abc", kind="true", sequences=3)
    assert_close(load_fisher(str(tmp_path), weights="abc")["w"], torch.ones(2))
    with pytest.raises(
        ValueError, match=r"is of the weights abc and policy\.path has def; run scripts/estimate_fisher"
    ):
        load_fisher(str(tmp_path), weights="def")
    save_file({"w": torch.ones(2)}, tmp_path / FISHER)
    with pytest.raises(ValueError, match="is of the weights None"):
        load_fisher(str(tmp_path), weights="def")
    with pytest.raises(ValueError, match=r"has no fisher\.safetensors; run scripts/estimate_fisher"):
        load_fisher(str(tmp_path / "nothing"), weights="abc")


def test_under_zero_3_the_penalty_is_refused_and_ptx_is_not():
    both = config(ELASTIC, PTX).retention
    require_whole_weights(both, 2)
    with pytest.raises(ValueError, match=r"retention\.elastic needs whole weights.*zero_stage 2"):
        require_whole_weights(both, 3)
    require_whole_weights(Retention(ptx=both.ptx), 3)


# ----------------------------------------------------------------------------------------------------- in an optimizer step


def moved(trainer, by=0.001):
    with torch.no_grad():
        for parameter in trainer.unwrapped.parameters():
            parameter.add_(by)


@pytest.mark.parametrize(("budget", "layout"), [(10_000, "shared"), (250, "shared"), (250, "padded")])
def test_a_step_pays_the_penalty_and_imitates_once_however_it_is_cut(
    make_trainer, captured, remembered, budget, layout
):
    options = (ELASTIC, PTX, "guards.max_kl_sampler=1000")
    trainer = make_trainer(
        f"training.tokens_per_micro_batch={budget}", f"training.layout={layout}", *options, remembered=remembered
    )
    exp = experience(trainer)
    moved(trainer)
    trainer.updater.update(exp, Metrics())
    expected = expected_gradient(trainer, exp)
    taken = take_demonstrations([len(d.token_ids) for d in remembered.demonstrations], 0, 150, seed=trainer.config.seed)
    assert 1 < len(taken) < 7
    model, tokens = trainer.unwrapped, sum(len(remembered.demonstrations[i].token_ids) for i in taken)
    for i in taken:
        d = remembered.demonstrations[i]
        ids, start = torch.tensor([[*d.prompt.token_ids, *d.token_ids]]), len(d.prompt.token_ids) - 1
        logprobs = token_logprobs(model(input_ids=ids[:, :-1]).logits[0, start:], ids[0, start + 1 :], temperature=1.0)
        (-0.5 * logprobs.sum() / tokens).backward()
    for name, parameter in model.named_parameters():
        expected[name] += parameter.grad + 1000 * remembered.fisher[name] * 0.001
    model.zero_grad()
    assert_same(captured[0], expected, atol=2e-6)
    assert any((captured[0][n] - 1000 * remembered.fisher[n] * 0.001).abs().max() > 0.01 for n in expected)


def test_demonstrations_come_in_epochs_within_the_budget_and_one_at_least():
    lengths = [5, 7, 3, 50]
    taken, start = [], 0
    for _ in range(40):
        step = take_demonstrations(lengths, start, 12, seed=1)
        assert sum(lengths[i] for i in step) <= 12 or len(step) == 1
        taken, start = [*taken, *step], start + len(step)
    whole_epochs = len(taken) // 4
    assert whole_epochs > 10
    for epoch in range(whole_epochs):
        assert sorted(taken[4 * epoch : 4 * epoch + 4]) == [0, 1, 2, 3]
    assert len({tuple(taken[4 * e : 4 * e + 4]) for e in range(whole_epochs)}) > 1


# ----------------------------------------------------------------------------------------------------- the held-out ability


def test_the_coefficient_rises_while_the_ability_has_fallen_and_stays_within_its_bounds():
    def follow(factor, fall):
        return adapted_retention_factor(factor, fall, allowed=0.1, rate=1.0, maximum=10.0)

    assert follow(2.0, 0.1) == 2.0
    assert follow(2.0, 0.15) == pytest.approx(2.0 * 2.718281828**0.5)
    assert follow(2.0, 0.9) == pytest.approx(2.0 * 2.718281828)  # the error is clipped at 1
    assert follow(9.0, 0.9) == 10.0
    assert follow(2.0, -0.5) == 1.0  # never below the recipe's own


def test_a_fallen_ability_raises_the_coefficient_that_the_next_step_uses(make_trainer, remembered):
    falling = iter([1.0, 1.0, 0.5, 0.5])

    def grade(rollouts):
        share = next(falling)
        return [
            Score(verdict="correct" if i < share * len(rollouts) else "wrong", value=0.0) for i in range(len(rollouts))
        ]

    trainer = make_trainer(
        PTX, ELASTIC, "retention.adaptive={steers: elastic, problems: given, every_batches: 1}", "training.num_batches=3",
        remembered=Remembered(**{**{k: getattr(remembered, k) for k in ("fisher", "demonstrations", "prompts")}, "grade": grade}),
    )  # fmt: skip
    rows = trainer.train()
    assert [row["retention/ability"] for row in rows] == [1.0, 0.5, 0.5]
    assert [row["retention/factor"] for row in rows] == pytest.approx([1.0, 2.718281828, 2.718281828**2])
    retention = trainer.updater.retention
    assert retention.factor("elastic") == pytest.approx(2.718281828**2)
    assert retention.factor("ptx") == retention.factor("kl") == 1.0
    penalty = retention._anchor.penalty().item()
    assert retention.penalty(Metrics()).item() == pytest.approx(1000 * 2.718281828**2 * penalty)


def test_an_ability_that_too_few_completions_can_tell_is_not_steered_by(make_trainer, remembered):
    def grade(rollouts):
        return [
            Score(verdict="undecided", value=None, reason="timeout"),
            *[Score(verdict="correct", value=1.0)] * (len(rollouts) - 1),
        ]

    trainer = make_trainer(
        "retention.adaptive={steers: kl, problems: given, every_batches: 1}", "algorithm.kl_coefficient=0.1",
        "reference={kind: moving_average}", "training.num_batches=1", f"guards.max_undecided_share={0.9 / len(remembered.prompts)}",
        remembered=Remembered(prompts=remembered.prompts, grade=grade),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="could not be judged, above guards.max_undecided_share .*timeout"):
        trainer.train()


def test_the_kls_coefficient_follows_the_ability(make_trainer, remembered):
    falling = iter([1.0, 0.0])

    def grade(rollouts):
        return [
            Score(verdict="correct" if next_share else "wrong", value=0.0)
            for next_share in [next(falling)] * len(rollouts)
        ]

    trainer = make_trainer(
        "retention.adaptive={steers: kl, problems: given, every_batches: 1}", "algorithm.kl_coefficient=0.1",
        "reference={kind: moving_average}", "training.num_batches=1", remembered=Remembered(prompts=remembered.prompts, grade=grade),
    )  # fmt: skip
    trainer.train()
    assert trainer.updater.kl_coefficient == pytest.approx(0.1 * 2.718281828)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (("retention.adaptive={steers: elastic, problems: p}",), r"steers is elastic but retention\.elastic is not set"),
        (("retention.adaptive={steers: kl, problems: p}",), r"steers is kl but algorithm\.kl_coefficient is not set"),
        (
            ("retention.adaptive={steers: kl, problems: p}", "algorithm.kl_coefficient=0.1", "algorithm.kl_target=0.1", "reference={path: p}"),
            r"kl_target steers the same coefficient; remove one",
        ),
    ],
)  # fmt: skip
def test_a_coefficient_that_nothing_could_steer_is_refused(overrides, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(*overrides)


# ------------------------------------------------------------------------------------------------------------ what was forgotten


CHANGES = {
    "kept": {"mean": 0.01, "low": -0.02, "high": 0.04, "n": 200},
    "noisy": {"mean": -0.04, "low": -0.12, "high": 0.04, "n": 20},
    "lost": {"mean": -0.3, "low": -0.36, "high": -0.24, "n": 200},
}


def test_the_gate_refuses_what_fell_and_by_interval_also_what_could_not_be_shown():
    by_point = refusals(CHANGES, ForgettingGate(max_fall=0.05, decided_by="point"))
    assert [reason.split()[0] for reason in by_point] == ["lost"]
    by_interval = refusals(CHANGES, ForgettingGate(max_fall=0.05))
    assert [reason.split()[0] for reason in by_interval] == ["noisy", "lost"]
    assert by_interval[0].endswith("its low end is below -0.050; more problems would give a narrower interval")
    assert refusals({"kept": CHANGES["kept"]}, ForgettingGate(max_fall=0.05)) == []


def test_the_table_names_every_suite_and_the_worst():
    at = {"mean": 0.9, "low": 0.85, "high": 0.94, "n": 200}
    table = forgetting_table({name: {"before": at, "after": at, "change": change} for name, change in CHANGES.items()})
    assert "| lost | 200 | 0.900 [0.850, 0.940] | 0.900 [0.850, 0.940] | -0.300 [-0.360, -0.240] |" in table
    assert table.splitlines()[-1].startswith("worst case: lost, -0.300 [-0.360, -0.240]")
