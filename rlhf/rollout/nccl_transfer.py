"""Weights from the trainer's GPU to the servers' over NCCL, by vLLM's own transfer. It needs GPUs on both sides and has not been run on any yet."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx2
import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf.run import is_main_process


class Fleet:
    """Several servers as the one that vLLM's side of the trainer speaks to; every call goes to all of them at once."""

    def __init__(self, urls: Sequence[str], seconds: float) -> None:
        self._clients = [httpx2.Client(base_url=url, timeout=seconds, trust_env=False) for url in urls]
        self.label = ""
        """Of the weights that the next transfer ends with."""

    def sizes(self) -> list[int]:
        """GPUs of each server."""
        return [answer["world_size"] for answer in self._all("GET", "/get_world_size", [None] * len(self._clients))]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Each server's GPUs get the ranks after those of the servers before it."""
        offset, infos = init_info["rank_offset"], []
        for size in self.sizes():
            infos.append({"init_info": {**init_info, "rank_offset": offset}})
            offset += size
        self._all("POST", "/init_weight_transfer_engine", infos)

    def shutdown_weight_transfer_engine(self) -> None:
        self._same("/shutdown_weight_transfer_engine", None)

    def start_weight_update(self) -> None:
        self._same("/start_weight_update", None)

    def update_weights(self, update_info: Any) -> None:
        self._same("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._same("/finish_weight_update", {"weight_version": weight_version or self.label})

    def _same(self, path: str, body: Any) -> None:
        self._all("POST", path, [body] * len(self._clients))

    def _all(self, method: str, path: str, bodies: Sequence[Any]) -> list[dict[str, Any]]:
        def call(client: httpx2.Client, body: Any) -> dict[str, Any]:
            return client.request(method, path, json=body).raise_for_status().json()

        with ThreadPoolExecutor(len(self._clients)) as pool:  # they wait for each other
            return list(pool.map(call, self._clients, bodies))


class Weights(WeightSource):
    """What is pushed, as often as it is iterated over.

    Args:
        named_tensors: gathered anew each time, which under ZeRO-3 takes every rank.
        dtype: in which they travel.
        metadata: names and shapes, when they are known from an earlier push; else everything is gathered once more to learn them.
    """

    def __init__(
        self, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, metadata: list[ParamMeta] | None = None
    ) -> None:
        self._named_tensors, self._dtype = named_tensors, dtype
        self._metadata = metadata or [ParamMeta(name, dtype, tuple(tensor.shape)) for name, tensor in named_tensors]

    def metadata(self) -> list[ParamMeta]:
        return self._metadata

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._named_tensors:
            yield name, tensor.detach().to(self._dtype)


class NCCLTransfer:
    """One group of the trainer's first rank and every GPU of the servers, made anew when other servers are up than last time."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._urls = seconds, tuple[str, ...]()
        self._engine: Any | None = None
        self._metadata: list[ParamMeta] | None = None
        self._fleet: Fleet | None = None

    def send(
        self, named_tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, urls: Sequence[str], label: str
    ) -> None:
        """All ranks must call it; the first one's `urls` count."""
        weights = Weights(named_tensors, dtype, self._metadata)
        self._metadata = weights.metadata()
        changed = [tuple(urls) != self._urls or self._engine is None]
        if torch.distributed.is_initialized():
            torch.distributed.broadcast_object_list(changed)
        if changed[0]:
            self._join(weights, urls)
        assert self._fleet is not None
        assert self._engine is not None
        self._fleet.label, self._engine.source = label, weights
        self._engine.send_weights()

    def _join(self, weights: Weights, urls: Sequence[str]) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._urls, fleet = tuple(urls), Fleet(urls, self._seconds)
        rank = 0 if is_main_process() else 1
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        info = NCCLTrainerInitInfo(
            rank=rank,
            master_address=_address_towards(urls[0]) if rank == 0 else "",
            master_port=port,
            world_size=1 + sum(fleet.sizes()) if rank == 0 else 0,
        )
        self._engine = WeightTransferTrainerFactory.trainer_init(info, client=fleet, source=weights)
        self._fleet = fleet


def _address_towards(url: str) -> str:
    """This host's address as a server sees it."""
    parts = urlsplit(url)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing
        probe.connect((parts.hostname, parts.port or 80))
        return probe.getsockname()[0]
