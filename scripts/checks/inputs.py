"""Data files, models, tokenizers, and the reward of the reference solutions."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from checks.findings import Context, Report
from data.catalog import BENCHMARKS, CATALOG, find
from data.chat import ChatRenderer, response_of
from data.records import Demonstration, LabelledSteps, PreferencePair, Problem, read_records
from reward_models.composite import build_reward, require_columns, require_reachable
from reward_models.judge import Judge
from reward_models.outcome import STATISTICS
from reward_models.outcome_server import ServedOutcomeModel
from reward_models.process import DESCRIPTION, targets_of
from reward_models.processbench import first_wrong, require_both_kinds
from reward_models.steps import encode_steps
from rlhf.config import (
    PPO,
    SFT,
    BuildModel,
    Config,
    CurateData,
    EstimateFisher,
    Evaluate,
    EvaluateProcess,
    EvaluateThinking,
    Forgetting,
    GenerateTraces,
    GSM8KSource,
    JudgeReward,
    Judging,
    LabelSteps,
    MakePairs,
    ModelReward,
    Offline,
    Online,
    PreferenceTraining,
    PrepareData,
    ProcessRewardModel,
    RewardModel,
    RewardServerReward,
    RuleReward,
)
from rlhf.models import check_model_path, load_tokenizer
from rlhf.rollout.engine import choose_engine, require_prompts_fit


def record_files(config: Config) -> list[tuple[str, type, str]]:
    """(key, kind of record, path) of every record file that a stage reads."""
    if isinstance(config, SFT | BuildModel):
        return [("demonstrations", Demonstration, config.demonstrations)]
    if isinstance(config, RewardModel):
        return [
            ("train_pairs", PreferencePair, config.train_pairs),
            ("heldout_pairs", PreferencePair, config.heldout_pairs),
        ]
    if isinstance(config, PreferenceTraining):
        return [("pairs", PreferencePair, config.pairs)]
    if isinstance(config, ProcessRewardModel):
        return [
            ("train_steps", LabelledSteps, config.train_steps),
            ("heldout_steps", LabelledSteps, config.heldout_steps),
        ]
    if isinstance(config, Online):
        found = [("problems", Problem, config.problems), ("demonstrations", Demonstration, config.demonstrations)]
        ptx, adaptive = config.retention.ptx, config.retention.adaptive
        found += [("retention.ptx.demonstrations", Demonstration, ptx.demonstrations)] if ptx else []
        return found + ([("retention.adaptive.problems", Problem, adaptive.problems)] if adaptive else [])
    if isinstance(config, Forgetting):
        return [(f"suites.{name}.problems", Problem, s.problems) for name, s in config.suites.items() if s.problems]
    if isinstance(config, EstimateFisher) and config.demonstrations is not None:
        return [("demonstrations", Demonstration, config.demonstrations)]
    if isinstance(config, LabelSteps | MakePairs | GenerateTraces | EvaluateThinking | EstimateFisher) or (
        isinstance(config, Evaluate) and config.problems is not None
    ):
        return [("problems", Problem, config.problems or "")]
    return []


def model_folders(config: Config) -> list[tuple[str, str]]:
    """(key, path) of every model that a stage loads."""
    if isinstance(config, Offline):
        return [("model.path", config.model.path)]
    if isinstance(config, Evaluate):
        return [(f"models.{label}.path", model.path) for label, model in config.models.items() if model.server is None]
    if isinstance(config, EvaluateProcess):
        return [("model", config.model)]
    if isinstance(config, EvaluateThinking):
        return [(f"models.{label}.path", model.path) for label, model in config.models.items()]
    if isinstance(config, GenerateTraces):
        judge = [("process_model.path", config.process_model.path)] if config.process_model else []
        return [("policy.path", config.policy.path), *judge]
    if isinstance(config, LabelSteps | MakePairs):
        rewards = config.rewards if isinstance(config, MakePairs) else ()
        models = [(f"rewards.{r.name}.path", r.path) for r in rewards if isinstance(r, ModelReward)]
        return [("policy.path", config.policy.path), *models]
    if isinstance(config, EstimateFisher):
        return [("model.path", config.model.path)]
    if isinstance(config, Forgetting):
        return [("before.path", config.before.path), ("after.path", config.after.path)]
    if isinstance(config, CurateData):
        return [("difficulty.policy.path", config.difficulty.policy.path)] if config.difficulty else []
    if not isinstance(config, Online):
        return []
    found = [("policy.path", config.policy.path)]
    if config.reference is not None and config.reference.path is not None:
        found.append(("reference.path", config.reference.path))
    if isinstance(config, PPO):
        found.append(("critic.path", config.critic.path))
    found += [(f"rewards.{r.name}.path", r.path) for r in config.rewards if isinstance(r, ModelReward)]
    return found


def check_records(report: Report, config: Config, context: Context) -> dict[str, list[Any]]:
    """Every record file of a stage, read whole; key to records."""
    found: dict[str, list[Any]] = {}
    for key, kind, path in record_files(config):
        if not Path(path).exists() and not _pending(report, key, path, context):
            continue
        if Path(path).exists():
            records = report.attempt(
                key,
                lambda kind=kind, path=path: read_records(kind, path),
                lambda r, path=path: f"{len(r):,} records in {path}",
            )
            if records:
                found[key] = records
    return found


def _pending(report: Report, key: str, path: str, context: Context) -> bool:
    """Whether an earlier stage will make a missing input; a line in any case where it will or cannot."""
    try:
        maker = context.maker(path)
    except ValueError as error:
        report.add("error", key, str(error))
        return False
    if maker is None:
        report.add(
            "error", key, f"{path} does not exist; run the stage that writes it first or correct the path in the recipe"
        )
        return False
    report.add("ok", key, f"{path} will be made by the stage {maker.stage}")
    return True


def check_models(report: Report, config: Config, context: Context) -> list[str]:
    """Every model of a stage: config, safetensors files that are whole, a reward model's statistics. Returns the folders that are there."""
    there = []
    for key, path in model_folders(config):
        local = Path(path)
        if not local.exists():
            on_hub = (
                path.count("/") == 1
                and not path.startswith(("/", ".", "outputs/"))
                and not _made_earlier(path, context)
            )
            if on_hub:
                report.add(
                    "warning",
                    key,
                    f"{path} is no local folder; it will be downloaded from the hub, and was not checked",
                )
            else:
                _pending(report, key, path, context)
            continue

        def check(key: str = key, path: str = path) -> int:
            check_model_path(path, key)
            beside = {"rewards.reward_model.path": STATISTICS, "model": DESCRIPTION}.get(key)
            if beside is not None and not (Path(path) / beside).is_file():
                script = ProcessRewardModel.script if beside == DESCRIPTION else RewardModel.script
                raise ValueError(f"{key} is {path}, which has no {beside}; train it with {script}")
            return count_tensors(Path(path))

        if report.attempt(key, check, lambda n, path=path: f"{path}, {n:,} tensors in safetensors") is not None:
            there.append(path)
    return there


