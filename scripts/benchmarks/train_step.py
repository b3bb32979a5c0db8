"""The training step on the same stored rollouts, ours against a peer: same work proved first, then timed in alternating processes."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import (
    CASES,
    MODEL,
    TINY_MODEL,
    VOCABULARY,
    count_tokens,
    make_groups,
    padded_work,
    read_groups,
    useful_work,
    write_groups,
)
from benchmarks.gates import Record, compare
from benchmarks.measuring import Sample, machine, ratio_with_interval
from benchmarks.sides import Outcome, Spec

TRL_DEFAULT = "on:8"
TRL_SETTINGS = ("off:4", "off:8", "off:16", "on:8")
"""Gradient checkpointing and sequences of a micro-batch that TRL is tried with."""
SCRIPT = Path(__file__).parents[1] / "benchmark.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    case: str
    against: str
    dtype: str = "fp32"
    zero_share: float = 0.5
    repeats: int = 3
    threads: int = 1
    scale: float = 1.0
    """Lengths are multiplied by it; below 0.5 the model is a tiny one."""
    warmup: str = "full"
    settings: tuple[str, ...] = TRL_SETTINGS
    """For `trl`; the fastest is the peer."""
    tokens: int | None = None
    """Of our micro-batches, at least as many as the longest sequence needs; the case's own when None."""

    @property
    def budget(self) -> int:
        return self.tokens or CASES[self.case].tokens

    @property
    def tiny(self) -> bool:
        return self.scale < 0.5


def run_process(spec: Spec) -> tuple[Outcome, Record]:
    """A side in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        spec = replace(spec, folder=folder)
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(asdict(spec)))
        environment = {**os.environ, "OMP_NUM_THREADS": str(spec.threads), "MKL_NUM_THREADS": str(spec.threads)}
        command = [sys.executable, str(SCRIPT), "side", str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode == -signal.SIGKILL:
            raise MemoryError(f"{spec.side} was killed, most likely for its memory")
        if done.returncode:
            raise RuntimeError(f"{spec.side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        if spec.side == "sampler":
            return Outcome(), Record()
        raw = json.loads((Path(folder) / "outcome.json").read_text())
        outcome = Outcome([Sample(**sample) for sample in raw["samples"]], raw["limit"])
        record = Record(**torch.load(Path(folder) / "record.pt")) if spec.record else Record()
        return outcome, record


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def with_setting(spec: Spec, setting: str, sequences: int) -> Spec:
    checkpointing, size = setting.split(":")
    return replace(spec, checkpointing=checkpointing == "on", micro_batch=min(int(size), sequences))


def choose_setting(options: Options, spec: Spec, sequences: int) -> tuple[Spec, dict[str, float]]:
    """TRL at its best on this machine: one timed step of each setting."""
    if options.against == "trl-default":
        return with_setting(spec, TRL_DEFAULT, sequences), {}
    tried: dict[str, float] = {}
    if len(options.settings) == 1:
        return with_setting(spec, options.settings[0], sequences), tried
    for setting in options.settings:
        if int(setting.split(":")[1]) > sequences:
            continue
        try:
            outcome, _ = run_process(replace(with_setting(spec, setting, sequences), steps=1, warmup="short"))
        except MemoryError as fault:
            say(f"trl {setting}: {fault}")
            continue
        tried[setting] = outcome.samples[0].cpu
        say(f"trl {setting}: {tried[setting]:.2f} CPU-s")
    if not tried:
        raise MemoryError(
            f"no setting of TRL's fits here: {', '.join(options.settings)}; name a smaller one, such as --setting on:1"
        )
    return with_setting(spec, min(tried, key=lambda s: tried[s]), sequences), tried


def alternate(peer: Spec | None, ours: Spec, repeats: int) -> tuple[list[Sample], list[Sample], float]:
    """`repeats` timed steps of each side, the sides in the order ABBA; and the machine's limit."""
    samples: dict[str, list[Sample]] = {"peer": [], "ours": []}
    limits = []
    for number in range(repeats):
        order = ("peer", "ours") if number % 2 == 0 else ("ours", "peer")
        for name in order:
            spec = ours if name == "ours" else peer
            if spec is None:
                continue
            outcome, _ = run_process(spec)
            samples[name] += outcome.samples
            if outcome.limit:
                limits.append(outcome.limit)
            say(f"{name} {outcome.samples[0].cpu:.2f} CPU-s {outcome.samples[0].wall:.2f} s")
    return samples["peer"], samples["ours"], statistics.median(limits)


