"""Evidence for docs/benchmarks/process_rewards.md: what rewards of steps do to the tokens that GRPO samples until it is good.

python scripts/run_pipeline.py --config recipes/tiny/slips/pipeline.yaml
python scripts/benchmark_process_rewards.py run --variants outcome sum --seeds 0 1 2 --step-value signed --weight 1
python scripts/benchmark_process_rewards.py report --picture docs/benchmarks/process_rewards.png

Every run is recipes/tiny/slips/grpo.yaml with other rewards; a finished run is not repeated. All runs of a command share one rollout engine, which gets
the first policy's weights again before each of them. `--recipe recipes/tiny/grpo.yaml` is the demo's task.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_grpo
import yaml
from benchmarks.commands import run_and_report
from benchmarks.learning import mean_curve, reached

from data.chat import ChatRenderer
from data.records import Problem, read_records
from reward_models.composite import judge_here
from rlhf.config import GRPO, load_config
from rlhf.models import load_tokenizer
from rlhf.rollout.engine import RolloutEngine, Sampling, build_engine
from rlhf.run import faults_as_sentences, git_revision, open_run, quiet_libraries, say, write_json

RECIPE = "recipes/tiny/slips/grpo.yaml"
FOLDER = Path("outputs/process_rewards")
JSON = Path("docs/benchmarks/process_rewards.json")
COMPLETIONS = 256
"""Whose mean accuracy must reach the target, and not fall below it again."""
HELD_OUT = 256
"""Test problems, one sample each, after a run."""
VARIANTS = {"outcome": "", **{credit: f"algorithm.step_credit={credit}" for credit in ("sum", "min", "own")}}
"""What a token is responsible for; `outcome` has no process rewards."""


class SharedEngine:
    """An engine that outlives the run it is handed to."""

    def __init__(self, engine: RolloutEngine) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self) -> None:
        """What the run does when it ends; the next one needs the engine."""


def changes_of(variant: str, given: argparse.Namespace) -> list[str]:
    """Overrides of the recipe."""
    process = (
        f", {{name: process, kind: process_reward_model, path: {given.process_model}, weight: {given.weight}, "
        f"step_value: {given.step_value}}}"
    )
    rewards = f"rewards=[{{name: correctness}}, {{name: format, weight: 0.1}}{process if variant != 'outcome' else ''}]"
    return [rewards, *([VARIANTS[variant]] if VARIANTS[variant] else []), *given.change]


def run(given: argparse.Namespace) -> None:
    engine: SharedEngine | None = None
    for seed in given.seeds:
        for variant in given.variants:
            label = given.label or variant
            folder = FOLDER / f"{label}-{seed}"
            changes = changes_of(variant, given)
            if not (folder / "held_out.json").is_file():
                config = load_config(given.recipe, [*changes, f"output_dir={folder}", f"seed={seed}"])
                assert isinstance(config, GRPO)
                engine = engine or start_engine(config)
                say(f"--- {label}, seed {seed}")
                train_grpo.__dict__["build_engine"] = lambda *_, shared=engine, **__: shared
                train_grpo.train_online(config, open_run(config))
                write_json(folder / "held_out.json", held_out(engine, config, given.test_problems))
            record(given, label, seed, changes, folder)


def renderer_of(config: GRPO) -> ChatRenderer:
    return ChatRenderer(load_tokenizer(config.policy.path, revision=config.policy.revision), config.chat.system_prompt)


def start_engine(config: GRPO) -> SharedEngine:
    renderer = renderer_of(config)
    stop = renderer.stop_token_id
    return SharedEngine(build_engine(config.rollout, config.policy.path, stop_token_id=stop, decode=renderer.decode))


def held_out(engine: SharedEngine, config: GRPO, problems: str) -> dict[str, float]:
    """Accuracy, by the grader alone, of the weights that the engine holds on problems nobody was trained on."""
    renderer = renderer_of(config)
    prompts = [renderer.prompt(p.id, p.question, p.answer) for p in read_records(Problem, problems)[:HELD_OUT]]
    sampling = Sampling.of(config.rollout.model_copy(update={"samples_per_prompt": 1}))
    rollouts = engine.generate(prompts, sampling, seed=0)
    grades = judge_here([(renderer.prefill + r.text, r.prompt.reference) for r in rollouts])
    return {"accuracy": statistics.fmean(g.verdict == "correct" for g in grades), "problems": len(prompts)}


def record(given: argparse.Namespace, label: str, seed: int, changes: list[str], folder: Path) -> None:
    """Put a run's figures into the JSON file, in the place of an older run of that name and recipe."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rollout = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))["rollout"]
    completions = rollout["prompts_per_batch"] * rollout["samples_per_prompt"]
    batches: list[dict[str, float]] = []
    for row in rows:
        before = batches[-1]["sampled_tokens"] if batches else 0
        batches.append(
            {
                "sampled_tokens": before + round(row["rollout/length"] * completions),
                "correctness": row["reward/correctness"],
                "length": row["rollout/length"],
            }
        )
    found = json.loads(given.json.read_text(encoding="utf-8")) if given.json.is_file() else {"runs": []}
    one = {
        "recipe": given.recipe,
        "label": label,
        "seed": seed,
        "changes": changes,
        "completions": completions,
        "commit": git_revision(),
        "held_out": json.loads((folder / "held_out.json").read_text(encoding="utf-8")),
        "batches": batches,
    }
    others = [r for r in found["runs"] if place(r) != place(one)]
    given.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(given.json, {"runs": sorted([*others, one], key=place)})


