"""Speed, proved before it is printed (docs/benchmarks/training_step.md).

python scripts/benchmark.py train-step --case gsm8k --zero-share 0.5 --against trl --dtype fp32 --json step.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from benchmarks.cases import CASES


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = main.add_subparsers(dest="command", required=True)
    step = commands.add_parser("train-step", help="the training step on stored rollouts, ours against a peer")
    step.add_argument("--case", choices=CASES, required=True)
    step.add_argument("--zero-share", type=float, default=0.5, help="share of the groups without signal")
    step.add_argument("--against", choices=("trl", "trl-default", "packed", "none"), required=True)
    step.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    step.add_argument("--repeats", type=int, default=3)
    step.add_argument("--threads", type=int, default=1)
    step.add_argument("--scale", type=float, default=1.0, help="of all lengths; below 0.5 with a tiny model")
    step.add_argument(
        "--warmup", choices=("full", "short"), default="full", help="what each process's discarded step computes"
    )
    step.add_argument(
        "--setting", action="append", help="checkpointing:micro-batch for trl, such as off:8; repeat to try several"
    )
    step.add_argument("--tokens", type=int, default=2048, help="of our micro-batches")
    side = commands.add_parser("side", help="one side in this process, as train-step starts it")
    side.add_argument("spec", type=Path)
    for command in (step,):
        command.add_argument("--json", type=Path, help="where the figures go")
    return main


def main() -> int:
    arguments = parser().parse_args()
    if arguments.command == "side":
        from benchmarks.sides import Spec, run_side

        run_side(Spec(**json.loads(arguments.spec.read_text())))
        return 0
    from benchmarks import train_step

    options = train_step.Options(
        case=arguments.case,
        against=arguments.against,
        dtype=arguments.dtype,
        zero_share=arguments.zero_share,
        repeats=arguments.repeats,
        threads=arguments.threads,
        scale=arguments.scale,
        warmup=arguments.warmup,
        settings=tuple(arguments.setting or train_step.TRL_SETTINGS),
        tokens=arguments.tokens,
    )
    figures, failures = train_step.run(options)
    if arguments.json:
        arguments.json.write_text(json.dumps(figures | {"refused": failures}, indent=2) + "\n")
    if failures:
        print("no ratio: the two sides did not do the same work\n  " + "\n  ".join(failures), file=sys.stderr)
        return 1
    print(train_step.table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
