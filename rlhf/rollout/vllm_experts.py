"""Which experts of a mixture vLLM sent each token to.

On GPUs vLLM returns them itself (`enable_return_routed_experts`). That needs its second model runner and with it Triton, which has no backend
for CPUs in the lock; there the routers of the model in this process are listened to. A request then has to compute its prompt itself, so
the prefix cache is off.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def engine_arguments() -> dict[str, bool]:
    """What vLLM must be started with."""
    return {"enable_return_routed_experts": True} if torch.cuda.is_available() else {"enable_prefix_caching": False}


def cpu_experts() -> type:
    """Class of experts that vLLM packs for a CPU."""
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    return CPUUnquantizedExperts


def mixtures(model: torch.nn.Module) -> list[Any]:
    """The blocks of experts of a model of vLLM, in the order of its layers."""
    from vllm.model_executor.layers.fused_moe.layer import MoERunner

    return [module for module in model.modules() if isinstance(module, MoERunner)]


class ExpertRecorder:
    """Notes experts by request.

    Args:
        llm: vLLM, of a mixture of experts, started with `engine_arguments`.

    Raises:
        ValueError: when its model is no mixture.
    """

    def __init__(self, llm: Any) -> None:
        self._layers: list[int] = llm.apply_model(lambda model: [module.layer_id for module in mixtures(model)])[0]
        if not self._layers:
            raise ValueError("rollout.record_experts is set and the policy is no mixture of experts; remove it")
        config = llm.llm_engine.model_config
        self._dtype = torch.uint8 if config.get_num_experts() <= 256 else torch.int16
        self._max_tokens = config.max_model_len
        self._of_request: dict[str, Tensor] = {}
        """[max_tokens, L, K], filled as far as a request was computed."""
        self._step: list[tuple[str, slice, slice]] = []
        if not torch.cuda.is_available():
            llm.collective_rpc(self._listen)

    def _listen(self, worker: Any) -> None:
        runner = worker.model_runner
        for place, module in enumerate(mixtures(runner.model)):
            module.router.set_capture_fn(lambda experts, place=place: self._note(runner, place, experts))

    def _note(self, runner: Any, place: int, experts: Tensor) -> None:
        """[tokens of the step, K] of one layer; the first layer finds out whose tokens they are."""
        if place == 0:
            ids, batch = runner.input_batch.req_ids, runner.input_batch
            ends, done = runner.query_start_loc.np.tolist(), batch.num_computed_tokens_cpu.tolist()
            self._step = [  # vLLM puts eight random characters behind the name of a request
                (name.rpartition("-")[0], slice(ends[i], ends[i + 1]), slice(done[i], done[i] + ends[i + 1] - ends[i]))
                for i, name in enumerate(ids)
            ]
        for name, rows, positions in self._step:
            if name not in self._of_request:
                shape = (self._max_tokens, len(self._layers), experts.shape[-1])
                self._of_request[name] = torch.zeros(shape, dtype=self._dtype)
            self._of_request[name][positions, place] = experts[rows].to(self._dtype)

    def start(self) -> None:
        """Forget what was noted before."""
        self._of_request.clear()

    def of(self, output: Any, sample: Any, *, num_tokens: int) -> Tensor:
        """[num_tokens, L, K] of a sample of vLLM's output, its first so many tokens."""
        if sample.routed_experts is not None:
            native = torch.from_numpy(sample.routed_experts.astype("int16"))
            return native[:num_tokens, self._layers].to(self._dtype)
        for name in (f"{sample.index}_{output.request_id}", output.request_id):
            if name in self._of_request:
                return self._of_request[name][:num_tokens].clone()
        raise RuntimeError(f"vLLM did not say which experts request {output.request_id} used")
