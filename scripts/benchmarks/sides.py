"""One side of the comparison in a process of its own: TRL's GRPOTrainer, this project's Updater, or plain sequences as reference."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.cases import EOS, MODEL, PAD, TINY_MODEL, VOCABULARY, Group, read_groups, write_groups
from benchmarks.gates import Entry, Record, key_of, ledger_hash, snapshot
from benchmarks.measuring import Sample, matrix_throughput, measured

LEARNING_RATE = 1e-3
NO_CLIPPING = 1e9
"""Largest gradient norm: both sides measure it, neither is clipped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a process does; it writes `outcome.json` and, when recording, `record.pt` into `folder`."""

    side: str
    """`ours`, `packed` (ours, every prompt computed for each sample and nothing skipped), `trl`, `reference`, or `sampler`, which
    writes into the rollouts how likely their tokens are."""
    rollouts: str
    folder: str
    dtype: str = "fp32"
    threads: int = 1
    steps: int = 1
    """Timed."""
    warmup: str = "full"
    """What the discarded first step computes: `full`, or `short`: prompts and completions cut to an eighth."""
    record: bool = False
    """One step from the initial weights is recorded instead of timed."""
    tiny: bool = False
    checkpointing: bool = False
    micro_batch: int = 8
    """Sequences of a forward pass, for TRL."""
    tokens: int = 8192
    """Of a micro-batch, for us."""


@dataclass(slots=True)
class Outcome:
    samples: list[Sample] = field(default_factory=list)
    limit: float = 0.0
    """Floating point operations per processor-second in matrix products of the model's shapes."""


def run_side(spec: Spec) -> None:
    """Run, and write what came out."""
    torch.set_num_threads(spec.threads)
    groups = read_groups(Path(spec.rollouts))
    if spec.side == "sampler":
        write_groups(add_logprobs(groups, spec), Path(spec.rollouts))
        return
    record, outcome = Record(), Outcome()
    {"ours": run_ours, "packed": run_ours, "trl": run_trl, "reference": run_reference}[spec.side](
        spec, groups, record, outcome
    )
    if spec.record:
        torch.save(asdict(record), Path(spec.folder) / "record.pt")
    if spec.side == "ours" and not spec.record:
        dtype = torch.bfloat16 if spec.dtype == "bf16" else torch.float32
        outcome.limit = matrix_throughput(TINY_MODEL if spec.tiny else MODEL, VOCABULARY, dtype, rows=2048)
    (Path(spec.folder) / "outcome.json").write_text(json.dumps(asdict(outcome)))


def build(spec: Spec) -> tuple[Any, Any]:
    """The model, the same on all sides, and a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from rlhf.models import build_qwen3

    unknown = "t3"
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(VOCABULARY)}, unk_token=unknown))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token=unknown
    )
    return build_qwen3(TINY_MODEL if spec.tiny else MODEL, tokenizer, seed=0), tokenizer


def shortened(groups: Sequence[Group]) -> list[Group]:
    return [
        replace(
            g,
            prompt=g.prompt[: max(4, len(g.prompt) // 8)],
            completions=[c[: max(4, len(c) // 8)] for c in g.completions],
            logprobs=[p[: max(4, len(p) // 8)] for p in g.logprobs],
        )
        for g in groups
    ]


def stages(spec: Spec, groups: Sequence[Group]) -> list[tuple[Sequence[Group], bool]]:
    """The rollouts of each optimizer step, and whether it is timed."""
    if spec.record:
        return [(groups, False)]
    first = shortened(groups) if spec.warmup == "short" else groups
    return [(first, False), *[(groups, True)] * spec.steps]


@contextmanager
def recorded(model: torch.nn.Module, record: Record) -> Iterator[None]:
    """Gradients just before the optimizer's step, and what the step changed."""
    before = snapshot(model)
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: record.gradients.update(snapshot(model, "grad")))
    yield
    hook.remove()
    record.deltas = {name: p - before[name] for name, p in snapshot(model).items()}


# ------------------------------------------------------------------------------------------------------------------------- ours


def ours_config(groups: Sequence[Group], *, tokens: int, checkpointing: bool) -> Any:
    """A recipe of the product: GRPO with DAPO's aggregation, as TRL's default loss."""
    from rlhf.config import GRPO

    longest = max(len(c) for g in groups for c in g.completions)
    prompt = max(len(g.prompt) for g in groups)
    return GRPO.model_validate(
        {
            "stage": "grpo",
            "output_dir": "unused",
            "policy": {"path": "unused", "gradient_checkpointing": checkpointing},
            "problems": "unused",
            "demonstrations": "unused",
            "rollout": {
                "prompts_per_batch": len(groups),
                "samples_per_prompt": len(groups[0].completions),
                "max_prompt_tokens": prompt,
                "max_new_tokens": longest,
            },
            "rewards": [{"name": "correctness", "weight": 1.0}],
            "algorithm": {"truncated": "grade"},
            "training": {"num_batches": 1000, "tokens_per_micro_batch": max(tokens, prompt + longest)},
            "optimizer": {"learning_rate": LEARNING_RATE, "max_grad_norm": NO_CLIPPING},
            "guards": {"max_kl_sampler": 1e9},
        }
    )


