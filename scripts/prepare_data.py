"""Turn sources into record files. `python scripts/prepare_data.py --config recipes/tiny/prepare_data.yaml`

Recipes of the stage `prepare_data` make the JSONL files of a whole pipeline from one source; those of `curate_data` (recipes/data/) filter,
deduplicate, decontaminate, split and mix any number of sources into parquet files with a manifest.
"""

import dataclasses
import os
import zlib
from functools import partial

from data.catalog import SOURCES
from data.chat import ChatRenderer, render_response
from data.decontamination import Rules
from data.difficulty import pass_rate
from data.filters import Filters
from data.plan import BenchmarkPlan, Plan, SourcePlan
from data.prepare import Judge, prepare
from data.records import Problem, write_records
from rlhf.config import CurateData, Difficulty, PrepareData
from rlhf.run import Run, die_with_parent, format_table, git_revision, run_stage, say


def prepare_data(config: PrepareData | CurateData, run: Run) -> None:
    """Turn sources into record files."""
    if isinstance(config, CurateData):
        curate(config, run)
        return
    options = config.source.model_dump(exclude={"name"})
    prepared = SOURCES[config.source.name](
        seed=config.seed,
        demonstrations=config.num_demonstrations,
        train_problems=config.num_train_problems,
        test_problems=config.num_test_problems,
        train_pairs=config.num_preference_pairs,
        heldout_pairs=config.num_preference_pairs // 10 + 1,
        **options,
    )
    counts = {
        f.name: write_records(getattr(prepared, f.name), run.folder / f"{f.name}.jsonl")
        for f in dataclasses.fields(prepared)
    }
    say(format_table([(f"{name}.jsonl", f"{count:,} records") for name, count in counts.items()]))
    for demonstration in prepared.demonstrations[:2]:
        say(f"\n{demonstration.question}\n{render_response(demonstration.scratchpad, demonstration.answer)}")
    run.finish(records=counts)


def curate(config: CurateData, run: Run) -> None:
    judge = build_judge(config.difficulty, config.seed) if config.difficulty else None
    manifest = prepare(
        plan_of(config), run.folder, say=say, code=git_revision(), judge=judge, initializer=partial(die_with_parent, os.getpid())
    )  # fmt: skip
    rows = [("rows in", f"{manifest['rows_in']:,}"), ("kept", f"{manifest['kept']:,}")]
    rows += [(f"dropped: {reason}", f"{drop['rows']:,}") for reason, drop in manifest["dropped"].items()]
    for name, found in manifest.get("decontamination", {"benchmarks": {}})["benchmarks"].items():
        rows.append((f"{name}: problems found", f"{found['found']} of {found['problems']}, {found['left']} left in"))
    say(format_table(rows))
    run.finish(records={name: split["rows"] for name, split in manifest["splits"].items()})


def build_judge(config: Difficulty, seed: int) -> Judge:
    """Pass rates under the recipe's policy, measured by the engine and the graders that training uses."""
    from reward_models.grading import GraderPool  # torch and vLLM come with these
    from rlhf.models import check_model_path, load_tokenizer
    from rlhf.rollout.engine import Sampling, build_engine, require_prompts_fit

    policy, rollout = config.policy, config.rollout
    check_model_path(policy.path, "difficulty.policy.path")
    renderer = ChatRenderer(
        load_tokenizer(policy.path, revision=policy.revision), config.chat.system_prompt, config.chat.think
    )
    stop, graders = renderer.stop_token_id, GraderPool()
    engine = build_engine(rollout, policy.path, revision=policy.revision, stop_token_id=stop, decode=renderer.decode)

    def judge(problems: list[Problem]) -> list[float | None]:
        prompts = [renderer.problem_prompt(p) for p in problems]
        require_prompts_fit(prompts, rollout)
        n = rollout.samples_per_prompt
        samples = engine.generate(
            prompts,
            Sampling.of(rollout),
            # The draws of a batch depend on its problems alone, so that a run taken up again measures what it would have.
            seed=(seed + zlib.crc32(problems[0].id.encode())) % 2**31,
        )
        grades = graders.grade_many([(renderer.prefill + s.text, s.prompt.reference) for s in samples])
        return [pass_rate([g.verdict for g in grades[i : i + n]]) for i in range(0, len(grades), n)]

    return judge


def plan_of(config: CurateData) -> Plan:
    """The recipe as `data` reads it."""
    scan = config.decontamination
    return Plan(
        sources=tuple(SourcePlan(**source.model_dump()) for source in config.sources),
        seed=config.seed,
        filters=Filters(**config.filters.model_dump()),
        exact_duplicates=config.duplicates.exact,
        near_threshold=config.duplicates.near_threshold,
        shingle_words=config.duplicates.shingle_words,
        rules=Rules(**scan.model_dump(exclude={"against"})) if scan else Rules(),
        benchmarks={name: BenchmarkPlan(**b.model_dump()) for name, b in scan.against.items()} if scan else {},
        num_rows=config.mix.num_rows if config.mix else None,
        mixed=config.mix is not None,
        splits=config.split.shares,
        stratify_by=config.split.stratify_by,
        min_pass_rate=config.difficulty.min_pass_rate if config.difficulty else 0.0,
        max_pass_rate=config.difficulty.max_pass_rate if config.difficulty else 1.0,
        processes=config.processes or len(os.sched_getaffinity(0)),
        shard_bytes=int(config.shard_megabytes * 2**20),
    )


if __name__ == "__main__":
    run_stage((PrepareData, CurateData), prepare_data)
