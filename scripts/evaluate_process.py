"""First wrong steps found by a process model. `python scripts/evaluate_process.py --config recipes/eval/processbench.yaml`"""

from pathlib import Path

import torch

from data.catalog import CATALOG, find
from data.chat import ChatRenderer
from data.records import LabelledSteps
from data.sources import read_source
from reward_models.process import ProcessModel, figures_of
from reward_models.processbench import first_wrong, require_both_kinds
from rlhf.config import EvaluateProcess, Source
from rlhf.run import Run, run_stage, say, write_json


def read_solutions(label: str, source: Source) -> list[LabelledSteps]:
    """All labelled solutions of a source; refused rows are counted, with the first reason."""
    known = find(source.name, CATALOG)
    if known.kind is not LabelledSteps:
        raise ValueError(
            f"solutions.{label}.name is {source.name}, which has no labelled steps; name processbench or another that has"
        )
    split = source.split or known.default_split
    records, refused = read_source(known, path=source.path, revision=source.revision, split=split)
    because = f", {len(refused):,} rows refused, such as {refused[0].origin}: {refused[0].reason}" if refused else ""
    say(f"{label}: {len(records):,} solutions{because}")
    require_both_kinds([first_wrong(record.labels) for record in records], label)
    return records


def evaluate_process(config: EvaluateProcess, run: Run) -> None:
    first = [config.threshold_on] if config.threshold_on else []
    labels = [*first, *(label for label in config.solutions if label not in first)]
    records = {label: read_solutions(label, config.solutions[label]) for label in labels}
    model = ProcessModel.load(config.model, device="cuda" if torch.cuda.is_available() else "cpu")
    renderer = ChatRenderer(model.tokenizer, config.chat.system_prompt, config.chat.think)
    threshold = None if config.threshold_on else model.description.threshold
    results, rows = {}, {}
    for label in labels:
        solutions = [model.encode(renderer.prompt_ids(r.question), r.steps) for r in records[label]]
        probabilities = model.probabilities(solutions, tokens_per_batch=config.tokens_per_batch)
        truth = [first_wrong(record.labels) for record in records[label]]
        threshold, results[label] = figures_of(probabilities, truth, threshold=threshold, seed=config.seed)
        rows[label] = [
            {"id": r.id, "first_error": t, "probabilities": p}
            for r, t, p in zip(records[label], truth, probabilities, strict=True)
        ]
    write_json(Path(config.output_dir) / "probabilities.json", rows)
    mean = sum(figures["f1"]["mean"] for figures in results.values()) / len(results)
    say(f"\nthreshold {threshold:.3f}\n{'':20}  solutions  erroneous  correct  F1")
    for label, figures in results.items():
        f1 = figures["f1"]
        say(
            f"{label:20}  {figures['num_solutions']:9,}  {figures['erroneous']['mean']:9.3f}  {figures['correct']['mean']:7.3f}  "
            f"{f1['mean']:.3f} [{f1['low']:.3f}, {f1['high']:.3f}]"
        )
    say(f"{'mean':20}  {'':9}  {'':9}  {'':7}  {mean:.3f}")
    run.finish(threshold=threshold, mean_f1=mean, solutions=results)


if __name__ == "__main__":
    run_stage(EvaluateProcess, evaluate_process)
