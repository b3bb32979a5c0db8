"""The stages that judge models and completions."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.data import Source
from rlhf.config.models import Weights
from rlhf.config.rewards import JudgeModel
from rlhf.config.sections import Chat, PositiveInt, Rollout, Section, nearest


class EvaluateProcess(Section):
    """How well a process model finds the first wrong step of labelled solutions, counted as ProcessBench does."""

    stage: Literal["evaluate_process"]
    output_dir: str
    seed: int = 0
    model: str
    """Folder of a process reward model."""
    chat: Chat = Chat()
    solutions: Annotated[dict[str, Source], Field(min_length=1)]
    """Label to a source of labelled steps, such as processbench."""
    threshold_on: str | None = None
    """Label of the solutions a quarter of which gives the threshold, for all; the rest of them is scored. By default the model's own counts."""
    tokens_per_batch: PositiveInt = 16_384
    """Of a forward pass, padding included."""
    script: ClassVar[str] = "scripts/evaluate_process.py"

    @model_validator(mode="after")
    def _threshold_is_on_a_label(self) -> EvaluateProcess:
        if self.threshold_on is not None and self.threshold_on not in self.solutions:
            raise ValueError(
                f"threshold_on is {self.threshold_on!r}; {nearest(self.threshold_on, list(self.solutions))}"
            )
        return self


class Server(Section):
    """An OpenAI-compatible server that holds the weights."""

    url: Annotated[str, Field(pattern=r"^https?://")]
    """Up to and including `/v1`."""
    name: str | None = None
    """What the server calls the model; by default the only one it lists."""
    prompts: Literal["tokens", "text", "messages"] = "tokens"
    """What is sent. `tokens` is what training and rollout use. `text` and `messages` let the server tokenize, `messages` render too; where
    models.<label>.path has a tokenizer, a prompt of another length than ours is an error: a second BOS, or another chat template."""
    key_variable: str | None = None
    """Environment variable that holds the API key."""
    logprobs: bool = True
    """Ask for log-probabilities, which weight the votes; some servers refuse to give them."""
    concurrency: PositiveInt = 16
    """Requests under way at once; each is one sample."""
    attempts: PositiveInt = 5
    """Of a request that fails by no fault of ours: no connection, overload, an internal error."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 600.0


class EvaluatedModel(Weights):
    server: Server | None = None
    """Where to sample from; without it the weights are loaded by rollout.engine."""


class EvaluationRollout(Rollout):
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0 is greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the likeliest tokens that together have this probability."""
    problems_per_chunk: PositiveInt = 512
    """Sampled together and stored together, per rank: what a kill costs at most. Part of the seed, so another value draws other samples."""


class Benchmark(Section):
    """A published set of problems (see data/benchmarks.py)."""

    name: str
    path: str | None = None
    """File or folder in the form its authors ship; without it the hub's copy is downloaded at `revision`."""
    revision: str | None = None


class Selection(Section):
    """One answer out of n samples of a problem: by majority, by a reward model's best sample, by weighted vote (see rlhf/selection.py)."""

    ns: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 4, 8)
    """Numbers of samples to choose from; each at most rollout.samples_per_prompt."""
    outcome_model: str | None = None
    """Folder of scripts/train_reward_model.py."""
    process_model: str | None = None
    """Folder of scripts/train_process_reward_model.py."""
    aggregate: Literal["min", "product", "mean", "last"] = "min"
    """What of a process model's steps is the score of a completion."""
    batch_size: PositiveInt = 64
    """Completions that the outcome model scores at once."""


class Evaluate(Section):
    """Accuracy of models on the same problems, with intervals, and their paired difference."""

    stage: Literal["evaluate"]
    output_dir: str
    seed: int = 0
    models: Annotated[dict[str, EvaluatedModel], Field(min_length=1)]
    """Label to weights; the first is the baseline the last is compared with."""
    chat: Chat = Chat()
    problems: str | None = None
    """Record file. Either this or `benchmark`."""
    benchmark: Benchmark | None = None
    num_problems: PositiveInt | None = None
    """The first so many; all by default."""
    perturbations: tuple[Literal["reworded", "numbers", "distraction", "typos"], ...] = ()
    """How the same problems are told differently, for the robustness figures (see data/perturbation.py)."""
    rollout: EvaluationRollout
    truncated: Literal["grade", "wrong"] = "grade"
    """A completion cut by max_new_tokens is graded as it stands, or counts as wrong."""
    accept: Literal["boxed", "marked", "bare", "last_number"] = "boxed"
    """How plainly a completion must say its answer; each takes what the ones before it take (see reward_models/grading/extraction.py)."""
    pass_at: tuple[PositiveInt, ...] = (1,)
    """The k of pass@k; each at most rollout.samples_per_prompt."""
    selection: Selection | None = None
    """Compare ways to choose one of a problem's samples."""
    num_shown: Annotated[int, Field(ge=0)] = 3
    """Problems whose answers by every model are kept for reading."""
    data_manifest: str | None = None
    """manifest.json of the data the models were trained on; its contamination report is shown beside the score."""
    script: ClassVar[str] = "scripts/evaluate.py"

    @model_validator(mode="after")
    def _one_source(self) -> Evaluate:
        if (self.problems is None) == (self.benchmark is None):
            both = "neither" if self.problems is None else "both"
            raise ValueError(
                f"{both} of problems and benchmark are set; name a record file under problems or a benchmark"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_file_names(self) -> Evaluate:
        for label in self.models:
            if not label or not all(c.isalnum() or c in "-_.+" for c in label):
                raise ValueError(
                    f"models has the label {label!r}, which names files; use letters, digits and -_.+ only"
                )
        return self

    @model_validator(mode="after")
    def _enough_samples(self) -> Evaluate:
        if max(self.pass_at) > self.rollout.samples_per_prompt:
            raise ValueError(
                f"pass_at asks for pass@{max(self.pass_at)} from rollout.samples_per_prompt = {self.rollout.samples_per_prompt} samples; "
                "raise samples_per_prompt or lower pass_at"
            )
        if self.selection is not None and max(self.selection.ns) > self.rollout.samples_per_prompt:
            raise ValueError(
                f"selection.ns asks for {max(self.selection.ns)} samples to choose from and rollout.samples_per_prompt is "
                f"{self.rollout.samples_per_prompt}; raise samples_per_prompt or lower ns"
            )
        if self.rollout.temperature == 0 and self.rollout.samples_per_prompt > 1:
            raise ValueError(
                f"rollout.temperature is 0, so all {self.rollout.samples_per_prompt} samples of a problem would be the same; "
                "set rollout.samples_per_prompt to 1 or raise the temperature"
            )
        return self


class Judging(Section):
    """Puts completions or preference pairs that are there already before a judge; a second run asks only for what is missing."""

    stage: Literal["judge"]
    output_dir: str
    judge: JudgeModel
    """Without a cache of its own, verdicts are kept in output_dir."""
    completions: str | None = None
    """JSON lines, or a folder of them, with the fields question, completion and, where there is one, reference. Either this or `pairs`."""
    pairs: str | None = None
    """File of preference pairs in any form of data/preferences.py; each is shown in both orders."""
    num_rows: PositiveInt | None = None
    """The first so many; all by default."""
    script: ClassVar[str] = "scripts/judge.py"

    @model_validator(mode="after")
    def _one_kind(self) -> Judging:
        if (self.completions is None) == (self.pairs is None):
            both = "neither" if self.pairs is None else "both"
            raise ValueError(f"{both} of completions and pairs are set; name one file")
        return self
