"""What accelerators hold and how fast they are, by the data sheets, and `8xH100-80GB` read as a machine. Imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from rlhf.config import nearest

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One GPU, or a CPU with its memory."""

    name: str
    memory: float
    """Bytes that a program can use."""
    bf16_flops: float
    """Operations per second in dense matrix products, without sparsity."""
    fp32_flops: float
    """Without TF32, which torch does not use for float32 unless it is told to."""
    bandwidth: float
    """Bytes per second between the memory and the processor."""
    link: float
    """Bytes per second to the other devices of the machine, one way."""
    is_cpu: bool = False


USABLE = 0.94
"""Of a card's memory; ECC and drivers keep the rest."""


def _gpu(name: str, gigabytes: float, bf16: float, fp32: float, bandwidth: float, link: float) -> Device:
    """Of a data sheet's numbers: GB, TFLOP/s, TFLOP/s, GB/s, GB/s."""
    return Device(
        name=name,
        memory=USABLE * gigabytes * GIB,
        bf16_flops=bf16 * 1e12,
        fp32_flops=fp32 * 1e12,
        bandwidth=bandwidth * 1e9,
        link=link * 1e9,
    )


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("B200-180GB", 180, 2250, 75, 8000, 900),
        _gpu("H200-141GB", 141, 989, 67, 4800, 450),
        _gpu("H100-80GB", 80, 989, 67, 3350, 450),
        _gpu("A100-80GB", 80, 312, 19.5, 2039, 300),
        _gpu("A100-40GB", 40, 312, 19.5, 1555, 300),
        _gpu("L40S-48GB", 48, 362, 91.6, 864, 32),
        _gpu("A10-24GB", 24, 125, 31.2, 600, 32),
        _gpu("L4-24GB", 24, 121, 30.3, 300, 32),
        _gpu("RTX4090-24GB", 24, 165, 82.6, 1008, 32),
        _gpu("RTX3090-24GB", 24, 71, 35.6, 936, 32),
        _gpu("T4-16GB", 16, 8.1, 8.1, 320, 16),  # no bfloat16 units: computed as float32
    )
}
"""NVIDIA's data sheets; links are NVLink where the card has it, else PCIe."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Devices of one kind."""

    count: int
    device: Device


def cpu(*, memory: float, flops: float, bf16_flops: float | None = None, bandwidth: float = 2e10) -> Device:
    """A processor core or several, with what of the memory may be used; `flops` as measured."""
    return Device(
        name="cpu",
        memory=memory,
        bf16_flops=bf16_flops or flops,
        fp32_flops=flops,
        bandwidth=bandwidth,
        link=bandwidth,
        is_cpu=True,
    )


def parse_gpus(text: str) -> Machine:
    """`8xH100-80GB`, `H100-80GB`, or `4xANY-24GB`: any card of so much memory, as slow as the slowest known of its size.

    Raises:
        ValueError: for a count of 0, an unknown card, or another form.
    """
    found = re.fullmatch(r"(?:(\d+)x)?([A-Za-z]\w*)-(\d+)GB", text, re.IGNORECASE)
    if found is None:
        raise ValueError(
            f"--gpus is {text!r}, not of the form 8xH100-80GB, 4xANY-24GB or cpu; cards: {', '.join(GPUS)}"
        )
    count, size = int(found[1] or 1), float(found[3])
    if count < 1:
        raise ValueError(f"--gpus is {text!r}, which is no GPU at all; give a number of 1 or more")
    if found[2].upper() == "ANY":
        known = [gpu for gpu in GPUS.values() if gpu.memory >= USABLE * size * GIB] or list(GPUS.values())
        slowest = min(known, key=lambda gpu: (gpu.memory, gpu.bf16_flops))
        numbers = (slowest.bf16_flops / 1e12, slowest.fp32_flops / 1e12, slowest.bandwidth / 1e9, slowest.link / 1e9)
        return Machine(count, _gpu(f"ANY-{found[3]}GB", size, *numbers))
    name = f"{found[2]}-{found[3]}GB"
    by_upper = {known.upper(): gpu for known, gpu in GPUS.items()}
    if name.upper() not in by_upper:
        raise ValueError(
            f"--gpus names {name}, whose speed is not known; {nearest(name, list(GPUS))} "
            f"Write {count}xANY-{found[3]}GB for any card of that memory"
        )
    return Machine(count, by_upper[name.upper()])
