"""Evidence for docs/benchmarks/learning.md: what each algorithm learns on the embedded task, and how soon, against TRL.

python scripts/benchmark_learning.py run --algorithms grpo dr_grpo rloo dapo ppo --seeds 0 1 2
python scripts/benchmark_learning.py run --algorithms grpo --label two-passes --change training.passes_per_batch=2
python scripts/benchmark_learning.py trl --seeds 0 1 2
python scripts/benchmark_learning.py report --picture docs/benchmarks/learning.png

Everything starts from what `make demo` leaves before its GRPO stage. A finished run is not repeated.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import train_grpo
import yaml
from benchmarks.commands import run_and_report
from benchmarks.learning import Clock, draw_learning, learning_table, load_results, race_table, write_results
from benchmarks.learning_trl import train_with_trl

from rlhf.config import GRPO, PPO, load_config
from rlhf.evaluation_files import compare_evaluations, read_evaluated
from rlhf.run import die_with_parent, faults_as_sentences, git_revision, run_stage, say
from rlhf.trainers.online import OnlineTrainer
from rlhf.types import RewardFn

FOLDER = Path("outputs/learning")
JSON = Path("docs/benchmarks/learning.json")
RECIPES = {
    "grpo": "recipes/tiny/grpo.yaml",
    "dr_grpo": "recipes/algorithms/dr_grpo.yaml",
    "rloo": "recipes/algorithms/rloo.yaml",
    "dapo": "recipes/algorithms/dapo.yaml",
    "ppo": "recipes/tiny/ppo.yaml",
}
EVALUATION = "recipes/tiny/evaluate.yaml"
BUDGET = 300_000
"""Sampled completion tokens; 20 batches of our recipe come to that within 1 %."""
MICRO_BATCH = 32
"""Completions a forward pass of TRL's: 16, 32, 64 and 128 were tried (docs/benchmarks/learning.md)."""
BASELINE = "outputs/demo/sft"


def launch(*arguments: str) -> None:
    """This script or another one, as a process of its own."""
    environment = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **os.environ}
    subprocess.run([sys.executable, *arguments], check=True, env=environment, preexec_fn=die_with_parent)


def evaluate(label: str, path: str) -> None:
    """500 unseen problems, 4 samples each."""
    folder = FOLDER / "evaluation" / label
    if (folder / "run.json").is_file():
        return
    recipe = yaml.safe_load(Path(EVALUATION).read_text(encoding="utf-8"))
    recipe |= {"output_dir": str(folder), "models": {label.replace("-", "_"): {"path": path}}}
    file = FOLDER / "evaluation" / f"{label}.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    launch("scripts/evaluate.py", "--config", str(file))


# ------------------------------------------------------------------------------------------------------------------------- ours


def run(algorithms: list[str], seeds: list[int], label: str | None, overrides: list[str], file: Path) -> None:
    evaluate("sft", BASELINE)
    for seed in seeds:
        for algorithm in algorithms:
            name = f"{label or algorithm}-{seed}"
            folder = FOLDER / name
            if not (folder / "clock.json").is_file():
                changed = [f"seed={seed}", f"output_dir={folder}", *overrides]
                launch(__file__, "one", "--config", RECIPES[algorithm], *changed)
            evaluate(name, str(folder))
            record(file, label or algorithm, seed)


class ClockedTrainer(OnlineTrainer):
    """The trainer of a stage script, with a clock around its loop."""

    clock = Clock()

    def __init__(self, *arguments: Any, reward_fn: RewardFn, **keywords: Any) -> None:
        super().__init__(*arguments, reward_fn=self.clock.scoring(reward_fn), **keywords)

    def train(self) -> list[dict[str, float]]:
        self.clock.start()
        history = super().train()
        self.clock.stop(steps=history[-1]["step"])
        return history


def one(recipe: str, overrides: list[str]) -> None:
    """One run of a recipe by its own stage script, with the clock."""
    config = load_config(recipe, overrides)
    train_grpo.__dict__["OnlineTrainer"] = ClockedTrainer
    sys.argv = [config.script, "--config", recipe, *overrides]
    run_stage((GRPO, PPO), train_grpo.train_online)
    folder = Path(config.output_dir)
    ClockedTrainer.clock.save(folder / "clock.json", recipe=recipe, changed=overrides, commit=git_revision())


