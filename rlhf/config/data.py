"""The stages that make data: prepare_data and curate_data."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from rlhf.config.models import Weights
from rlhf.config.sections import Chat, PositiveInt, Rollout, Section, Share


class StoriesSource(Section):
    """The embedded task, generated (see data/stories.py)."""

    name: Literal["stories"]
    min_level: PositiveInt = 2
    """Fewest events of a problem."""
    max_level: Annotated[int, Field(ge=1, le=6)] = 5
    answers_at_once: Share = 0.6
    """Share of the demonstrations that answer without a scratchpad."""
    budgets: dict[
        Literal["short", "long"] | Annotated[Literal["off"], BeforeValidator(lambda v: "off" if v is False else v)],
        Annotated[float, Field(gt=0)],
    ] = {}
    """Thinking budgets of demonstrations and problems, and the weight of each: off answers at once, short writes down the first
    three sums, long all of them. Without any, `answers_at_once` decides."""

    @model_validator(mode="after")
    def _levels_in_order(self) -> StoriesSource:
        if self.min_level > self.max_level:
            raise ValueError(f"min_level is {self.min_level} and max_level is {self.max_level}; swap them")
        return self


class GSM8KSource(Section):
    """GSM8K in its original JSONL (see data/gsm8k.py)."""

    name: Literal["gsm8k"]
    path: str | None = None
    """Folder with train.jsonl and test.jsonl; without it the hub's openai/gsm8k is downloaded at `revision`."""
    revision: str = "main"


class PrepareData(Section):
    """Turns a source into the record files that the other stages read."""

    stage: Literal["prepare_data"]
    output_dir: str
    seed: int = 0
    source: Annotated[StoriesSource | GSM8KSource, Field(discriminator="name")]
    num_demonstrations: PositiveInt
    num_train_problems: PositiveInt
    """Problems for reinforcement learning."""
    num_test_problems: PositiveInt
    num_preference_pairs: Annotated[int, Field(ge=2)]
    """Training pairs; a tenth as many again are held out, from the source's test split, for the reward model's accuracy."""
    script: ClassVar[str] = "scripts/prepare_data.py"


class Source(Section):
    """A source of data/catalog.py."""

    name: str
    path: str | None = None
    """File or folder in the form the source ships; without it the hub's data set is downloaded at a pinned revision."""
    revision: str | None = None
    """Commit on the hub, where it is not the catalog's."""
    split: str | None = None
    """The source's own split; its training data where it has any, by default."""


class DataSource(Source):
    """One of several; all sources of a recipe yield the same kind of record."""

    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the mix, relative to the other sources."""


class DataFilters(Section):
    """What a record must be. The defaults let everything pass; what is taken out is counted with its reason."""

    tokenizer: str | None = None
    """Folder with the tokenizer.json that tokens are counted with; chat markers are not counted."""
    min_tokens: PositiveInt = 1
    max_tokens: PositiveInt | None = None
    languages: tuple[str, ...] = ()
    """Codes such as en; a text that is too short to tell passes."""
    min_letter_share: Share = 0.0
    """Letters among all characters but spaces."""
    max_repetition: Share = 1.0
    """Share of a text's 5-grams that occurred in it before, in texts of 50 words and more."""
    pictures: bool = True
    """Whether a text may refer to a picture that is not there."""

    @model_validator(mode="after")
    def _tokens_need_a_tokenizer(self) -> DataFilters:
        if self.tokenizer is None and (self.max_tokens is not None or self.min_tokens > 1):
            raise ValueError("max_tokens and min_tokens count tokens, but tokenizer is not set; name a model's folder")
        if self.max_tokens is not None and self.max_tokens < self.min_tokens:
            raise ValueError(f"max_tokens is {self.max_tokens} and min_tokens is {self.min_tokens}; swap them")
        return self


class Duplicates(Section):
    """Of equal or similar rows the first one stays, in the order of the sources."""

    exact: bool = True
    near_threshold: Annotated[float, Field(gt=0, le=1)] | None = 0.8
    """Least estimated Jaccard similarity of near duplicates; null keeps them. Rows with different answers are none."""
    shingle_words: PositiveInt = 5
    """Words of the n-grams that are compared."""


class EvaluationSet(Section):
    """Where an evaluation set is read from: a local file or folder, or the hub at a pinned revision."""

    path: str | None = None
    revision: str | None = None


class Decontamination(Section):
    """Rows that hold a problem of an evaluation set are dropped, and named in the manifest (see data/decontamination.py)."""

    against: Annotated[dict[str, EvaluationSet], Field(min_length=1)]
    """Benchmarks by name; recipes/data/benchmarks.yaml lists all that are known."""
    ngram_words: PositiveInt = 8
    overlap: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least share of a problem's n-grams in a row."""
    numbers_blind: Literal["drop", "report", "off"] = "drop"
    """What happens to rows that are a problem reworded with other numbers."""
    similarity: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Least numbers-blind similarity."""
    min_words: PositiveInt = 12
    """Problems of fewer words, numbers and single letters aside, are not matched numbers-blind: they are set phrases."""


class Difficulty(Section):
    """Pass rate of a policy on each problem that is left; problems outside the bounds are dropped."""

    policy: Weights
    chat: Chat = Chat()
    rollout: Rollout
    min_pass_rate: Share = 0.0
    max_pass_rate: Share = 1.0


class Mix(Section):
    """Sources in the proportion of their weights, no row twice. Without this block every row that is left is used."""

    num_rows: PositiveInt | None = None
    """As many as the weights allow, by default."""


class Split(Section):
    """Files to write; rows with the same question go to the same one."""

    shares: Annotated[dict[str, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)] = {"train": 1.0}
    stratify_by: tuple[str, ...] = ()
    """Fields of the records, such as level or subject, whose values have the same shares in every split."""

    @model_validator(mode="after")
    def _shares_add_up(self) -> Split:
        if abs(sum(self.shares.values()) - 1) > 1e-6:
            raise ValueError(f"shares add up to {sum(self.shares.values()):g}, not 1; change one of them")
        return self


class CurateData(Section):
    """Filters, deduplicates, decontaminates, splits and mixes sources of any size into parquet files with a manifest."""

    stage: Literal["curate_data"]
    output_dir: str
    seed: int = 0
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1)]
    filters: DataFilters = DataFilters()
    duplicates: Duplicates = Duplicates()
    decontamination: Decontamination | None = None
    difficulty: Difficulty | None = None
    mix: Mix | None = None
    split: Split = Split()
    processes: PositiveInt | None = None
    """As many as there are cores, by default."""
    shard_megabytes: Annotated[float, Field(gt=0)] = 32.0
    """Of input text a process reads before it leaves a mark to resume from."""
    script: ClassVar[str] = "scripts/prepare_data.py"

    @model_validator(mode="after")
    def _weights_need_a_mix(self) -> CurateData:
        if self.mix is None and any(source.weight != 1 for source in self.sources):
            raise ValueError("a source has a weight, but there is no mix, so nothing would read it; add `mix: {}`")
        return self
