"""A language model as judge (https://arxiv.org/abs/2306.05685), behind any OpenAI-compatible server: scores by a rubric, or comparisons.

A judgement is decided or it is not, and what is not decided has no value: an endpoint that is down, a reply that is no verdict, and
two orders of a pair that contradict each other are never a 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from reward_models.judge_cache import ReplyCache, request_key
from reward_models.judge_protocol import (
    PROMPT_VERSION,
    RUBRIC,
    Ask,
    Case,
    UnparsableError,
    content_of,
    pair_ask,
    read_reply,
    rubric_ask,
)
from rlhf.config import JudgeModel
from rlhf.endpoint import Answer, Endpoint, Unanswered
from rlhf.report import printable
from rlhf.run import say
from rlhf.types import Rollout
from rlhf.uncertainty import share

Status = Literal["decided", "endpoint", "unparsable", "contradictory"]
"""`endpoint`: no answer, or a refusal. `contradictory`: the two orders of a pair got verdicts that exclude each other."""
Progress = Callable[[int, int], None]
"""Told (verdicts there are, of so many)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """What the judge says of an answer, or of a pair of them."""

    status: Status
    value: float | None
    """From 0, worst, to 1, best; of a pair 1 where the first answer is better, 0 where the second is, 0.5 for a tie. None exactly when
    undecided."""
    reason: str = ""
    """The judge's explanation, or why there is no verdict."""
    verdicts: tuple[int | str | None, ...] = ()
    """As given: a score; or of a pair A (the answer shown first), B or tie, for the pair as it is and then for the other order."""

    def __post_init__(self) -> None:
        if (self.value is None) != (self.status != "decided"):
            raise ValueError(
                f"a judgement with status {self.status} and value {self.value}; only a decided one has a value"
            )


@dataclass(frozen=True, slots=True)
class _Reply:
    status: Status
    verdict: int | str | None
    reason: str


class Judge:
    """A judge as a recipe describes it.

    Args:
        config: the recipe's section.
        key: its place in the recipe, for messages.

    Raises:
        ValueError: when the API key, the rubric's file or the cache is not usable.
    """

    def __init__(self, config: JudgeModel, *, key: str = "judge") -> None:
        self._config, self._key = config, key
        self._rubric = _read_rubric(config, key)
        self._endpoint = Endpoint(config, key)
        self._cache = ReplyCache(config.cache)
        self._served: tuple[str, str] | None = None
        self.num_asked = 0
        """Requests that the cache did not answer, so far."""

    @property
    def num_retried(self) -> int:
        return self._endpoint.num_retried

    def connect(self) -> Judge:
        """Itself, once the server has said what it serves and has answered to a request of the kind that will follow.

        Raises:
            ValueError: when it is not there, does not know the model, or refuses; with the key to change.
        """
        reply = self._ask([self._rubric_ask(Case("1 + 1?", "2", "2"))], use_cache=False)[0]
        if reply.status == "endpoint":
            raise ValueError(
                f"{self._key}.url {self._config.url} gives no verdict ({reply.reason}); start the server, or correct url, model, key_variable or "
                "response_format"
            )
        return self

    def grade(self, cases: Sequence[Case], progress: Progress | None = None) -> list[Judgement]:
        """A score of each answer, scaled to [0, 1]."""
        low, high = self._config.scale
        replies = self._ask([self._rubric_ask(case) for case in cases], progress)
        return [
            Judgement(
                status=r.status,
                value=(r.verdict - low) / (high - low) if isinstance(r.verdict, int) else None,
                reason=r.reason,
                verdicts=(r.verdict,),
            )
            for r in replies
        ]

    def compare(self, pairs: Sequence[tuple[Case, Case]], progress: Progress | None = None) -> list[Judgement]:
        """Which answer of each pair is better, asked in both orders; decided only where both say the same."""
        c = self._config

        def ask(question: str, first: str, second: str) -> Ask:
            return pair_ask(question, first, second, rubric=self._rubric, explanation_chars=c.explanation_chars)

        asks = [ask(x.question, *answers) for x, y in pairs for answers in ((x.answer, y.answer), (y.answer, x.answer))]
        replies = self._ask(asks, progress)
        return [both_orders(*replies[i : i + 2]) for i in range(0, len(replies), 2)]

    def scorer(self, *, prefill: str = "") -> Callable[[Sequence[Rollout]], list[float | None]]:
        """Rollouts to scores in [0, 1], None where undecided. `prefill` is what the chat template writes of a completion."""

        def score(rollouts: Sequence[Rollout]) -> list[float | None]:
            shown = self._config.show_reference
            cases = [Case(r.prompt.question, prefill + r.text, r.prompt.reference if shown else "") for r in rollouts]
            judged = self.grade(cases)
            missing = [j for j in judged if j.value is None]
            if missing:
                counts = ", ".join(f"{n} {status}" for status, n in Counter(j.status for j in missing).items())
                say(
                    f"{self._key}: {len(missing)} of {len(judged)} completions undecided ({counts}); {missing[0].reason}"
                )
            return [j.value for j in judged]

        return score

    def _rubric_ask(self, case: Case) -> Ask:
        c = self._config
        return rubric_ask(case, rubric=self._rubric, scale=c.scale, explanation_chars=c.explanation_chars)

    def _ask(self, asks: Sequence[Ask], progress: Progress | None = None, *, use_cache: bool = True) -> list[_Reply]:
        """A reply to each; the same question is put once."""
        served = self._serves()
        if isinstance(served, Unanswered):
            return [_Reply("endpoint", None, served.reason)] * len(asks)
        model, identity = served
        bodies = [ask.body(self._config, model) for ask in asks]
        keys = [request_key(identity, PROMPT_VERSION, body) for body in bodies]
        place = {key: i for i, key in enumerate(keys)}
        kept = self._cache.find(place) if use_cache else {}
        found = {key: _read(text, asks[place[key]]) for key, text in kept.items()}
        missing = [key for key in place if key not in found]
        total, done = len(place), len(found)

        def arrived(i: int, answer: Answer) -> None:
            nonlocal done
            key = missing[i]
            found[key] = reply = _reply_of(answer, asks[place[key]])
            if reply.status == "decided" and not isinstance(answer, Unanswered):
                keep(key, content_of(answer))
            done += 1
            if progress is not None:
                progress(done, total)

        if progress is not None:
            progress(done, total)
        self.num_asked += len(missing)
        with self._cache.writer() as keep:
            self._endpoint.post("chat/completions", [bodies[place[key]] for key in missing], arrived)
        return [found[key] for key in keys]

    def _serves(self) -> tuple[str, str] | Unanswered:
        """(name of the model, what tells it from others), asked of the server once.

        Raises:
            ValueError: when the recipe's model is not among those it lists, or it lists several and the recipe names none.
        """
        if self._served is not None:
            return self._served
        wanted, answer = self._config.model, self._endpoint.get("models")
        if isinstance(answer, Unanswered):
            if wanted is None or not answer.refused:
                return answer
            answer = {}  # a server without a list of models
        rows = answer.get("data")
        listed = [m for m in rows if isinstance(m, dict) and "id" in m] if isinstance(rows, list) else []
        names = [str(m["id"]) for m in listed]
        shown = printable(", ".join(names))[:300] or "none"
        if wanted is None and len(names) != 1:
            raise ValueError(f"{self._config.url} lists the models {shown}; set {self._key}.model to one of them")
        if wanted is not None and names and wanted not in names:
            raise ValueError(f"{self._key}.model is {wanted!r} and {self._config.url} lists {shown}")
        name = wanted or names[0]
        # vLLM tells where it has the weights from: the same name may be another model tomorrow.
        root = next((str(m.get("root") or "") for m in listed if str(m["id"]) == name), "")
        self._served = name, f"{name} {root}".strip()
        return self._served