def trl(seeds: list[int], micro_batch: int, file: Path) -> None:
    """TRL's GRPO with as many sampled tokens as our recipe takes."""
    evaluate("sft", BASELINE)
    for seed in seeds:
        folder = FOLDER / f"trl-{seed}"
        if not (folder / "clock.json").is_file():
            launch(__file__, "one-trl", "--seed", str(seed), "--micro-batch", str(micro_batch))
        evaluate(f"trl-{seed}", str(folder))
        record(file, "trl", seed)


def one_trl(seed: int, micro_batch: int, budget: int, folder: Path) -> None:
    config = load_config(RECIPES["grpo"], [f"seed={seed}"])
    assert isinstance(config, GRPO)
    folder.mkdir(parents=True, exist_ok=True)
    most = 2 * config.training.num_batches  # no run needs so many: its completions grow
    clock = train_with_trl(config, folder, budget=budget, most_batches=most, micro_batch=micro_batch)
    clock.save(
        folder / "clock.json", recipe=RECIPES["grpo"], budget=budget, micro_batch=micro_batch, commit=git_revision()
    )


def read_clock(folder: Path) -> dict[str, Any]:
    file = folder / "clock.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no finished run; run `benchmark_learning.py run` first")
    return json.loads(file.read_text(encoding="utf-8"))


def record(file: Path, algorithm: str, seed: int) -> None:
    """Put a run's figures into the JSON file, in the place of an older run of that name."""
    name = f"{algorithm}-{seed}"
    clock, scores = read_clock(FOLDER / name), read_evaluated(str(FOLDER / "evaluation" / name))
    before = read_evaluated(str(FOLDER / "evaluation" / "sft"))
    difference = compare_evaluations(before, scores)["difference"]
    results = load_results(file) if file.is_file() else {"runs": []}
    row = {
        "algorithm": algorithm,
        "seed": seed,
        "after": scores.card["scores"]["pass_at_1"],
        "difference": {key: difference[key] for key in ("mean", "low", "high", "n", "p_value")},
        "sampled_tokens": clock["batches"][-1]["sampled_tokens"],
        **clock,
    }
    others = [run for run in results["runs"] if (run["algorithm"], run["seed"]) != (algorithm, seed)]
    results = {
        "before": before.card["scores"]["pass_at_1"],
        "hardware": before.card["hardware"],
        "runs": sorted([*others, row], key=place),
    }
    write_results(file, results)


def place(run: dict[str, Any]) -> tuple[int, str, int]:
    """Algorithms in the order of `RECIPES`, variants after them, TRL last."""
    algorithm = run["algorithm"]
    order = list(RECIPES)
    known = order.index(algorithm) if algorithm in order else len(order) + (algorithm == "trl")
    return known, algorithm, run["seed"]


def report(file: Path, picture: Path | None) -> None:
    results = load_results(file)
    say(f"{learning_table(results)}\n\n{race_table(results)}")
    if picture is not None:
        draw_learning(results, picture, algorithms=list(RECIPES))


def main() -> None:
    parser, commands, _, _ = run_and_report(__doc__, RECIPES, JSON, option="algorithms")
    single = commands.add_parser("one")
    single.add_argument("--config", required=True)
    single.add_argument("overrides", nargs="*")
    theirs = commands.add_parser("trl", help="TRL's GRPO with the same seeds and as many sampled tokens")
    theirs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    theirs.add_argument("--micro-batch", type=int, default=MICRO_BATCH, help="completions a forward pass of TRL's")
    theirs.add_argument("--json", type=Path, default=JSON)
    theirs = commands.add_parser("one-trl")
    theirs.add_argument("--seed", type=int, required=True)
    theirs.add_argument("--micro-batch", type=int, required=True)
    theirs.add_argument("--budget", type=int, default=BUDGET)
    theirs.add_argument("--folder", type=Path)
    given = parser.parse_args()
    with faults_as_sentences():
        if given.command == "run":
            run(given.algorithms, given.seeds, given.label, given.change, given.json)
        elif given.command == "one":
            one(given.config, given.overrides)
        elif given.command == "trl":
            trl(given.seeds, given.micro_batch, given.json)
        elif given.command == "one-trl":
            one_trl(given.seed, given.micro_batch, given.budget, given.folder or FOLDER / f"trl-{given.seed}")
        else:
            report(given.json, given.picture)


if __name__ == "__main__":
    main()
