"""The training system. Importing it settles, before any library looks, what every entry point shares: no telemetry, quiet start."""

import logging
import os
from pathlib import Path

HAS_ACCELERATOR = any(Path(device).exists() for device in ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
"""Whether a GPU's device file is there; asked without importing torch."""

os.environ.setdefault("DS_ACCELERATOR", "cuda" if HAS_ACCELERATOR else "cpu")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
# With AVX512-BF16 it asks the hub for a kernel, which is never fetched here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
