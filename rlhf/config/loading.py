"""How a recipe becomes a config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, Field, ValidationError

from rlhf.config.data import CurateData, PrepareData
from rlhf.config.evaluation import Evaluate, EvaluateProcess, Judging
from rlhf.config.models import BuildModel
from rlhf.config.offline import SFT, ProcessRewardModel, RewardModel
from rlhf.config.online import GRPO, PPO
from rlhf.config.preference import DPO, ORPO
from rlhf.config.retention import EstimateFisher, Forgetting
from rlhf.config.samples import GenerateTraces, LabelSteps, MakePairs
from rlhf.config.sections import Section, nearest
from rlhf.config.thinking import EvaluateThinking


class PipelineStage(Section):
    recipe: str
    """A path; a bare file name is looked for beside the pipeline's own recipe."""
    overrides: tuple[str, ...] = ()


class Pipeline(Section):
    """Stages run one after the other, each its own `accelerate launch`."""

    stage: Literal["pipeline"]
    output_dir: str
    accelerate_config: str
    """An accelerate configuration file; it decides ranks, DeepSpeed and precision for every training stage."""
    stages: Annotated[tuple[PipelineStage, ...], Field(min_length=1)]
    script: ClassVar[str] = "scripts/run_pipeline.py"


Config = (
    PrepareData
    | CurateData
    | BuildModel
    | SFT
    | RewardModel
    | LabelSteps
    | MakePairs
    | GenerateTraces
    | ProcessRewardModel
    | EvaluateProcess
    | Judging
    | ORPO
    | DPO
    | GRPO
    | PPO
    | Evaluate
    | EstimateFisher
    | Forgetting
    | EvaluateThinking
    | Pipeline
)
STAGES: dict[str, type[Config]] = {get_args(c.model_fields["stage"].annotation)[0]: c for c in get_args(Config)}


class RecipeLoader(yaml.SafeLoader):
    """YAML in which only true and false are truth values, so that `off` is a word, and in which a key stands once."""

    yaml_implicit_resolvers = {
        start: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool" or start in "tTfF"]
        for start, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands twice; remove one", node.start_mark
            )
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """Raises yaml.YAMLError for what is no YAML."""
    return yaml.load(text, Loader=RecipeLoader)  # noqa: S506  # a SafeLoader


def read_recipe(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe file as a dict, with what it `extends` underneath it."""
    if not path.is_file():
        siblings = [str(p) for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        hint = nearest(str(path), siblings) if siblings else "recipes live under recipes/"
        raise ValueError(f"recipe {path} does not exist; {hint}")
    if path.resolve() in seen:
        raise ValueError(f"recipe {path} extends itself through {' -> '.join(p.name for p in seen)}; break the circle")
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, got {type(raw).__name__}")
    for stage in raw.get("stages", ()) if raw.get("stage") == "pipeline" else ():
        # A bare name is a neighbour, so that a copied folder runs its own recipes and not those it was copied from.
        if isinstance(stage, dict) and isinstance(stage.get("recipe"), str) and "/" not in stage["recipe"]:
            stage["recipe"] = str(path.parent / stage["recipe"])
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    return merge(read_recipe(path.parent / str(parent), (*seen, path.resolve())), raw)


def merge(base: dict[str, Any], overlay: dict[str, Any]) -> dict[str, Any]:
    """`overlay` on top of `base`: mappings merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in overlay.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """`a.b=3` as {"a": {"b": 3}}; the value is read as YAML."""
    key, equals, value = text.partition("=")
    if not equals or not all(key.split(".")):
        raise ValueError(f"override {text!r} is not of the form key.sub=value")
    try:
        nested: Any = read_yaml(value)
    except yaml.YAMLError:
        raise ValueError(f"the value of override {text!r} is not valid YAML") from None
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return nested


def parse_config(raw: dict[str, Any], origin: str) -> Config:
    """A validated config from a raw recipe.

    Raises:
        ValueError: one line for each thing wrong, with its key, its value and the repair.
    """
    stage = raw.get("stage")
    if stage not in STAGES:
        problem = "has no stage key" if stage is None else f"names the stage {stage!r}"
        raise ValueError(f"{origin} {problem}; {nearest(str(stage), list(STAGES))}")
    try:
        return STAGES[stage].model_validate(raw)
    except ValidationError as error:
        lines = [explain(e, STAGES[stage]) for e in error.errors()]
        raise ValueError(f"{origin}: " + "; ".join(dict.fromkeys(lines))) from None


def explain(error: Any, root: type[Section]) -> str:
    """One pydantic error as a sentence."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}; {nearest(location[-1], known_keys(root, location[:-1]))}"
        case "missing":
            return f"key {key!r} is missing; add it"
        case "value_error":
            return (f"{key}: " if key else "") + error["msg"].removeprefix("Value error, ")
        case _:
            return f"key {key!r} has the value {error['input']!r:.60}; {error['msg'][0].lower()}{error['msg'][1:]}"


def known_keys(root: type[BaseModel], location: list[str]) -> list[str]:
    """Field names valid at a location, found by walking the schema."""
    models = [root]
    for part in location:
        inner = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [
            m for annotation in inner for m in sections_in(annotation)
        ] or models  # an index or a union tag stays where it is
        tagged = [m for m in models if part in {m.__name__, *_tags(m)}]
        models = tagged or models
    return [*dict.fromkeys(name for model in models for name in model.model_fields)]


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    field = model.model_fields.get("name")
    return get_args(field.annotation) if field else ()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    """All sections mentioned by a type."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in sections_in(inner)]


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The config of a recipe file with `key.sub=value` overrides applied.

    Raises:
        ValueError: for anything a user can get wrong in it.
    """
    raw = read_recipe(Path(path))
    for override in overrides:
        raw = merge(raw, parse_override(override))
    return parse_config(raw, str(path))


def to_yaml(config: Section) -> str:
    """A config as YAML that loads to the same config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
