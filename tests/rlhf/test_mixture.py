"""A mixture of experts in the loop: the loss that balances its experts, and the sampler's experts compared and replayed."""

import dataclasses

import pytest
import torch
from online_helpers import G, assert_same, expected_gradient, experience
from torch.testing import assert_close

from rlhf.metrics import Metrics
from rlhf.rollout_buffer import RolloutBuffer, from_files, to_files

COEFFICIENT = 0.3


@pytest.fixture
def make_mixture(make_trainer, mixture_folder):
    def make(*overrides, **kwargs):
        return make_trainer(*overrides, model=mixture_folder, **kwargs)

    return make


def balance_gradient(trainer, exp):
    """coefficient x mean over layers of 8 sum_e f_e P_e, over the trained tokens, by a loop over unpadded sequences."""
    model = trainer.unwrapped
    model.zero_grad()
    model.set_attn_implementation("sdpa")
    logits = []
    for rollout, trained in zip(exp.rollouts, exp.trained, strict=True):
        if trained:
            tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]])
            output = model(input_ids=tokens[:, :-1], output_router_logits=True)
            logits.append(torch.stack([layer[len(rollout.prompt.token_ids) - 1 :] for layer in output.router_logits]))
    logits = torch.cat(logits, 1)
    probability = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(logits.topk(2).indices, 8).sum(2).float()
    loss = 8 * (chosen.mean(1) * probability.mean(1)).sum(1).mean()
    (COEFFICIENT * loss).backward()
    gradient = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.set_attn_implementation("shared_prefix" if trainer.updater.shares_prompts else "sdpa")
    return loss.item(), gradient


@pytest.mark.parametrize("layout", ["shared", "padded"])
@pytest.mark.parametrize("budget", [150, 10_000])
def test_the_balance_loss_is_that_of_the_whole_step_however_it_is_cut(make_mixture, captured, layout, budget):
    trainer = make_mixture(
        f"policy.router_aux_coefficient={COEFFICIENT}", f"training.layout={layout}", f"training.tokens_per_micro_batch={budget}"
    )  # fmt: skip
    exp, metrics = experience(trainer), Metrics()
    trainer.updater.update(exp, metrics)
    loss, gradient = balance_gradient(trainer, exp)
    policy = expected_gradient(trainer, exp)
    assert max(g.abs().max() for g in gradient.values()) > 1e-3
    assert_same(captured[0], {name: policy[name] + gradient[name] for name in policy}, atol=1e-6)
    total, count = metrics.pairs()["moe/balance_loss"]
    assert total / count == pytest.approx(loss, rel=1e-5)


def test_sequences_without_advantage_count_in_the_balance_of_the_experts(make_mixture, captured):
    trainer = make_mixture(f"policy.router_aux_coefficient={COEFFICIENT}", "training.tokens_per_micro_batch=150")
    exp = experience(trainer, [1.0] * 4 * G)
    trainer.updater.update(exp, Metrics())
    assert_same(captured[0], balance_gradient(trainer, exp)[1], atol=1e-6)


def test_without_a_coefficient_the_gradient_is_the_policys_alone_and_the_load_is_reported(make_mixture, captured):
    trainer, metrics = make_mixture("training.tokens_per_micro_batch=150"), Metrics()
    exp = experience(trainer)
    trainer.updater.update(exp, metrics)
    assert_same(captured[0], expected_gradient(trainer, exp), atol=1e-6)
    means = {key: total / count for key, (total, count) in metrics.pairs().items()}
    assert 1 < means["moe/load"] <= 4
    assert 0 < means["moe/router_entropy"] < 2.08
    assert not means.keys() & {"moe/balance_loss", "moe/disagreement", "moe/replaced"}


def with_experts(trainer, exp, *, wrong=0):
    """The experience with the experts that the trainer's own routers choose, in the first `wrong` rollouts others."""
    rollouts = []
    for i, rollout in enumerate(exp.rollouts):
        tokens = torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids[:-1]]])
        trainer.unwrapped.set_attn_implementation("sdpa")
        routers = trainer.updater.policy.unwrapped.routers
        with torch.no_grad(), routers.listening() as routing:
            trainer.unwrapped(input_ids=tokens)
        experts = torch.stack(routing.own, 1)
        experts = (experts + 1) % 8 if i < wrong else experts  # another set of two, always
        rollouts.append(dataclasses.replace(rollout, routed_experts=experts.to(torch.uint8)))
    trainer.unwrapped.set_attn_implementation("shared_prefix")
    return dataclasses.replace(exp, rollouts=rollouts)


