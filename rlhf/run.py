"""A stage's command line, its output folder, and what it leaves there: `recipe.yaml`, `run.json` once finished."""

from __future__ import annotations

import argparse
import ctypes
import dis
import fcntl
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import psutil
import yaml

from rlhf.config import Config, Pipeline, batch_arithmetic, load_config, to_yaml

WHERE_SERVERS_ARE = tuple(
    f"rollout.server.{key} "
    for key in ("urls", "replicas", "first_port", "devices", "folder", "request_seconds", "patience_seconds")
)
"""Keys that may be others when a run goes on: a server on another host samples the same."""
MAY_DIFFER = (*WHERE_SERVERS_ARE, "watch.", "training.completions_every ")
"""And what only looks on."""
RECIPE, FINISHED, LOCK = "recipe.yaml", "run.json", ".lock"
DIE_WITH_PARENT = "SCRATCHPAD_DIE_WITH_PARENT"

C = TypeVar("C", bound=Config)


def is_main_process() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: str) -> None:
    """Print once, whatever the number of ranks."""
    if is_main_process():
        print(text, flush=True)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def differences(old: Any, new: Any, prefix: str = "") -> list[str]:
    """`key: old there, new here` for every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            line
            for key in [*old, *(k for k in new if k not in old)]
            for line in differences(old.get(key), new.get(key), f"{prefix}{key}.")
        ]
    return [] if old == new else [f"{prefix.rstrip('.')} is {old!r} there and {new!r} here"]


def check_output_dir(config: Config) -> None:
    """Raise when the output folder belongs to something else.

    Raises:
        ValueError: when it holds another run or foreign files.
    """
    folder = Path(config.output_dir)
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    recipe = folder / RECIPE
    repair = "choose another output_dir or delete the folder"
    if not recipe.is_file():
        raise ValueError(f"output_dir {folder} is not empty and holds no run of this project; {repair}")
    changed = differences(yaml.safe_load(recipe.read_text(encoding="utf-8")), config.model_dump(mode="json"))
    changed = [line for line in changed if not line.startswith(MAY_DIFFER)]
    if changed:
        raise ValueError(f"output_dir {folder} holds another run ({'; '.join(changed[:3])}); {repair}")


def finished(config: Config) -> dict[str, Any] | None:
    """What the stage left when it finished with this very recipe, else None."""
    path = Path(config.output_dir) / FINISHED
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to end this process when its parent does, even when that one is killed outright.

    A process that takes long to start gives its parent's number: one that died before is not reported.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class Run:
    """An output folder opened for writing by this process alone."""

    folder: Path
    lock: IO[str] | None = None
    """Held open, and with it the lock, for as long as the run lives."""

    def abandon(self) -> None:
        """Give the folder free when nothing but the recipe is in it: a refused recipe must not stand in the way of its repair."""
        if is_main_process() and {path.name for path in self.folder.iterdir()} <= {RECIPE, LOCK}:
            (self.folder / RECIPE).unlink(missing_ok=True)
            (self.folder / LOCK).unlink(missing_ok=True)

    def finish(self, **results: Any) -> None:
        """Mark the stage finished; `results` are what later stages and the summary read."""
        if is_main_process():
            write_json(
                self.folder / FINISHED,
                {
                    **results,
                    "seconds": round(time.time() - psutil.Process().create_time(), 1),
                    "peak_memory_gb": peak_memory_gb(),
                    "git": git_revision(),
                },
            )


def open_run(config: Config) -> Run:
    folder = Path(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not is_main_process():
        return Run(folder)
    check_output_dir(config)
    lock = (folder / LOCK).open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another process is writing to output_dir {folder}; wait for it or stop it") from None
    if not (folder / RECIPE).is_file():
        (folder / RECIPE).write_text(to_yaml(config), encoding="utf-8")
    return Run(folder, lock)


def peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)


def git_revision() -> str:
    """Commit the code is at, with a mark when it was changed since; `unknown` outside a checkout."""
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parent,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def format_table(rows: list[tuple[str, str]]) -> str:
    width = max(len(quantity) for quantity, _ in rows)
    return "\n".join(f"  {quantity:{width}}  {value}" for quantity, value in rows)


def raised_by_us(error: BaseException) -> bool:
    """Whether a `raise` of this project's own code made it: then it is a sentence for the user, else a fault with a traceback worth seeing."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    root = Path(__file__).resolve().parents[1]
    return (
        frame is not None
        and dis.opname[frame.tb_frame.f_code.co_code[frame.tb_lasti]] == "RAISE_VARARGS"
        and Path(frame.tb_frame.f_code.co_filename).resolve().parent.is_relative_to(root)
        and ".venv" not in frame.tb_frame.f_code.co_filename
    )


@contextmanager
def faults_as_sentences() -> Iterator[None]:
    """A fault of the user's is one sentence on stderr and exit code 2; any other keeps its traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not raised_by_us(error):
            raise
        rank = "" if is_main_process() else f" on rank {os.environ['RANK']}"
        print(f"error{rank}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def quiet_libraries() -> None:
    """Log warnings of ours, and none that are no news."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    for no_news in ("accelerate.utils.other", "torch._library.triton"):  # tied weights saved once; no Triton on a CPU
        logging.getLogger(no_news).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="vllm")


def run_stage(config_class: type[C] | tuple[type[C], ...], stage: Callable[[C, Run], None]) -> None:
    """The `main` of a stage script: `--config RECIPE [key.sub=value ...]`. A script may take recipes of several classes.

    A fault of the user's is one sentence on stderr and exit code 2.
    """
    if DIE_WITH_PARENT in os.environ:
        die_with_parent()
    parser = argparse.ArgumentParser(description=stage.__doc__)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    arguments = parser.parse_args()
    quiet_libraries()
    with faults_as_sentences():
        config = load_config(arguments.config, arguments.overrides)
        if not isinstance(config, config_class):
            raise ValueError(
                f"{arguments.config} is a recipe for the stage {config.stage}; run {config.script} with it"
            )
        if is_main_process():  # the others would see its first files there
            check_output_dir(config)
        if finished(config) is not None and not isinstance(config, Pipeline):  # a pipeline looks at its stages
            say(f"{config.output_dir} holds this very run, finished; delete it to run again")
            return
        rows = batch_arithmetic(config, num_ranks())
        if rows:
            say(f"{config.stage}: batch arithmetic\n{format_table(rows)}")
        run = open_run(config)
        try:
            stage(config, run)
        except ValueError:
            run.abandon()
            raise
    if num_ranks() > 1:
        from rlhf.distributed import leave  # which imports this module, and torch

        leave()
