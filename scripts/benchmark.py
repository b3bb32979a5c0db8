"""Speed, proved before it is printed (docs/benchmarks/training_step.md).

python scripts/benchmark.py train-step --case gsm8k --zero-share 0.5 --against trl --dtype fp32 --json step.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.memory import CASES as MEMORY_CASES
from benchmarks.memory import MODELS as MEMORY_MODELS
from benchmarks.zero import DTYPES as ZERO_DTYPES
from benchmarks.zero import MODELS as ZERO_MODELS
from benchmarks.zero import SETUPS as ZERO_SETUPS


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
    step.add_argument("--tokens", type=int, help="of our micro-batches")
    side = commands.add_parser("side", help="one side in this process, as train-step starts it")
    side.add_argument("spec", type=Path)
    rollout = commands.add_parser("rollout", help="sampled tokens per CPU-second of each engine")
    rollout.add_argument("--engine", action="append", choices=("vllm", "transformers"), help="both when not given")
    whole = commands.add_parser("step", help="a whole GRPO step and its parts")
    whole.add_argument("--engine", choices=("auto", "vllm", "transformers"), default="auto")
    whole.add_argument("--against", choices=("trl", "none"), default="none")
    whole.add_argument("--micro-batch", type=int, default=4, help="sequences of TRL's forward pass in training")
    whole.add_argument("--zero-share", type=float, default=0.5, help="share of the groups without signal")
    for command in (rollout, whole):
        command.add_argument(
            "--lengths",
            choices=("geometric", "equal"),
            default="geometric",
            help="of completions, around the case's mean",
        )
        command.add_argument("--case", choices=CASES, default="gsm8k", help="of which the prompts and lengths are")
        command.add_argument("--repeats", type=int, default=2)
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--scale", type=float, default=1.0, help="of all lengths; below 0.5 with a tiny model")
    memory = commands.add_parser("memory", help="peak memory of training, planned and measured")
    memory.add_argument("--case", action="append", choices=MEMORY_CASES, help="all when not given")
    memory.add_argument(
        "--model", choices=MEMORY_MODELS, default="benchmark", help="small: 5 M parameters, for the live tensors"
    )
    memory.add_argument("--threads", type=int, default=1)
    memory.add_argument(
        "--malloc",
        choices=("returning", "default"),
        default="returning",
        help="whether blocks that are freed go back to the system, or as glibc has it",
    )
    zero = commands.add_parser(
        "zero", help="losses and memory of each rank under every ZeRO stage, on one rank and two"
    )
    zero.add_argument("--model", action="append", choices=ZERO_MODELS, help="both when not given")
    zero.add_argument("--dtype", action="append", choices=ZERO_DTYPES, help="both when not given")
    zero.add_argument("--ranks", action="append", type=int, choices=(1, 2), help="both when not given")
    zero.add_argument("--setup", action="append", choices=ZERO_SETUPS, help="all when not given")
    for command in (step, rollout, whole, memory, zero):
        command.add_argument("--json", type=Path, help="where the figures go")
    return main


def run_spec(spec: dict[str, Any]) -> None:
    if "zero" in spec:
        from benchmarks.zero import Spec as ZeroSpec
        from benchmarks.zero import run_zero

        run_zero(ZeroSpec(**spec))
    elif "memory" in spec:
        from benchmarks.memory import run_memory

        run_memory(spec)
    elif "engine" in spec:
        from benchmarks.whole_step import StepSpec, run_whole

        run_whole(StepSpec(**spec))
    else:
        from benchmarks.sides import Spec, run_side

        run_side(Spec(**spec))


def whole_step_figures(arguments: argparse.Namespace) -> dict[str, Any]:
    from benchmarks.whole_step import StepSpec, compare_engines, compare_steps

    spec = StepSpec(
        side="ours",
        folder="",
        case=arguments.case,
        lengths=arguments.lengths,
        scale=arguments.scale,
        steps=arguments.repeats,
        threads=arguments.threads,
    )
    if arguments.command == "rollout":
        return compare_engines(spec, arguments.engine or ("vllm", "transformers"))
    return compare_steps(
        replace(spec, engine=arguments.engine, micro_batch=arguments.micro_batch, zero_share=arguments.zero_share),
        against=arguments.against,
    )


def zero_figures(arguments: argparse.Namespace) -> int:
    """The cases that were asked for, beside those that the file already has."""
    from benchmarks import zero

    path = arguments.json
    rows = {zero.key_of(row): row for row in json.loads(path.read_text())} if path and path.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        zero.write_inputs(Path(folder))
        models, dtypes = arguments.model or ZERO_MODELS, arguments.dtype or list(ZERO_DTYPES)
        setups, ranks = arguments.setup or ZERO_SETUPS, arguments.ranks or (1, 2)
        for spec in zero.cases(models, dtypes, setups, ranks, Path(folder)):
            row = zero.measure(spec)
            rows[zero.key_of(row)] = row
            print(zero.table([row]).splitlines()[-1], flush=True)
            if path:
                path.write_text(json.dumps(list(rows.values()), indent=1) + "\n")
    print(zero.table(list(rows.values())))
    refused = zero.refusals(list(rows.values()))
    print("\n".join(refused), file=sys.stderr)
    return int(bool(refused))


def main() -> int:
    arguments = parser().parse_args()
    if arguments.command == "side":
        run_spec(json.loads(arguments.spec.read_text()))
        return 0
    if arguments.command == "zero":
        return zero_figures(arguments)
    if arguments.command == "memory":
        from benchmarks.memory import compare, table

        size, threads, malloc = arguments.model, arguments.threads, arguments.malloc
        names = arguments.case or MEMORY_CASES
        rows = [compare(case, size=size, threads=threads, malloc=malloc) for case in names]
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=2) + "\n")
        print(table(rows))
        return 0
    if arguments.command in ("rollout", "step"):
        figures = whole_step_figures(arguments)
        print(json.dumps(figures, indent=2))
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n")
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
