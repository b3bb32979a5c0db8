"""Stages one after the other: checked together before the first starts, skipped when finished, resumed after a kill."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from rlhf.config import (
    Config,
    Evaluate,
    Online,
    Pipeline,
    ProcessRewardModel,
    RewardModel,
    batch_arithmetic,
    load_config,
)
from rlhf.report import draw, headline
from rlhf.run import DIE_WITH_PARENT, Run, check_output_dir, die_with_parent, finished, say, write_json


def load_stages(config: Pipeline) -> list[tuple[Config, list[str]]]:
    """Every stage's config with its command-line arguments, all of them valid.

    Raises:
        ValueError: for the first recipe or output folder that is not.
    """
    stages = []
    for stage in config.stages:
        loaded = load_config(stage.recipe, stage.overrides)
        if isinstance(loaded, Pipeline):
            raise ValueError(f"{stage.recipe} is itself a pipeline; list its stages instead")
        check_output_dir(loaded)
        batch_arithmetic(loaded, 1)
        stages.append((loaded, ["--config", stage.recipe, *stage.overrides]))
    folders = [loaded.output_dir for loaded, _ in stages]
    doubled = {folder for folder in folders if folders.count(folder) > 1}
    if doubled:
        raise ValueError(f"two stages write to output_dir {doubled.pop()}; give each its own")
    if not Path(config.accelerate_config).is_file():
        raise ValueError(f"accelerate_config {config.accelerate_config} does not exist; see recipes/accelerate/")
    return stages


def run_pipeline(config: Pipeline, run: Run) -> None:
    """Run what is not finished, then write summary.json and a picture."""
    stages = load_stages(config)
    threads = threads_per_rank(Path(config.accelerate_config))
    rerun = False
    for number, (stage, arguments) in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.stage}"
        done = finished(stage)
        if done is not None and not rerun:
            say(f"{title}: finished before, skipped ({done['seconds']:.0f} s then)")
            continue
        if done is not None:
            raise ValueError(
                f"{stage.output_dir} is finished but an earlier stage was run again, so it stands on old inputs; delete it"
            )
        rerun = True
        say(f"{title}: {stage.script} {' '.join(arguments)}")
        launch(
            [
                sys.executable,
                "-m",
                "accelerate.commands.launch",
                "--config_file",
                config.accelerate_config,
                stage.script,
                *arguments,
            ],
            threads,
        )
        done = finished(stage)
        assert done is not None, f"{stage.script} ended well and left no {stage.output_dir}/run.json"
        say(f"{title}: done in {done['seconds']:.0f} s\n")
    summary = summarise(run.folder, [stage for stage, _ in stages])
    run.finish(**summary)


def threads_per_rank(accelerate_config: Path) -> int:
    """Cores shared evenly over the ranks of this machine; accelerate by itself would give each rank one thread."""
    settings = yaml.safe_load(accelerate_config.read_text(encoding="utf-8"))
    local_ranks = int(settings.get("num_processes", 1)) // int(settings.get("num_machines", 1))
    return max(1, len(os.sched_getaffinity(0)) // max(1, local_ranks))


def launch(command: list[str], threads: int) -> None:
    """Run a stage as a child that never outlives this process.

    Raises:
        SystemExit: when it fails; its own output says why.
    """
    environment = {**os.environ, DIE_WITH_PARENT: "1"}
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    child = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=die_with_parent)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        code = child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)
        child.wait()
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code:
        say(
            f"the stage failed (exit code {code}); repair what it says above, then run the same command: "
            "finished stages are skipped and this one continues"
        )
        sys.exit(code if code > 0 else 1)


def summarise(folder: Path, stages: list[Config]) -> dict[str, Any]:
    """summary.json, the picture and the headline, from what the stages left."""
    names = [stage.stage for stage in stages]
    results = {
        name if names.count(name) == 1 else Path(stage.output_dir).name: finished(stage) or {}
        for name, stage in zip(names, stages, strict=True)
    }
    summary: dict[str, Any] = {}
    evaluation: dict[str, Any] | None = None
    for stage, done in zip(stages, results.values(), strict=True):
        if isinstance(stage, Evaluate) and stage.selection is not None:
            chosen = {label: model["selection"] for label, model in done["models"].items()}
            most = str(max(stage.selection.ns))
            summary[f"best_of_{most}"] = {
                label: {method: by_n[most] for method, by_n in of_model["accuracy"].items()}
                for label, of_model in chosen.items()
            }
        elif isinstance(stage, Evaluate):
            evaluation = done
            summary["pass_at_1"] = {label: model["pass_at_1"] for label, model in done["models"].items()}
            summary["paired_difference"] = done["paired_difference"] and {
                k: done["paired_difference"][k] for k in ("mean", "low", "high")
            }
        elif isinstance(stage, RewardModel):
            summary["reward_model_accuracy"] = done["accuracy"]
        elif isinstance(stage, ProcessRewardModel):
            summary["process_reward_model_f1"] = done["f1"]
        elif isinstance(stage, Online):
            summary["rollout_engine"], summary["max_kl_sampler"] = done["rollout_engine"], done["max_kl_sampler"]
    summary["seconds"] = {name: done["seconds"] for name, done in results.items()}
    summary["peak_memory_gb"] = max(done["peak_memory_gb"] for done in results.values())
    write_json(folder / "summary.json", summary)

    grpo = next((stage for stage in stages if isinstance(stage, Online)), None)
    if evaluation:
        say(headline(evaluation))
    if grpo and evaluation:
        draw(
            Path(grpo.output_dir) / "metrics.jsonl",
            evaluation,
            folder / "summary.png",
            max_kl_sampler=grpo.guards.max_kl_sampler,
        )
        say(f"picture: {folder / 'summary.png'}")
    say(f"summary: {folder / 'summary.json'}")
    return summary