def _made_earlier(path: str, context: Context) -> bool:
    return any(stage.output_dir == path for stage in context.earlier)


def count_tensors(folder: Path) -> int:
    """Tensors in a model's safetensors files, of which the headers are read.

    Raises:
        ValueError: for a file that is cut off or damaged, and for one that the index names and that is not there.
    """
    names: set[str] = set()
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="np") as content:
                names.update(content.keys())
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read ({error}); copy or download it again") from None
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = sorted({name for name in listed.values() if not (folder / name).is_file()})
        if absent:
            raise ValueError(
                f"{folder} lacks {', '.join(absent[:3])} of {index.name}; copy or download the model again"
            )
        lost = sorted(set(listed) - names)
        if lost:
            raise ValueError(
                f"{folder} lacks the tensors {', '.join(lost[:3])} of {index.name}; copy or download it again"
            )
    return len(names)


def check_text(report: Report, config: Config, records: dict[str, list[Any]], there: Sequence[str]) -> None:
    """Tokenizer and chat template give back what they are given, lengths fit, and the reward can be earned."""
    if isinstance(config, Online):
        path, revision = config.policy.path, config.policy.revision
    elif isinstance(config, Offline):
        path, revision = config.model.path, config.model.revision
    else:
        return
    if path not in there:
        return
    loaded = report.attempt(
        "tokenizer", lambda: load_tokenizer(path, revision=revision), lambda t: f"{len(t):,} tokens, chat template"
    )
    if loaded is None:
        return
    renderer = ChatRenderer(loaded, config.chat.system_prompt, config.chat.think)
    demonstrations = records.get("demonstrations")
    if demonstrations:
        first = demonstrations[0]
        report.attempt(
            "round trip",
            lambda: renderer.require_round_trip(first.question, response_of(first)),
            lambda _: "text comes back as it was, and the question stands in the prompt",
        )
    if isinstance(config, Online):
        _check_online(report, config, renderer, records)
    elif demonstrations:
        lengths = [sum(map(len, renderer.demonstration_ids(d))) for d in demonstrations]
        _check_lengths(report, lengths, config.max_tokens)
    elif pairs := records.get("pairs") or records.get("train_pairs"):
        rendered = [renderer.pair_ids(pair) for pair in pairs]
        _check_lengths(report, [len(p) + max(len(c), len(r)) for p, c, r in rendered], config.max_tokens)
    elif isinstance(config, ProcessRewardModel) and "train_steps" in records:
        _check_steps(report, config, renderer, records)