def place(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["recipe"], row["label"], row["seed"]


# -------------------------------------------------------------------------------------------------------------------- the report


def tokens_to(row: dict[str, Any], target: float) -> int | None:
    """Sampled tokens at the end of the first window of completions that reaches the target for good; None for never."""
    window = max(COMPLETIONS // row["completions"], 1)
    index = reached([b["correctness"] for b in row["batches"]], threshold=target, window=window)
    return None if index is None else row["batches"][index]["sampled_tokens"]


def table(runs: Sequence[dict[str, Any]], targets: Sequence[float]) -> str:
    """Markdown: tokens to each target, run by run."""
    heads = " | ".join(f"sampled tokens to {target}" for target in targets)
    lines = [
        f"| run | seed | {heads} | accuracy of the last {COMPLETIONS} completions | held-out accuracy | sampled tokens |",
        "|---|---|" + "---|" * (len(targets) + 3),
    ]
    for r in runs:
        window = max(COMPLETIONS // r["completions"], 1)
        last = statistics.fmean(b["correctness"] for b in r["batches"][-window:])
        shown = " | ".join("never" if n is None else f"{n:,}" for n in (tokens_to(r, t) for t in targets))
        held = f"{r['held_out']['accuracy']:.3f}" if r["held_out"] else "-"
        lines.append(
            f"| {r['label']} | {r['seed']} | {shown} | {last:.3f} | {held} | {r['batches'][-1]['sampled_tokens']:,} |"
        )
    return "\n".join(lines)


def ratios(runs: Sequence[dict[str, Any]], targets: Sequence[float], baseline: str = "outcome") -> str:
    """Markdown: how many times the tokens the baseline takes, seed by seed; at least so many where it never gets there."""
    by = {(r["label"], r["seed"]): r for r in runs}
    lines = [
        f"| run | target | tokens of `{baseline}` over its own, seed by seed | geometric mean |",
        "|---|---|---|---|",
    ]
    for label in dict.fromkeys(r["label"] for r in runs if r["label"] != baseline):
        seeds = sorted(s for name, s in by if name == label and (baseline, s) in by)
        for target in targets if seeds else ():
            found = []
            for seed in seeds:
                ours, theirs = tokens_to(by[label, seed], target), tokens_to(by[baseline, seed], target)
                whole = by[baseline, seed]["batches"][-1]["sampled_tokens"]
                found.append(None if ours is None else ((theirs or whole) / ours, theirs is None))
            shown = ", ".join("never there" if f is None else f"{'> ' if f[1] else ''}{f[0]:.2f}" for f in found)
            known = [f for f in found if f is not None]
            mean = statistics.geometric_mean([f[0] for f in known]) if len(known) == len(found) else None
            bound = "at least " if any(f[1] for f in known) else ""
            lines.append(f"| {label} | {target} | {shown} | {'-' if mean is None else f'{bound}{mean:.2f}'} |")
    return "\n".join(lines)


def draw(runs: Sequence[dict[str, Any]], picture: Path) -> None:
    """Accuracy over sampled tokens; thin lines are seeds, each a mean over COMPLETIONS completions."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2))
    for colour, label in enumerate(dict.fromkeys(r["label"] for r in runs)):
        curves = []
        for r in (r for r in runs if r["label"] == label):
            window = max(COMPLETIONS // r["completions"], 1)
            rows = r["batches"]
            curve = [
                {**rows[i], "mean": statistics.fmean(b["correctness"] for b in rows[i - window + 1 : i + 1])}
                for i in range(window - 1, len(rows))
            ]
            curves.append(curve)
            axes.plot([b["sampled_tokens"] for b in curve], [b["mean"] for b in curve], f"C{colour}", lw=0.6, alpha=0.6)
        axes.plot(*mean_curve(curves, "sampled_tokens", "mean"), f"C{colour}", lw=2, label=f"{label} ({len(curves)})")
    axes.set(xlabel="sampled completion tokens", ylabel=f"accuracy, mean of {COMPLETIONS} completions", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(title="rewards (seeds)")
    figure.tight_layout()
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser, _, runs, shown = run_and_report(__doc__, VARIANTS, JSON, option="variants")
    for command in (runs, shown):
        command.add_argument("--recipe", default=RECIPE)
    runs.add_argument("--process-model", default="outputs/slips/process_reward_model")
    runs.add_argument("--test-problems", default="outputs/slips/data/test_problems.jsonl")
    runs.add_argument("--weight", type=float, default=0.3, help="of the process rewards; correctness has 1")
    runs.add_argument("--step-value", choices=("probability", "signed"), default="signed")
    shown.add_argument("--labels", nargs="+", help="only these")
    shown.add_argument("--targets", nargs="+", type=float, default=[0.4, 0.5])
    given = parser.parse_args()
    quiet_libraries()
    with faults_as_sentences():
        if given.command == "run":
            run(given)
        elif given.json.is_file():
            recorded = json.loads(given.json.read_text(encoding="utf-8"))["runs"]
            chosen = [r for r in recorded if r["recipe"] == given.recipe and r["label"] in (given.labels or r["label"])]
            say(f"{table(chosen, given.targets)}\n\n{ratios(chosen, given.targets)}")
            if given.picture is not None:
                draw(chosen, given.picture)
        else:
            raise ValueError(f"{given.json} does not exist; run `benchmark_process_rewards.py run` first")


if __name__ == "__main__":
    main()
