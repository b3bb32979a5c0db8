"""Metrics as (total, count), the meaning of each key, and where they go."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

POOLS = ("unseen", "active", "solved", "impossible")
"""Where a curriculum sorts problems by the pass rate that was measured."""
PASS_RATE_BINS = 10

MEANING = {
    "step": "optimizer steps taken",
    "batch": "rollout batches trained on",
    "reward/total": "mean reward of a completion: weighted sum of the components; of everything sampled, replaced groups included",
    "reward/correctness": "share of judged completions with the right answer",
    "reward/group_std": "mean standard deviation of the rewards of a group",
    "reward/groups_with_signal": "share of groups whose rewards are not all equal; the others have no gradient",
    "advantage/magnitude": "mean absolute advantage of a trained token",
    "advantage/positive": "share of trained tokens with an advantage above 0",
    "rollout/tokens": "tokens sampled for the batch, of groups that were replaced too, per rank",
    "rollout/tokens_per_second": "tokens sampled per second and rank",
    "rollout/refilled": "share of groups without signal that rollout.refill_rounds replaced",
    "rollout/age": "optimizer steps the trainer had taken since the weights that sampled, mean over completions; 0 in the synchronous loop",
    "rollout/hidden": "share of the time of sampling and scoring that training did not have to wait for, with training.max_staleness",
    "rollout/length": "mean tokens of a completion",
    "rollout/repetition": "share of the 8-grams of tokens of a completion that stood in it before, mean over completions",
    "rollout/truncated": "share of completions cut by max_new_tokens",
    "rollout/undecided": "share of completions the grader could not judge; their groups are left out",
    "policy/loss": "loss of the optimizer step, summed over its tokens with their weights",
    "policy/entropy": "mean entropy in nats of the policy at trained tokens",
    "policy/clip_fraction": "share of trained tokens whose gradient the clip took away",
    "policy/ratio": "mean ratio of the policy to the one that sampled, at trained tokens; 1 on policy",
    "policy/sampler_correction": "mean weight of a trained token by algorithm.sampler_correction",
    "policy/kl_sampler": "k3 estimate of KL(sampler || trainer) per token, measured before the policy moves; 0 up to rounding",
    "policy/kl_reference": "estimate of KL(policy || reference) per trained token, only with a reference",
    "policy/focus": "share of trained tokens that algorithm.top_entropy_share left a gradient",
    "policy/grad_norm": "gradient norm before clipping, mean over the batch's optimizer steps",
    "moe/load": "largest share of a layer's tokens that one expert gets, times the number of experts, mean over layers; 1 is even, of the trained tokens that were computed",
    "moe/router_entropy": "mean entropy in nats of a router's probabilities at trained tokens; ln of the number of experts is undecided",
    "moe/balance_loss": "auxiliary loss before its coefficient: experts x sum of load x mean probability, mean over layers; experts per token is even",
    "moe/disagreement": "share of (trained token, layer) that went to other experts in the sampler than in the trainer, before the policy moves",
    "moe/replaced": "share of (trained token, layer) whose own choice of experts policy.router_replay put aside, mean over the batch's steps",
    "critic/loss": "value loss of the optimizer step, summed over its tokens with their weights",
    "critic/error": "mean squared difference between value and return at trained tokens, before the step",
    "critic/value": "mean value the critic predicts at trained tokens",
    "critic/return": "mean return at trained tokens, what the critic should predict",
    "critic/grad_norm": "gradient norm of the critic before clipping, mean over the batch's optimizer steps",
    "train/tokens": "tokens a forward pass computes, padding included, mean over the batch's micro-batches",
    "train/tokens_per_second": "completion tokens trained on per second of training and rank, once per batch whatever the passes",
    "retention/ability": "accuracy on retention.adaptive.problems, one sample each, after the batch; only where it was measured",
    "retention/elastic": "1/2 sum F (weight - weight before)^2, before its coefficient, mean over the batch's optimizer steps",
    "retention/factor": "what retention.adaptive multiplies its control's coefficient with from here on",
    "retention/ptx": "mean negative log-likelihood in nats of a response token of retention.ptx.demonstrations",
    "sync/error": "nats per token between engine and trainer on the probe after the sync",
    "rollout/temperature": "of the batch, with rollout.temperature_schedule",
    "policy/entropy_coefficient": "of the batch, with algorithm.entropy_schedule",
    "rollout/distinct_scratchpads": "different scratchpads among the samples of a prompt: 0 when they are all the same, 1 when no two are",
    "rollout/distinct_answers": "the same for what comes after the scratchpad; it falls with accuracy too",
    "rollout/self_bleu": "BLEU of a completion with the other samples of its prompt as references: 1 when they are all the same",
    "replay/size": "past correct completions held for section replay",
    "replay/rescued": "share of groups, wrong from end to end, that got a past correct completion",
    "replay/age": "rollout batches since these were sampled, mean",
    "curriculum/pass_rate": "mean pass rate of the problems sampled so far, as it was measured last",
    "curriculum/effective": "how many problems, drawn evenly, the next choice would be as spread over",
    "curriculum/unseen": "problems never sampled",
    "curriculum/active": "problems that are neither solved nor impossible, as section curriculum.pools or its defaults have it",
    "curriculum/solved": "problems at or above solved_at",
    "curriculum/impossible": "problems at or below impossible_at",
    **{
        f"curriculum/{key}_{i}": f"share of {what} whose pass rate is from {i / 10} to {(i + 1) / 10}"
        for key, what in (("rates", "the problems sampled so far"), ("chosen", "the problems sampled for this batch"))
        for i in range(PASS_RATE_BINS)
    },
    "watch/surface": "share of the variance behind the advantages that comes from components of the kinds format, length, overlong, repetition, cosine and target_length",
    "seconds/rollout": "time sampling",
    "seconds/reward": "time scoring",
    "seconds/train": "time in forward, backward and optimizer",
    "seconds/sync": "time pushing weights and checking them",
    "share/rollout": "part of the batch's time that went into sampling",
    "share/reward": "part that went into scoring, with the reference's and the critic's passes before the update",
    "share/train": "part that went into optimizer steps",
    "share/sync": "part that went into pushing weights and checking them",
    "memory/peak_gb": "highest memory in use so far, in GiB: of the device, or of the process on a CPU",
}
"""Components named in a recipe add three each: `reward/<name>`, the mean of its raw value where it applies, `weighted/<name>`, the mean of
what it adds to the total there, and `variance_share/<name>`, its share of the variance that the advantages come from: of the weighted
components within groups, over the batch with a critic. The shares add up to 1, and one that works against the others is negative."""

CLOCK = ("seconds/", "share/", "memory/", "rollout/hidden", "rollout/tokens_per_second", "train/tokens_per_second")
"""Beginnings of the keys that the machine decides; the others are the run's own and the same each time on one CPU rank."""


