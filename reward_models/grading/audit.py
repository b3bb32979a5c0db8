"""Labelled cases, and how far a grader agrees with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

MAX_SHOWN = 60


def read_cases(path: Path) -> list[dict[str, Any]]:
    """Rows with id, reference (or gold) and completion.

    Raises:
        ValueError: naming the file and line of a row that is none.
    """
    if not path.is_file():
        raise ValueError(f"cases file {path} does not exist; each of its lines is {{'id', 'reference', 'completion'}}")
    rows = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number}: not JSON ({error.msg})") from None
            if not isinstance(row, dict) or "completion" not in row or not {"reference", "gold"} & row.keys():
                raise ValueError(f"{path}:{number}: a case needs the fields id, reference and completion")
            reference = row.get("reference", row.get("gold"))
            if not all(isinstance(text, str | None) for text in (reference, row["completion"])):
                raise ValueError(f"{path}:{number}: reference and completion must be strings")
            rows.append({**row, "id": row.get("id", number), "reference": reference})
    return rows


def audit(rows: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """Agreement with the rows' `expected` (true or false), errors by source, and the disagreements.

    Rows marked `ambiguous`, or without a label, are counted and left out.
    """
    labelled = [
        (row, result) for row, result in zip(rows, results, strict=True) if isinstance(row.get("expected"), bool)
    ]
    clear = [(row, result) for row, result in labelled if not row.get("ambiguous")]
    if not clear:
        return "no row has an `expected` of true or false to compare with"
    counts: dict[str, Counter[str]] = {}
    wrong = []
    for row, result in clear:
        kind = {(True, False): "false_positive", (False, True): "false_negative"}.get(
            (result["verdict"] == "correct", row["expected"]), "agreed"
        )
        counts.setdefault(str(row.get("source", "all")), Counter())[kind] += 1
        if result["verdict"] == "undecided":
            counts[str(row.get("source", "all"))]["undecided"] += 1
        if kind != "agreed":
            wrong.append((kind, row, result))
    total = sum(counts.values(), Counter())
    lines = [
        f"{len(clear):,} labelled rows ({len(labelled) - len(clear)} ambiguous ones left out): agreement {total['agreed'] / len(clear):.4f}, "
        f"false positives {total['false_positive']} ({total['false_positive'] / len(clear):.2%}), false negatives {total['false_negative']} "
        f"({total['false_negative'] / len(clear):.2%}), undecided {total['undecided']}",
        f"{'source':40} {'rows':>6} {'FP':>4} {'FN':>4}",
    ]
    for source, count in sorted(counts.items()):
        size = count["agreed"] + count["false_positive"] + count["false_negative"]
        lines.append(f"{source:40.40} {size:>6} {count['false_positive']:>4} {count['false_negative']:>4}")
    for kind, row, result in wrong[:MAX_SHOWN]:
        lines.append(
            f"{kind}  {row['id']}  reference {row['reference']!r:.60}  extracted {result['extracted']!r:.60}  ({result['reason']})"
        )
    if len(wrong) > MAX_SHOWN:
        lines.append(f"... and {len(wrong) - MAX_SHOWN} more")
    return "\n".join(lines)
