"""Kills a run, or a part of it, at random moments and compares what comes out with a run left alone: weights bit for bit, metrics row by row.

    python scripts/verify_resume.py recipes/tiny/grpo.yaml training.num_batches=15 --kills 20
    python scripts/verify_resume.py recipes/tiny/grpo.yaml --victim grader --kills 10
    python scripts/verify_resume.py recipes/tiny/grpo.yaml --victim rank --accelerate_config recipes/accelerate/ddp.yaml --num_processes 2

`job`: each kill is a trial of its own, SIGKILL to all processes of the run, then the same command again until it finishes. Every second kill
waits for a checkpoint that is being written and comes in the middle of it. `rank`: the same, but one rank is killed and the launcher has
to end the others. `grader`: workers of the grader are killed during one run, which has to go on by itself; every second kill waits
for one that is at work, a step at most. `server`: the same with the vLLM servers of a recipe that samples on them, and their engines. The exit code is 0 when every trial went on from a checkpoint, if it had one, and ended as the run left alone, 1 when one
did not, 2 when a run failed. Equality to the last bit holds on one CPU rank, and on two.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from rlhf.checkpoint import checkpoints
from rlhf.config import Config, Online, load_config
from rlhf.metrics import CLOCK, read_jsonl
from rlhf.run import FINISHED

ROOT = Path(__file__).parents[1]
FROM_THE_BEGINNING = "from the beginning"
ATTEMPTS = 5
"""At a kill that comes before the run ends."""
LAUNCHER_SECONDS = 90
"""In which a launcher that lost a rank must have ended the others."""


@dataclass(frozen=True)
class Runs:
    """How the runs of this verification are started."""

    recipe: str
    overrides: Sequence[str]
    config: Config
    folder: Path
    accelerate_config: str | None
    num_processes: int

    def start(self, name: str) -> subprocess.Popen[bytes]:
        launcher = []
        if self.accelerate_config is not None:
            launcher = ["-m", "accelerate.commands.launch", "--config_file", self.accelerate_config, "--num_processes", str(self.num_processes),
                        "--main_process_port", "0"]  # fmt: skip
        command = [sys.executable, *launcher, str(ROOT / self.config.script), "--config", self.recipe, *self.overrides]
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*command, f"output_dir={self.folder / name}"],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
            )

    def finish(self, name: str) -> None:
        """Run to the end, from wherever it was left.

        Raises:
            ChildProcessError: when it fails.
        """
        if self.start(name).wait() != 0:
            raise self.failure(name)

    def failure(self, name: str) -> ChildProcessError:
        last = (self.folder / f"{name}.log").read_text(encoding="utf-8", errors="replace")[-2000:]
        return ChildProcessError(f"the run {self.folder / name} failed:\n{last}")


@dataclass(frozen=True)
class LeftAlone:
    """What came out of the run that nobody disturbed."""

    weights: dict[str, torch.Tensor]
    rows: list[dict[str, float]]
    steps: int
    """How far it came, as `progress` counts."""
    seconds: float
    """Of a step."""


@dataclass(frozen=True)
class Trial:
    """One kill and what became of it."""

    killed: str
    """Where it had come to."""
    resumed: str
    """From where it went on."""
    started_over: bool
    """Though there was a checkpoint: what comes out is then equal, and shows nothing."""
    weights: int
    """Numbers in the saved weights that differ from those of the run left alone."""
    rows: int
    """Rows of metrics that differ."""


def progress(run: Path) -> int:
    """Optimizer steps by the newest checkpoint, or rows of metrics where there are no checkpoints; 0 before the first.

    Moments are counted in these and not in seconds, which other work on the same cores stretches.
    """
    found = checkpoints(run / "checkpoints")
    if found:
        return int(found[-1].name.rpartition("-")[2])
    return len(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0


def wait_until(process: subprocess.Popen[bytes], condition: Callable[[], bool], seconds: float = float("inf")) -> bool:
    """Whether `condition()` came true within `seconds`, before the process ended."""
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.0003)
    return False


def job(leader: psutil.Process) -> list[psutil.Process]:
    """All processes of a run."""
    return [leader, *leader.children(recursive=True)]


def ranks(leader: psutil.Process) -> list[psutil.Process]:
    """Those that a launcher started."""
    return [process for process in leader.children(recursive=True) if "LOCAL_RANK" in process.environ()]


def graders(leader: psutil.Process) -> list[psutil.Process]:
    """Workers of reward_models/grading/pool.py."""
    return [
        process
        for process in leader.children(recursive=True)
        if any("reward_models.grading.worker" in argument for argument in process.cmdline())
    ]


def servers(leader: psutil.Process) -> list[psutil.Process]:
    """The vLLM servers that the run started, and their engines."""
    return [
        process
        for process in leader.children(recursive=True)
        if process.name().startswith("VLLM::") or "vllm.entrypoints.openai.api_server" in process.cmdline()
    ]


VICTIMS = {"job": job, "rank": ranks, "grader": graders, "server": servers}
DISPENSABLE = ("grader", "server")
"""Victims whose loss a run survives by itself."""


def find_victims(process: subprocess.Popen[bytes], victim: str) -> list[psutil.Process]:
    """The processes of a run that a kill may hit; a process that ends meanwhile is none."""
    try:
        return VICTIMS[victim](psutil.Process(process.pid))
    except psutil.Error:
        return []


def strike(
    process: subprocess.Popen[bytes], victims: Sequence[psutil.Process], everything: Sequence[psutil.Process]
) -> bool:
    """SIGKILL to processes whose loss has to end their run; whether it ended by that.

    Raises:
        ChildProcessError: when the rest of the run goes on waiting for those that are gone.
    """
    for victim in victims:
        with suppress(psutil.NoSuchProcess):
            victim.kill()
    try:
        ended = process.wait(LAUNCHER_SECONDS) != 0 and bool(victims)
    except subprocess.TimeoutExpired:
        raise ChildProcessError(f"{LAUNCHER_SECONDS} s after the kill the run had not ended") from None
    finally:  # a launcher's children are sessions of their own
        for left in everything:
            with suppress(psutil.NoSuchProcess):
                left.kill()
    return ended


def kill_at(
    runs: Runs, name: str, victim: str, draw: random.Random, *, steps: int, seconds: float, in_a_write: bool
) -> str | None:
    """Start a run and kill it `seconds` after so many steps, or in the first write of a checkpoint from then on; where it had come to.

    None when it ended before.
    """
    process, run = runs.start(name), runs.folder / name
    wait_until(process, lambda: progress(run) >= steps)
    wait_until(process, lambda: False, seconds)
    everything, victims = find_victims(process, "job"), find_victims(process, victim)  # slow, so before the moment
    if victim != "job" and victims:
        victims = [draw.choice(victims)]
    writing = in_a_write and wait_until(process, lambda: any((run / "checkpoints").glob("writing-*")))
    alive = process.poll() is None and not (run / FINISHED).exists()
    if not strike(process, victims, everything) or not alive:
        return None
    batches = len(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0
    leftover = any((run / "checkpoints").glob("writing-*"))
    return f"in batch {batches + 1}" + (
        ", checkpoint half written" if leftover else ", after a write" if writing else ""
    )


def find_at_work(found: list[psutil.Process], process: subprocess.Popen[bytes], victim: str) -> list[psutil.Process]:
    """Put into `found` those victims that are computing at this moment."""
    with suppress(psutil.Error):
        found[:] = [one for one in find_victims(process, victim) if one.status() == psutil.STATUS_RUNNING]
    return found


def kill_parts(runs: Runs, name: str, victim: str, draw: random.Random, *, kills: int, steps: int) -> list[str]:
    """Kill one part of a run after another, which is to go on by itself to its end; where it had come to at each.

    Raises:
        ChildProcessError: when it does not.
    """
    process, run = runs.start(name), runs.folder / name
    struck: list[str] = []
    working: list[psutil.Process] = []
    for moment in sorted(draw.randint(1, max(1, int(0.8 * steps))) for _ in range(kills)):
        wait_until(process, lambda moment=moment: progress(run) >= moment)
        working.clear()
        if len(struck) % 2:
            wait_until(process, lambda m=moment: bool(find_at_work(working, process, victim)) or progress(run) > m)
        found = working or find_victims(process, victim)
        if found:
            with suppress(psutil.NoSuchProcess):
                draw.choice(found).kill()
                rows = len(read_jsonl(run / "metrics.jsonl")) if (run / "metrics.jsonl").exists() else 0
                struck.append(f"in batch {rows + 1}" + ", at work" * bool(working))
    if process.wait() != 0:
        raise ChildProcessError(
            f"the run {run} did not survive the loss of a {victim}; its last words are in {run}.log"
        )
    return struck


def flip_a_byte(run: Path, draw: random.Random) -> bool:
    """One bit of one file of the newest checkpoint, if there is an older one to fall back to."""
    found = checkpoints(run / "checkpoints")
    if len(found) < 2:
        return False
    file = draw.choice(sorted(found[-1].iterdir()))
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1
    file.write_bytes(content)
    return True


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    files = [f for f in run.rglob("*.safetensors") if not {"checkpoints", "trainer"} & set(f.relative_to(run).parts)]
    return {f"{f.relative_to(run)}:{key}": value for f in files for key, value in load_file(f).items()}


def rows_of(run: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith(CLOCK)} for row in read_jsonl(run / "metrics.jsonl")]


def differing_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> int:
    """How many numbers are not the same to the last bit; all of a tensor that only one side has."""
    total = 0
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            total += max(t.numel() for t in (a, b) if t is not None)
        else:
            total += int((_bytes(a) != _bytes(b)).any(1).sum())
    return total


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A row for each number."""
    return tensor.contiguous().flatten().view(torch.uint8).view(-1, tensor.element_size())


