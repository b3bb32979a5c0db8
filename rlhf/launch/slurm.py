"""A SLURM job that runs the launcher inside its allocation: one code path for ssh and for SLURM, with srun in the place of ssh."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from rlhf.config import Config
from rlhf.launch.layout import Ranks

SRUN = "srun --overlap --nodes=1 --ntasks=1 --cpu-bind=none --nodelist={host}"
SECONDS_BEFORE_THE_LIMIT = 120
PORTS = 20000
"""From here on, by the job's number: jobs that share a node do not meet."""


def batch_script(
    config: Config,
    ranks: Ranks,
    *,
    launcher: Sequence[str],
    directory: str,
    logs: Path,
    gpus_per_node: int,
    serving_nodes: int,
    options: Sequence[str],
) -> str:
    """The text of an sbatch script.

    SLURM starts the same script again after `scontrol requeue`, a preemption or a node's failure (`--requeue`); it then goes on from the
    newest checkpoint. Before the time limit SLURM sends SIGUSR1, at which the launcher ends the ranks and has the job requeued.

    Args:
        config: of the recipe; its stage names the job.
        ranks: of the accelerate configuration.
        launcher: the command line of scripts/launch.py without hosts, ssh template and port.
        directory: the checkout.
        logs: where SLURM's log goes.
        gpus_per_node: 0 asks for none.
        serving_nodes: nodes of the job that serve completions, after those that train.
        options: of sbatch, `--partition=gpu` for instance; the last one counts where two contradict.

    Raises:
        ValueError: for an option or a path that sbatch would read as something else.
    """
    for option in options:
        if not re.fullmatch(r"--[a-z][a-z-]*(=[\w.,:@%+\[\]/-]+)?", option):
            raise ValueError(
                f"--sbatch is {option!r}; give one option of sbatch in the form --name=value, without spaces"
            )
    if not re.fullmatch(r"[\w.,:@+/-]+", str(logs)):
        raise ValueError(f"--logs is {str(logs)!r}, which an #SBATCH line cannot hold; choose a path without spaces")
    train = ranks.num_machines
    serving = f' --serving-hosts "$(names {train + 1} {train + serving_nodes})"' if serving_nodes else ""
    lines = [
        f"--job-name={config.stage}",
        f"--nodes={ranks.num_machines + serving_nodes}",
        "--ntasks-per-node=1",
        "--exclusive",  # without it a task may get one core of its node
        *([f"--gpus-per-node={gpus_per_node}"] if gpus_per_node else []),
        "--requeue",
        "--open-mode=append",
        f"--output={logs}/slurm-%j.log",
        f"--signal=B:USR1@{SECONDS_BEFORE_THE_LIMIT}",
        *options,
    ]
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            f"cd {shlex.quote(directory)} || exit 2",
            'names() { scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "$1,$2p" | paste -sd, -; }',
            "# exec: SLURM's signals reach the launcher itself",
            f'exec {shlex.join([*launcher, "--ssh", SRUN])} --hosts "$(names 1 {train})"{serving} --port $(({PORTS} + SLURM_JOB_ID % 20000))',
            "",
        ]
    )