def experience_of(groups: Sequence[Group], config: Any) -> Any:
    """The groups as the loop would hand them to its update."""
    from rlhf.experience import estimate
    from rlhf.types import Prompt, Rollout, Score

    rollouts, scores = [], []
    for number, group in enumerate(groups):
        prompt = Prompt(id=str(number), token_ids=tuple(group.prompt), question="", reference="")
        for tokens, reward, logprobs in zip(group.completions, group.rewards, group.logprobs, strict=True):
            rollouts.append(
                Rollout(
                    prompt=prompt,
                    token_ids=tuple(tokens),
                    logprobs=tuple(logprobs),
                    finish_reason="stop" if tokens[-1] == EOS else "length",
                    text="",
                    policy_version=0,
                )
            )
            scores.append(Score(verdict="correct" if reward else "wrong", value=reward))
    return estimate(rollouts, scores, config)


def run_ours(spec: Spec, groups: Sequence[Group], record: Record, outcome: Outcome) -> None:
    """This project's Updater with a GRPO recipe; as `packed` with every sample a group of its own and no group skipped."""
    from accelerate import Accelerator

    from rlhf import packing
    from rlhf.metrics import Metrics
    from rlhf.updater import Updater

    model, _ = build(spec)
    config = ours_config(groups, tokens=spec.tokens, checkpointing=spec.checkpointing)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if spec.dtype == "bf16" else "no")
    updater = Updater(config, accelerator, policy=model, pad_token_id=PAD)
    assert updater.shares_prompts

    def experience(some: Sequence[Group]) -> Any:
        made = experience_of(some, config)
        if spec.side == "packed":  # a group without signal is computed when its advantage is not quite 0
            made = replace(made, advantages=tuple(torch.where(a == 0, 1e-30, a) for a in made.advantages))
        return made

    if spec.side == "packed":
        packing.by_prompt = lambda rollouts, rows: [[i] for i in rows]
    entries: dict[int, Entry] = {}
    if spec.record:
        made = experience(groups)
        updater._policy_loss = _watched(updater._policy_loss, made, entries, record)
        with recorded(updater.unwrapped, record):
            updater.update(made, Metrics())
        denominator = next(iter(entries.values())).denominator
        for i, rollout in enumerate(made.rollouts):  # what was skipped counts in the denominator with advantage 0
            advantage = made.advantages[i][0].item()
            skipped = Entry(rollout.prompt.token_ids, rollout.token_ids, advantage, len(rollout.token_ids), denominator)
            entries.setdefault(i, skipped)
        record.ledger = ledger_hash(list(entries.values()))
        return
    for some, timed in stages(spec, groups):
        made = experience(some)
        with measured() as sample:
            updater.update(made, Metrics())
        if timed:
            outcome.samples.append(sample)


def _watched(loss: Callable[..., Any], made: Any, entries: dict[int, Entry], record: Record) -> Callable[..., Any]:
    """The updater's loss of a micro-batch, with a note of what it was computed from."""

    def watch(micro: Any, logprobs: torch.Tensor, *rest: Any) -> Any:
        for place, i in enumerate(micro.batch.rows):
            own = micro.batch.sequences == place
            tokens = tuple(micro.batch.targets[own].tolist())
            prompt = made.rollouts[i].prompt.token_ids
            denominator = round(1 / micro.weights[own][0].item())
            entries[i] = Entry(prompt, tokens, micro.advantages[own][0].item(), len(tokens), denominator)
            record.logprobs[key_of(prompt, tokens)] = logprobs.detach()[own].float().clone()
        return loss(micro, logprobs, *rest)

    return watch


# -------------------------------------------------------------------------------------------------------------------------- TRL


