"""vLLM in servers of their own, one or several replicas: sampling goes on while the trainer works, and outlives the death of a replica."""

from __future__ import annotations

import hashlib
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf.config import Lora, OnlineRollout
from rlhf.rollout.engine import Decode, Sampling
from rlhf.rollout.replicas import LostError, Replica, Replicas
from rlhf.rollout.serving import require_devices, require_free_port
from rlhf.run import RECIPE, is_main_process
from rlhf.types import FinishReason, Prompt, Rollout

if TYPE_CHECKING:
    from rlhf.rollout.nccl_transfer import NCCLTransfer

FILE_BYTES = 256 * 2**20
"""Of weights in one file, and in memory at a time."""
HOST = "127.0.0.1"
MEMORY = Path("/dev/shm")  # noqa: S108 - weights handed over as files need not reach a disk


class VLLMServerEngine:
    """Samples from servers. Which replica takes a request changes no token: each has a seed of its own.

    The main process writes new weights, has every replica load them, and starts and ends the replicas that no one else started; the other
    ranks check that a replica holds the weights they expect before they use it.
    """

    name = "vllm server"
    lora: Lora | None = None
    checkpoint_names = True

    def __init__(self, config: OnlineRollout, run_folder: Path, *, stop_token_id: int, decode: Decode) -> None:
        assert config.server is not None
        server = self._server = config.server
        self._stop_token_id, self._decode, self._dtype = stop_token_id, decode, getattr(torch, config.dtype)
        self.policy_version = -1  # whatever a server was started with, its weights come from the trainer
        self._main, self._run_folder = is_main_process(), run_folder
        self._transfer: NCCLTransfer | None = None
        self._kept_up: list[subprocess.Popen[bytes]] = []
        in_memory = not server.urls and MEMORY.is_dir()
        parent = Path(server.folder) if server.folder is not None else MEMORY if in_memory else run_folder
        if self._main:
            parent.mkdir(parents=True, exist_ok=True)
            self._folder = Path(tempfile.mkdtemp(prefix="weights-", dir=parent.absolute()))
        urls = server.urls or [f"http://{HOST}:{server.first_port + i}" for i in range(server.replicas)]
        if self._main and not server.urls:
            self._start_replicas(run_folder)
        self._run_id, self._num_pushes, self._label = _broadcast(secrets.token_hex(4)), 0, ""
        """A label of weights is the run, the number of the push and the policy version: never the same for two weights."""
        self._replicas = Replicas(
            urls,
            label_prefix=f"{self._run_id}.",
            request_seconds=server.request_seconds,
            patience_seconds=server.patience_seconds,
            loader=self._load if self._main and server.weights == "folder" else None,
            obstacle=self._obstacle,
        )

    def _start_replicas(self, run_folder: Path) -> None:
        for i in range(self._server.replicas):
            require_free_port(HOST, self._server.first_port + i)
        for devices in self._server.devices:
            require_devices(devices)
        for i in range(self._server.replicas):
            devices = ["--devices", self._server.devices[i]] if self._server.devices else []
            command = [sys.executable, str(Path(__file__).parents[2] / "scripts/serve.py"), str(run_folder / RECIPE), "--die-with-parent",
                       "--port", str(self._server.first_port + i), *devices]  # fmt: skip
            with (run_folder / f"server-{i}.log").open("ab") as log:
                self._kept_up.append(subprocess.Popen(command, stdout=log, stderr=log))

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        parameters = {
            "n": sampling.samples_per_prompt,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_new_tokens,
            "logprobs": 0,
            "stop_token_ids": [self._stop_token_id],
            "detokenize": False,
        }
        bodies = [
            {
                "token_ids": list(prompt.token_ids),
                "sampling_params": {**parameters, "seed": _seed(seed, i)},
                "cache_salt": self._label,  # prefixes computed by other weights are never found
            }
            for i, prompt in enumerate(prompts)
        ]
        costs = [len(p.token_ids) + sampling.samples_per_prompt * sampling.max_new_tokens for p in prompts]
        answers = self._replicas.generate(bodies, costs)
        return [
            self._rollout(prompt, choice)
            for prompt, answer in zip(prompts, answers, strict=True)
            for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
        ]

    def _rollout(self, prompt: Prompt, choice: dict[str, Any]) -> Rollout:
        finish: FinishReason = "stop" if choice["finish_reason"] == "stop" else "length"
        token_ids = tuple(choice["token_ids"])
        return Rollout(
            prompt=prompt,
            token_ids=token_ids,
            logprobs=tuple(token["logprob"] for token in choice["logprobs"]["content"]),
            finish_reason=finish,
            text=self._decode(token_ids),
            policy_version=min(_version_of(span["version"]) for span in choice["weight_versions"]),
        )

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[list[float]]:
        tokens = [*prompt_ids, *completion_ids]
        sampling = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 1.0, "detokenize": False}
        # Its own salt: what is scored must not come from the cache of a completion.
        body = {"token_ids": tokens, "sampling_params": sampling, "cache_salt": f"score {self._label}"}
        answers = self._replicas.every("/inference/v1/generate", body)
        places = range(len(prompt_ids), len(tokens))
        return [[answer["prompt_logprobs"][i][str(tokens[i])]["logprob"] for i in places] for answer in answers]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        self._num_pushes += 1
        before, self._label = self._label, f"{self._run_id}.{self._num_pushes}.{policy_version}"
        if self._server.weights == "nccl":
            self._send(named_tensors)
        elif self._main:
            self._write(named_tensors, self._folder / self._label)
            self._replicas.want(self._label)
        else:
            for _ in named_tensors:  # gathering them from ZeRO's pieces takes every rank
                pass
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        if not self._main or self._server.weights == "nccl":
            self._replicas.want(self._label)
        elif before:
            shutil.rmtree(self._folder / before)
        self.policy_version = policy_version

    def load_adapter(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        raise NotImplementedError("policy.lora.sync adapter is refused with rollout.engine server")

    def close(self) -> None:
        self._replicas.close()
        for process in self._kept_up:
            process.terminate()
        for process in self._kept_up:
            process.wait()
        if self._main:
            shutil.rmtree(self._folder)

    # -------------------------------------------------------------------------------------------------------------------- weights

    def _write(self, named_tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
        folder.mkdir()
        file: dict[str, Tensor] = {}
        size = number = 0
        for name, tensor in named_tensors:
            if size and size + tensor.nbytes > FILE_BYTES:
                save_file(file, folder / f"{number:05}.safetensors")
                file, size, number = {}, 0, number + 1
            # a copy: the tensor may be whole only until the next is asked for
            file[name] = tensor.detach().to(device="cpu", dtype=self._dtype, copy=True).contiguous()
            size += tensor.nbytes
        save_file(file, folder / f"{number:05}.safetensors")

    def _send(self, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
        """From GPU to GPU, to the servers that are up."""
        from rlhf.rollout.nccl_transfer import NCCLTransfer

        if self._transfer is None:
            self._transfer = NCCLTransfer(self._server.request_seconds)
        urls = self._replicas.answering() if self._main else []
        self._transfer.send(named_tensors, self._dtype, urls, self._label)

    async def _load(self, replica: Replica) -> None:
        """The wanted weights into a replica, under their label."""
        label = self._replicas.wanted
        assert label is not None
        if self._server.update_in_flight:
            await replica.call("POST", "/pause?mode=keep")
        try:
            answer = await replica.call(
                "POST", "/collective_rpc", {"method": "load_folder", "args": [str(self._folder / label)]}
            )
            if set(answer.get("results", ())) != {"loaded"}:
                raise LostError(f"it answered {str(answer)[:200]} to new weights")
            await replica.call("POST", "/update_weight_version", {"new_version": label})
        finally:
            if self._server.update_in_flight:
                await replica.call("POST", "/resume")

    def _obstacle(self) -> str | None:
        ended = [i for i, process in enumerate(self._kept_up) if process.poll() is not None]
        if len(ended) < len(self._kept_up) or not ended:
            return None
        return f"no vLLM server of this run could be kept up; {self._run_folder / 'server-0.log'} says why"


def _version_of(label: str) -> int:
    return int(label.rpartition(".")[2])


def _broadcast(value: str) -> str:
    """The main process's value, on every rank."""
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]


def _seed(seed: int, request: int) -> int:
    """31 bits, the same for a request whoever serves it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {request}".encode()).digest()[:4], "big") >> 1
