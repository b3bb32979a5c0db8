"""TRL's GRPOTrainer on the task of a GRPO recipe: the same prompts, rewards and hyperparameters, its own sampling and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning import Clock, is_spent
from data.chat import ChatRenderer
from data.records import Problem, read_records
from rlhf.config import GRPO
from rlhf.curriculum import prompt_stream
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.run import say
from rlhf.types import Rollout, Score


def trl_settings(config: GRPO, *, micro_batch: int) -> dict[str, Any]:
    """TRL's names for what a recipe says; `micro_batch` completions a forward pass.

    Raises:
        ValueError: for a recipe of another algorithm than the one that is translated.
    """
    a, t, r, o = config.algorithm, config.training, config.rollout, config.optimizer
    same = (a.advantage, a.loss, a.aggregation, a.kl_coefficient, a.entropy_coefficient, t.passes_per_batch)
    if same != ("group_relative", "clipped", "token", 0, 0, 1):
        raise ValueError(
            "only GRPO with a mean over tokens, one pass and neither KL nor entropy term is put in TRL's words"
        )
    completions = r.prompts_per_batch * r.samples_per_prompt
    per_step = completions // t.minibatches_per_batch
    if per_step % micro_batch:
        raise ValueError(
            f"micro_batch is {micro_batch}, which does not divide the {per_step} completions of an optimizer step"
        )
    return {
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": micro_batch,
        "gradient_accumulation_steps": per_step // micro_batch,
        "steps_per_generation": completions // micro_batch,
        "num_generations": r.samples_per_prompt,
        "max_completion_length": r.max_new_tokens,
        "temperature": r.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "loss_type": "dapo",  # its name for the mean over the tokens of an optimizer step
        "scale_rewards": "group" if a.scale_by_std else "none",
        "epsilon": a.clip_low,
        "epsilon_high": a.clip_high,
        "beta": 0.0,
        "num_iterations": 1,
        "mask_truncated_completions": a.truncated == "mask",
        "learning_rate": o.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": o.warmup_steps,
        "adam_beta1": o.beta1,
        "adam_beta2": o.beta2,
        "weight_decay": o.weight_decay,
        "max_grad_norm": o.max_grad_norm,
        "seed": config.seed,
        "shuffle_dataset": False,
    }


class TRLReward:
    """Our reward function with the signature TRL calls."""

    __name__ = "scratchpad"

    def __init__(self, prompts: Sequence[Any], renderer: ChatRenderer, score: Any) -> None:
        self.prompts, self.renderer, self.score = prompts, renderer, score

    def __call__(self, *, completion_ids: list[list[int]], index: list[int], **_: Any) -> list[float | None]:
        scores: list[Score] = self.score([self._rollout(i, ids) for i, ids in zip(index, completion_ids, strict=True)])
        return [score.value for score in scores]

    def _rollout(self, index: int, ids: list[int]) -> Rollout:
        return Rollout(
            prompt=self.prompts[index],
            token_ids=tuple(ids),
            logprobs=(0.0,) * len(ids),
            finish_reason="stop" if ids[-1] == self.renderer.stop_token_id else "length",
            text=self.renderer.decode(ids),
            policy_version=0,
        )


def train_with_trl(config: GRPO, folder: Path, *, budget: int, most_batches: int, micro_batch: int) -> Clock:
    """Train until `budget` sampled tokens are spent, and save the policy.

    Args:
        config: the recipe whose problems, policy, rewards and hyperparameters are used.
        folder: where the trained policy goes.
        budget: sampled completion tokens; the rollout batch that spends it is still trained on.
        most_batches: rollout batches after which it ends in any case.
        micro_batch: completions a forward pass.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from reward_models.composite import build_reward

    tokenizer = load_tokenizer(config.policy.path, revision=config.policy.revision)
    renderer = ChatRenderer(tokenizer, config.chat.system_prompt, config.chat.think)
    problems = read_records(Problem, config.problems)
    prompts = [renderer.problem_prompt(p) for p in problems]
    order = prompt_stream(len(prompts), 0, most_batches * config.rollout.prompts_per_batch, seed=config.seed)
    dataset = Dataset.from_list([{"prompt": renderer.messages(prompts[i].question), "index": i} for i in order])
    clock = Clock()
    score = clock.scoring(build_reward(config, prefill=renderer.prefill, device="cpu"))

    class Budget(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            clock.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            row = clock.batches[-1]
            whole_batch = state.global_step % config.training.minibatches_per_batch == 0
            if whole_batch:
                say(
                    f"batch {len(clock.batches):3}  correct {row['correctness']:.1%}  length {row['length']:.1f}  {row['cpu']:.0f} CPU s"
                )
            control.should_training_stop |= whole_batch and is_spent(budget, clock.batches)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            clock.stop(steps=state.global_step)

    trainer = GRPOTrainer(
        model=load_causal_lm(config.policy.path, revision=config.policy.revision, dtype="float32"),
        reward_funcs=TRLReward(prompts, renderer, score),
        args=GRPOConfig(
            output_dir=str(folder / "trainer"),
            max_steps=most_batches * config.training.minibatches_per_batch,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            **trl_settings(config, micro_batch=micro_batch),
        ),
        train_dataset=dataset,
        processing_class=tokenizer,
        callbacks=[Budget()],
    )
    seen = trainer._tokenize_prompts([dataset[0]["prompt"]])[0][0]
    if tuple(seen) != prompts[order[0]].token_ids:
        raise RuntimeError("TRL renders the prompt to other tokens than this project does")
    trainer.train()
    trainer.save_model(str(folder))
    tokenizer.save_pretrained(folder)
    return clock