def run(options: Options, *, peer_rollouts: Path | None = None) -> tuple[dict[str, Any], list[str]]:
    """Prepare, prove, time.

    Args:
        options: of the command line.
        peer_rollouts: another file of rollouts for the peer, to show that the gates see the difference.

    Returns:
        The figures, and a sentence for each gate that did not pass; then there is no ratio among the figures.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.json"
        base = Spec(
            side="ours", rollouts=str(path), folder="", dtype=options.dtype, threads=options.threads, warmup=options.warmup,
            tiny=options.tiny, tokens=options.budget,
        )  # fmt: skip
        case = CASES[options.case]
        write_groups(make_groups(case, zero_share=options.zero_share, scale=options.scale), path)
        run_process(replace(base, side="sampler"))
        figures: dict[str, Any] = {
            "case": options.case,
            "dtype": options.dtype,
            "against": options.against,
            "zero_share": options.zero_share,
            **arithmetic(path, options),
        }
        peer: Spec | None = None
        if options.against != "none":
            side = "packed" if options.against == "packed" else "trl"
            peer = replace(base, side=side, rollouts=str(peer_rollouts or path))
            if side == "trl":
                peer = with_setting(peer, options.settings[0], case.prompts * case.samples)
            failures = prove(base, peer, options, figures)
            if failures:
                return figures, failures
            if side == "trl":
                peer, tried = choose_setting(options, peer, case.prompts * case.samples)
                figures["peer_settings"] = {
                    "gradient_checkpointing": peer.checkpointing,
                    "per_device_train_batch_size": peer.micro_batch,
                    "tried_cpu_seconds": tried,
                }
        theirs, ours, limit = alternate(peer, base, options.repeats)
        figures |= timings(theirs, ours, figures["useful_gflop"] * 1e9, limit)
        figures["machine"] = machine()
        return figures, []


def arithmetic(path: Path, options: Options) -> dict[str, Any]:
    groups, model = read_groups(path), TINY_MODEL if options.tiny else MODEL
    useful = useful_work(groups, model, VOCABULARY)
    on_cpu = padded_work(groups, model, VOCABULARY, checkpointing=False, all_positions=True)
    on_gpu = padded_work(groups, model, VOCABULARY, checkpointing=False, all_positions=False)
    return {
        "tokens": asdict(count_tokens(groups)),
        "useful_gflop": useful.total / 1e9,
        "waste_factor": on_cpu.total / useful.total,
        "waste_factor_completions_scored_only": on_gpu.total / useful.total,
        "settings": {
            "threads": options.threads,
            "repeats": options.repeats,
            "scale": options.scale,
            "warmup": options.warmup,
            "tokens_per_micro_batch": options.budget,
        },
    }


def prove(ours: Spec, peer: Spec, options: Options, figures: dict[str, Any]) -> list[str]:
    """One recorded step of each side, compared."""
    say("recording one step of each side")
    reference = None
    if options.dtype == "bf16":
        reference = run_process(replace(ours, side="reference", dtype="fp32", record=True))[1]
    _, our_record = run_process(replace(ours, record=True))
    _, their_record = run_process(replace(peer, record=True))
    measured, failures = compare(our_record, their_record, dtype=options.dtype, reference=reference)
    figures |= measured
    return failures


def timings(theirs: Sequence[Sample], ours: Sequence[Sample], useful: float, limit: float) -> dict[str, Any]:
    """Medians, and ratios where there is a peer."""

    def medians(samples: Sequence[Sample]) -> dict[str, float]:
        return {key: statistics.median(getattr(sample, key) for sample in samples) for key in ("cpu", "wall", "peak")}

    own = medians(ours)
    figures: dict[str, Any] = {
        "ours": own,
        "share_of_limit": useful / own["cpu"] / limit,
        "limit_gflops": limit / 1e9,
    }
    if theirs:
        figures["peer"] = medians(theirs)
        for key, name in (("cpu", "ratio_cpu"), ("wall", "ratio_wall"), ("peak", "ratio_peak_memory")):
            values = [[getattr(s, key) for s in side] for side in (theirs, ours)]
            figures[name], figures[f"{name}_interval"] = ratio_with_interval(*values)
    return figures


def table(figures: dict[str, Any]) -> str:
    """A few lines for people."""
    own = figures["ours"]
    lines = [
        f"{figures['case']} {figures['dtype']}, {figures['zero_share']:.0%} of the groups without signal, against {figures['against']}",
        f"  ours {own['cpu']:.2f} CPU-s, {own['wall']:.2f} s, {own['peak'] / 2**20:.0f} MiB, {figures['share_of_limit']:.0%} of the limit "
        f"of {figures['limit_gflops']:.0f} GFLOP/s",
    ]
    if "peer" in figures:
        peer = figures["peer"]
        low, high = figures["ratio_cpu_interval"]
        lines += [
            f"  peer {peer['cpu']:.2f} CPU-s, {peer['wall']:.2f} s, {peer['peak'] / 2**20:.0f} MiB {figures.get('peer_settings', '')}",
            f"  {figures['ratio_cpu']:.2f}x in CPU time [{low:.2f}, {high:.2f}], {figures['ratio_wall']:.2f}x in wall time, "
            f"{figures['ratio_peak_memory']:.2f}x in peak memory; gradients differ by {figures['grad_rel_err']:.1e}",
        ]
    return "\n".join(lines)
