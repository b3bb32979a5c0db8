"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685) inside a plain transformers model, and out of it again.

    y = W x + alpha / rank B A x        W [O, I] frozen, A [rank, I] drawn, B [O, rank] zero at first

The model object stays the class it was, so everything that takes a model takes one with adapters. Nothing here changes W.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.config import Lora, Model, nearest, require_unsharded
from rlhf.distributed import configured_zero_stage, whole, whole_bytes
from rlhf.quantization import dequantised, quantise_linear_layers

ADAPTER = "default"
"""peft's name for the only adapter there is."""
BUCKET_BYTES = 2**28
"""Of sharded weights that are whole at once."""


def add_lora(model: Any, config: Lora, *, trained_in_full: Sequence[str] = ()) -> None:
    """Put trainable adapters on the model's linear layers, in place, and freeze everything else.

    A is drawn from torch's random state and B is zero, so the model computes what it did. Fused experts and routers of mixtures
    are parameters, not linear layers, and get no adapter.

    Args:
        model: of transformers.
        config: the recipe's block.
        trained_in_full: modules, such as a new head, that get no adapter and are trained themselves.

    Raises:
        ValueError: when a target is no linear layer of the model.
    """
    from peft import inject_adapter_in_model

    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and name not in trained_in_full
    ]
    kinds = sorted({name.rpartition(".")[2] for name in linear})
    for target in config.target_modules or ():
        if target not in kinds:
            raise ValueError(
                f"lora.target_modules has {target!r}, which is no linear layer of this model's blocks; {nearest(target, kinds)}"
            )
    chosen = [name for name in linear if name.rpartition(".")[2] in (config.target_modules or kinds)]
    inject_adapter_in_model(peft_config(config, chosen, base=model.name_or_path), model, ADAPTER)
    for name, parameter in model.named_parameters():
        if _is_adapter(name):  # in bfloat16 most updates would be smaller than rounding
            parameter.data = parameter.data.float()
    for name in trained_in_full:
        model.get_submodule(name).requires_grad_(True)
    model.peft_config[ADAPTER].modules_to_save = list(trained_in_full) or None


def adapt(model: Any, config: Model, *, trained_in_full: Sequence[str] = ()) -> None:
    """Make of a loaded model what its block of the recipe trains: adapters, over a quantised base or not, or the model as it is.

    Raises:
        ValueError: when a target is no linear layer of the model, or ZeRO-3 would shard 4-bit weights.
    """
    if config.quantization is not None:
        require_unsharded(config, configured_zero_stage())
        quantise_linear_layers(model, keep=trained_in_full)
    if config.lora is not None:
        add_lora(model, config.lora, trained_in_full=trained_in_full)


def peft_config(config: Lora, modules: Iterable[str], *, base: str | None = None) -> Any:
    """The recipe's block in peft's words."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(modules), base_model_name_or_path=base
    )


def has_lora(model: Any) -> bool:
    return ADAPTER in getattr(model, "peft_config", {})


@torch.no_grad()
def merged_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Parameters under the names and with the values of the plain model that computes the same, one at a time.

    The sum is formed in the adapters' precision and rounded once to that of W; a quantised W is dequantised. Tied weights come once. Weights that ZeRO-3 shards
    are gathered `BUCKET_BYTES` at a time, so all ranks must take all of them.
    """
    for bucket in _buckets(model.named_parameters()):
        with whole([parameter for _, parameter in bucket]):
            for name, parameter in bucket:
                if _is_adapter(name):
                    continue
                module, _, leaf = name.rpartition(".")
                weight = dequantised(parameter)
                if module.endswith(".base_layer") and leaf == "weight":
                    delta = model.get_submodule(module.removesuffix(".base_layer")).get_delta_weight(ADAPTER)
                    weight = (weight + delta).to(weight.dtype)
                yield _plain(name), weight


def adapter_parameters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """What `add_lora` made trainable: the adapters, and the modules trained in full. Names as in peft's files, less their prefix."""
    in_full = tuple(f"{name}." for name in model.peft_config[ADAPTER].modules_to_save or ())
    chosen = [(n, p) for n, p in model.named_parameters() if _is_adapter(n) or n.startswith(in_full)]
    for bucket in _buckets(chosen):
        with whole([parameter for _, parameter in bucket]):
            for name, parameter in bucket:
                yield name.replace(f".{ADAPTER}.", "."), parameter.detach()


def _buckets(named: Iterable[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Consecutive parameters, a layer always with its adapters, as many as fit into `BUCKET_BYTES`, and at least one layer."""
    bucket: list[tuple[str, nn.Parameter]] = []
    room = BUCKET_BYTES
    for _, layer in groupby(named, key=lambda pair: pair[0].partition(".base_layer.")[0].partition(".lora_")[0]):
        parameters = list(layer)
        size = sum(whole_bytes(parameter) for _, parameter in parameters)
        if bucket and size > room:
            yield bucket
            bucket, room = [], BUCKET_BYTES
        bucket, room = bucket + parameters, room - size
    if bucket:
        yield bucket


def load_adapter(model: Any, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Replace the values of `adapter_parameters`.

    Raises:
        ValueError: when the names are not the model's.
    """
    own, given = dict(adapter_parameters(model)), dict(named_tensors)
    if own.keys() != given.keys():
        odd = sorted(own.keys() ^ given.keys())
        raise ValueError(f"the adapter is not this model's: {', '.join(odd[:3])} missing or unexpected")
    for name, tensor in given.items():
        own[name].copy_(tensor)


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name


def _plain(name: str) -> str:
    return name.replace(".base_layer.", ".")


@contextmanager
def base_of(model: Any) -> Iterator[None]:
    """The adapters are off inside: what is left is the model that training started from, the reference policy of a LoRA run."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert layers, "a model without adapters has no base to fall back on"
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted_layers(model: Any) -> dict[str, Any]:
    """Layers with an adapter, by the names of the weights they have in the plain model."""
    if not has_lora(model):
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def delta_weight(layer: Any) -> Tensor:
    """alpha / rank B A of a layer with an adapter, [O, I], with its gradient."""
    return layer.get_delta_weight(ADAPTER)


def save_model(model: Any, folder: str | Path, *, write: bool = True) -> None:
    """The model as whole weights that load without peft; what was trained of it, in peft's format, under `adapter`.

    Under ZeRO-3 every rank must call it, to gather the weights; the one with `write` keeps and writes them.
    """
    folder = Path(folder)
    state = {name: tensor.clone() for name, tensor in merged_parameters(model) if write}
    adapter = {n: t.clone() for n, t in adapter_parameters(model) if write} if has_lora(model) else None
    if not write:
        return
    buffers = {name for name, _ in model.named_buffers()}
    model.save_pretrained(folder, state_dict=state | {n: t for n, t in model.state_dict().items() if n in buffers})
    if adapter is not None:
        write_adapter(folder / "adapter", adapter.items(), model.peft_config[ADAPTER])


def write_adapter(folder: Path, named_tensors: Iterable[tuple[str, Tensor]], config: Any) -> None:
    """An adapter as peft and vLLM read it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in named_tensors}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(str(folder))
