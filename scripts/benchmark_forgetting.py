"""Evidence for docs/benchmarks/forgetting.md: what GRPO on a second task takes of the first, and what each control keeps.

python scripts/benchmark_forgetting.py prepare
python scripts/benchmark_forgetting.py run --arms none kl ewc ptx adaptive --seeds 0 1 2
python scripts/benchmark_forgetting.py run --arms ewc --label ewc-10 --change retention.elastic.coefficient=10
python scripts/benchmark_forgetting.py report --picture docs/benchmarks/forgetting.png

It starts from the policy that `make demo` trains. One process takes all runs, one after the other; a finished one is not repeated.
"""

import gc
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import set_seed
from benchmarks.commands import run_and_report
from benchmarks.forgetting import SAMPLES, TASKS, Counts, draw_forgetting, forgetting_tables, write_tasks
from benchmarks.learning import load_results, write_results
from train_grpo import NUM_PROBES, reference_solutions, remember

from data.chat import ChatRenderer
from data.records import Demonstration, Problem, read_records, write_records
from reward_models.composite import build_reward
from reward_models.grading import GraderPool
from rlhf.config import GRPO, load_config
from rlhf.distributed import start
from rlhf.lora import adapt
from rlhf.models import load_causal_lm, load_tokenizer
from rlhf.rollout.engine import RolloutEngine, Sampling, build_engine
from rlhf.run import die_with_parent, faults_as_sentences, git_revision, open_run, say
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import Prompt
from rlhf.weight_sync import Freshness, Probe

FOLDER = Path("outputs/forgetting")
JSON = Path("docs/benchmarks/forgetting.json")
RECIPE = "recipes/tiny/forgetting/grpo.yaml"
START = FOLDER / "start"
KL = ["reference={path: outputs/forgetting/start}", "algorithm.kl_coefficient=0.03"]
LORA = ["policy.lora={rank: 16}", "optimizer.learning_rate=1.0e-3"]
EWC = ["retention.elastic={fisher: outputs/forgetting/fisher, coefficient: 100}"]
DEMONSTRATIONS = "outputs/forgetting/data/stories_demonstrations.jsonl"
PTX = [f"retention.ptx={{demonstrations: {DEMONSTRATIONS}, coefficient: 0.3, tokens_per_step: 1000}}"]
OWN = FOLDER / "data/stories_own.jsonl"
"""The starting policy's completions of problems of A, right and wrong: PTX on them is, up to a constant, KL(start || policy) on A's prompts."""
WEAK = ["retention.ptx.coefficient=0.003"]
STEERS = "problems: outputs/forgetting/data/stories_heldout.jsonl, every_batches: 1"
ARMS = {
    "none": [],
    "kl": KL,
    "kl-k2": [KL[0], "algorithm.kl_estimator=k2", "algorithm.kl_coefficient=0.1"],
    "kl-on-a": [PTX[0].replace(DEMONSTRATIONS, str(OWN))],
    "ewc": EWC,
    "ptx": PTX,
    "adaptive": [*PTX, *WEAK, f"retention.adaptive={{steers: ptx, {STEERS}}}"],
    "ptx-weak": [*PTX, *WEAK],
    "kl-adaptive": [KL[0], "algorithm.kl_coefficient=0.005", f"retention.adaptive={{steers: kl, {STEERS}}}"],
    "lora": LORA,
    "lora-ewc": [*LORA, *EWC],
}
"""What each changes of the recipe; the weak PTX is what the adaptive one starts from, without its controller."""
CURVE_EVERY, CURVE_PROBLEMS = 2, 100


def prepare() -> None:
    """Data, the policy that knows both tasks, the Fisher information of the first, and completions of it."""
    write_tasks(FOLDER / "data")
    for script, recipe in (("train_sft", "start"), ("estimate_fisher", "fisher")):
        command = [f"scripts/{script}.py", "--config", f"recipes/tiny/forgetting/{recipe}.yaml"]
        subprocess.run([sys.executable, *command], check=True, env=os.environ, preexec_fn=die_with_parent)
    write_own_completions()


def write_own_completions() -> None:
    config = load_config(RECIPE)
    assert isinstance(config, GRPO)
    renderer = ChatRenderer(load_tokenizer(config.policy.path), config.chat.system_prompt)
    problems = read_records(Problem, f"{FOLDER}/data/stories.jsonl")
    prompts = [renderer.prompt(p.id, p.question, p.answer) for p in problems]
    rollout = config.rollout
    engine = build_engine(rollout, str(START), stop_token_id=renderer.stop_token_id, decode=renderer.decode)
    with closing(engine):
        sampled = engine.generate(prompts, replace(Sampling.of(rollout), samples_per_prompt=1), seed=0)
    own = [
        Demonstration(
            id=r.prompt.id, question=r.prompt.question, scratchpad="", answer=r.prompt.reference, response=r.text
        )
        for r in sampled
        if r.finish_reason == "stop"
    ]
    write_records(own, OWN)


