"""Loss and gradient of one batch, ours against TRL's GRPOTrainer, for each of its loss types that we have."""

import pytest
import torch
from torch.testing import assert_close

from rlhf.logprobs import token_logprobs
from rlhf.losses import cispo_loss, clipped_policy_loss, sapo_loss, sequence_ratio, token_ratio
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
}


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
    return model, prompts, completions, mask, old, torch.tensor([1.0, -0.5, 0.7, -1.2])


def theirs(batch, settings, model_folder, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model, prompts, completions, mask, old, advantages = batch
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
    trainer.current_gradient_accumulation_steps = 1
    inputs = {
        "prompt_ids": prompts,
        "prompt_mask": torch.ones_like(prompts),
        "completion_ids": completions,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old,
        "num_items_in_batch": mask.sum(),
    }
    trainer.model.train()
    return gradient_of(trainer.model, lambda m: trainer._compute_loss(m, inputs))


def ours(batch, settings, loss, level, aggregation):
    model, prompts, completions, mask, old, advantages = batch
    clip_high = settings.get("epsilon_high", 0.2)

    def compute(m):
        logits = m(input_ids=torch.cat([prompts, completions], 1)).logits[:, 5:-1]
        logprobs = token_logprobs(logits[mask], completions[mask], temperature=1.0)
        sequences = mask.nonzero()[:, 0]
        per_token_advantages = advantages[sequences]
        ratio = token_ratio(logprobs, old[mask]) if level == "token" else sequence_ratio(logprobs, old[mask], sequences)
        per_token = {
            "clipped": lambda: clipped_policy_loss(
                ratio, per_token_advantages, clip_low=0.2, clip_high=clip_high, ceiling=settings.get("delta")
            ),
            "cispo": lambda: cispo_loss(ratio, logprobs, per_token_advantages, max_ratio=clip_high),
            "sapo": lambda: sapo_loss(ratio, per_token_advantages, temperature_positive=1.0, temperature_negative=1.05),
        }[loss]()
        weights = token_weights(torch.tensor(LENGTHS), aggregation, max_length=MAX_LENGTH)
        return (per_token * weights[sequences]).sum()

    return gradient_of(model, compute)


def gradient_of(model, compute):
    model.zero_grad()
    loss = compute(model)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_trls(name, batch, model_folder, tmp_path):
    settings, loss, level, aggregation = CASES[name]
    our_loss, our_gradient = ours(batch, settings, loss, level, aggregation)
    their_loss, their_gradient = theirs(batch, settings, model_folder, tmp_path)
    assert our_loss == pytest.approx(their_loss, rel=1e-5, abs=1e-6)
    assert (our_gradient - their_gradient).norm() / their_gradient.norm() < 1e-5
    assert_close(our_gradient, their_gradient, rtol=1e-3, atol=1e-5)
