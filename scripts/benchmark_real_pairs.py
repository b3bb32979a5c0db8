"""Published preference pairs through ORPO and DPO, and where every row of their files went.

    python scripts/benchmark_real_pairs.py --data ../shared/data/preference [--output FILE]

The policy is small and trained from nothing, tokenizer included: this is about the rows, one pass over all of them, not about the policy.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from benchmark_preferences import ARCHITECTURE, FILES, VOCABULARY, read_pairs
from train_dpo import run_dpo
from train_orpo import run_orpo

from data.records import PreferencePair, write_records
from data.tokenizer import train_tokenizer
from rlhf.config import DPO, ORPO
from rlhf.metrics import read_jsonl
from rlhf.run import open_run, say, write_json

PAIRS_PER_STEP = 32
STAGES = {"orpo": (ORPO, run_orpo), "dpo": (DPO, run_dpo)}


def rows_in(file: Path) -> int:
    """Rows of a file, counted without the code that reads them."""
    if file.suffix == ".gz":
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return sum(bool(line.strip()) for line in lines)
    return len(json.loads(file.read_text(encoding="utf-8")))


def build_policy(folder: Path, pairs: list[PreferencePair]) -> None:
    from rlhf.models import build_qwen3

    tokenizer = train_tokenizer([text for p in pairs for text in (p.chosen, p.rejected)], vocab_size=VOCABULARY)
    build_qwen3(ARCHITECTURE, tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(stage: str, folder: Path, pairs: list[PreferencePair], max_tokens: int, used: int) -> dict[str, Any]:
    """One pass over the pairs by a stage's own script; what it says of the rows, and the figures of the last step."""
    config_class, script = STAGES[stage]
    write_records(pairs, folder / "pairs.jsonl")
    steps = math.ceil(used / PAIRS_PER_STEP)
    config = config_class.model_validate(
        {
            "stage": stage, "output_dir": str(folder / stage), "model": {"path": str(folder / "base")}, "pairs": str(folder / "pairs.jsonl"),
            "max_tokens": max_tokens,
            "training": {"num_steps": steps, "sequences_per_step": PAIRS_PER_STEP, "micro_batch_size": 8, "log_every": steps},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10},
        }
    )  # fmt: skip
    script(config, open_run(config))
    done = json.loads((folder / stage / "run.json").read_text(encoding="utf-8"))
    return {**done["pairs"], "passes": read_jsonl(folder / stage / "metrics.jsonl")[-1]["epoch"]}


def fits(folder: Path, pairs: list[PreferencePair], max_tokens: int) -> int:
    """How many pairs are no longer than that: as many as training must say it used."""
    from data.chat import ChatRenderer
    from rlhf.models import load_tokenizer

    renderer = ChatRenderer(load_tokenizer(str(folder / "base")))
    rendered = (renderer.pair_ids(pair) for pair in pairs)
    return sum(len(p) + max(len(c), len(r)) <= max_tokens and c != r for p, c, r in rendered)


def run(
    data: Path, folder: Path, *, max_tokens: int, stages: tuple[str, ...] = ("orpo", "dpo"), files: Any = FILES
) -> dict[str, Any]:
    pairs, read = read_pairs(data, files)
    names = [name for of_source in files.values() for name in of_source]
    files_rows = {name.partition(".")[0]: rows_in(data / name) for name in names}
    rows = {
        label: {"rows": n, "read": read[label]["used"], "refused": dict(read[label]["refused"])}
        for label, n in files_rows.items()
    }
    build_policy(folder / "base", pairs)
    used = fits(folder, pairs, max_tokens)
    return {"files": rows, **{stage: train(stage, folder, pairs, max_tokens, used) for stage in stages}}


def lost(found: dict[str, Any]) -> int:
    """Rows of the files that were neither read nor refused with a reason, and pairs that were neither used nor refused."""
    of_files = sum(r["rows"] - r["read"] - sum(r["refused"].values()) for r in found["files"].values())
    stages = [found[stage] for stage in STAGES if stage in found]
    refused = [sum(n for key, n in s.items() if key.startswith("refused")) for s in stages]
    read = sum(r["read"] for r in found["files"].values())
    return of_files + sum(
        abs(s["rows"] - s["used"] - n) + abs(read - s["rows"]) for s, n in zip(stages, refused, strict=True)
    )


def describe(found: dict[str, Any]) -> str:
    lines = ["| file | rows | read | refused in reading |", "|---|---|---|---|"]
    for name, r in found["files"].items():
        reasons = ", ".join(f"{n:,} {why}" for why, n in r["refused"].items())
        lines.append(f"| {name} | {r['rows']:,} | {r['read']:,} | {reasons or '-'} |")
    lines += ["", "| stage | pairs | used | refused | passes over the used |", "|---|---|---|---|---|"]
    for stage in (s for s in STAGES if s in found):
        s = found[stage]
        reasons = Counter({key.removeprefix("refused: "): n for key, n in s.items() if key.startswith("refused")})
        said = ", ".join(f"{n:,} {why}" for why, n in reasons.items())
        lines.append(f"| {stage} | {s['rows']:,} | {s['used']:,} | {said or '-'} | {s['passes']:g} |")
    return "\n".join([*lines, "", f"rows lost: {lost(found)}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of benchmark_preferences.py")
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--output", type=Path, help="write the counts as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.data, Path(folder), max_tokens=given.max_tokens)
    say(describe(found))
    if given.output:
        write_json(given.output, found)


if __name__ == "__main__":
    main()
