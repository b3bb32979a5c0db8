"""Rollout engines, and a whole GRPO step: sampling, scoring, training and the push of the weights.

The model is random but ends its completions: each token is the last with about the same chance, so lengths are geometric around the
case's mean and cut at its longest. With `equal` it does not, and every completion is as long as the mean: no sequence waits for a longer
one and none is padded, the worst case for us.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import CASES, EOS, FIRST_WORD, MODEL, PAD, TINY_MODEL, VOCABULARY, Group, make_groups
from benchmarks.measuring import machine
from benchmarks.sides import Spec, build, ours_config

LEARNING_RATE = 1e-12
"""So small that the model, and with it the lengths, stay as they are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSpec:
    """One process: an engine alone, or whole steps."""

    side: str
    """`ours` or `trl`: whole steps; `engine`: only its sampling."""
    folder: str
    engine: str = "auto"
    case: str = "gsm8k"
    scale: float = 1.0
    lengths: str = "geometric"
    """Of completions; or `equal`."""
    zero_share: float = 0.5
    """Of the groups, whose completions all earn the same."""
    steps: int = 2
    threads: int = 1
    micro_batch: int = 4
    """Sequences of a forward pass, for TRL."""


class Clock:
    """A mark between steps, set where both loops score a rollout batch."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float, int]] = []

    def mark(self, tokens: int) -> None:
        self.marks.append((time.perf_counter(), time.process_time(), tokens))

    def steps(self) -> list[dict[str, float]]:
        """From one scoring to the next: wall and processor seconds, and completion tokens, of which a half was trained on
        and a half sampled meanwhile. The first step, with its start-up, is left out.
        """
        pairs = zip(self.marks[1:], self.marks[2:], strict=False)
        return [{"wall": b[0] - a[0], "cpu": b[1] - a[1], "tokens": (a[2] + b[2]) / 2} for a, b in pairs]


def reward_of(group: Group, tokens: Sequence[int]) -> float:
    """Of groups with signal half of the completions earn 1, by their tokens; of the others all."""
    return float(sum(tokens) % 2) if group.has_signal else 1.0


@torch.no_grad()
def let_stop(model: Any, mean: int) -> None:
    """Change a random model so that a token is a completion's last with a chance of about 1 in `mean`.

    All embeddings get one component in common, which the final norm hands on to the tied head, and the stop token's gets more of
    it; how much is found by bisection.
    """
    assert model.config.tie_word_embeddings
    embeddings = model.get_input_embeddings().weight
    embeddings[:, 0] = 1.0
    tokens = torch.randint(FIRST_WORD, VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    hidden = model.model(input_ids=tokens).last_hidden_state[0]
    low, high = 0.0, 20.0
    for _ in range(30):
        embeddings[EOS, 0] = 1.0 + (low + high) / 2
        chance = (hidden @ embeddings.T).softmax(-1)[:, EOS].mean().item()
        low, high = ((low + high) / 2, high) if chance < 1 / mean else (low, (low + high) / 2)


def run_whole(spec: StepSpec) -> None:
    """Run, and write `outcome.json` into the folder."""
    torch.set_num_threads(spec.threads)
    path = Path(spec.folder) / "model"
    case = CASES[spec.case]
    model, tokenizer = build(Spec(side="ours", rollouts="", folder="", tiny=spec.scale < 0.5))
    if spec.lengths == "geometric":
        let_stop(model, max(4, round(case.completion * spec.scale)))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    groups = make_groups(case, zero_share=spec.zero_share, scale=spec.scale)
    longest = case.longest if spec.lengths == "geometric" else case.completion
    outcome = {"engine": _engine, "ours": _ours, "trl": _trl}[spec.side](
        spec, groups, path, max(8, round(longest * spec.scale)), model, tokenizer
    )
    (Path(spec.folder) / "outcome.json").write_text(json.dumps(outcome))


def _config(groups: Sequence[Any], spec: StepSpec, new_tokens: int, output: str) -> Any:
    config = ours_config(groups, tokens=2048, checkpointing=False)
    rollout = config.rollout.model_copy(
        update={"engine": spec.engine, "max_new_tokens": new_tokens, "dtype": "float32"}
    )
    training = config.training.model_copy(update={"num_batches": spec.steps + 2})
    optimizer = config.optimizer.model_copy(update={"learning_rate": LEARNING_RATE})
    return config.model_copy(
        update={"rollout": rollout, "training": training, "optimizer": optimizer, "output_dir": output}
    )


def _prompts(groups: Sequence[Any]) -> list[Any]:
    from rlhf.types import Prompt

    return [Prompt(id=str(i), token_ids=tuple(g.prompt), question="", reference="") for i, g in enumerate(groups)]


def _built_engine(config: Any, path: Path) -> Any:
    from rlhf.rollout.engine import build_engine

    return build_engine(config.rollout, str(path), stop_token_id=EOS, decode=lambda _: "")


def _engine(spec: StepSpec, groups: Sequence[Any], path: Path, new_tokens: int, *_: Any) -> dict[str, Any]:
    config = _config(groups, spec, new_tokens, spec.folder)
    engine, prompts, rows = _built_engine(config, path), _prompts(groups), []
    for seed in range(spec.steps + 1):
        wall, cpu = time.perf_counter(), time.process_time()
        rollouts = engine.generate(
            prompts,
            samples_per_prompt=config.rollout.samples_per_prompt,
            temperature=1.0,
            max_new_tokens=new_tokens,
            seed=seed,
        )
        tokens = sum(len(r.token_ids) for r in rollouts)
        rows.append({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "tokens": tokens})
    return {"engine": engine.name, "steps": rows[1:]}


def _ours(
    spec: StepSpec, groups: Sequence[Any], path: Path, new_tokens: int, model: Any, tokenizer: Any
) -> dict[str, Any]:
    from accelerate import Accelerator

    from rlhf.run import open_run
    from rlhf.trainers.online import OnlineTrainer
    from rlhf.types import Rollout, Score
    from rlhf.weight_sync import Probe

    config = _config(groups, spec, new_tokens, str(Path(spec.folder) / "run"))
    clock = Clock()

    def reward_fn(rollouts: Sequence[Rollout]) -> list[Score]:
        clock.mark(sum(len(r.token_ids) for r in rollouts))
        earned = [reward_of(groups[int(r.prompt.id)], r.token_ids) for r in rollouts]
        return [Score(verdict="correct" if e else "wrong", value=e, components={"correctness": e}) for e in earned]

    trainer = OnlineTrainer(
        config,
        Accelerator(cpu=True),
        policy=model,
        engine=_built_engine(config, path),
        prompts=_prompts(groups),
        reward_fn=reward_fn,
        probes=[Probe(tuple(g.prompt[:32]), tuple(g.completions[0][:16])) for g in groups[:4]],
        pad_token_id=PAD,
        run=open_run(config),
    )
    history = trainer.train()
    parts = {
        key.removeprefix("seconds/"): statistics.median(row[key] for row in history[1:])
        for key in history[-1]
        if key.startswith("seconds/")
    }
    return {"steps": clock.steps(), "parts": parts}


def _trl(
    spec: StepSpec, groups: Sequence[Any], path: Path, new_tokens: int, model: Any, tokenizer: Any
) -> dict[str, Any]:
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    clock, samples = Clock(), len(groups[0].completions)
    by_prompt = {" ".join(f"t{t}" for t in g.prompt): g for g in groups}

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        clock.mark(sum(map(len, completion_ids)))
        return [reward_of(by_prompt[p], tokens) for p, tokens in zip(prompts, completion_ids, strict=True)]

    sequences = len(groups) * samples
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(
            output_dir=str(Path(spec.folder) / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False,
            per_device_train_batch_size=spec.micro_batch, gradient_accumulation_steps=sequences // spec.micro_batch,
            num_generations=samples, max_completion_length=new_tokens, temperature=1.0, top_k=0, beta=0.0,
            learning_rate=LEARNING_RATE, lr_scheduler_type="constant", max_steps=spec.steps + 2, shuffle_dataset=False,
            report_to=[], save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": list(by_prompt)}),
        processing_class=tokenizer,
    )  # fmt: skip
    trainer.train()
    return {"steps": clock.steps()}


def _in_process(spec: StepSpec) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(asdict(replace(spec, folder=folder))))
        threads = str(spec.threads)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        command = [sys.executable, str(Path(__file__).parents[1] / "benchmark.py"), "side", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{spec.side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        return json.loads((Path(folder) / "outcome.json").read_text())


def _median(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def compare_engines(spec: StepSpec, engines: Sequence[str]) -> dict[str, Any]:
    """Sampled tokens per processor-second of each engine."""
    found = {}
    for name in engines:
        rows = _in_process(replace(spec, side="engine", engine=name))["steps"]
        found[name] = {
            "tokens_per_cpu_second": _median(rows, "tokens") / _median(rows, "cpu"),
            "tokens_per_second": _median(rows, "tokens") / _median(rows, "wall"),
        }
    return {"case": spec.case, "scale": spec.scale, "engines": found, "machine": machine()}


def per_token(steps: Sequence[dict[str, float]], key: str) -> float:
    """Seconds per thousand completion tokens."""
    return 1000 * sum(step[key] for step in steps) / sum(step["tokens"] for step in steps)


def compare_steps(spec: StepSpec, against: str) -> dict[str, Any]:
    """A whole step of ours with its parts, and of TRL's GRPOTrainer with its own generate.

    The two sample different completions of the same distribution: ratios are of seconds per completion token.
    """
    sides = {"ours": _in_process(replace(spec, side="ours"))}
    if against == "trl":
        sides["peer"] = _in_process(replace(spec, side="trl"))
    figures: dict[str, Any] = {
        "case": spec.case,
        "lengths": spec.lengths,
        "zero_share": spec.zero_share,
        "scale": spec.scale,
        "engine": spec.engine,
        "parts": sides["ours"]["parts"],
        "vocabulary": VOCABULARY,
        "hidden_size": (TINY_MODEL if spec.scale < 0.5 else MODEL).hidden_size,
    }
    for name, side in sides.items():
        figures[name] = {key: _median(side["steps"], key) for key in ("wall", "cpu", "tokens")}
    if against == "trl":
        for key in ("cpu", "wall"):
            figures[f"ratio_{key}"] = per_token(sides["peer"]["steps"], key) / per_token(sides["ours"]["steps"], key)
    return figures | {"machine": machine()}