def differing_rows(one: list[dict[str, float]], other: list[dict[str, float]]) -> int:
    same = sum(a == b for a, b in zip(one, other, strict=False))
    return max(len(one), len(other)) - same


def resumed_from(log: Path) -> str:
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("resuming")
    ]
    return lines[-1].removeprefix("resuming ").split(", policy")[0] if lines else FROM_THE_BEGINNING


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument(
        "--victim", action="append", choices=VICTIMS, help="what is killed, the job if not given; may be repeated"
    )
    parser.add_argument(
        "--damage",
        action="store_true",
        help="flip a bit of the newest checkpoint after each kill, so that an older one must serve",
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("outputs/verify_resume"), help="for the runs and their logs; must not exist"
    )
    parser.add_argument("--accelerate_config", help="launch with accelerate; by default one plain process")
    parser.add_argument("--num_processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    arguments = parser.parse_intermixed_args()
    try:
        return verify(arguments)
    except (ValueError, ChildProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def verify(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)
    overrides = list(arguments.overrides)
    if isinstance(config, Online) and config.training.checkpoint_every_steps is None:
        overrides.append("training.checkpoint_every_steps=1")
    if arguments.folder.exists():
        raise ValueError(f"{arguments.folder} exists; delete it or choose another --folder")
    arguments.folder.mkdir(parents=True)
    folder = arguments.folder.resolve()
    runs = Runs(arguments.recipe, overrides, config, folder, arguments.accelerate_config, arguments.num_processes)
    process, alone = runs.start("alone"), folder / "alone"
    wait_until(process, lambda: progress(alone) > 0)
    begun, first, steps = time.monotonic(), progress(alone), 0
    while process.poll() is None:
        steps = max(steps, progress(alone))
        time.sleep(0.01)
    if process.returncode != 0:
        raise runs.failure("alone")
    seconds = (time.monotonic() - begun) / max(1, steps - first)
    weights, rows = weights_of(alone), rows_of(alone)
    numbers = sum(tensor.numel() for tensor in weights.values())
    print(f"left alone: {len(rows)} rows of metrics, {numbers:,} weights, {steps} steps of {seconds:.1f} s")
    left_alone = LeftAlone(weights, rows, steps, seconds)
    draw, failures = random.Random(arguments.seed), 0
    for victim in arguments.victim or ["job"]:
        if victim in DISPENSABLE:
            failures += not survives(runs, victim, left_alone, draw, kills=arguments.kills)
        else:
            failures += not resumes(runs, victim, left_alone, draw, kills=arguments.kills, damage=arguments.damage)
    return int(failures > 0)


def resumes(runs: Runs, victim: str, left_alone: LeftAlone, draw: random.Random, *, kills: int, damage: bool) -> bool:
    """Kills that end a run; whether the same command then went on to the same end after each."""
    print(
        f"| {victim} | killed | resumed | weights that differ | rows that differ |\n|---|---|---|---|---|", flush=True
    )
    failures = 0
    for number in range(1, kills + 1):
        trial = one_trial(runs, victim, number, left_alone, draw, damage=damage)
        failures += bool(trial.started_over or trial.weights or trial.rows)
        print(f"| {number} | {trial.killed} | {trial.resumed} | {trial.weights} | {trial.rows} |", flush=True)
    print(f"{kills - failures} of {kills} resumed runs end as the run left alone")
    return not failures


def survives(runs: Runs, victim: str, left_alone: LeftAlone, draw: random.Random, *, kills: int) -> bool:
    """Kills of parts that a run does without; whether all that were asked for came and left no trace."""
    name = f"without-{victim}"
    struck = kill_parts(runs, name, victim, draw, kills=kills, steps=left_alone.steps)
    print(f"| {victim} | killed |\n|---|---|")
    print("\n".join(f"| {number} | {moment} |" for number, moment in enumerate(struck, 1)))
    weights = differing_weights(left_alone.weights, weights_of(runs.folder / name))
    rows = differing_rows(left_alone.rows, rows_of(runs.folder / name))
    print(
        f"the run went on through {len(struck)} of {kills} kills; weights that differ: {weights}, rows that differ: {rows}"
    )
    return len(struck) == kills and not weights and not rows


def one_trial(
    runs: Runs, victim: str, number: int, left_alone: LeftAlone, draw: random.Random, *, damage: bool
) -> Trial:
    for attempt in range(ATTEMPTS):
        name = f"{victim}-{number}" + f"-{attempt}" * bool(attempt)
        steps, after = draw.randint(1, max(1, int(0.8 * left_alone.steps))), draw.uniform(0, left_alone.seconds)
        killed = kill_at(runs, name, victim, draw, steps=steps, seconds=after, in_a_write=number % 2 == 0)
        if killed is not None:
            break
    else:
        raise ValueError(f"{ATTEMPTS} runs ended before they could be killed; take more batches")
    run = runs.folder / name
    if damage and flip_a_byte(run, draw):
        killed += ", newest checkpoint damaged"
    had_checkpoint = bool(checkpoints(run / "checkpoints"))
    runs.finish(name)
    resumed = resumed_from(run.with_suffix(".log"))
    return Trial(
        killed,
        resumed,
        had_checkpoint and resumed == FROM_THE_BEGINNING,
        differing_weights(left_alone.weights, weights_of(run)),
        differing_rows(left_alone.rows, rows_of(run)),
    )


if __name__ == "__main__":
    sys.exit(main())
