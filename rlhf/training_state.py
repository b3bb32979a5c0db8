"""What a checkpoint of the online loop holds: safetensors and JSON, by parameter name and whole, whatever the number of ranks.

state.json                       counters, coefficients, schedules, recipe, git revision, last metrics
policy.weights.safetensors       what is trained; the rest is as `policy.path` has it
policy.optimizer.safetensors     AdamW's moments and step
critic.…, reference.weights…     with PPO, with a moving average
replay.safetensors               past successes, with section replay; the rest of them is in state.json
rank-R.safetensors, rank-R.json  random state of a rank and, inside a rollout batch, its rollout buffer
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.checkpoint import STATE
from rlhf.distributed import load_optimizer_state, optimizer_state
from rlhf.learner import Learner
from rlhf.reference import ReferencePolicy
from rlhf.rollout_buffer import RolloutBuffer, from_files, share_of, to_files


def collect(learners: Mapping[str, Learner], others: Mapping[str, ReferencePolicy]) -> dict[str, dict[str, Tensor]]:
    """Files of tensors that are the same on all ranks, by name; a collective, of which the main process gets the result.

    Args:
        learners: what is trained.
        others: what moves without being trained.
    """
    files: dict[str, dict[str, Tensor]] = {}
    for name, learner in learners.items():
        weights, state = optimizer_state(learner.accelerator, learner.unwrapped, learner.optimizer)
        files |= {f"{name}.weights": weights, f"{name}.optimizer": state}
    for name, module in others.items():
        files[f"{name}.weights"] = module.state_dict()
    return files


def schedules(learners: Mapping[str, Learner]) -> dict[str, Any]:
    """For `state.json`: schedules, and scales of the loss in float16."""
    return {
        name: {
            "schedule": learner.scheduler.state_dict(),
            "scaler": learner.accelerator.scaler.state_dict() if learner.accelerator.scaler is not None else None,
        }
        for name, learner in learners.items()
    }


def write_shared(folder: Path, files: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> list[Path]:
    """The main process's part."""
    paths = [_write_tensors(folder / f"{name}.safetensors", tensors) for name, tensors in files.items()]
    return [*paths, _write_json(folder / STATE, state)]


def write_rank(folder: Path, rank: int, buffers: Mapping[str, RolloutBuffer]) -> list[Path]:
    """Every rank's own part, with its rollout batches that are not trained on to the end, by a name for each."""
    tensors, document = _random_state()
    document["buffers"] = {}
    for key, buffer in buffers.items():
        of_buffer, document["buffers"][key] = to_files(buffer)
        tensors |= {f"{key}.{name}": tensor for name, tensor in of_buffer.items()}
    return [
        _write_tensors(folder / f"rank-{rank}.safetensors", tensors),
        _write_json(folder / f"rank-{rank}.json", document),
    ]


def restore(
    folder: Path, state: Mapping[str, Any], learners: Mapping[str, Learner], others: Mapping[str, ReferencePolicy]
) -> None:
    """Weights, moments and schedules out of a checkpoint."""
    for name, learner in learners.items():
        weights = load_file(folder / f"{name}.weights.safetensors")
        moments = load_file(folder / f"{name}.optimizer.safetensors")
        load_optimizer_state(learner.accelerator, learner.unwrapped, learner.optimizer, weights, moments)
        saved = state["learners"][name]
        learner.scheduler.load_state_dict(saved["schedule"])
        for group, learning_rate in zip(learner.optimizer.param_groups, learner.scheduler.get_last_lr(), strict=True):
            group["lr"] = learning_rate
        if learner.accelerator.scaler is not None and saved["scaler"] is not None:
            learner.accelerator.scaler.load_state_dict(saved["scaler"])
    for name, module in others.items():
        module.load_state_dict(load_file(folder / f"{name}.weights.safetensors"))


def restore_rank(
    folder: Path, rank: int, num_ranks: int, *, saved_ranks: int, minibatches: int
) -> dict[str, RolloutBuffer]:
    """This rank's random state, where there was such a rank, and its share of the rollout batches that were stored."""
    documents = [json.loads((folder / f"rank-{r}.json").read_text(encoding="utf-8")) for r in range(saved_ranks)]
    tensors = [load_file(folder / f"rank-{r}.safetensors") for r in range(saved_ranks)]
    if rank < saved_ranks:
        _set_random_state(tensors[rank], documents[rank])

    def of_all_ranks(key: str) -> list[RolloutBuffer]:
        start = f"{key}."
        return [
            from_files(
                {n.removeprefix(start): t for n, t in of_rank.items() if n.startswith(start)}, document["buffers"][key]
            )
            for of_rank, document in zip(tensors, documents, strict=True)
        ]

    return {
        key: share_of(of_all_ranks(key), rank, num_ranks, minibatches=minibatches) for key in documents[0]["buffers"]
    }


def _random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, internal, gauss_next = random.getstate()
    of_numpy: Any = np.random.get_state(legacy=False)
    tensors = {"random.torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    of_numpy["state"]["key"] = of_numpy["state"]["key"].tolist()
    return tensors, {"random.python": [version, list(internal), gauss_next], "random.numpy": of_numpy}


def _set_random_state(tensors: dict[str, Tensor], document: dict[str, Any]) -> None:
    version, internal, gauss_next = document["random.python"]
    random.setstate((version, tuple(internal), gauss_next))
    of_numpy = document["random.numpy"]
    of_numpy["state"]["key"] = np.array(of_numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state(of_numpy)
    torch.set_rng_state(tensors["random.torch"])
    if torch.cuda.is_available() and "random.cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random.cuda"])


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    return path


def _write_json(path: Path, document: Mapping[str, Any]) -> Path:
    path.write_text(json.dumps(document), encoding="utf-8")
    return path
