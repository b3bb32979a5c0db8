"""Trainers over the tiny model of tests/conftest.py."""

import pytest
import torch
from online_helpers import config, count_of_a_token, fisher_of, perturbed

import rlhf.learner as learner
from rlhf.config import PPO
from rlhf.critic import load_critic
from rlhf.distributed import start
from rlhf.lora import adapt
from rlhf.models import load_causal_lm
from rlhf.retention import NOTHING, Remembered
from rlhf.rollout.engine import build_engine
from rlhf.run import Run
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import Score
from rlhf.weight_sync import Probe


@pytest.fixture
def make_trainer(model_folder, renderer, demonstrations, tmp_path):
    def make(
        *overrides, folder="run", reward_fn=None, recipe=config, engine=None, model=model_folder, remembered=NOTHING
    ):
        cfg = recipe(*overrides)
        prompts = [renderer.prompt(d.id, d.question, d.answer) for d in demonstrations[:10]]
        engine = engine or build_engine(
            cfg.rollout,
            model,
            stop_token_id=renderer.stop_token_id,
            decode=renderer.decode,
            lora=cfg.policy.lora,
        )
        (tmp_path / folder).mkdir(exist_ok=True)
        policy = load_causal_lm(model, revision=None, dtype="float32")
        if cfg.policy.lora:
            torch.manual_seed(0)
            adapt(policy, cfg.policy)
        return OnlineTrainer(
            cfg,
            start(cfg.seed),
            policy=policy,
            reference=perturbed(load_causal_lm(model_folder, revision=None, dtype="float32"))
            if cfg.reference and cfg.reference.kind == "frozen"
            else None,
            critic=load_critic(cfg.critic.model_copy(update={"path": model_folder})) if isinstance(cfg, PPO) else None,
            engine=engine,
            prompts=prompts,
            reward_fn=reward_fn or count_of_a_token,
            probes=[Probe(p.token_ids, tuple(renderer.response_ids("1 + 2"))) for p in prompts[:2]],
            pad_token_id=renderer.tokenizer.pad_token_id,
            run=Run(tmp_path / folder),
            remembered=remembered,
        )

    return make


@pytest.fixture
def captured(monkeypatch):
    """Gradients at every optimizer step, which is not taken."""
    steps = []

    def capture(accelerator, model, optimizer, scheduler, max_grad_norm):
        steps.append(
            {n.removeprefix("model."): p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
        optimizer.zero_grad()
        return 1.0

    monkeypatch.setattr(learner, "clip_and_step", capture)
    return steps


@pytest.fixture
def remembered(model_folder, renderer, demonstrations):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    prompts = [renderer.prompt(d.id, d.question, d.answer) for d in demonstrations[20:24]]

    def grade(rollouts):
        """As good as half of its tokens are even."""
        return [
            Score(
                verdict="correct" if sum(t % 2 == 0 for t in r.token_ids) > len(r.token_ids) / 2 else "wrong", value=0.0
            )
            for r in rollouts
        ]

    return Remembered(
        fisher=fisher_of(model), demonstrations=[renderer.demonstrated(d) for d in demonstrations[:7]], prompts=prompts, grade=grade
    )  # fmt: skip
