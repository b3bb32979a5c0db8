"""Accuracy of checkpoints on the same problems. `accelerate launch scripts/evaluate.py --config recipes/tiny/evaluate.yaml`"""

import dataclasses
import json

from data.chat import ChatRenderer
from data.records import Problem, read_records
from reward_models.grading import canonical, grade
from rlhf.config import Evaluate, Model
from rlhf.distributed import gather, start
from rlhf.evaluation import GradedProblem, compare, summarise
from rlhf.models import check_model_path, load_tokenizer
from rlhf.report import before_and_after, evaluation_table
from rlhf.rollout.engine import build_engine, require_prompts_fit
from rlhf.run import Run, run_stage, say, write_json


def evaluate(config: Evaluate, run: Run) -> None:
    problems = read_records(Problem, config.problems)[: config.num_problems]
    for label, model in config.models.items():
        check_model_path(model.path, f"models.{label}.path")
    accelerator = start(config.seed)
    graded: dict[str, list[GradedProblem]] = {}
    engine_name = ""
    for label, model in config.models.items():
        say(f"{label}: {len(problems):,} problems x {config.rollout.samples_per_prompt} samples")
        mine = problems[accelerator.process_index :: accelerator.num_processes]
        engine_name, answers = sample_and_grade(config, model, mine)
        by_id = {p.id: p for p in gather(accelerator, answers)}
        graded[label] = [by_id[p.id] for p in problems]
        if accelerator.is_main_process:
            rows = "".join(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in graded[label])
            (run.folder / f"samples.{label}.jsonl").write_text(rows, encoding="utf-8")

    first, last = next(iter(graded)), list(graded)[-1]
    results = {
        "models": {label: summarise(g, pass_at=config.pass_at, seed=config.seed) for label, g in graded.items()},
        "paired_difference": compare(graded[first], graded[last], seed=config.seed) if first != last else None,
        "rollout_engine": engine_name,
        "shown": [
            {"question": p.question, "reference": p.answer, **{label: g[i].texts[0] for label, g in graded.items()}}
            for i, p in enumerate(problems[: config.num_shown])
        ],
    }
    if accelerator.is_main_process:
        write_json(run.folder / "results.json", results)
    say(f"\n{before_and_after(results)}\n\n{evaluation_table(results)}")
    run.finish(**results)


def sample_and_grade(config: Evaluate, model: Model, problems: list[Problem]) -> tuple[str, list[GradedProblem]]:
    """(engine used, every problem with its graded samples)."""
    renderer = ChatRenderer(load_tokenizer(model.path, revision=model.revision), config.chat.system_prompt)
    prompts = [renderer.prompt(p.id, p.question, p.answer) for p in problems]
    require_prompts_fit(prompts, config.rollout)
    engine = build_engine(
        config.rollout,
        model.path,
        revision=model.revision,
        stop_token_id=renderer.stop_token_id,
        decode=renderer.decode,
    )
    k, rollout = config.rollout.samples_per_prompt, config.rollout
    rollouts = engine.generate(
        prompts,
        samples_per_prompt=k,
        temperature=rollout.temperature,
        max_new_tokens=rollout.max_new_tokens,
        seed=config.seed,
    )
    engine.close()
    graded = []
    for i, problem in enumerate(problems):
        samples = rollouts[i * k : (i + 1) * k]
        grades = [grade(renderer.prefill + s.text, problem.answer) for s in samples]
        graded.append(
            GradedProblem(
                id=problem.id,
                level=problem.level,
                answers=tuple(None if g.extracted is None else canonical(g.extracted) for g in grades),
                verdicts=tuple(g.verdict for g in grades),
                lengths=tuple(len(s.token_ids) for s in samples),
                truncated=tuple(s.finish_reason == "length" for s in samples),
                texts=tuple(s.text for s in samples),
            )
        )
    return engine.name, graded


if __name__ == "__main__":
    run_stage(Evaluate, evaluate)
