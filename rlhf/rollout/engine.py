"""What a rollout engine is, and how one is chosen. Token ids cross this boundary, never text."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rlhf.config import Lora, OnlineRollout, PolicyLora
from rlhf.config import Rollout as RolloutConfig
from rlhf.types import Prompt, Rollout

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How completions of a prompt are drawn."""

    samples_per_prompt: int
    temperature: float
    """0 is greedy decoding; it and `top_p` below 1 are for evaluation only, where no importance ratio is formed."""
    top_p: float = 1.0
    max_new_tokens: int

    @classmethod
    def of(cls, rollout: RolloutConfig) -> Sampling:
        """What a recipe's rollout block says."""
        return cls(**rollout.model_dump(include={field.name for field in fields(cls)}))


class RolloutEngine(Protocol):
    """Samples completions from a copy of the policy that it holds itself."""

    name: str
    policy_version: int
    """Optimizer steps the engine's weights have seen."""
    lora: Lora | None
    """The adapter it applies to weights that stay as they are, or None: then all weights are replaced."""
    checkpoint_names: bool
    """Whether `load_weights` takes weights as the model's files have them, not as transformers' modules do; for mixtures they differ."""

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        """`samples_per_prompt` completions of each prompt, those of one prompt next to each other.

        The same weights, arguments and seed give the same completions.
        """
        ...

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[list[float]]:
        """Log-probability of each completion token given what precedes it, at temperature 1: [T] by each copy of the weights that samples."""
        ...

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """Replace all weights. Anything computed from the old ones (prefix cache) is dropped."""
        ...

    def load_adapter(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        """Replace the adapter, in an engine that was built with `lora`; until the first one arrives it is the bare weights."""
        ...

    def close(self) -> None:
        """Give back the memory; nothing may be called afterwards."""
        ...


def choose_engine(name: str) -> str:
    """`vllm`, `transformers` or `server` for a recipe's `rollout.engine`.

    Raises:
        ValueError: when the recipe insists on vLLM and it is not installed.
    """
    if name == "server":  # vLLM need only be installed where the servers are
        return name
    installed = importlib.util.find_spec("vllm") is not None
    if name == "vllm" and not installed:
        raise ValueError(
            "rollout.engine is vllm but vLLM is not installed; run `make install`, or set rollout.engine to transformers"
        )
    if name == "auto" and not installed:
        logger.warning(
            "vLLM is not installed: rollouts use transformers' generate, several times slower; `make install` brings vLLM"
        )
    return "vllm" if installed and name != "transformers" else "transformers"


def require_prompts_fit(prompts: Sequence[Prompt], rollout: RolloutConfig) -> None:
    """Raise for prompts the engine could not take.

    Raises:
        ValueError: naming the longest one.
    """
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    if len(longest.token_ids) > rollout.max_prompt_tokens:
        raise ValueError(
            f"prompt {longest.id!r} has {len(longest.token_ids)} tokens, more than rollout.max_prompt_tokens {rollout.max_prompt_tokens}; "
            f"set it to {len(longest.token_ids)} or more, or remove the problem"
        )


def build_engine(
    config: RolloutConfig,
    path: str,
    *,
    revision: str | None = None,
    stop_token_id: int,
    decode: Decode,
    lora: PolicyLora | None = None,
    run_folder: Path | None = None,
) -> RolloutEngine:
    """The engine a recipe asks for, holding the weights at `path`, at policy version 0; servers hold none before the first push.

    With `lora`, the policy's own block, it takes adapters or merged weights as the block says.
    """
    if choose_engine(config.engine) == "server":
        from rlhf.rollout.vllm_server import VLLMServerEngine

        assert isinstance(config, OnlineRollout)
        assert run_folder is not None
        return VLLMServerEngine(config, run_folder, stop_token_id=stop_token_id, decode=decode)
    record_experts = isinstance(config, OnlineRollout) and config.record_experts
    adapter = lora if lora is not None and lora.sync == "adapter" else None
    if choose_engine(config.engine) == "vllm":
        from rlhf.rollout.vllm_colocate import VLLMEngine

        return VLLMEngine(
            config,
            path,
            revision=revision,
            stop_token_id=stop_token_id,
            decode=decode,
            lora=adapter,
            record_experts=record_experts,
        )
    if record_experts:
        raise ValueError(
            "rollout.record_experts is set and the transformers engine does not say which experts it used; set rollout.engine to vllm or remove it"
        )
    from rlhf.rollout.transformers import TransformersEngine

    return TransformersEngine(config, path, revision=revision, stop_token_id=stop_token_id, decode=decode, lora=adapter)