def test_the_share_of_tokens_whose_experts_differ_is_reported_and_stops_the_run_above_its_bound(make_mixture, captured):
    trainer, metrics = make_mixture("guards.max_router_disagreement=1"), Metrics()
    exp = with_experts(trainer, experience(trainer, [0.0, 1.0, 0.0] * 4), wrong=1)
    trainer.updater.update(exp, metrics)
    lengths = [len(r.token_ids) for r in exp.rollouts]
    total, count = metrics.pairs()["moe/disagreement"]
    assert count == 2 * sum(lengths)
    # a group's prompt is computed once, with the experts of its first sample: its last position predicts every sample's first token
    assert total == 2 * (lengths[0] + G - 1)
    strict = make_mixture("guards.max_router_disagreement=0.01", folder="strict")
    with pytest.raises(RuntimeError, match="moe/disagreement is 0.*max_router_disagreement 0.01"):
        strict.updater.update(exp, Metrics())
    assert len(captured) == 1


def test_later_minibatches_are_guarded_before_any_step_is_taken(make_mixture, captured):
    trainer = make_mixture("training.minibatches_per_batch=2", "guards.max_router_disagreement=0.01")
    exp = with_experts(trainer, experience(trainer, [0.0, 1.0, 0.0] * 4))
    last = dataclasses.replace(exp.rollouts[-1], routed_experts=(exp.rollouts[-1].routed_experts + 1) % 8)
    with pytest.raises(RuntimeError, match="moe/disagreement"):
        trainer.updater.update(dataclasses.replace(exp, rollouts=[*exp.rollouts[:-1], last]), Metrics())
    assert captured == []


def test_a_moving_average_that_is_the_policy_disagrees_with_a_policy_whose_experts_are_replayed(make_mixture, captured):
    """The reference keeps its own experts: with the sampler's own the KL is 0, with others it is not."""
    kl = []
    for wrong in (0, 3):
        trainer = make_mixture_without_engine(
            make_mixture, "reference={kind: moving_average}", "algorithm.kl_coefficient=0.1", folder=f"{wrong}"
        )
        metrics = Metrics()
        trainer.updater.update(with_experts(trainer, experience(trainer, [0.0, 1.0, 0.0] * 4), wrong=wrong), metrics)
        kl.append(metrics.pairs()["policy/kl_reference"][0])
    assert abs(kl[0]) < 1e-6
    assert kl[1] > 1e-4


def test_replay_takes_the_disagreement_away_and_its_own_experts_change_no_gradient(make_mixture, captured):
    replay = ("policy.router_replay=true", "rollout.record_experts=true")
    free = make_mixture("training.tokens_per_micro_batch=150", f"policy.router_aux_coefficient={COEFFICIENT}")
    exp = experience(free)
    free.updater.update(exp, Metrics())
    for budget, wrong in ((150, 0), (150, 3), (10_000, 3)):
        trainer = make_mixture_without_engine(
            make_mixture,
            f"training.tokens_per_micro_batch={budget}",
            f"policy.router_aux_coefficient={COEFFICIENT}",
            *replay,
            folder=f"{budget}-{wrong}",
        )
        metrics = Metrics()
        trainer.updater.update(with_experts(trainer, exp, wrong=wrong), metrics)
        assert metrics.pairs()["moe/disagreement"][0] == 0
        assert (metrics.pairs()["moe/replaced"][0] > 0) == (wrong > 0)
    assert_same(captured[1], captured[0], atol=1e-6)
    assert_same(captured[3], captured[2], atol=1e-6)
    assert any((captured[2][name] - captured[1][name]).abs().max() > 1e-4 for name in captured[1])


def make_mixture_without_engine(make_mixture, *overrides, folder):
    """With router_replay the recipe asks the engine for its experts, which the one of these tests does not say; here they are made up."""
    without = [o for o in overrides if "record_experts" not in o and "router_replay" not in o]
    trainer = make_mixture(*without, folder=folder)
    policy = trainer.config.policy.model_copy(update={"router_replay": True})
    trainer.updater.config = trainer.config.model_copy(update={"policy": policy})
    trainer.updater.policy.unwrapped.replay_experts = True
    return trainer


def test_replay_without_the_samplers_experts_is_an_error(make_mixture):
    trainer = make_mixture_without_engine(make_mixture, folder="run")
    with pytest.raises(RuntimeError, match="12 of 12 rollouts do not say which experts the engine used"):
        trainer.updater.update(experience(trainer), Metrics())


def test_an_engine_that_cannot_record_experts_is_refused(make_mixture):
    with pytest.raises(ValueError, match="the transformers engine does not say which experts it used"):
        make_mixture("rollout.record_experts=true")


def test_a_balance_coefficient_for_a_dense_model_is_refused(make_trainer):
    with pytest.raises(ValueError, match="policy.router_aux_coefficient is set and a qwen3 model has no router"):
        make_trainer("policy.router_aux_coefficient=0.1")


def test_experts_survive_a_checkpoint(make_mixture):
    trainer = make_mixture()
    exp = with_experts(trainer, experience(trainer))
    again = from_files(*to_files(RolloutBuffer(exp, Metrics()))).experience
    for rollout, other in zip(exp.rollouts, again.rollouts, strict=True):
        assert rollout == other
        assert rollout.routed_experts.dtype == other.routed_experts.dtype == torch.uint8
        assert_close(other.routed_experts, rollout.routed_experts)
