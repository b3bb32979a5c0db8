"""Checks the hosts, starts their ranks, and starts them again from the newest checkpoint when some die."""

from __future__ import annotations

import json
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.launch.host import ANSWER, GRACE, fingerprint
from rlhf.launch.layout import Host, Launch, reach

USER_FAULT = 2
LOST = 255
"""Of an ssh client whose connection broke."""
SETTLE = 10.0
"""Seconds in which the other hosts may end by themselves after the first: theirs may be the cause."""
CHECK_SECONDS = 120.0
POLL = 0.1
RETRY = 5.0
LAST_LINES = 8


# --------------------------------------------------------------------------------------------------------------------------- checks


def check_hosts(launch: Launch) -> list[dict[str, Any]]:
    """Ask every host whether it is fit for the launch; their answers in order. The first one goes first, for the others look for its file.

    Raises:
        ValueError: one sentence for each thing wrong, before anything is started.
    """
    nonce = secrets.token_hex(8)
    first = _ask(launch, [0], nonce)
    others = _ask(launch, range(1, len(launch.hosts)), nonce)
    answers = first + others
    here = fingerprint(launch.recipe, list(launch.overrides), launch.ranks.path)
    faults = [f for i, answer in enumerate(answers) for f in faults_of(launch, launch.hosts[i], answer, here)]
    if faults:
        raise ValueError("; ".join(faults))
    return answers


def wait_for_hosts(launch: Launch, seconds: float) -> None:
    """Check the hosts again and again until they are fit, for a host that died may be on its way back.

    Raises:
        ValueError: when they are not after `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        try:
            check_hosts(launch)
            return
        except ValueError:
            if time.monotonic() > end:
                raise
        time.sleep(RETRY)


def _ask(launch: Launch, indices: Sequence[int], nonce: str) -> list[dict[str, Any]]:
    asked = [
        subprocess.Popen(
            launch.on_host(launch.hosts[i], launch.check_command(i, nonce=nonce)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in indices
    ]
    end = time.monotonic() + CHECK_SECONDS
    answers = []
    for process in asked:
        try:
            out, err = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()[0], f"no answer after {CHECK_SECONDS:.0f} s"
        lines = [line.removeprefix(ANSWER) for line in out.splitlines() if line.startswith(ANSWER)]
        if lines:
            answers.append(json.loads(lines[-1]))
        else:
            why = (err.strip() or out.strip() or "it said nothing").splitlines()[-1]
            answers.append({"unreachable": f"{why} (exit code {process.returncode})"})
    return answers


def faults_of(launch: Launch, host: Host, answer: Mapping[str, Any], here: Mapping[str, str]) -> list[str]:
    """What makes a host unfit, a sentence each."""
    if "unreachable" in answer:
        return [
            f"host {host.name} cannot be used: {answer['unreachable']}; try {shlex.join(reach(launch.ssh, host, 'true'))} by hand"
        ]
    if "error" in answer:
        return [f"host {host.name}: {answer['error']}"]
    faults = [
        f"host {host.name} has another {what} than this one ({answer['same'].get(what, '')[:20]} there, {value[:20]} here); bring them to the same"
        for what, value in here.items()
        if answer["same"].get(what) != value
    ]
    if not answer["port_free"]:
        faults.append(f"port {launch.port} is in use on host {host.name}; choose another --port")
    if not answer["shares_output_dir"]:
        faults.append(
            f"host {host.name} does not see what {launch.hosts[0].name} writes beside output_dir {launch.config.output_dir}; "
            "checkpoints and logs need a folder that all hosts share"
        )
    if answer["interface"].startswith("lo") and len(launch.hosts) > 1:
        faults.append(
            f"host {host.name} reaches the first host's address {launch.hosts[0].address} over its loopback; give the address the others see: "
            f"--hosts {launch.hosts[0].name}=ADDRESS,..."
        )
    return faults


# -------------------------------------------------------------------------------------------------------------------------- attempts


@dataclass(slots=True)
class Running:
    """A host's part of an attempt."""

    host: Host
    process: subprocess.Popen[bytes]
    log: Path

    def end(self) -> None:
        """Let go of its standard input, which ends its ranks."""
        if self.process.stdin is not None:
            self.process.stdin.close()


@dataclass(frozen=True, slots=True)
class Ended:
    """How a host's part of an attempt came to its end."""

    host: Host
    code: int
    log: Path

    def __str__(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        tail = "\n".join(f"  | {line}" for line in lines)
        return f"host {self.host.name} ended with {describe(self.code)}; the last lines of {self.log}:\n{tail}"


def describe(code: int) -> str:
    """An exit code in words."""
    number = -code if code < 0 else code - 128
    if code == LOST:
        return f"exit code {code}, a lost connection"
    if number in {s.value for s in signal.Signals}:
        return f"{signal.Signals(number).name} (exit code {code})"
    return f"exit code {code}"


def culprit(ended: Sequence[Ended]) -> Ended:
    """Of hosts in the order in which they ended, the one whose end explains the others'.

    A refusal explains all; a rank ended by a signal or a lost connection makes the ranks of other hosts fail, with exit code 1, in the same moment.
    """
    failed = [e for e in ended if e.code != 0]
    for explains in (lambda c: c == USER_FAULT, lambda c: c < 0 or c > 128):
        for e in failed:
            if explains(e.code):
                return e
    return failed[0]


def start_hosts(launch: Launch, hosts: Sequence[Host], commands: Sequence[Sequence[str]], logs: Path) -> list[Running]:
    """Each host's command, with a log of its own and a standard input that only this process holds open."""
    logs.mkdir(parents=True, exist_ok=True)
    running = []
    for index, (host, command) in enumerate(zip(hosts, commands, strict=True)):
        log = logs / f"{index}-{host.name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                launch.on_host(host, command),
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the launcher's to pass on
            )
        running.append(Running(host, process, log))
    return running