def run_trl(spec: Spec, groups: Sequence[Group], record: Record, outcome: Outcome) -> None:
    """GRPOTrainer, fed through its public `rollout_func`; its public callbacks mark the optimizer steps."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    samples, steps = len(groups[0].completions), stages(spec, groups)
    model, tokenizer = build(spec)
    names = [f"t{100 + g}" for g in range(len(groups))]
    calls = {"rollout": 0}

    def rollout_func(prompts: list[str], trainer: Any) -> dict[str, Any]:
        current = steps[min(calls["rollout"], len(steps) - 1)][0]
        calls["rollout"] += 1
        chosen = [(current[names.index(p)], prompts[:i].count(p)) for i, p in enumerate(prompts)]
        return {
            "prompt_ids": [g.prompt for g, _ in chosen],
            "completion_ids": [g.completions[s] for g, s in chosen],
            "logprobs": [g.logprobs[s] for g, s in chosen],
        }

    def reward(prompts: list[str], **_: Any) -> list[float | None]:
        return [groups[names.index(p)].rewards[prompts[:i].count(p)] for i, p in enumerate(prompts)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.context = measured()
            self.sample = self.context.__enter__()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.context.__exit__(None, None, None)
            if steps[state.global_step - 1][1]:
                outcome.samples.append(self.sample)

    sequences = len(groups) * samples
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=spec.dtype == "bf16", gradient_checkpointing=spec.checkpointing,
                per_device_train_batch_size=spec.micro_batch, gradient_accumulation_steps=sequences // spec.micro_batch,
                num_generations=samples, max_completion_length=8192, temperature=1.0, beta=0.0, loss_type="dapo", epsilon=0.2,
                learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_grad_norm=NO_CLIPPING, max_steps=len(steps),
                shuffle_dataset=False, logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": names}),
            processing_class=tokenizer,
            rollout_func=rollout_func,
            callbacks=[Clock()],
        )  # fmt: skip
        if not spec.record:
            trainer.train()
            return
        entries = _watch_trl(trainer, record)
        with recorded(model, record):
            trainer.train()
        record.ledger = ledger_hash(entries)


def _watch_trl(trainer: Any, record: Record) -> list[Entry]:
    """Notes what TRL's loss is computed from; changes nothing."""
    entries: list[Entry] = []
    loss, logprobs_of = trainer._compute_loss, trainer._get_per_token_logps_and_entropies
    current: list[Any] = []

    def watch_loss(model: Any, inputs: Any) -> Any:
        current[:] = [
            (p[pm.bool()].tolist(), c[cm.bool()].tolist())
            for p, pm, c, cm in zip(
                inputs["prompt_ids"],
                inputs["prompt_mask"],
                inputs["completion_ids"],
                inputs["completion_mask"],
                strict=True,
            )
        ]
        for (p, c), advantage in zip(current, inputs["advantages"].tolist(), strict=True):
            entries.append(Entry(tuple(p), tuple(c), advantage, len(c), int(inputs["num_items_in_batch"])))
        return loss(model, inputs)

    def watch_logprobs(*arguments: Any, **keywords: Any) -> Any:
        result = logprobs_of(*arguments, **keywords)
        for (p, c), row in zip(current, result[0].detach().float(), strict=True):
            record.logprobs[key_of(p, c)] = row[: len(c)].clone()
        return result

    trainer._compute_loss, trainer._get_per_token_logps_and_entropies = watch_loss, watch_logprobs
    return entries


# -------------------------------------------------------------------------------------------------------------------- reference


def run_reference(spec: Spec, groups: Sequence[Group], record: Record, outcome: Outcome) -> None:
    """Float32 gradients of single sequences through transformers, without packing, padding or chunks: the ratio is 1 on policy."""
    model, _ = build(spec)
    denominator = sum(len(c) for g in groups for c in g.completions)
    for group in groups:
        rewards = torch.tensor(group.rewards)
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        for completion, advantage in zip(group.completions, advantages.tolist(), strict=True):
            if not group.has_signal:
                continue
            tokens = torch.tensor([group.prompt + completion])
            logits = model(input_ids=tokens[:, :-1]).logits[0, len(group.prompt) - 1 :]
            logprobs = torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion).unsqueeze(1))
            (-advantage / denominator * logprobs.sum()).backward()
    record.gradients = snapshot(model, "grad")


def add_logprobs(groups: Sequence[Group], spec: Spec) -> list[Group]:
    """The groups with the log-probabilities that the model, as a sampler in float32, would report."""
    from rlhf.packing import pack_shared
    from rlhf.scorer import Scorer

    model, _ = build(spec)
    scorer = Scorer(model.eval(), share_prompts=True)
    done = []
    for group in groups:
        empty = replace(group, logprobs=[[0.0] * len(c) for c in group.completions])
        rollouts = experience_of([empty], ours_config([empty], tokens=1, checkpointing=False)).rollouts
        rows = range(len(rollouts))
        with torch.no_grad():
            batch = pack_shared(rollouts, rows, torch.ones(len(rollouts), dtype=torch.bool))
            logprobs = scorer(batch, 1.0)[0].split([len(rollouts[i].token_ids) for i in batch.kept])
        by_row = dict(zip(batch.kept, logprobs, strict=True))
        done.append(replace(group, logprobs=[by_row[i].tolist() for i in rows]))
    return done