def _read_rubric(config: JudgeModel, key: str) -> str:
    if config.rubric_file is None:
        return config.rubric or RUBRIC
    path = Path(config.rubric_file)
    if not path.is_file():
        raise ValueError(f"{key}.rubric_file {path} does not exist; correct the path or write the rubric under rubric")
    return path.read_text(encoding="utf-8")


def _reply_of(answer: Answer, ask: Ask) -> _Reply:
    if isinstance(answer, Unanswered):
        return _Reply("endpoint", None, answer.reason)
    try:
        return _read(content_of(answer), ask)
    except UnparsableError as error:
        return _Reply("unparsable", None, printable(str(error)))


def _read(content: str, ask: Ask) -> _Reply:
    try:
        verdict, explanation = read_reply(content, ask)
    except UnparsableError as error:
        return _Reply("unparsable", None, printable(str(error)))
    return _Reply("decided", verdict, printable(explanation))


_FOR_FIRST = {"A": 1.0, "B": 0.0, "tie": 0.5}


def both_orders(as_is: _Reply, swapped: _Reply) -> Judgement:
    """One judgement of a pair from its two orders."""
    verdicts = (as_is.verdict, swapped.verdict)
    for reply in (as_is, swapped):
        if reply.status != "decided":
            return Judgement(status=reply.status, value=None, reason=reply.reason, verdicts=verdicts)
    value, other = _FOR_FIRST[str(as_is.verdict)], 1 - _FOR_FIRST[str(swapped.verdict)]
    if value != other:
        reason = f"{as_is.verdict} for the pair and {swapped.verdict} for the other order"
        return Judgement(status="contradictory", value=None, reason=reason, verdicts=verdicts)
    return Judgement(status="decided", value=value, reason=as_is.reason, verdicts=verdicts)


def position_bias(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How much the order decides, over the pairs with a verdict in both orders.

    `flipped`: share of pairs whose two verdicts name different answers, or once a tie; 0 for a judge that reads only the answers.
    `first_wins`: how often the answer shown first wins, a tie counting half; 0.5 without bias. Both with 95 % intervals, the unit is
    the pair.
    """
    both = [j for j in judgements if len(j.verdicts) == 2 and None not in j.verdicts]
    if not both:
        return {"pairs": 0, "flipped": None, "first_wins": None}
    flipped = share([float(j.status == "contradictory") for j in both])
    first = share([sum(_FOR_FIRST[str(v)] for v in j.verdicts) / 2 for j in both], samples=2)
    return {"pairs": len(both), "flipped": asdict(flipped), "first_wins": asdict(first)}


def agreement(judgements: Sequence[Judgement]) -> dict[str, Any]:
    """How often the judge prefers what people preferred, of pairs whose first answer is the one they preferred; a tie counts half.

    Once over the decided pairs, which a judge chooses itself, and once over all that were answered, the undecided ones counting half, as a
    coin would have it. With 95 % intervals.
    """
    decided = [j.value for j in judgements if j.value is not None]
    answered = [0.5 if j.value is None else j.value for j in judgements if j.status != "endpoint"]
    return {
        "agreement": asdict(share(decided)) if decided else None,
        "agreement_undecided_half": asdict(share(answered)) if answered else None,
    }


def status_counts(judgements: Sequence[Judgement]) -> dict[str, int]:
    """How many there are of each status."""
    return {
        status: sum(j.status == status for j in judgements)
        for status in ("decided", "endpoint", "unparsable", "contradictory")
    }
