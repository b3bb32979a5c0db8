"""Evidence for docs/benchmarks/curriculum.md: what the choice of problems does to the tokens that GRPO samples until it is good.

python scripts/benchmark_curriculum.py prepare
python scripts/benchmark_curriculum.py run --arms uniform signal refill --seeds 0 1 2
python scripts/benchmark_curriculum.py run --arms signal --label sharp --change curriculum.sharpness=4
python scripts/benchmark_curriculum.py report --picture docs/benchmarks/curriculum.png

`prepare` teaches the demo's SFT policy the mixture of scripts/benchmarks/mixture.py. A finished run is not repeated.
"""

import os
import shutil
import statistics
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
import train_grpo
from benchmarks.commands import run_and_report
from benchmarks.curriculum import draw_race, load_runs, put_run, race_table, reached
from benchmarks.mixture import demonstrations, heldout_problems, training_problems

from data.chat import ChatRenderer
from data.records import Demonstration, Problem, read_records, write_records
from reward_models.composite import build_reward
from rlhf.config import GRPO, load_config
from rlhf.distributed import start
from rlhf.metrics import read_jsonl
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.rollout.engine import RolloutEngine, Sampling, build_engine
from rlhf.rollout_buffer import RolloutBuffer
from rlhf.run import Run, die_with_parent, faults_as_sentences, git_revision, say
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import Prompt, RewardFn
from rlhf.weight_sync import Probe

RECIPE = "recipes/tiny/grpo.yaml"
FOLDER = Path("outputs/curriculum")
JSON = Path("docs/benchmarks/curriculum.json")
SETTINGS = (
    f"policy.path={FOLDER}/sft", f"demonstrations={FOLDER}/demonstrations.jsonl", f"problems={FOLDER}/problems.jsonl",
    "rewards=[{name: correctness}]", "rollout.prompts_per_batch=8", "training.minibatches_per_batch=1", "training.num_batches=160",
    "training.completions_every=0", "training.checkpoint_every=1000", "watch.action='off'",
)  # fmt: skip
SMALL_GROUPS = (
    "curriculum={kind: signal, rest_batches: 0}",
    "rollout.prompts_per_batch=16",
    "rollout.samples_per_prompt=4",
)
"""Of which more are wrong from end to end."""
ARMS = {
    "uniform": ("curriculum={kind: uniform, measure: true}",),
    "refill": ("curriculum={kind: uniform, measure: true}", "rollout.refill_rounds=3"),
    "signal": ("curriculum={kind: signal, rest_batches: 0}",),
    "signal_by_level": ("curriculum={kind: signal, rest_batches: 0, prior_column: level}",),
    "signal_by_level_rested": ("curriculum={kind: signal, prior_column: level}",),
    "replay": ("curriculum={kind: replay}",),
    "small_groups": SMALL_GROUPS,
    "rescue": (*SMALL_GROUPS, "replay={}", "algorithm.sampler_correction=truncate"),
}
EVERY = 5
"""Rollout batches between measurements."""
SAMPLES = 2
"""Of each held-out problem, at temperature 1."""


def prepare(baseline: str) -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    write_records(demonstrations(), FOLDER / "demonstrations.jsonl")
    write_records(training_problems(), FOLDER / "problems.jsonl")
    write_records(heldout_problems(), FOLDER / "heldout.jsonl")
    command = [
        "scripts/train_sft.py", "--config", "recipes/tiny/sft.yaml", f"model.path={baseline}", f"output_dir={FOLDER}/sft",
        f"demonstrations={FOLDER}/demonstrations.jsonl", "training.num_steps=120", "optimizer.learning_rate=1e-3", "optimizer.warmup_steps=10",
    ]  # fmt: skip
    subprocess.run([sys.executable, *command], check=True, env=os.environ, preexec_fn=die_with_parent)


class Good(Exception):
    """The policy has reached the threshold."""


