"""The Fisher information that elastic weight consolidation needs. `python scripts/estimate_fisher.py --config recipes/tiny/forgetting/fisher.yaml`"""

import random
from contextlib import closing

from data.chat import ChatRenderer
from data.records import Demonstration, Problem, read_records
from rlhf.card import fingerprint
from rlhf.config import EstimateFisher
from rlhf.elastic import fisher_diagonal, save_fisher
from rlhf.models import check_model_path, load_causal_lm, load_tokenizer
from rlhf.rollout.engine import Sampling, build_engine, require_prompts_fit
from rlhf.run import Run, format_table, num_ranks, run_stage, say
from rlhf.types import Rollout


def completions(config: EstimateFisher, renderer: ChatRenderer) -> list[Rollout]:
    """`num_sequences` at most: given ones, or the model's own of problems drawn without repetition.

    Raises:
        ValueError: when no demonstration fits.
    """
    draw, rollout = random.Random(config.seed), config.rollout
    if config.demonstrations is not None:
        given = [renderer.demonstrated(d) for d in read_records(Demonstration, config.demonstrations)]
        fitting = [d for d in given if len(d.token_ids) <= rollout.max_new_tokens]
        if not fitting:
            raise ValueError(f"no demonstration fits into rollout.max_new_tokens {rollout.max_new_tokens}; raise it")
        return draw.sample(fitting, min(config.num_sequences, len(fitting)))
    assert config.problems is not None
    problems = read_records(Problem, config.problems)
    needed = -(-config.num_sequences // rollout.samples_per_prompt)
    prompts = [renderer.prompt(p.id, p.question, p.answer) for p in draw.sample(problems, min(needed, len(problems)))]
    require_prompts_fit(prompts, rollout)
    model = config.model
    engine = build_engine(
        rollout, model.path, revision=model.revision, stop_token_id=renderer.stop_token_id, decode=renderer.decode
    )
    with closing(engine):
        return engine.generate(prompts, Sampling.of(rollout), seed=config.seed)[: config.num_sequences]


def estimate_fisher(config: EstimateFisher, run: Run) -> None:
    if num_ranks() > 1:
        raise ValueError(f"estimate_fisher runs in one process and {num_ranks()} were launched; run it with python")
    check_model_path(config.model.path, "model.path")
    weights = fingerprint(config.model.path)
    if weights == "unknown":
        raise ValueError(
            f"model.path {config.model.path} is no folder with safetensors, so nothing could tell later whether its weights are the same; "
            "download it and name the folder"
        )
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    rollouts = completions(config, ChatRenderer(tokenizer, config.chat.system_prompt))
    model = load_causal_lm(config.model.path, revision=config.model.revision, dtype="float32").eval()
    fisher = fisher_diagonal(model, rollouts)
    kind = "true, of sampled completions" if config.problems is not None else "empirical, of given completions"
    file = save_fisher(run.folder, fisher, weights=weights, kind=kind, sequences=len(rollouts))
    mean = sum(f.sum().item() for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    largest = max(fisher, key=lambda name: fisher[name].mean().item())
    rows = [
        ("kind", kind),
        ("completions", f"{len(rollouts):,} of {len({r.prompt.id for r in rollouts}):,} problems"),
        ("mean over weights", f"{mean:.3g}"),
        ("most in", f"{largest} ({fisher[largest].mean().item():.3g})"),
        ("weights", weights),
        ("file", str(file)),
    ]
    say(format_table(rows))
    run.finish(kind=kind, completions=len(rollouts), mean=mean, weights=weights)


if __name__ == "__main__":
    run_stage(EstimateFisher, estimate_fisher)