class Metrics:
    """Accumulates totals and counts, so that means over micro-batches and ranks are means over tokens, not means of means.

    Example: a rank with 1 token of value 2 and a rank with 3 tokens of value 0 have mean 0.5, not 1.
    """

    def __init__(self) -> None:
        self._total: dict[str, float] = defaultdict(float)
        self._count: dict[str, float] = defaultdict(float)

    def add(self, key: str, *, total: float, count: float) -> None:
        self._total[key] += total
        self._count[key] += count

    def update(self, other: Metrics) -> None:
        for key, (total, count) in other.pairs().items():
            self.add(key, total=total, count=count)

    def pairs(self) -> dict[str, tuple[float, float]]:
        return {key: (self._total[key], self._count[key]) for key in self._total}


def reduce_metrics(per_rank: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    """Means over the (total, count) pairs of all ranks; keys without any count are left out."""
    total: dict[str, float] = defaultdict(float)
    count: dict[str, float] = defaultdict(float)
    for pairs in per_rank:
        for key, (t, c) in pairs.items():
            total[key] += t
            count[key] += c
    return {key: total[key] / count[key] for key in total if count[key]}


def append_jsonl(path: Path, row: Mapping[str, float | str]) -> None:
    with path.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def truncate_jsonl(path: Path, *, key: str, below: float) -> None:
    """Drop the rows that a resumed run is about to write again, and a last one that a kill cut off."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows if row[key] < below), encoding="utf-8")
        os.replace(temporary, path)


def console_line(row: dict[str, float], total_batches: int) -> str:
    """One batch on one line; a dash where nothing was measured."""
    seconds = sum(value for key, value in row.items() if key.startswith("seconds/"))

    def show(label: str, key: str, form: str) -> str:
        return f"{label} {format(row[key], form) if key in row else '-'}"

    return "  ".join(
        (
            f"batch {row['batch']:>4.0f}/{total_batches}",
            show("reward", "reward/total", "6.3f"),
            show("correct", "reward/correctness", "5.1%"),
            show("length", "rollout/length", "5.1f"),
            show("truncated", "rollout/truncated", ".1%"),
            show("entropy", "policy/entropy", "5.3f"),
            show("kl_sampler", "policy/kl_sampler", ".1e"),
            show("signal", "reward/groups_with_signal", "4.0%"),
            f"{seconds:.1f} s",
        )
    )


if __name__ == "__main__":
    for name, meaning in MEANING.items():
        print(f"{name:26} {meaning}")
