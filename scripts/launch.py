"""Train on several hosts: over ssh, or as a SLURM job. Starts again from the newest checkpoint when a rank or a host dies.

python scripts/launch.py recipes/gsm8k/grpo.yaml --hosts node1,node2 [key.sub=value ...]

`--dry-run` shows the whole plan and reaches nobody (docs/guides/multi_node.md). Exit code 0 when the stage finished, 1 when it failed for
good, 2 with a sentence when an argument, a recipe or a host is not fit.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from launching.show import show_plan

from rlhf.config import batch_arithmetic, load_config, require_unsharded, trained_model
from rlhf.footprint import read_sharding
from rlhf.hardware import parse_gpus
from rlhf.launch.layout import SSH, Host, Launch, parse_hosts, read_ranks, server_urls, serving_commands
from rlhf.launch.slurm import SRUN, batch_script
from rlhf.launch.supervise import TimeLimitNear, check_hosts, serving, signals_end_the_launch, supervise, wait_for_hosts
from rlhf.run import check_output_dir, faults_as_sentences, finished, say


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    main.add_argument("recipe", metavar="RECIPE")
    main.add_argument("overrides", nargs="*", metavar="key.sub=value")
    main.add_argument("--nodes", type=int, help="how many; by default as many as --hosts names")
    main.add_argument("--hosts", default="", help="name or name=address, separated by commas; the first has rank 0")
    main.add_argument("--serving-hosts", default="", help="hosts that serve completions, where the recipe has a server")
    main.add_argument(
        "--serving-nodes", type=int, default=0, help="how many nodes of a SLURM job serve, besides --nodes"
    )
    main.add_argument("--serving-port", type=int, default=8400, help="on every serving host: %(default)s")
    main.add_argument(
        "--accelerate",
        metavar="FILE",
        default="recipes/accelerate/multi_node.yaml",
        help="accelerate configuration of all nodes together (default: %(default)s)",
    )
    main.add_argument("--ssh", default=SSH, metavar="TEMPLATE", help="what reaches a host: %(default)s")
    main.add_argument(
        "--port", type=int, help="on the first host, free; by default the configuration's main_process_port"
    )
    main.add_argument("--directory", default=str(Path.cwd()), help="of the checkout on every host, by default this one")
    main.add_argument("--python", default=sys.executable, help="the same on every host")
    main.add_argument("--env", action="append", default=[], metavar="KEY=VALUE", help="for every host's ranks")
    main.add_argument("--restarts", type=int, default=3, help="at most, after a rank or a host died")
    main.add_argument("--wait", type=float, default=600.0, help="seconds for lost hosts to come back before a restart")
    main.add_argument("--logs", type=Path, help="by default output_dir with .launch behind it")
    main.add_argument("--gpus", help="of each host, 8xH100-80GB for instance: adds the memory plan to --dry-run")
    main.add_argument(
        "--model-config", action="append", default=[], metavar="[ROLE=]FILE", help="as for scripts/plan.py"
    )
    main.add_argument(
        "--slurm", action="store_true", help="submit a SLURM job that runs this launcher on --nodes nodes"
    )
    main.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="--sbatch=--partition=gpu, repeated"
    )
    main.add_argument("--dry-run", action="store_true", help="show everything, start and reach nothing")
    return main


def serving_hosts(arguments: argparse.Namespace) -> tuple[Host, ...]:
    """As they were named, or stand-ins for those that SLURM will name."""
    if arguments.slurm:
        return parse_hosts([f"SERVING{i}" for i in range(arguments.serving_nodes)])
    return parse_hosts(arguments.serving_hosts.split(","), "--serving-hosts") if arguments.serving_hosts else ()


def plan_launch(arguments: argparse.Namespace) -> Launch:
    """The launch that the command line describes, with everything checked that needs no other host.

    Raises:
        ValueError: for what is wrong with it.
    """
    config = load_config(arguments.recipe, arguments.overrides)
    urls = server_urls(config, serving_hosts(arguments), arguments.serving_port)
    if urls and not arguments.slurm:  # there, the job's own launcher learns the names
        arguments.overrides += urls
        config = load_config(arguments.recipe, arguments.overrides)
    if not Path(config.script).is_file():
        raise ValueError(
            f"{config.script} is not in {Path.cwd()}; run the launcher from the checkout's folder, as it runs on the hosts"
        )
    if arguments.slurm and arguments.hosts:
        raise ValueError("--slurm and --hosts exclude each other: SLURM chooses the hosts; give --nodes alone")
    texts = arguments.hosts.split(",") if arguments.hosts else []
    if arguments.slurm:
        texts = [f"NODE{i}" for i in range(arguments.nodes or 0)]  # names that SLURM will give
    if arguments.dry_run and not texts:
        texts = [f"node{i}" for i in range(arguments.nodes or 0)]  # a plan needs no names
    if not texts:
        missing = (
            "--nodes is missing; say how many"
            if arguments.slurm
            else "--hosts is missing; name the hosts to train on, the first one with rank 0"
        )
        raise ValueError(missing)
    hosts = parse_hosts(texts)
    nodes = arguments.nodes or len(hosts)
    if nodes != len(hosts):
        raise ValueError(f"--nodes is {nodes} and --hosts names {len(hosts)}; they must agree")
    if arguments.restarts < 0:
        raise ValueError(f"--restarts is {arguments.restarts}; give 0 or more")
    ranks = read_ranks(arguments.accelerate, nodes=nodes)
    environment = dict(pair.partition("=")[::2] for pair in arguments.env)
    launch = Launch(
        config=config, recipe=arguments.recipe, overrides=arguments.overrides, ranks=ranks, hosts=hosts, directory=arguments.directory,
        python=arguments.python, ssh=SRUN if arguments.slurm else arguments.ssh, port=arguments.port or ranks.port, environment=environment,
    )  # fmt: skip
    batch_arithmetic(config, ranks.num_processes)
    model = trained_model(config)
    if model is not None:
        require_unsharded(model, read_sharding(ranks.path)[0].stage)
    check_output_dir(config)
    return launch


def run(arguments: argparse.Namespace) -> int:
    launch = plan_launch(arguments)
    logs = arguments.logs or Path(f"{launch.config.output_dir.rstrip('/')}.launch")
    job = batch_job(arguments, launch, logs) if arguments.slurm else None
    if arguments.dry_run:
        print(
            show_plan(
                launch,
                servers=serving_hosts(arguments),
                serving_port=arguments.serving_port,
                logs=logs,
                restarts=arguments.restarts,
                gpus=arguments.gpus,
                model_configs=arguments.model_config,
            )
        )
        print(f"\n{logs}/job.sbatch\n{job}" if job is not None else "", end="")
        return 0
    if finished(launch.config) is not None:
        say(f"{launch.config.output_dir} holds this very run, finished; delete it to run again")
        return 0
    if job is not None:
        return submit(job, logs)
    check_hosts(launch)
    try:
        with signals_end_the_launch():
            servers = serving_hosts(arguments)
            with serving(launch, servers, serving_commands(launch, servers, arguments.serving_port), logs):
                return supervise(
                    launch, restarts=arguments.restarts, logs=logs, ready=lambda: wait_for_hosts(launch, arguments.wait)
                )
    except TimeLimitNear:
        number = os.environ["SLURM_JOB_ID"]
        say(f"the time limit is near: job {number} is requeued and goes on from the newest checkpoint")
        return subprocess.run(["scontrol", "requeue", number]).returncode


def batch_job(arguments: argparse.Namespace, launch: Launch, logs: Path) -> str:
    """The sbatch script that runs this command line inside an allocation."""
    repeated = [("--env", arguments.env), ("--model-config", arguments.model_config)]
    launcher = [
        launch.python, "-u", "scripts/launch.py", launch.recipe, *launch.overrides, "--nodes", str(len(launch.hosts)),
        "--accelerate", launch.ranks.path, "--python", launch.python, "--directory", launch.directory,
        "--restarts", str(arguments.restarts), "--wait", str(arguments.wait), "--serving-port", str(arguments.serving_port), "--logs", str(logs), *(word for key, values in repeated for v in values for word in (key, v)),
    ]  # fmt: skip
    gpus = parse_gpus(arguments.gpus).count if arguments.gpus not in (None, "cpu") else 0
    return batch_script(
        launch.config, launch.ranks, launcher=launcher, directory=launch.directory, logs=logs, gpus_per_node=gpus,
        serving_nodes=arguments.serving_nodes,
        options=arguments.sbatch,
    )  # fmt: skip


def submit(job: str, logs: Path) -> int:
    """Hand a job to SLURM; sbatch's exit code.

    Raises:
        ValueError: when there is no sbatch here.
    """
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not installed here; run this on a login node of the cluster, or launch over ssh with --hosts"
        )
    logs.mkdir(parents=True, exist_ok=True)
    file = logs / "job.sbatch"
    file.write_text(job, encoding="utf-8")
    return subprocess.run(["sbatch", str(file)]).returncode


def main() -> int:
    arguments = parser().parse_intermixed_args()
    with faults_as_sentences():
        return run(arguments)
    return 2


if __name__ == "__main__":
    sys.exit(main())
