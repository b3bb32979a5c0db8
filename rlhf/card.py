"""The card beside a score: everything it depends on, as JSON, as Markdown, and as a picture.

A number without it cannot be repeated (open-r1#97, #194, #224): pass@1 moves by points with the chat template, the sampling
temperature or the grader's version.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from rlhf.evaluation import GradedProblem
from rlhf.report import figures, printable
from rlhf.run import write_json
from rlhf.uncertainty import share

WHOLE_FILE = 2**28
"""Bytes of a weights file up to which all of it is hashed; of a larger one its ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """What one model's score depends on. Blocks of plain values, so that two cards can be compared key by key."""

    label: str
    model: Mapping[str, Any]
    """Path, revision, and a fingerprint of the weights."""
    prompt: Mapping[str, Any]
    """System prompt, hash of the chat template, how the template opens the answer, one prompt in full."""
    sampling: Mapping[str, Any]
    engine: Mapping[str, Any]
    """Name, and the versions of everything below it."""
    grader: Mapping[str, Any]
    benchmark: Mapping[str, Any]
    """Where the problems are from, how many, how many rows were refused."""
    contamination: Mapping[str, Any] | None
    """What the training data's manifest says of this benchmark; None when no manifest was named."""
    hardware: Mapping[str, Any]
    cost: Mapping[str, Any]
    """Tokens and seconds."""
    commit: str
    scores: Mapping[str, Any]


