"""Starting vLLM servers that sample for a run, and keeping them up. No vLLM is imported here: a server is a process of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import httpx2
import psutil

from rlhf.config import Online

ROOT = Path(__file__).parents[2]
HOPELESS = 4
"""Starts in a row that end by themselves before the server has answered once."""
SILENT_SECONDS = 60.0
"""Without an answer, after which a server that had answered is ended: one whose engine died may wait for ever for its clients to leave."""


def serve_command(config: Online, *, host: str, port: int) -> list[str]:
    """The server's command line: token ids in and out, one engine, weights that can be replaced."""
    rollout, server = config.rollout, config.rollout.server
    assert server is not None
    options: dict[str, object] = {
        "model": config.policy.path,
        "host": host,
        "port": port,
        "dtype": rollout.dtype,
        "max-model-len": rollout.max_prompt_tokens + rollout.max_new_tokens + 1,
        "logprobs-mode": "processed_logprobs",
        "generation-config": "vllm",
        "served-model-name": "policy",
        "worker-extension-cls": "rlhf.rollout.vllm_worker.FolderReceiver",
        "tensor-parallel-size": server.tensor_parallel,
        "data-parallel-size": server.data_parallel,
        "gpu-memory-utilization": rollout.gpu_memory_share,
    }
    flags = ["tokens-only", "disable-log-stats", "disable-uvicorn-access-log"]
    if config.policy.revision is not None:
        options["revision"] = config.policy.revision
    if server.weights == "nccl":
        options["weight-transfer-config"] = '{"backend": "nccl"}'
    if not _has_gpus():
        # A prompt cut into chunks makes vLLM wind a request's own generator back, which those of a CPU cannot: the server would die.
        flags += ["enforce-eager", "no-enable-chunked-prefill"]
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, *(f"--{flag}" for flag in flags)]


def serve_environment(config: Online, *, devices: str | None) -> dict[str, str]:
    """The server's environment; `devices` are its GPUs, or its cores where there are none."""
    settings = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VLLM_SERVER_DEV_MODE": "1",  # the calls that replace weights
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_CPU_KVCACHE_SPACE": str(max(1, round(config.rollout.kv_cache_gb))),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # the process is confined instead, all of it
    }
    if devices is not None and _has_gpus():
        settings["CUDA_VISIBLE_DEVICES"] = devices
    elif devices is not None:
        settings["OMP_NUM_THREADS"] = str(len(cores_of(devices)))
    # What a launcher said of this process's ranks is not the server's.
    ranks = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "GROUP_RANK")
    inherited = {
        key: value for key, value in os.environ.items() if key not in ranks and not key.startswith("TORCHELASTIC")
    }
    return {**inherited, **settings}


def confine(devices: str | None) -> None:
    """This process, and those it starts, to their cores, where there are no GPUs to tell them apart by."""
    if devices is not None and not _has_gpus():
        os.sched_setaffinity(0, cores_of(devices))


def require_devices(devices: str) -> None:
    """Raise when there are no GPUs and these are no cores of this machine."""
    if not _has_gpus():
        cores_of(devices)


def cores_of(text: str) -> set[int]:
    """`0-2,7` as {0, 1, 2, 7}.

    Raises:
        ValueError: for something else, and for cores this machine does not have.
    """
    try:
        ends = [part.split("-") for part in text.split(",")]
        cores = {core for first, *last in ends for core in range(int(first), int(last[0] if last else first) + 1)}
    except ValueError:
        cores = set()
    if not cores or not cores <= set(range(os.cpu_count() or 1)):
        raise ValueError(
            f"rollout.server.devices has {text!r}; without GPUs it names cores from 0 to {(os.cpu_count() or 1) - 1}, such as 0-2,7"
        )
    return cores


def require_free_port(host: str, port: int) -> None:
    """Raise when something listens there.

    Raises:
        ValueError: naming the key to change.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"port {port} of {host} cannot be used ({error.strerror}); set rollout.server.first_port to another, or stop what listens there"
            ) from None


def keep_up(
    command: list[str],
    environment: dict[str, str],
    *,
    url: str,
    parent: int | None,
    silent_seconds: float = SILENT_SECONDS,
) -> int:
    """Run a server and start it again when it dies or falls silent; returns when the process `parent` is gone, or it cannot be started.

    Its descendants become this process's when it dies, and are ended before the next start: an engine left over would hold the memory.
    """
    ctypes.CDLL(None).prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    failed_starts = 0
    try:
        while failed_starts < HOPELESS:
            process = subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent)  # one thread: safe
            answered = None  # when, last
            while process.poll() is None and (answered is None or time.monotonic() < answered + silent_seconds):
                if parent is not None and os.getppid() != parent:
                    return 0
                answered = time.monotonic() if _answers(url) else answered
                time.sleep(0.2 if answered is None else 1.0)
            how = "fell silent" if process.returncode is None else f"ended with code {process.returncode}"
            killed = (process.returncode or 0) < 0  # by someone else, not by what it found
            end_descendants()
            print(f"the server {how}; it is started again", flush=True)
            failed_starts = failed_starts if killed else 0 if answered is not None else failed_starts + 1
        print(f"the server ended {HOPELESS} times before it had answered once; the reason is above", flush=True)
        return 1
    finally:
        end_descendants()


def _answers(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health", timeout=5, trust_env=False).status_code == 200
    except httpx2.HTTPError:
        return False


def end_descendants() -> None:
    for force in (False, True):
        found = psutil.Process().children(recursive=True)
        for child in found:
            with suppress(psutil.NoSuchProcess):
                child.kill() if force else child.terminate()
        psutil.wait_procs(found, timeout=10)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; the server ends its engine


def _has_gpus() -> bool:
    return Path("/dev/nvidiactl").exists()
