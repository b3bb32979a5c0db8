"""What a launch runs on each of its hosts: a check before anything is started, then accelerate's launcher under supervision.

    python -m rlhf.launch.host check|run|serve ...

Standard input is the line to the launcher. When it ends, because the launcher ended this host or died itself, so do this host's ranks: an
ssh client that is killed leaves what it started running.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from rlhf.config import load_config, to_yaml
from rlhf.run import DIE_WITH_PARENT, die_with_parent, git_revision

ROOT = Path(__file__).parents[2]
ANSWER = "scratchpad-host: "
"""Before the answer of a check, which may come after a login shell's greetings."""
PACKAGES = ("torch", "transformers", "accelerate", "trl", "peft")
GRACE = 35.0
"""Seconds for ranks to end after SIGTERM; torch's agent kills them after 30."""


# ----------------------------------------------------------------------------------------------------------------------------- check


def code_digest() -> str:
    """Of every Python file that a training stage may import: two checkouts of one revision may still differ."""
    digest = hashlib.sha256()
    for package in ("rlhf", "reward_models", "data", "scripts"):
        for path in sorted((ROOT / package).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def fingerprint(recipe: str, overrides: list[str], accelerate: str) -> dict[str, str]:
    """What must be the same on all hosts, and where the launch was planned.

    Raises:
        ValueError: when the recipe cannot be loaded here.
        OSError: when the accelerate configuration cannot be read here.
    """
    return {
        "code revision": git_revision(),
        "code": code_digest(),
        "recipe": hashlib.sha256(to_yaml(load_config(recipe, overrides)).encode()).hexdigest(),
        "accelerate configuration": hashlib.sha256(Path(accelerate).read_bytes()).hexdigest(),
        "Python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def interface_towards(address: str) -> str:
    """The network interface from which this host talks to `address`, which may be its own.

    Raises:
        OSError: when `address` is unknown or there is no way to it.
    """
    family, kind, *_, target = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(target)  # of a datagram socket: routes, sends nothing
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == own for a in addresses):
            return name
    raise OSError(f"no interface has {own}, the address of the way to {address}")


def port_is_free(port: int) -> bool:
    with socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def shared_file(output_dir: str) -> Path:
    """Written by the first host, looked for by the others: all ranks must see one output_dir."""
    return Path(f"{output_dir.rstrip('/')}.launch") / "shared"


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the launcher wants to know of this host before it starts anything."""
    try:
        same = fingerprint(arguments.config, arguments.overrides, arguments.accelerate)
        interface = interface_towards(arguments.main_process_ip)
        shared = shared_file(load_config(arguments.config, arguments.overrides).output_dir)
        if arguments.machine_rank == 0:
            shared.parent.mkdir(parents=True, exist_ok=True)
            shared.write_text(arguments.nonce, encoding="utf-8")
        found = shared.read_text(encoding="utf-8") if shared.is_file() else ""
    except (ValueError, OSError) as error:
        return {"error": str(error)}
    return {
        "same": same,
        "interface": interface,
        "shares_output_dir": found == arguments.nonce,
        "port_free": arguments.machine_rank > 0 or port_is_free(arguments.main_process_port),
    }


# ------------------------------------------------------------------------------------------------------------------------------- run


def end_with_stdin() -> None:
    """End this process, and with it the host's ranks, when the launcher lets go of standard input."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE)
    os._exit(128 + signal.SIGTERM)  # ranks that are still there die with their parent


def ready_environment(main_address: str) -> None:
    """Variables of this host's ranks, as far as the user has not set them.

    Gloo and NCCL would else take the interface of the host's name, which on many systems is the loopback.
    """
    interface = interface_towards(main_address)
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, interface)
    os.environ[DIE_WITH_PARENT] = "1"
    # of this checkout, whatever is installed beside it
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


def exit_code_of(failures: list[tuple[int, int]]) -> int:
    """This host's exit code from (rank, exit code) of its failed ranks, the first failure first: 2 when one refused its input, 128 + n for signal n."""
    codes = [code for _, code in failures]
    first = 2 if 2 in codes else codes[0]
    return 128 - first if first < 0 else first


def run(launcher_arguments: list[str], main_address: str) -> int:
    """Run `accelerate launch` until its ranks end; the host's exit code."""
    threading.Thread(target=end_with_stdin, daemon=True).start()
    ready_environment(main_address)
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch.launch_command(launch.launch_command_parser().parse_args(launcher_arguments))
    except ChildFailedError as error:
        ordered = sorted(error.failures.items(), key=lambda item: item[1].timestamp)
        failures = [(rank, failure.exitcode) for rank, failure in ordered]
        for rank, code in failures:
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            print(f"rank {rank} ended with {how}", flush=True)
        return exit_code_of(failures)
    except SignalException as error:
        return 128 + error.sigval
    return 0


def serve(command: list[str]) -> int:
    """Run a command that is no training until it ends or the launcher lets go; its exit code."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=die_with_parent)

    def end(*_: Any) -> None:
        os.killpg(child.pid, signal.SIGTERM)

    signal.signal(signal.SIGTERM, end)
    threading.Thread(target=end_with_stdin, daemon=True).start()
    return child.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    check_parser = kinds.add_parser("check")
    for name, of_type in (("machine_rank", int), ("main_process_port", int), ("main_process_ip", str), ("nonce", str)):
        check_parser.add_argument(f"--{name}", type=of_type, required=True)
    check_parser.add_argument("--accelerate", required=True)
    check_parser.add_argument("--config", required=True)
    check_parser.add_argument("overrides", nargs="*")
    kinds.add_parser("run", help="accelerate launch's own arguments follow")
    kinds.add_parser("serve", help="a command follows")
    if sys.argv[1:2] == ["run"]:
        rest = sys.argv[2:]
        return run(rest, main_address=rest[rest.index("--main_process_ip") + 1])
    if sys.argv[1:2] == ["serve"]:
        return serve(sys.argv[2:])
    print(ANSWER + json.dumps(check(parser.parse_args())), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
