"""A small outcome reward model on published preference pairs, against a bag-of-words logistic regression on the same split.

    python scripts/benchmark_preferences.py --data ../shared/data/preference [--steps 50] [--output FILE]

The model is built from numbers and trained from nothing on the training pairs alone, tokenizer included, so what it reaches is what
so few pairs teach by themselves. Pairs with the same question are on the same side of the split.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from data.catalog import CATALOG
from data.chat import ChatRenderer
from data.records import PreferencePair
from data.sources import read_source
from data.tokenizer import train_tokenizer
from reward_models.outcome import OutcomeModel, TokenPair, score_pairs, train
from reward_models.pair_report import report, report_table
from rlhf.config import Architecture, RewardModel
from rlhf.evaluation import paired_difference
from rlhf.report import show_estimate
from rlhf.run import say, write_json

FILES = {
    "hh_rlhf": ("hh_harmless_base_test.jsonl.gz",),
    "pairs": ("llmbar_natural.json", "llmbar_adv_manual.json", "llmbar_adv_neighbor.json", "llmbar_adv_gptinst.json",
              "llmbar_adv_gptout.json", "lf_dpo_en_demo.json"),
}  # fmt: skip
ARCHITECTURE = Architecture(
    hidden_size=64, intermediate_size=128, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=32, max_positions=1024
)
VOCABULARY = 2_000
WORD = re.compile(r"\w+|[^\w\s]")


def read_pairs(folder: Path, files: dict[str, tuple[str, ...]] = FILES) -> tuple[list[PreferencePair], dict[str, Any]]:
    """(pairs, rows read and refused of each file)"""
    pairs: list[PreferencePair] = []
    rows: dict[str, Any] = {}
    for source, names in files.items():
        split = "test" if source == "hh_rlhf" else "train"
        for name in names:
            records, refused = read_source(CATALOG[source], path=str(folder / name), revision=None, split=split)
            label = name.partition(".")[0]
            pairs += [replace(r, id=f"{label}-{r.id}", source=label) for r in records]
            rows[label] = {"used": len(records), "refused": Counter(r.reason.partition(", got")[0] for r in refused)}
    return pairs, rows


def is_held_out(pair: PreferencePair, *, share: float = 0.3) -> bool:
    """By a hash of what was asked first, so that two dialogues that begin alike are on the same side."""
    asked = (pair.history or [pair.question])[0]
    return int(hashlib.sha256(asked.encode()).hexdigest()[:8], 16) / 2**32 < share


def bag_of_words(
    train: Sequence[PreferencePair], heldout: Sequence[PreferencePair], *, penalty: float = 0.01
) -> list[float]:
    """Score differences of the held-out pairs: logistic regression on the difference of two responses' bags of words.

        min_w  mean log(1 + exp(-w · (log(1 + n_chosen) - log(1 + n_rejected)))) + penalty / 2 |w|²

    Words that occur in fewer than three training responses are left out.
    """

    def words(text: str) -> Counter[str]:
        return Counter(WORD.findall(text.lower()))

    seen = Counter(w for p in train for text in (p.chosen, p.rejected) for w in words(text))
    index = {w: i for i, w in enumerate(sorted(w for w, count in seen.items() if count >= 3))}

    def rows(pairs: Sequence[PreferencePair]) -> torch.Tensor:
        x = torch.zeros(len(pairs), len(index))
        for i, pair in enumerate(pairs):
            for text, sign in ((pair.chosen, 1.0), (pair.rejected, -1.0)):
                for w, count in words(text).items():
                    if w in index:
                        x[i, index[w]] += sign * math.log1p(count)
        return x

    x, weights = rows(train), torch.zeros(len(index), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        value = torch.nn.functional.softplus(-(x @ weights)).mean() + penalty / 2 * weights.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return (rows(heldout) @ weights.detach()).tolist()


def run(folder: Path, output_dir: Path, *, steps: int, max_tokens: int, seed: int = 0) -> dict[str, Any]:
    """Both models' figures on the held-out pairs, and where every row went."""
    from rlhf.models import build_qwen3

    pairs, rows = read_pairs(folder)
    sides = {False: [p for p in pairs if not is_held_out(p)], True: [p for p in pairs if is_held_out(p)]}
    tokenizer = train_tokenizer([t for p in sides[False] for t in (p.chosen, p.rejected)], vocab_size=VOCABULARY)
    base = output_dir / "base"
    build_qwen3(ARCHITECTURE, tokenizer, seed=seed).save_pretrained(base)
    tokenizer.save_pretrained(base)
    renderer = ChatRenderer(tokenizer)

    def tokens(pair: PreferencePair) -> TokenPair:
        prompt, chosen, rejected = renderer.pair_ids(pair)
        prompt = prompt[-(max_tokens // 2) :]  # of a long dialogue the last turns
        return TokenPair(
            chosen_ids=prompt + chosen, rejected_ids=prompt + rejected, prompt_length=len(prompt), source=pair.source
        )

    kept: dict[bool, list[tuple[PreferencePair, TokenPair]]] = {False: [], True: []}
    for side, records in sides.items():
        for pair in records:
            rendered = tokens(pair)
            if max(len(rendered.chosen_ids), len(rendered.rejected_ids)) <= max_tokens:
                kept[side].append((pair, rendered))
            else:
                rows[pair.source]["used"] -= 1
                rows[pair.source]["refused"][f"longer than {max_tokens} tokens"] += 1
    config = RewardModel.model_validate(
        {
            "stage": "reward_model", "output_dir": str(output_dir / "reward_model"), "seed": seed,
            "model": {"path": str(base)}, "train_pairs": "-", "heldout_pairs": "-", "max_tokens": max_tokens,
            "training": {"num_steps": steps, "sequences_per_step": 32, "micro_batch_size": 32},
            "optimizer": {"learning_rate": 1e-3, "warmup_steps": 10, "schedule": "linear", "weight_decay": 0.1},
        }
    )  # fmt: skip
    Path(config.output_dir).mkdir(parents=True)
    started = time.process_time()
    statistics = train(config, train_pairs=[t for _, t in kept[False]], heldout_pairs=[t for _, t in kept[True]])
    seconds = time.process_time() - started
    heldout = [t for _, t in kept[True]]
    differences = torch.tensor(bag_of_words([p for p, _ in kept[False]], [p for p, _ in kept[True]]))
    words = score_pairs(heldout, differences, torch.zeros_like(differences))
    learnt = score_pairs(heldout, *map(torch.tensor, zip(*saved_scores(config, heldout), strict=True)))
    return {
        "rows": rows,
        "training_pairs": len(kept[False]),
        "outcome_model": statistics,
        "bag_of_words": report(words),
        "difference": asdict(paired_difference([w.right for w in words], [m.right for m in learnt])),
        "cpu_seconds": round(seconds, 1),
    }


def saved_scores(config: RewardModel, pairs: Sequence[TokenPair]) -> list[tuple[float, float]]:
    """(chosen, rejected) scores by the saved model."""
    model = OutcomeModel.load(config.output_dir, device="cpu")
    both = [
        model.raw_scores([getattr(p, side) for p in pairs], batch_size=64).tolist()
        for side in ("chosen_ids", "rejected_ids")
    ]
    return list(zip(*both, strict=True))


def describe(found: dict[str, Any]) -> str:
    """The figures as lines of text."""
    lines = [f"{'file':22}  used  refused"]
    lines += [
        f"{name:22}  {r['used']:>4}  {', '.join(f'{n} {why}' for why, n in r['refused'].items()) or '-'}"
        for name, r in found["rows"].items()
    ]
    for name in ("outcome_model", "bag_of_words"):
        lines.append(f"\n{name}, trained on {found['training_pairs']:,} pairs\n{report_table(found[name])}")
    lines.append(f"\noutcome model - bag of words: {show_estimate(found['difference'], signed=True)}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the files of FILES")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--max-tokens", type=int, default=320)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = run(given.data, Path(folder), steps=given.steps, max_tokens=given.max_tokens, seed=given.seed)
    say(describe(found))
    if given.output:
        write_json(given.output, found)


if __name__ == "__main__":
    main()
