"""Trainer weights into the rollout engine, and the proof that they arrived. The only code that knows both sides."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.logprobs import token_logprobs
from rlhf.lora import adapter_parameters, merged_parameters
from rlhf.rollout.engine import RolloutEngine


@dataclass(frozen=True, slots=True)
class Probe:
    """A fixed sequence that both sides score after every sync."""

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Freshness:
    """How far the engine is from the trainer on the probe, in nats per token (means of absolute differences), at its worst copy of the weights."""

    error: float
    """Engine against the trainer's weights now."""
    stale_error: float
    """Engine against the trainer's weights at the sync before."""
    moved: float
    """The trainer's weights now against those at the sync before."""
    level: float
    """Mean log-probability by the trainer's weights: the same on every rank, or the ranks train different models."""


def send_weights(engine: RolloutEngine, policy: nn.Module, *, policy_version: int) -> None:
    """The policy into the engine, unchecked: its adapter alone where the engine applies one, else whole weights, adapters merged."""
    if engine.lora is not None:
        engine.load_adapter(adapter_parameters(policy), policy_version=policy_version)
    else:
        weights = Merged(policy, as_in_files=engine.checkpoint_names)
        engine.load_weights(weights, policy_version=policy_version)


class Merged:
    """A policy's whole weights with adapters merged, gathered anew each time they are iterated over.

    Args:
        policy: the model.
        as_in_files: whether they get the names of the model's files.
    """

    def __init__(self, policy: nn.Module, *, as_in_files: bool) -> None:
        self._policy, self._as_in_files = policy, as_in_files

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        weights = merged_parameters(self._policy)
        return as_saved(self._policy, weights) if self._as_in_files else weights


def as_saved(policy: nn.Module, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names, and in the pieces, of the model's files: transformers fuses the experts of a mixture as it loads them."""
    from transformers.core_model_loading import revert_weight_conversion

    for name, tensor in weights:
        yield from revert_weight_conversion(policy, {name: tensor}).items()  # type: ignore[arg-type]


class WeightSync:
    """Pushes weights and checks them.

    An engine that silently kept its old weights is caught twice: its log-probabilities are further than `tolerance` from the
    trainer's, or, when the weights moved less than rounding, they are nearer to the previous weights' than to the current ones'.

    Example:
        sync = WeightSync(engine, policy, probes, tolerance=0.05)
        sync.push(policy_version=1)      # raises when the engine does not answer as the new weights would
    """

    def __init__(self, engine: RolloutEngine, policy: nn.Module, probes: Sequence[Probe], *, tolerance: float) -> None:
        self._engine, self._policy, self._probes, self._tolerance = engine, policy, probes, tolerance
        self._previous = self._trainer_logprobs()
        self._check(self._previous)

    def push(self, *, policy_version: int) -> Freshness:
        """Send the policy's weights and check that the engine uses them.

        Raises:
            RuntimeError: when it does not.
        """
        send_weights(self._engine, self._policy, policy_version=policy_version)
        if self._engine.policy_version != policy_version:
            raise RuntimeError(
                f"the {self._engine.name} engine reports policy version {self._engine.policy_version} after a push of {policy_version}"
            )
        current = self._trainer_logprobs()
        freshness = self._check(current)
        self._previous = current
        return freshness

    def _check(self, current: torch.Tensor) -> Freshness:
        by_copy = self._engine_logprobs()
        freshness = Freshness(
            error=(by_copy - current).abs().mean(1).max().item(),
            stale_error=(by_copy - self._previous).abs().mean(1).min().item(),
            moved=(current - self._previous).abs().mean().item(),
            level=current.mean().item(),
        )
        kept_old = freshness.stale_error < freshness.moved / 4 and freshness.error > freshness.moved / 2
        if not freshness.error <= self._tolerance or kept_old:  # weights that are not numbers give no number
            raise RuntimeError(
                f"stale rollout weights: after the push of policy version {self._engine.policy_version} the {self._engine.name} engine's log-probabilities "
                f"are {freshness.error:.2g} nats per token from the trainer's and {freshness.stale_error:.2g} from those before the push "
                f"(tolerance {self._tolerance:g}); look at the engine's version and weight loading, or raise guards.freshness_tolerance "
                "if the engine computes in a lower precision"
            )
        return freshness

    def _engine_logprobs(self) -> torch.Tensor:
        """[copies of the weights, tokens of all probes]; a copy that was lost between two probes is left out of neither, so it is asked again."""
        while True:
            scores = [self._engine.score(probe.prompt_ids, probe.completion_ids) for probe in self._probes]
            if len({len(copies) for copies in scores}) == 1:
                return torch.cat([torch.tensor(copies) for copies in scores], 1)

    @torch.no_grad()
    def _trainer_logprobs(self) -> torch.Tensor:
        device = next(self._policy.parameters()).device
        per_probe = []
        for probe in self._probes:
            tokens = torch.tensor([[*probe.prompt_ids, *probe.completion_ids]], device=device)
            logits = self._policy(input_ids=tokens[:, :-1]).logits[0, len(probe.prompt_ids) - 1 :]
            per_probe.append(token_logprobs(logits, tokens[0, len(probe.prompt_ids) :], temperature=1.0).cpu())
        return torch.cat(per_probe)
