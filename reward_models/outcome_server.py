"""An outcome reward model behind vLLM's server for pooling models, in the place of one that is loaded here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from reward_models.outcome import STATISTICS
from rlhf.config import RewardServerReward
from rlhf.endpoint import Answer, Endpoint, Unanswered
from rlhf.run import say
from rlhf.types import Rollout


class ServedOutcomeModel:
    """Scores of a reward model that a server holds, standardised by the statistics of its folder.

    Token ids are sent, so that the server tokenizes nothing, and it must have read as many as were sent: one that cuts sequences or
    adds a token would score another text.

    Raises:
        ValueError: when the statistics are missing, or the API key is.
    """

    def __init__(self, reward: RewardServerReward) -> None:
        self._reward, self._key = reward, f"rewards.{reward.name}"
        statistics = Path(reward.path) / STATISTICS
        if not statistics.is_file():
            raise ValueError(
                f"{self._key}.path is {reward.path}, which has no {STATISTICS}; copy it there from the folder of the model that {reward.url} serves"
            )
        stored = json.loads(statistics.read_text(encoding="utf-8"))
        if stored.get("head", "classification") != "classification":
            raise ValueError(
                f"{self._key}.path {reward.path} has the head {stored['head']}, which vLLM does not serve; leave out {self._key}.url to score here"
            )
        self.mean, self.std = float(stored["mean"]), float(stored["std"])
        self._endpoint = Endpoint(reward, self._key)

    def connect(self) -> ServedOutcomeModel:
        """Itself, once the server has scored something.

        Raises:
            ValueError: when it does not, naming the command that starts one.
        """
        answer = self._endpoint.post("classify", [self._body([[0]])])[0]
        if isinstance(answer, Unanswered) or _scores(answer, [1]) is None:
            reason = answer.reason if isinstance(answer, Unanswered) else f"it answered {json.dumps(answer)[:200]}"
            raise ValueError(
                f"{self._key}.url {self._reward.url} gives no score ({reason}); start a server with python -m vllm.entrypoints.openai.api_server "
                "--runner pooling --model <the reward model, of one label>, and give its url without a path"
            )
        return self

    def raw_scores(self, sequences: Sequence[Sequence[int]]) -> list[float | None]:
        """[N] unstandardised scores; None where the server gave none."""
        size = self._reward.batch_size
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        scores: list[float | None] = [None] * len(sequences)
        reasons: list[str] = []
        # A sequence that the server refuses, as too long for it, takes its batch along: each of those is then asked for alone.
        while batches:
            answers = self._endpoint.post("classify", [self._body([sequences[i] for i in rows]) for rows in batches])
            alone: list[list[int]] = []
            for rows, answer in zip(batches, answers, strict=True):
                if isinstance(answer, Unanswered):
                    reasons.append(answer.reason)
                    alone += [[i] for i in rows] if answer.refused and len(rows) > 1 else []
                    continue
                found = _scores(answer, [len(sequences[i]) for i in rows])
                if found is None:
                    reasons.append("an answer with other sequences, labels or lengths than were sent")
                for i, value in zip(rows, found or [None] * len(rows), strict=True):
                    scores[i] = value
            batches = alone
        if None in scores:
            say(
                f"{self._key}: {scores.count(None)} of {len(scores)} completions without a score; {reasons[-1] if reasons else 'not a number'}"
            )
        return scores

    def scorer(self) -> Callable[[Sequence[Rollout]], list[float | None]]:
        """Rollouts to standardised scores, None where undecided."""

        def score(rollouts: Sequence[Rollout]) -> list[float | None]:
            raw = self.raw_scores([(*r.prompt.token_ids, *r.token_ids) for r in rollouts])
            return [None if value is None else (value - self.mean) / self.std for value in raw]

        return score

    def _body(self, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
        # Without the activation, which for one label is a sigmoid, these are the scores themselves.
        return {"input": [list(s) for s in sequences], "add_special_tokens": False, "use_activation": False}


def _scores(answer: Answer, lengths: Sequence[int]) -> list[float | None] | None:
    """Scores of one request in its order; None in the place of what is no number, or of all when it is no answer to it."""
    try:
        rows = sorted(answer["data"], key=lambda row: row["index"])  # type: ignore[index]
        values = [row["probs"] for row in rows]
        read = answer["usage"]["prompt_tokens"]  # type: ignore[index]
        whole = len(values) == len(lengths) and all(len(v) == 1 for v in values) and read == sum(lengths)
        return [float(v[0]) if math.isfinite(float(v[0])) else None for v in values] if whole else None
    except (KeyError, IndexError, TypeError, ValueError):
        return None
