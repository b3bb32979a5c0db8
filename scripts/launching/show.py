"""A launch as text, for --dry-run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from plan import read_machine, read_shapes, show

from rlhf.config import batch_arithmetic
from rlhf.footprint import read_sharding
from rlhf.hardware import Machine
from rlhf.launch.layout import Host, Launch, serving_commands
from rlhf.plan import make_plan
from rlhf.run import format_table


def show_plan(
    launch: Launch,
    *,
    servers: Sequence[Host],
    serving_port: int,
    logs: Path,
    restarts: int,
    gpus: str | None,
    model_configs: list[str],
) -> str:
    """Everything that would happen, without reaching a host."""
    ranks, first = launch.ranks, launch.hosts[0]
    parts = [
        f"{launch.config.stage} from {launch.recipe} on {len(launch.hosts)} hosts, {ranks.num_processes} ranks",
        "batch arithmetic\n" + format_table(batch_arithmetic(launch.config, ranks.num_processes))
        if gpus is None
        else memory_plan(launch, gpus, model_configs),
    ]
    hosts = [(h.name, f"{h.address}, {_range(launch.ranks_of(i))}") for i, h in enumerate(launch.hosts)]
    hosts += [(h.name, f"{h.address}, serves completions on port {serving_port}") for h in servers]
    parts.append("hosts\n" + format_table(hosts))
    parts.append(
        "start-up\n"
        + format_table(
            [
                ("accelerate configuration", ranks.path),
                ("rendezvous", f"{first.address}, port {launch.port}, which must be free there and reachable from the others"),
                ("environment", shlex.join(f"{k}={v}" for k, v in launch.environment.items()) or "the login shell's, nothing added"),
                ("GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME", f"unless set: the interface towards {first.address}, found by each host"),
                ("checked first", "every host answers, has this code, recipe and configuration, these versions, and sees one output_dir"),
                ("logs", f"{logs}/attempt-NNN/, a file a host"),
                (
                    "restarts",
                    f"at most {restarts}, from the newest checkpoint in {launch.config.output_dir}; none after exit code 2, nor without a new checkpoint",
                ),
            ]
        )
    )  # fmt: skip
    started = [*zip(servers, serving_commands(launch, servers, serving_port), strict=True)]
    started += [(h, launch.command(i)) for i, h in enumerate(launch.hosts)]
    commands = "\n".join(f"  {shlex.join(launch.on_host(host, command))}" for host, command in started)
    return "\n\n".join([*parts, f"commands\n{commands}"])


def memory_plan(launch: Launch, gpus: str, model_configs: list[str]) -> str:
    """The plan of scripts/plan.py over the devices of all hosts.

    Raises:
        ValueError: when a host has another number of devices than ranks.
    """
    one = read_machine(gpus)
    if one.count != launch.ranks.per_host and not one.device.is_cpu:
        raise ValueError(
            f"--gpus gives each host {one.count} devices and {launch.ranks.path} gives it {launch.ranks.per_host} ranks; a rank needs a device of its own"
        )
    machine = Machine(launch.ranks.num_processes, one.device)
    sharding, _ = read_sharding(launch.ranks.path)
    shapes, notes = read_shapes(launch.config, model_configs)
    plan = make_plan(launch.config, shapes, machine, sharding)
    notes.append("times count the links inside a host; those between hosts are slower")
    verdict = "fits" if plan.fits else "does not fit: scripts/plan.py says what would help"
    return "\n".join([show(plan, shapes, sharding), *(f"note: {note}" for note in notes), verdict])


def _range(ranks: range) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