class Bench:
    """What all runs share: the engine, which a trainer fills with its own weights, the grader and the test problems."""

    def __init__(self, config: GRPO, accelerator: Accelerator, engine: RolloutEngine, pool: GraderPool) -> None:
        self.accelerator, self.engine, self.pool = accelerator, engine, pool
        self.renderer = ChatRenderer(load_tokenizer(config.policy.path), config.chat.system_prompt)
        self.sampling = Sampling.of(config.rollout)
        self.tests = {task: self._prompts(f"{FOLDER}/data/{task}_test.jsonl") for task in TASKS}

    def _prompts(self, file: str) -> list[Prompt]:
        return [self.renderer.prompt(p.id, p.question, p.answer) for p in read_records(Problem, file)]

    def accuracy(self, *, problems: int | None = None, samples: int = SAMPLES) -> dict[str, Counts]:
        """Right answers of each test problem by the policy in the engine; always the same seed."""
        sampling, found = replace(self.sampling, samples_per_prompt=samples), {}
        for task, prompts in self.tests.items():
            rollouts = self.engine.generate(prompts[:problems], sampling, seed=1)
            grades = self.pool.grade_many([(r.text, r.prompt.reference) for r in rollouts])
            right = [grade.verdict == "correct" for grade in grades]
            found[task] = "".join(str(sum(right[i : i + samples])) for i in range(0, len(right), samples))
        return found

    def train(self, config: GRPO) -> list[dict[str, float]]:
        """One run of a recipe; returns the accuracy on both tasks over its batches."""
        set_seed(config.seed)
        renderer = self.renderer
        policy = load_causal_lm(config.policy.path, revision=None, dtype=config.policy.dtype)
        adapt(policy, config.policy)
        frozen = config.reference and config.reference.path
        fitting = reference_solutions(config, renderer, read_records(Demonstration, config.demonstrations))
        trainer = WatchedTrainer(
            config,
            self.accelerator,
            policy=policy,
            reference=load_causal_lm(frozen, revision=None, dtype="float32") if frozen else None,
            engine=self.engine,
            prompts=self._prompts(config.problems),
            reward_fn=build_reward(config, prefill=renderer.prefill, device="cpu"),
            probes=[Probe(s.prompt.token_ids, s.token_ids) for s in fitting[:NUM_PROBES]],
            pad_token_id=renderer.pad_token_id,
            run=open_run(config),
            remembered=remember(config, renderer),
        )
        trainer.bench = self
        trainer.train()
        trainer.save(renderer.tokenizer)
        curve = trainer.curve
        del trainer, policy
        gc.collect()  # models and optimizer, which refer to one another
        return curve


class WatchedTrainer(OnlineTrainer):
    """The trainer, with a look at both tasks between its batches."""

    bench: Bench

    def train(self) -> list[dict[str, float]]:
        self.curve: list[dict[str, float]] = []
        self.look(0)
        return super().train()

    def _push(self) -> Freshness:
        freshness = super()._push()
        batch = self.policy_version // self.updater.steps_per_batch
        if batch % CURVE_EVERY == 0:
            self.look(batch)
        return freshness

    def look(self, batch: int) -> None:
        found = self.bench.accuracy(problems=CURVE_PROBLEMS, samples=1)
        self.curve.append({"batch": batch, **{task: c.count("1") / len(c) for task, c in found.items()}})
        say(f"  batch {batch}: " + ", ".join(f"{task} {self.curve[-1][task]:.2f}" for task in TASKS))


def run(arms: Sequence[str], seeds: Sequence[int], label: str | None, changes: Sequence[str], file: Path) -> None:
    results = load_results(file) if file.is_file() else {"runs": []}
    base = load_config(RECIPE)
    assert isinstance(base, GRPO)
    accelerator = start(0)
    renderer = ChatRenderer(load_tokenizer(base.policy.path), base.chat.system_prompt)
    engine = build_engine(base.rollout, base.policy.path, stop_token_id=renderer.stop_token_id, decode=renderer.decode)
    with closing(engine), GraderPool(workers=1) as pool:
        bench = Bench(base, accelerator, engine, pool)
        if "before" not in results:
            results = {"before": bench.accuracy(), **results}
        for seed in seeds:
            for arm in arms:
                name = label or arm
                if any((r["arm"], r["seed"]) == (name, seed) for r in results["runs"]):
                    continue
                overrides = [f"seed={seed}", f"output_dir={FOLDER}/{name}-{seed}", *ARMS[arm], *changes]
                config = load_config(RECIPE, overrides)
                assert isinstance(config, GRPO)
                say(f"\n{name}, seed {seed}")
                curve = bench.train(config)
                row: dict[str, Any] = {
                    "arm": name,
                    "seed": seed,
                    "against": "lora" if arm.startswith("lora") else "none",
                    "changes": [*ARMS[arm], *changes],
                    "commit": git_revision(),
                    "after": bench.accuracy(),
                    "curve": curve,
                }
                results["runs"] = sorted([*results["runs"], row], key=place)
                write_results(file, results)


def place(run: dict[str, Any]) -> tuple[int, str, int]:
    """In the order of `ARMS`, variants after them."""
    order = list(ARMS)
    return order.index(run["arm"]) if run["arm"] in order else len(order), run["arm"], run["seed"]


def main() -> None:
    parser, commands, _, _ = run_and_report(__doc__, ARMS, JSON)
    commands.add_parser("prepare", help="data, starting policy and Fisher information")
    given = parser.parse_args()
    with faults_as_sentences():
        if given.command == "prepare":
            prepare()
        elif given.command == "run":
            run(given.arms, given.seeds, given.label, given.change, given.json)
        else:
            results = load_results(given.json)
            say(forgetting_tables(results))
            if given.picture is not None:
                draw_forgetting(results, given.picture)


if __name__ == "__main__":
    main()