def end_all(running: Sequence[Running]) -> None:
    """End what still runs: its ranks first, and after a while its connection."""
    for r in running:
        r.end()
    end = time.monotonic() + GRACE + 5
    for r in running:
        try:
            r.process.wait(timeout=max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(r.process.pid, signal.SIGKILL)
            r.process.wait()


def attempt(launch: Launch, logs: Path, out: IO[str]) -> Ended | None:
    """Run all hosts once; None when all ended well, else the one that explains the end of the others. Rank 0's lines are shown as they come."""
    running = start_hosts(launch, launch.hosts, [launch.command(i) for i in range(len(launch.hosts))], logs)
    ended: dict[int, Ended] = {}
    deadline = None
    try:
        with running[0].log.open("r", encoding="utf-8", errors="replace") as main_log:
            while len(ended) < len(running) and (deadline is None or time.monotonic() < deadline):
                out.write(main_log.read())
                out.flush()
                for i, r in enumerate(running):
                    code = r.process.poll()
                    if i not in ended and code is not None:
                        ended[i] = Ended(r.host, code, r.log)
                        if code and deadline is None:
                            deadline = time.monotonic() + SETTLE
                time.sleep(POLL)
            out.write(main_log.read())
            out.flush()
    finally:
        end_all(running)
    failed = [e for e in ended.values() if e.code]
    return culprit(failed) if failed else None


def newest_step(output_dir: Path) -> int:
    """Of the newest published checkpoint; -1 without any."""
    numbers = [
        int(p.name.rpartition("-")[2])
        for pattern in ("checkpoints/step-*", "trainer/checkpoint-*")
        for p in output_dir.glob(pattern)
    ]
    return max(numbers, default=-1)


def supervise(
    launch: Launch, *, restarts: int, logs: Path, out: IO[str] = sys.stdout, ready: Callable[[], Any] = lambda: None
) -> int:
    """Run until the stage is finished, restarting at most `restarts` times; the exit code.

    Args:
        launch: what to run and where.
        restarts: how often the ranks may be started again.
        logs: a folder for each attempt's logs is made in it.
        out: where the launcher speaks.
        ready: called before each restart; raises ValueError when the hosts are not fit.
    """
    output_dir = Path(launch.config.output_dir)
    step = newest_step(output_dir)
    for number in range(restarts + 1):
        failed = attempt(launch, next_folder(logs), out)
        if failed is None:
            return 0
        print(str(failed), file=out, flush=True)
        if failed.code == USER_FAULT:
            print("not restarted: repair what it says and run the same command again", file=out, flush=True)
            return USER_FAULT
        reached = newest_step(output_dir)
        at = f"checkpoint {reached}" if reached >= 0 else "the beginning, there is no checkpoint yet"
        if number and reached <= step:
            print(
                f"not restarted: no new checkpoint since the last restart, which went on from {at}",
                file=out,
                flush=True,
            )
            return 1
        if number == restarts:
            print(f"not restarted: {restarts} restarts are used up (--restarts); the same command goes on from {at}", file=out, flush=True)  # fmt: skip
            return 1
        step = reached
        ready()
        print(f"restart {number + 1} of {restarts}, from {at}", file=out, flush=True)
    return 1


def next_folder(logs: Path) -> Path:
    """A new folder for an attempt's logs; those of earlier launches stay."""
    numbers = [int(p.name.rpartition("-")[2]) for p in logs.glob("attempt-*")]
    return logs / f"attempt-{max(numbers, default=0) + 1:03d}"


@contextmanager
def serving(launch: Launch, hosts: Sequence[Host], commands: Sequence[Sequence[str]], logs: Path) -> Iterator[None]:
    """Servers on their hosts for as long as the context lasts, restarts of the ranks included."""
    running = start_hosts(launch, hosts, commands, logs / "serving") if hosts else []
    try:
        yield
    finally:
        end_all(running)


class TimeLimitNear(Exception):
    """SLURM said that the job's time ends soon."""


@contextmanager
def signals_end_the_launch() -> Iterator[None]:
    """SIGTERM becomes an exit and, in a SLURM job, SIGUSR1 a TimeLimitNear: no rank is left behind."""

    def time_limit_near(*_: Any) -> None:
        raise TimeLimitNear

    handlers: dict[signal.Signals, Any] = {signal.SIGTERM: lambda *_: sys.exit(128 + signal.SIGTERM)}
    if "SLURM_JOB_ID" in os.environ:
        handlers[signal.SIGUSR1] = time_limit_near
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