class MeasuredTrainer(OnlineTrainer):
    """Measures the policy on held-out problems before every few rollout batches; those samples are not counted."""

    heldout: list[Prompt]
    measured: list[dict[str, float]]
    sampled_tokens = 0.0

    def fill(self, batch: int) -> RolloutBuffer:
        if batch % EVERY == 0:
            sampling = Sampling(
                samples_per_prompt=SAMPLES, temperature=1.0, max_new_tokens=self.config.rollout.max_new_tokens
            )
            scores = self.reward_fn(self.engine.generate(self.heldout, sampling, seed=batch))
            accuracy = statistics.fmean(score.verdict == "correct" for score in scores)
            self.measured.append({"batch": batch, "sampled_tokens": self.sampled_tokens, "accuracy": accuracy})
            say(f"  batch {batch:>3}, {self.sampled_tokens:>9,.0f} sampled tokens: held out {accuracy:.3f}")
            if reached(self.measured) is not None:
                raise Good
        buffer = super().fill(batch)
        self.sampled_tokens += buffer.metrics.pairs()["rollout/tokens"][0]
        return buffer


def run(arms: list[str], seeds: list[int], label: str | None, changes: list[str], file: Path) -> None:
    """All runs in one process, with one engine."""
    wanted = [(arm, label or arm, seed) for seed in seeds for arm in arms]
    finished = {(r["label"], r["seed"]) for r in load_runs(file)}
    wanted = [one for one in wanted if one[1:] not in finished]
    if not wanted:
        return
    configs = {one: recipe(*one, changes) for one in wanted}
    first, accelerator = configs[wanted[0]], start(0)
    tokenizer = load_tokenizer(first.policy.path, revision=None)
    renderer = ChatRenderer(tokenizer, None)
    reward_fn = build_reward(first, prefill=renderer.prefill, device="cpu")
    engine = build_engine(
        first.rollout, first.policy.path, stop_token_id=renderer.stop_token_id, decode=renderer.decode
    )
    with closing(engine):
        for one, config in configs.items():
            say(f"{one[1]}, seed {config.seed}")
            trainer = build_trainer(config, accelerator, renderer, engine, reward_fn)
            with suppress(Good):
                trainer.train()
            put_run(
                file,
                {
                    "label": one[1],
                    "seed": config.seed,
                    "changes": [*ARMS[one[0]], *changes],
                    "commit": git_revision(),
                    "measured": trainer.measured,
                    "batches": read_jsonl(trainer.metrics_file),
                },
            )


def recipe(arm: str, label: str, seed: int, changes: list[str]) -> GRPO:
    folder = FOLDER / "runs" / f"{label}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    config = load_config(RECIPE, [*SETTINGS, *ARMS[arm], *changes, f"seed={seed}", f"output_dir={folder}"])
    assert isinstance(config, GRPO)
    return config


def build_trainer(
    config: GRPO, accelerator: Any, renderer: ChatRenderer, engine: RolloutEngine, reward_fn: RewardFn
) -> MeasuredTrainer:
    torch.manual_seed(config.seed)
    fitting = train_grpo.reference_solutions(config, renderer, read_records(Demonstration, config.demonstrations))
    trainer = MeasuredTrainer(
        config,
        accelerator,
        policy=load_causal_lm(config.policy.path, revision=None, dtype="float32"),
        engine=engine,
        prompts=prompts_of(renderer, config.problems),
        reward_fn=reward_fn,
        probes=[Probe(s.prompt.token_ids, s.token_ids) for s in fitting[:4]],
        pad_token_id=renderer.pad_token_id,
        run=Run(Path(config.output_dir)),
    )
    trainer.heldout, trainer.measured = prompts_of(renderer, FOLDER / "heldout.jsonl"), []
    return trainer


def prompts_of(renderer: ChatRenderer, file: str | Path) -> list[Prompt]:
    return [renderer.prompt(p.id, p.question, p.answer, p.columns) for p in read_records(Problem, file)]


def main() -> None:
    parser, commands, _, _ = run_and_report(__doc__, ARMS, JSON)
    first = commands.add_parser("prepare", help="problems, demonstrations, and the policy that every run starts from")
    first.add_argument("--baseline", default="outputs/demo/sft")
    given = parser.parse_args()
    with faults_as_sentences():
        if given.command == "prepare":
            prepare(given.baseline)
        elif given.command == "run":
            run(given.arms, given.seeds, given.label, given.change, given.json)
        else:
            say(race_table(load_runs(given.json)))
            if given.picture:
                draw_race(load_runs(given.json), given.picture)


if __name__ == "__main__":
    main()
