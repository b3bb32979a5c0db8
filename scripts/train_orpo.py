"""ORPO. `accelerate launch scripts/train_orpo.py --config recipes/tiny/orpo.yaml`"""

from collections import Counter

from data.chat import ChatRenderer
from data.records import PreferencePair, read_records
from rlhf.config import ORPO, PreferenceTraining
from rlhf.metrics import append_jsonl
from rlhf.models import check_model_path, load_tokenizer
from rlhf.run import Run, is_main_process, run_stage, say
from rlhf.trainers.preference import PairExample, refusal, train_orpo

REFUSED = "refused.jsonl"


def load_pairs(config: PreferenceTraining, run: Run) -> tuple[ChatRenderer, list[PairExample], dict[str, int]]:
    """(renderer, the pairs that are trained on, where the rows of the file went); what is refused is listed in `refused.jsonl`.

    Raises:
        ValueError: when no pair is left.
    """
    pairs = read_records(PreferencePair, config.pairs)
    check_model_path(config.model.path, "model.path")
    tokenizer = load_tokenizer(config.model.path, revision=config.model.revision)
    renderer = ChatRenderer(tokenizer, config.chat.system_prompt, config.chat.think)
    renderer.require_round_trip(pairs[0].question, renderer.completion(pairs[0].chosen))
    kept: list[PairExample] = []
    refused: Counter[str] = Counter()
    (run.folder / REFUSED).unlink(missing_ok=True)
    for pair in pairs:
        prompt, chosen, rejected = renderer.pair_ids(pair)
        example = PairExample(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        reason = refusal(example, max_tokens=config.max_tokens)
        if reason is None:
            kept.append(example)
            continue
        refused[reason] += 1
        if is_main_process():
            append_jsonl(run.folder / REFUSED, {"id": pair.id, "reason": reason})
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in refused.items())
    if not kept:
        raise ValueError(
            f"no pair of {config.pairs} can be trained on: {reasons}; raise max_tokens or look at the file"
        )
    say(
        f"{len(pairs):,} pairs in {config.pairs}: {len(kept):,} used, {refused.total():,} refused{f' ({reasons})' if reasons else ''}"
    )
    passes = config.training.num_steps * config.training.sequences_per_step / len(kept)
    say(f"training sees {f'each of them {passes:.1f} times' if passes >= 1 else f'{passes:.0%} of them'}")
    return renderer, kept, {"rows": len(pairs), "used": len(kept), **{f"refused: {r}": n for r, n in refused.items()}}


def run_orpo(config: ORPO, run: Run) -> None:
    renderer, examples, rows = load_pairs(config, run)
    figures = train_orpo(config, renderer.tokenizer, examples, pad_token_id=renderer.pad_token_id)
    run.finish(pairs=rows, **figures)


if __name__ == "__main__":
    run_stage(ORPO, run_orpo)