def _check_steps(
    report: Report, config: ProcessRewardModel, renderer: ChatRenderer, records: dict[str, list[Any]]
) -> None:
    """Labels that training can use, a held-out file that F1 can be counted on, and lengths."""
    report.attempt(
        "targets",
        lambda: [targets_of(r.labels, r.values, soft=config.labels == "soft") for r in records["train_steps"]],
        lambda of_records: f"{sum(map(len, of_records)):,} {config.labels} labels",
    )
    if "heldout_steps" in records:
        truth = [first_wrong(record.labels) for record in records["heldout_steps"]]
        report.attempt(
            "heldout_steps",
            lambda: require_both_kinds(truth, config.heldout_steps),
            lambda _: f"{sum(i >= 0 for i in truth):,} erroneous and {sum(i < 0 for i in truth):,} correct solutions",
        )
    prompts = [renderer.prompt_ids(record.question) for record in records["train_steps"]]
    read = [
        encode_steps(prompt, record.steps, renderer.tokenizer, separator=config.separator, opening=config.opening)[0]
        for prompt, record in zip(prompts, records["train_steps"], strict=True)
    ]
    _check_lengths(report, list(map(len, read)), config.max_tokens)


def _check_lengths(report: Report, lengths: list[int], limit: int) -> None:
    """How much of the data is longer than the recipe allows and would be left out."""
    longer = sum(length > limit for length in lengths)
    text = f"{longer:,} of {len(lengths):,} longer than max_tokens {limit}, the longest has {max(lengths):,}"
    if longer == len(lengths):
        report.add("error", "lengths", f"{text}; raise max_tokens")
    elif longer > 0.05 * len(lengths):
        report.add("warning", "lengths", f"{text}; they will be left out: raise max_tokens to keep them")
    else:
        report.add("ok", "lengths", text)


