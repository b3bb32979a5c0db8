"""Loss and gradient of one batch, ours against TRL's GRPOTrainer, for every loss type it has, its KL term, entropy mask and bonus."""

import re

import pytest
import torch
from torch.testing import assert_close

from rlhf.kl import k3, off_policy
from rlhf.logprobs import token_entropy, token_logprobs
from rlhf.losses import (
    cispo_loss,
    clipped_policy_loss,
    high_entropy_mask,
    high_entropy_threshold,
    sapo_loss,
    sequence_ratio,
    token_ratio,
    vespo_loss,
)
from rlhf.masking import token_weights
from rlhf.models import load_causal_lm, load_tokenizer

MAX_LENGTH = 9
LENGTHS = (5, 9, 2, 7)

# name: (TRL's settings, our loss of (ratio, logprobs, advantages), kind of ratio, aggregation)
CASES = {
    "grpo": ({"loss_type": "grpo"}, "clipped", "token", "sequence"),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, "clipped", "token", "token"),
    "bnpo": ({"loss_type": "bnpo"}, "clipped", "token", "token"),
    "dr_grpo": ({"loss_type": "dr_grpo"}, "clipped", "token", "constant"),
    "two-sided": ({"loss_type": "dapo", "delta": 1.5}, "clipped", "token", "token"),
    "gspo": ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "clipped", "sequence", "sequence"),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.2}, "cispo", "token", "token"),
    "sapo": ({"loss_type": "sapo"}, "sapo", "token", "sequence"),
    "luspo": (
        {"loss_type": "luspo", "importance_sampling_level": "sequence"}, "clipped", "sequence", "sequence_sum",
    ),
    "vespo": ({"loss_type": "vespo"}, "vespo", "token", "token"),
    "vespo, other powers": (
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_k_neg": 0.5, "vespo_lambda_neg": 1.5},
        "vespo", "token", "token",
    ),
    "vespo, sampler corrected": ({"loss_type": "vespo", "corrected": True}, "vespo", "token", "token"),
    "kl": ({"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": False}, "clipped", "token", "token"),
    "kl, weighted": ({"loss_type": "dapo", "beta": 0.3}, "clipped", "token", "token"),
    "kl, weighted by sequence": (
        {"loss_type": "grpo", "beta": 0.3, "importance_sampling_level": "sequence"}, "clipped", "sequence", "sequence",
    ),
    "kl of cispo": ({"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.3}, "cispo", "token", "token"),
    "high entropy": ({"loss_type": "dapo", "top_entropy_quantile": 0.3}, "clipped", "token", "token"),
    "entropy bonus": ({"loss_type": "grpo", "entropy_coef": 0.2}, "clipped", "token", "sequence"),
    "everything": (
        {"loss_type": "dr_grpo", "beta": 0.3, "top_entropy_quantile": 0.5, "entropy_coef": 0.2, "delta": 1.5},
        "clipped", "token", "constant",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def batch(model_folder):
    model = load_causal_lm(model_folder, revision=None, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    size = model.config.vocab_size
    prompts = torch.randint(5, size, (4, 6), generator=generator)
    completions = torch.randint(5, size, (4, MAX_LENGTH), generator=generator)
    mask = torch.arange(MAX_LENGTH) < torch.tensor(LENGTHS).unsqueeze(1)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompts, completions], 1)).logits[:, 5:-1]
    # an old policy that is some way off, so that every clip acts somewhere
    old = token_logprobs(logits, completions, temperature=1.0) + 0.4 * torch.randn(4, MAX_LENGTH, generator=generator)
    reference = old + 0.5 * torch.randn(4, MAX_LENGTH, generator=generator)
    correction = (0.5 * torch.randn(4, MAX_LENGTH, generator=generator)).exp().clamp(max=2.0)
    correction = torch.where(mask, correction, 1.0)
    return model, prompts, completions, mask, old, torch.tensor([1.0, -0.5, 0.7, -1.2]), reference, correction


def theirs(batch, settings, model_folder, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, prompts, completions, mask, old, advantages, reference, correction = batch
    settings = dict(settings)
    beta, corrected = settings.pop("beta", 0.0), settings.pop("corrected", False)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=4, num_generations=4, max_completion_length=MAX_LENGTH,
            beta=0.0, temperature=1.0, gradient_checkpointing=False, report_to=[], **settings,
        ),
        train_dataset=Dataset.from_list([{"prompt": "x"}] * 4),
        processing_class=load_tokenizer(model_folder, revision=None),
    )  # fmt: skip
    trainer.beta = beta  # set here, it needs no model to compute the reference's log-probabilities
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    if corrected:
        inputs["importance_sampling_ratio"] = correction
    trainer.model.train()
    return gradient_of(trainer.model, lambda m: trainer._compute_loss(m, inputs))


