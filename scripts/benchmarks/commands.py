"""The command line of a benchmark that trains arms with seeds, records every run, and reports what has been recorded."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def run_and_report(
    doc: str | None, arms: Iterable[str], file: Path, *, option: str = "arms", picture: bool = True
) -> tuple[argparse.ArgumentParser, Any, argparse.ArgumentParser, argparse.ArgumentParser]:
    """(the whole parser, where `add_parser` adds more commands, the command `run`, the command `report`).

    Args:
        doc: of the script.
        arms: what can be run.
        file: where runs are recorded unless `--json` says otherwise.
        option: what the arms are called, in the plural.
        picture: whether the report can draw one.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help=f"train each of the {option} with each seed")
    run.add_argument(f"--{option}", nargs="+", choices=list(arms), required=True)
    run.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    run.add_argument("--label", help=f"name of what was changed; the {option.removesuffix('s')}'s by default")
    run.add_argument("--change", nargs="+", default=[], metavar="key.sub=value")
    report = commands.add_parser("report", help="what has been recorded")
    if picture:
        report.add_argument("--picture", type=Path)
    for command in (run, report):
        command.add_argument("--json", type=Path, default=file)
    return parser, commands, run, report
