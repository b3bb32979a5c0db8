"""Which host runs which ranks of a training stage, and the command that starts them there. Pure: nothing is reached or started here."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rlhf.config import Config, Offline, Online

SSH = "ssh -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
"""Never asks for a password, and gives a dead host up after a minute."""
DEFAULT_PORT = 29500


@dataclass(frozen=True, slots=True)
class Host:
    """A machine of the launch."""

    name: str
    """What the launcher reaches it by, `user@` included."""
    address: str
    """What the other hosts reach it by."""


def parse_host(text: str) -> Host:
    """`name`, `user@name` or `name=address`.

    Raises:
        ValueError: for anything that is no host name; such text must never become part of a command.
    """
    name, _, address = text.partition("=")
    address = address or name.rpartition("@")[2]
    label = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?"
    if not re.fullmatch(rf"(?:{label}@)?{label}", name) or not re.fullmatch(rf"{label}|[0-9A-Fa-f:]+", address):
        raise ValueError(f"{text!r} is no host: write name, user@name or name=address, for instance node1=10.0.0.1")
    return Host(name, address)


def parse_hosts(texts: Sequence[str], key: str = "--hosts") -> tuple[Host, ...]:
    """Hosts of a comma-separated list.

    Raises:
        ValueError: for something that is no host name, or a host named twice.
    """
    hosts = tuple(parse_host(text.strip()) for text in texts)
    for what in ("name", "address"):
        values = [getattr(host, what) for host in hosts]
        doubled = {value for value in values if values.count(value) > 1}
        if doubled:
            raise ValueError(f"{key} names {doubled.pop()} twice; each host runs one launch of all its ranks")
    return hosts


# -------------------------------------------------------------------------------------------------------------- accelerate's file


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """What an accelerate configuration says of machines and processes."""

    path: str
    num_machines: int
    num_processes: int
    """Of all machines."""
    port: int

    @property
    def per_host(self) -> int:
        return self.num_processes // self.num_machines


def read_ranks(path: str, *, nodes: int) -> Ranks:
    """An accelerate configuration, checked for a launch on `nodes` hosts, each with as many ranks as the file gives one machine.

    Raises:
        ValueError: with the line to write into it.
    """
    if not Path(path).is_file():
        raise ValueError(f"--accelerate names {path}, which does not exist; see recipes/accelerate/multi_node.yaml")
    settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(settings, dict) or "num_processes" not in settings:
        raise ValueError(f"{path} is no accelerate configuration: it has no num_processes")
    machines, processes = int(settings.get("num_machines", 1)), int(settings["num_processes"])
    if processes % machines:
        raise ValueError(
            f"{path} has num_processes: {processes}, which {machines} machines cannot share evenly; num_processes counts the ranks of all machines"
        )
    machines, processes = nodes, nodes * (processes // machines)
    kind = str(settings.get("distributed_type", "NO"))
    if processes > 1 and kind not in ("MULTI_GPU", "DEEPSPEED"):
        raise ValueError(
            f"{path} has distributed_type: {kind}, under which accelerate starts one process a host that knows of no other; write MULTI_GPU "
            "(on CPU ranks too) or DEEPSPEED"
        )
    launcher = (settings.get("deepspeed_config") or {}).get("deepspeed_multinode_launcher")
    if kind == "DEEPSPEED" and machines > 1 and launcher != "standard":
        raise ValueError(
            f"{path} has deepspeed_multinode_launcher: {launcher or 'pdsh'}, which would start the other hosts a second time; write standard"
        )
    if str(settings.get("rdzv_backend") or "static") != "static":
        raise ValueError(
            f"{path} has rdzv_backend: {settings['rdzv_backend']}; the launcher numbers the hosts: write static"
        )
    return Ranks(
        path=path,
        num_machines=machines,
        num_processes=processes,
        port=int(settings.get("main_process_port") or DEFAULT_PORT),
    )


# ------------------------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A training stage on its hosts."""

    config: Config
    recipe: str
    overrides: Sequence[str]
    ranks: Ranks
    hosts: Sequence[Host]
    """The first one has rank 0."""
    directory: str
    """Of the checkout, the same path on every host."""
    python: str
    ssh: str = SSH
    port: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """On top of what each host's login shell sets."""

    def __post_init__(self) -> None:
        if not isinstance(self.config, Online | Offline):
            raise ValueError(
                f"{self.recipe} is a recipe for the stage {self.config.stage}, which does not train on several hosts; run {self.config.script} "
                "with it, or launch the training stages of a pipeline one by one"
            )
        if not 1024 <= self.port <= 65535:
            raise ValueError(f"--port is {self.port}; give one between 1024 and 65535")
        for key in ("directory", "python"):
            path = getattr(self, key)
            if not path.startswith("/") or any(not c.isprintable() for c in path):
                raise ValueError(f"--{key} is {path!r}; give an absolute path, which must hold on every host")
        for key in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", key):
                raise ValueError(f"--env names {key!r}, which is no variable; write --env KEY=VALUE")

    def ranks_of(self, index: int) -> range:
        """The ranks of host `index`."""
        per_host = self.ranks.per_host
        return range(index * per_host, (index + 1) * per_host)

    def command(self, index: int) -> list[str]:
        """What runs on host `index`: accelerate's launcher inside rlhf/launch/host.py."""
        return [
            self.python, "-m", "rlhf.launch.host", "run",
            "--config_file", self.ranks.path,
            "--num_machines", str(len(self.hosts)), "--num_processes", str(self.ranks.num_processes), "--machine_rank", str(index),
            "--main_process_ip", self.hosts[0].address, "--main_process_port", str(self.port),
            self.config.script, "--config", self.recipe, *self.overrides,
        ]  # fmt: skip

    def check_command(self, index: int, *, nonce: str) -> list[str]:
        """What tells, on host `index` and before anything is started, whether it is fit for the launch."""
        return [
            self.python, "-m", "rlhf.launch.host", "check", "--machine_rank", str(index), "--main_process_ip", self.hosts[0].address,
            "--main_process_port", str(self.port), "--nonce", nonce, "--accelerate", self.ranks.path, "--config", self.recipe, *self.overrides,
        ]  # fmt: skip

    def on_host(self, host: Host, command: Sequence[str]) -> list[str]:
        """The local command that runs `command` on a host, in the checkout and with the environment of the launch."""
        variables = ["env", *(f"{key}={value}" for key, value in self.environment.items())] if self.environment else []
        return reach(self.ssh, host, f"cd {shlex.quote(self.directory)} && exec {shlex.join([*variables, *command])}")