def _check_online(report: Report, config: Online, renderer: ChatRenderer, records: dict[str, list[Any]]) -> None:
    if "problems" in records:

        def longest() -> int:
            prompts = [renderer.problem_prompt(p) for p in records["problems"]]
            require_prompts_fit(prompts, config.rollout)
            require_columns(config, prompts)
            return max(len(prompt.token_ids) for prompt in prompts)

        limit = config.rollout.max_prompt_tokens
        report.attempt(
            "prompts", longest, lambda n: f"the longest has {n:,} tokens of rollout.max_prompt_tokens {limit:,}"
        )
    report.attempt("rollout engine", lambda: choose_engine(config.rollout.engine), str)
    if "demonstrations" in records:
        from train_grpo import reference_solutions

        def reachable() -> int:
            rules = tuple(r.model_copy(update={"gates": ()}) for r in config.rewards if isinstance(r, RuleReward))
            reward = build_reward(config.model_copy(update={"rewards": rules}), prefill=renderer.prefill, device="cpu")
            solutions = reference_solutions(config, renderer, records["demonstrations"])
            require_reachable(reward, solutions)
            return len(solutions)

        report.attempt(
            "reward",
            reachable,
            lambda n: f"{n} reference solutions, as the policy would write them, earn every rule in full",
        )


def check_sources(report: Report, config: Config) -> None:
    """Local files of the stages that read other formats than records."""
    if isinstance(config, PrepareData) and isinstance(config.source, GSM8KSource):
        path = config.source.path
        if path is None:
            report.add("warning", "source", "openai/gsm8k will be downloaded from the hub, and was not checked")
        else:
            _exists(report, "source", [Path(path) / name for name in ("train.jsonl", "test.jsonl")])
    if isinstance(config, CurateData):
        for source in config.sources:
            _known(report, f"sources.{source.name}", source.name, source.path, CATALOG)
        scan = config.decontamination
        for name, benchmark in scan.against.items() if scan else ():
            _known(report, f"decontamination.{name}", name, benchmark.path, BENCHMARKS)
    if isinstance(config, EvaluateProcess):
        for label, source in config.solutions.items():
            _known(report, f"solutions.{label}", source.name, source.path, CATALOG)
    if isinstance(config, Evaluate):
        if config.benchmark is not None:
            _known(report, "benchmark", config.benchmark.name, config.benchmark.path, BENCHMARKS)
        if config.data_manifest is not None:
            _exists(report, "data_manifest", [Path(config.data_manifest)])


def check_servers(report: Report, config: Config) -> None:
    """Judges and reward models behind a server: what is here is right, and the server answers; one that does not may be started later."""
    found: list[tuple[str, Callable[[], Judge | ServedOutcomeModel]]] = []
    once: dict[str, Any] = {"attempts": 1}
    if isinstance(config, Judging):
        _exists(report, "pairs" if config.pairs else "completions", [Path(config.pairs or config.completions or "")])
        found.append(("judge", lambda: Judge(config.judge.model_copy(update=once | {"cache": None}))))
    for reward in config.rewards if isinstance(config, Online) else ():
        key = f"rewards.{reward.name}"
        if isinstance(reward, JudgeReward):
            judge = reward.judge.model_copy(update=once | {"cache": None})
            found.append((f"{key}.judge", lambda judge=judge, key=key: Judge(judge, key=f"{key}.judge")))
        elif isinstance(reward, RewardServerReward):
            found.append((key, lambda reward=reward: ServedOutcomeModel(reward.model_copy(update=once))))
    for key, build in found:
        built = report.attempt(key, build, lambda _: "key, rubric and statistics are there, where they are needed")
        try:
            if built is not None:
                built.connect()
                report.add("ok", f"{key}.url", "the server answers")
        except ValueError as error:
            report.add("warning", f"{key}.url", str(error))


def _known(report: Report, key: str, name: str, path: str | None, known: Any) -> None:
    if report.attempt(key, lambda: find(name, known), lambda s: s.name) is None:
        return
    if path is None:
        report.add("warning", key, f"{name} will be downloaded from the hub, and was not checked")
    else:
        _exists(report, key, [Path(path)])


def _exists(report: Report, key: str, paths: list[Path]) -> None:
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        report.add("error", key, f"{', '.join(missing)} does not exist; correct the path in the recipe")
    else:
        report.add("ok", key, ", ".join(map(str, paths)))
