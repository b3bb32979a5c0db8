"""A tiny trainer's recipe, rollouts with rewards, and its gradient by the plainest loop."""

from pathlib import Path

import torch
from torch.testing import assert_close

from rlhf.config import load_config
from rlhf.kl import k3
from rlhf.logprobs import token_logprobs
from rlhf.metrics import Metrics
from rlhf.types import Score

RECIPE = Path(__file__).parents[2] / "recipes/tiny/grpo.yaml"
G = 3


SMALL_PPO = ("reference=null", "algorithm.kl_coefficient=0", "critic.warmup_batches=0")


def config(*overrides, recipe=RECIPE):
    return load_config(
        recipe,
        [
            "rollout.engine=transformers", "rollout.prompts_per_batch=4", f"rollout.samples_per_prompt={G}", "rollout.max_new_tokens=10",
            "rollout.max_prompt_tokens=100", "training.minibatches_per_batch=1", "training.tokens_per_micro_batch=400", "training.num_batches=4",
            "training.checkpoint_every=2", "optimizer.warmup_steps=0", "rewards=[{name: correctness}]", *overrides,
        ],
    )  # fmt: skip


def perturbed(model):
    torch.manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    return model


def fisher_of(model):
    """Drawn, for every weight."""
    torch.manual_seed(3)
    return {name: torch.rand(p.shape) for name, p in model.named_parameters()}


def count_of_a_token(rollouts):
    """Something a policy can learn at once: even tokens are good."""
    return [
        Score(
            verdict="wrong",
            value=sum(t % 2 == 0 for t in r.token_ids) / len(r.token_ids),
            components={"correctness": 0.0},
        )
        for r in rollouts
    ]


def sample(trainer):
    return trainer.sample(trainer.prompts[: trainer.config.rollout.prompts_per_batch], 0)


def experience(trainer, values=None):
    rollouts = sample(trainer)
    scores = count_of_a_token(rollouts)
    if values is not None:
        scores = [Score(verdict="undecided" if v is None else "wrong", value=v) for v in values]
    return trainer.judge(rollouts, scores, Metrics())


def expected_gradient(trainer, exp, *, aggregation="token", kl_coefficient=0.0, kl_weighted=False):
    """The same loss by a loop over unpadded sequences, one after the other."""
    model = trainer.unwrapped
    model.zero_grad()
    lengths = [len(r.token_ids) for r, trained in zip(exp.rollouts, exp.trained, strict=True) if trained]
    for rollout, advantage, trained in zip(exp.rollouts, exp.advantages, exp.trained, strict=True):
        if not trained:
            continue
        tokens, start_at = (
            torch.tensor([[*rollout.prompt.token_ids, *rollout.token_ids]]),
            len(rollout.prompt.token_ids) - 1,
        )
        targets = torch.tensor(rollout.token_ids)
        logp = token_logprobs(model(input_ids=tokens[:, :-1]).logits[0, start_at:], targets, temperature=1.0)
        per_token = -torch.exp(logp - logp.detach()) * advantage
        if kl_coefficient:
            with torch.no_grad():
                reference = token_logprobs(
                    trainer.updater.reference.scorer.model(input_ids=tokens[:, :-1]).logits[0, start_at:],
                    targets,
                    temperature=1.0,
                )
            weight = torch.exp(logp - logp.detach()) if kl_weighted else 1.0
            per_token = per_token + kl_coefficient * weight * k3(logp, reference)
        weight = 1 / sum(lengths) if aggregation == "token" else 1 / (len(rollout.token_ids) * len(lengths))
        (per_token.sum() * weight).backward()
    gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    return gradient


def assert_same(actual, expected, *, atol=2e-7):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_close(actual[name], expected[name], atol=atol, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def ppo(*overrides):
    return config(*SMALL_PPO, *overrides, recipe=RECIPE.with_name("ppo.yaml"))