def reach(template: str, host: Host, shell_line: str) -> list[str]:
    """A command template with a host and a line for its shell put in.

    `{host}` and `{command}` stand for the two. Without them the host comes last and the line follows: as one word for ssh, which hands
    it to a shell by itself, as `sh -c LINE` for everything else.

    Example:
        ssh -p 2222                       ssh -p 2222 HOST LINE
        ip netns exec {host}              ip netns exec HOST sh -c LINE
        srun --nodelist={host}            srun --nodelist=HOST sh -c LINE

    Raises:
        ValueError: when the template is empty or its quotes do not match.
    """
    try:
        words = shlex.split(template)
    except ValueError as error:
        raise ValueError(f"--ssh is {template!r}: {error}") from None
    if not words:
        raise ValueError("--ssh is empty; it is the command that reaches a host, ssh by default")
    if not any("{host}" in word for word in words):
        words.append("{host}")
    has_line = any("{command}" in word for word in words)
    filled = [word.replace("{host}", host.name).replace("{command}", shell_line) for word in words]
    if has_line:
        return filled
    return [*filled, shell_line] if Path(words[0]).name == "ssh" else [*filled, "sh", "-c", shell_line]


# -------------------------------------------------------------------------------------------------------------------- rollout servers


def serves(config: Config) -> bool:
    """Whether the recipe's completions come from servers, which may run on hosts of their own."""
    return isinstance(config, Online) and str(config.rollout.engine) == "server"


def server_urls(config: Config, hosts: Sequence[Host], port: int) -> list[str]:
    """Overrides that tell the training ranks of the servers on `hosts`.

    Raises:
        ValueError: when hosts are given and the recipe has nothing to serve.
    """
    if not hosts:
        return []
    if not serves(config):
        engine = config.rollout.engine if isinstance(config, Online) else "not part of this stage"
        raise ValueError(
            f"--serving-hosts names {', '.join(host.name for host in hosts)}, but rollout.engine is {engine}, which samples inside the training "
            "ranks; leave --serving-hosts out"
        )
    return [f"rollout.server.urls=[{', '.join(f'http://{host.address}:{port}' for host in hosts)}]"]


def serving_commands(launch: Launch, hosts: Sequence[Host], port: int) -> list[list[str]]:
    """The command of each serving host: scripts/serve.py under the same watch as the ranks. Seam: only this function knows that script."""
    return [
        [
            launch.python, "-m", "rlhf.launch.host", "serve", launch.python, "-u", "scripts/serve.py", launch.recipe, *launch.overrides,
            "--host", host.address, "--port", str(port),
        ]
        for host in hosts
    ]  # fmt: skip
