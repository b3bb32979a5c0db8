"""vLLM in the trainer's own process: one engine per rank, weights handed over in memory."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

# Read by vLLM at import. In process, so that weights need not be serialised and the random state is ours; no telemetry.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from torch import Tensor

from rlhf.config import Lora
from rlhf.config import Rollout as RolloutConfig
from rlhf.lora import peft_config, write_adapter
from rlhf.rollout.engine import Decode, Sampling
from rlhf.rollout.vllm_experts import ExpertRecorder, engine_arguments
from rlhf.rollout.vllm_worker import repack
from rlhf.types import FinishReason, Prompt, Rollout


class VLLMEngine:
    name = "vllm"
    checkpoint_names = True

    def __init__(
        self,
        config: RolloutConfig,
        path: str,
        *,
        revision: str | None,
        stop_token_id: int,
        decode: Decode,
        lora: Lora | None = None,
        record_experts: bool = False,
    ) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, round(config.kv_cache_gb))))
        from vllm import LLM

        num_threads = torch.get_num_threads()
        placement: dict[str, Any] = (
            {"gpu_memory_utilization": config.gpu_memory_share}
            if torch.cuda.is_available()
            else {"enforce_eager": True}
        )
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            # Every rank holds a whole engine; vLLM must not try to span them with a process group of its own.
            placement["distributed_executor_backend"] = "external_launcher"
        if lora is not None:
            placement |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": _served_rank(lora.rank)}
        if record_experts:
            placement |= engine_arguments()
        if config.cache_block_tokens is not None:
            placement["block_size"] = config.cache_block_tokens
        self._llm = LLM(
            path,
            revision=revision,
            tokenizer_revision=revision,
            skip_tokenizer_init=True,
            dtype=config.dtype,
            max_model_len=config.max_prompt_tokens + config.max_new_tokens + 1,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            use_tqdm_on_load=False,
            **placement,
        )
        torch.set_num_threads(num_threads)  # vLLM binds OpenMP threads for itself; the trainer shares the process
        self._stop_token_id, self._decode = stop_token_id, decode
        self._experts = ExpertRecorder(self._llm) if record_experts else None
        self.policy_version = 0
        self.reused_prompt_tokens = 0
        """Prompt tokens that the prefix cache held so far; exact where samples_per_prompt is 1, else of one sample of each prompt."""
        self.lora, self._adapter, self._num_adapters = lora, None, 0
        memory = "/dev/shm"  # noqa: S108 - an adapter is handed over as files, which need not reach a disk
        self._adapter_folder = lora and tempfile.TemporaryDirectory(dir=memory if os.path.isdir(memory) else None)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int) -> list[Rollout]:
        from vllm import SamplingParams

        parameters = SamplingParams(
            n=sampling.samples_per_prompt,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_new_tokens,
            logprobs=0,
            stop_token_ids=[self._stop_token_id],
            detokenize=False,
        )
        if self._experts is not None:
            self._experts.start()
        # One seed for the whole call: a seed per request makes vLLM sample row by row in Python.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            outputs = self._llm.generate(
                [{"prompt_token_ids": list(p.token_ids)} for p in prompts],
                parameters,
                use_tqdm=False,
                lora_request=self._adapter,
            )
        self.reused_prompt_tokens += sum(output.num_cached_tokens or 0 for output in outputs)
        return [
            self._rollout(prompt, output, sample)
            for prompt, output in zip(prompts, outputs, strict=True)
            for sample in output.outputs
        ]

    def _rollout(self, prompt: Prompt, output: Any, sample: Any) -> Rollout:
        finish: FinishReason = "stop" if sample.finish_reason == "stop" else "length"
        token_ids = tuple(sample.token_ids)
        experts = None
        if self._experts is not None:
            experts = self._experts.of(output, sample, num_tokens=len(prompt.token_ids) + len(token_ids) - 1)
        return Rollout(
            prompt=prompt,
            token_ids=token_ids,
            logprobs=tuple(position[token].logprob for token, position in zip(token_ids, sample.logprobs, strict=True)),
            finish_reason=finish,
            text=self._decode(token_ids),
            policy_version=self.policy_version,
            routed_experts=experts,
        )

    def score(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> list[list[float]]:
        from vllm import SamplingParams

        tokens = [*prompt_ids, *completion_ids]
        sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = self._llm.generate(
            [{"prompt_token_ids": tokens}], sampling, use_tqdm=False, lora_request=self._adapter
        )[0]
        per_position = output.prompt_logprobs
        assert per_position is not None
        return [[per_position[i][tokens[i]].logprob for i in range(len(prompt_ids), len(tokens))]]  # type: ignore[index]

    def load_weights(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        self._llm.collective_rpc(
            "reload_weights", kwargs={"weights_iterator": iter(named_tensors), "is_checkpoint_format": True}
        )
        self._llm.apply_model(repack)
        self._llm.reset_prefix_cache()
        self.policy_version = policy_version

    def load_adapter(self, named_tensors: Iterable[tuple[str, Tensor]], *, policy_version: int) -> None:
        from vllm.lora.request import LoRARequest

        assert self.lora is not None
        assert self._adapter_folder is not None
        folder = Path(self._adapter_folder.name)
        tensors = dict(named_tensors)
        modules = sorted({name.rsplit(".", 3)[1] for name in tensors})
        write_adapter(folder, tensors.items(), peft_config(self.lora, modules))
        # A number and a name never used before: vLLM looks by number whether it has an adapter, and by name for cached prefixes.
        self._num_adapters += 1
        self._adapter = LoRARequest(f"adapter-{self._num_adapters}", self._num_adapters, str(folder))
        if not self._llm.llm_engine.add_lora(self._adapter):
            raise RuntimeError(f"vLLM did not take the adapter of policy version {policy_version}")
        self._llm.reset_prefix_cache()
        self.policy_version = policy_version

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.llm_engine.engine_core.shutdown()
        del self._llm
        gc.collect()
        if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
            cleanup_dist_env_and_memory()


def _served_rank(rank: int) -> int:
    """The smallest of the ranks vLLM has kernels for that holds an adapter of this one.

    Raises:
        ValueError: when there is none.
    """
    from vllm.config.lora import MaxLoRARanks

    fitting = [served for served in get_args(MaxLoRARanks) if served >= rank]
    if not fitting:
        raise ValueError(
            f"policy.lora.rank is {rank} and vLLM serves adapters up to rank {max(get_args(MaxLoRARanks))}; lower it or set policy.lora.sync to merged"
        )
    return min(fitting)
