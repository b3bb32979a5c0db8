"""New weights inside a running vLLM; a server loads this file into its workers by `--worker-extension-cls`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn


class FolderReceiver:
    """A mixin for vLLM's worker."""

    model_runner: Any

    def load_folder(self, folder: str) -> str:
        """Replace all weights by those of a folder's safetensors files, one tensor at a time."""
        self.model_runner.reload_weights(weights_iterator=_tensors(Path(folder)), is_checkpoint_format=True)
        repack_head(self.model_runner.get_model())
        return "loaded"


def _tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a dict
                yield name, tensors.get_tensor(name)


def repack_head(model: nn.Module) -> None:
    """Refresh the packed copy of a tied output head, which vLLM's reload on CPUs leaves at the old weights without a word."""
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

        dispatch_cpu_unquantized_gemm(head, remove_weight=False)