def fingerprint(path: str) -> str:
    """A hash of the weights in a folder: of each safetensors file its name, size and content, of large files only the ends."""
    folder = Path(path)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return "unknown"
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as content:
            if size <= WHOLE_FILE:
                while block := content.read(2**20):
                    digest.update(block)
            else:
                digest.update(content.read(WHOLE_FILE // 2))
                content.seek(-WHOLE_FILE // 2, 2)
                digest.update(content.read())
    return digest.hexdigest()[:16]


def short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def source_hash(folder: Path) -> str:
    """A hash of the Python files in a folder, for code whose every change may change a verdict."""
    return short_hash("\n".join(file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.py"))))


def versions(*packages: str) -> dict[str, str]:
    """Versions of those packages that are installed, and of Python."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Processor, cores, memory, and GPUs by name."""
    import torch

    name = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": name or platform.machine(),
        "cores": psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30),
        "gpus": gpus,
    }


def contamination(manifest: str | None, benchmark: str | None) -> dict[str, Any] | None:
    """What a data manifest found of a benchmark in the training data; None when no manifest is named.

    Raises:
        ValueError: when there is no such file, or it holds no decontamination report.
    """
    if manifest is None:
        return None
    path = Path(manifest)
    if not path.is_file():
        raise ValueError(
            f"data_manifest {manifest} does not exist; run scripts/prepare_data.py or correct the path in the recipe"
        )
    try:
        report = json.loads(path.read_text(encoding="utf-8"))["decontamination"]
        scanned = report["benchmarks"]
        known = scanned.get(benchmark) if benchmark else None
        if known is None:
            return {"scanned": False, "benchmarks": sorted(scanned)}
        return {
            "scanned": True,
            "rows_scanned": report["rows_scanned"],
            "problems": known["problems"],
            "found": known["found"],
            "left": known["left"],
            "left_ids": known["left_ids"],
            "rules": report["rules"],
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"data_manifest {manifest} holds no decontamination report that can be read ({type(error).__name__}: {error}); "
            "prepare the data again with decontamination in its recipe"
        ) from None


def without_leaks(found: Mapping[str, Any] | None, problems: Sequence[GradedProblem]) -> dict[str, Any] | None:
    """pass@1 on the problems that the training data does not hold; None where nothing was left in it, or nothing is known."""
    if not found or not found.get("left_ids"):
        return None
    leaked = set(found["left_ids"])
    clean = [p for p in problems if p.is_judged and not p.origin and p.id not in leaked]
    return asdict(share([p.accuracy for p in clean], samples=len(clean[0].verdicts))) if clean else None


def show_contamination(found: Mapping[str, Any] | None) -> str:
    """The contamination result as a sentence."""
    if found is None:
        return "unknown: the recipe names no data_manifest"
    if not found["scanned"]:
        known = ", ".join(found["benchmarks"]) or "no benchmark"
        return f"unknown: the training data was not scanned for these problems (scanned for {known})"
    return (
        f"{found['left']} of {found['problems']} problems occur in the {found['rows_scanned']:,} training rows "
        f"({found['found']} before they were cleaned)"
    )


def markdown(card: Card) -> str:
    """The card as people read it. What a model or a file wrote is shown without control characters, and quoted."""
    scores = card.scores
    lines = [f"# {card.label}", "", "| figure | value |", "|---|---|"]
    lines += [f"| {_cell(name)} | {_cell(show(dict(scores)))} |" for name, show in figures(dict(scores))]
    bootstrap = scores["bootstrap"]
    lines += [f"| pass@1, bootstrap interval | [{bootstrap['low']:.3f}, {bootstrap['high']:.3f}] |"]
    if scores.get("without_leaks"):
        clean = scores["without_leaks"]
        lines.append(
            f"| pass@1 on the {clean['n']} problems not in the training data | {clean['mean']:.3f} [{clean['low']:.3f}, {clean['high']:.3f}] |"
        )
    lines += [
        "",
        f"95 % intervals over {scores['pass_at_1']['n']} problems; {scores['samples_per_problem']} samples each. A tie in a vote counts as the "
        "share of the tied answers that are correct. A problem with an undecided sample is left out as a whole.",
        "",
        f"Contamination: {show_contamination(card.contamination)}.",
        "",
        "| | |",
        "|---|---|",
    ]
    for block in ("model", "sampling", "engine", "grader", "benchmark", "hardware", "cost"):
        lines += [
            f"| {block}: {_cell(str(key))} | {_cell(_plain(value))} |" for key, value in getattr(card, block).items()
        ]
    lines += [f"| commit | {_cell(card.commit)} |"]
    prompt = dict(card.prompt)
    example = prompt.pop("example", "")
    lines += [f"| prompt: {_cell(str(key))} | {_cell(_plain(value))} |" for key, value in prompt.items()]
    quoted = "\n".join(f"    {line}" for line in printable(str(example)).split("\n"))
    return "\n".join([*lines, "", "The first prompt, as the model reads it:", "", quoted, ""])


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list | tuple) else str(value)


def _cell(text: str) -> str:
    """One line without what would end a table cell."""
    return printable(text).replace("\n", " ").replace("|", "\\|")[:500]


def draw_card(card: Card, picture: Path) -> None:
    """A PNG: accuracy and votes, pass@k, accuracy by level, subject and perturbation, each with its interval."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    scores = card.scores
    bars = {"pass@1": scores["pass_at_1"], f"maj@{scores['samples_per_problem']}": scores["majority"]}
    if scores["weighted_majority"]:
        bars["weighted maj"] = scores["weighted_majority"]
    panels: list[tuple[str, dict[str, Any]]] = [("score", bars)]
    if scores["pass_at_k"]:
        panels.append(("pass@k", {"1": scores["pass_at_1"], **scores["pass_at_k"]}))
    for key, title in (("by_level", "pass@1 by level"), ("by_subject", "pass@1 by subject")):
        if len(scores[key]) > 1:
            panels.append((title, dict(list(scores[key].items())[:12])))
    if scores.get("robustness"):
        told = {kind: v["accuracy"] for kind, v in scores["robustness"]["variants"].items()}
        worst = {"worst": scores["robustness"]["worst"]} if scores["robustness"]["worst"] else {}
        panels.append(("pass@1 when told differently", {"original": scores["pass_at_1"], **told, **worst}))
    figure, axes = plt.subplots(
        1, len(panels), figsize=(4.2 * len(panels), 3.8), layout="constrained", squeeze=False, sharey=True
    )
    for axis, (title, estimates) in zip(axes[0], panels, strict=True):
        names = [printable(name)[:24] for name in estimates]
        means = [e["mean"] for e in estimates.values()]
        errors = [
            [max(0.0, e["mean"] - e["low"]) for e in estimates.values()],
            [max(0.0, e["high"] - e["mean"]) for e in estimates.values()],
        ]
        if title == "pass@k":
            axis.errorbar(range(len(names)), means, errors, fmt="o-", capsize=3, color="tab:blue")
        else:
            axis.bar(range(len(names)), means, yerr=errors, capsize=3, color="tab:blue", alpha=0.75)
        axis.set_xticks(
            range(len(names)), names, rotation=30 if max(map(len, names)) > 3 else 0, ha="center", fontsize=8
        )
        axis.set_title(title, fontsize=10)
        axis.set_ylim(0, 1.02)
        axis.grid(alpha=0.3, axis="y")
    n = scores["pass_at_1"]["n"]
    figure.suptitle(
        f"{printable(card.label)} · {printable(str(card.benchmark['name']))} · {n} problems x {scores['samples_per_problem']} samples · 95 % intervals",
        fontsize=10,
        parse_math=False,
    )
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def write_card(card: Card, folder: Path) -> None:
    """card.<label>.json, .md and .png."""
    write_json(folder / f"card.{card.label}.json", asdict(card))
    (folder / f"card.{card.label}.md").write_text(markdown(card), encoding="utf-8")
    draw_card(card, folder / f"card.{card.label}.png")
