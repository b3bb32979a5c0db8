"""New weights inside a running vLLM; a server loads this file into its workers by `--worker-extension-cls`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from rlhf.rollout.vllm_experts import cpu_experts, mixtures


class FolderReceiver:
    """A mixin for vLLM's worker."""

    model_runner: Any

    def load_folder(self, folder: str) -> str:
        """Replace all weights by those of a folder's safetensors files, one tensor at a time."""
        self.model_runner.reload_weights(weights_iterator=_tensors(Path(folder)), is_checkpoint_format=True)
        repack(self.model_runner.get_model())
        return "loaded"


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def repack(model: nn.Module) -> None:
    """Refresh what vLLM on CPUs packs when it starts, and its reload leaves as it is without a word: a tied output head, which keeps its old
    weights, and experts, which are new and not packed, and then read as if they were."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
    for module in mixtures(model):
        experts: Any = getattr(getattr(module.routed_experts.quant_method, "moe_kernel", None), "fused_experts", None)
        if isinstance(experts, cpu_experts()):
            experts.process_weights_after_loading(module.routed_experts)