def ours(batch, settings, loss, level, aggregation):
    model, prompts, completions, mask, old, advantages, reference, correction = batch
    clip_high = settings.get("epsilon_high", 0.2)
    old, reference, sequences = old[mask], reference[mask], mask.nonzero()[:, 0]
    per_token_advantages = advantages[sequences]

    def compute(m):
        logits = m(input_ids=torch.cat([prompts, completions], 1)).logits[:, 5:-1][mask]
        logprobs = token_logprobs(logits, completions[mask], temperature=1.0)
        entropy = token_entropy(logits, temperature=1.0)
        ratio = token_ratio(logprobs, old) if level == "token" else sequence_ratio(logprobs, old, sequences)
        behaviour = old - correction[mask].log() if settings.get("corrected") else old
        per_token = {
            "clipped": lambda: clipped_policy_loss(
                ratio, per_token_advantages, clip_low=0.2, clip_high=clip_high, ceiling=settings.get("delta")
            ),
            "cispo": lambda: cispo_loss(ratio, logprobs, per_token_advantages, max_ratio=clip_high),
            "sapo": lambda: sapo_loss(ratio, per_token_advantages, temperature_positive=1.0, temperature_negative=1.05),
            "vespo": lambda: vespo_loss(
                logprobs,
                behaviour,
                per_token_advantages,
                sequences,
                power_positive=settings.get("vespo_k_pos", 2.0),
                decay_positive=settings.get("vespo_lambda_pos", 3.0),
                power_negative=settings.get("vespo_k_neg", 3.0),
                decay_negative=settings.get("vespo_lambda_neg", 2.0),
            ),
        }[loss]()
        active = high_entropy_mask(entropy, high_entropy_threshold(entropy, settings.get("top_entropy_quantile", 1.0)))
        per_token = torch.where(active, per_token, 0.0)
        kl = k3(logprobs, reference)
        if settings.get("use_bias_correction_kl", True):
            kl = off_policy(kl, ratio)
        per_token = per_token + settings.get("beta", 0.0) * kl
        weights = token_weights(torch.tensor(LENGTHS), aggregation, max_length=MAX_LENGTH)
        # TRL's bonus is a mean over the active tokens, whatever the policy loss is divided by.
        return (per_token * weights[sequences]).sum() - settings.get("entropy_coef", 0.0) * entropy[active].mean()

    return gradient_of(model, compute)


def gradient_of(model, compute):
    model.zero_grad()
    loss = compute(model)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_every_loss_type_of_trl_is_compared():
    from trl import GRPOConfig

    documented = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    types = re.findall(r"'(\w+)'(?: \(default\))?:", documented)
    assert len(types) == 8
    assert {settings["loss_type"] for settings, *_ in CASES.values()} == set(types)


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name, batch, model_folder, tmp_path):
    settings, loss, level, aggregation = CASES[name]
    our_loss, our_gradient = ours(batch, settings, loss, level, aggregation)
    their_loss, their_gradient = theirs(batch, settings, model_folder, tmp_path)
    assert our_loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5
    assert_close(our_gradient, their_gradient, rtol=1e-3, atol=1e-5)
