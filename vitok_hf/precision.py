"""Precision that fits the machine: bfloat16 where the hardware multiplies it faster, else float32."""

import logging
import os
import time
from functools import cache

import torch
from accelerate.utils import parse_flag_from_env


logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
MIXED_PRECISIONS = ("auto", "no", "bf16", "fp16")


def default_device() -> torch.device:
    """That of accelerate, whose state the first `Accelerator` of a process sets up."""
    if parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available():
        return torch.device("cpu")
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _seconds(dtype: torch.dtype) -> float:
    x, weight = torch.randn(256, 768, dtype=dtype), torch.randn(768, 768, dtype=dtype)
    timings = []
    for _ in range(4):  # the first call sets up
        began = time.perf_counter()
        x @ weight
        timings.append(time.perf_counter() - began)
    return min(timings)


@cache
def bfloat16_slowness() -> float:
    """How long products take in bfloat16 on this processor, measured, as a multiple of their time in float32."""
    return _seconds(torch.bfloat16) / _seconds(torch.float32)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 products, on a processor clearly faster ones than in float32.

    Some processors emulate them, several times slower; others have the instructions, but are slower with them.
    """
    if device.type == "cpu":
        has_instructions = any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16", "bf16"))
        return has_instructions and bfloat16_slowness() < 0.8
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "xpu" and torch.xpu.is_bf16_supported()


def _warn_of_slowness(is_bfloat16: bool, device: torch.device) -> None:
    if is_bfloat16 and device.type == "cpu" and not multiplies_bfloat16(device):
        logger.warning(
            "Products in bfloat16 take %.1f times as long as in float32 on this processor: use float32 here.",
            bfloat16_slowness(),
        )


def choose_dtype(name: str = "auto", device: torch.device | None = None) -> str:
    """The name of the dtype to run a model in; warns of bfloat16 where a processor is slower with it.

    Args:
        name: `"auto"`, which takes bfloat16 where the hardware multiplies it faster, else float32; or one of `DTYPES`.
        device: Where the model runs, by default accelerate's.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, but is {name!r}.")
    device = default_device() if device is None else device
    if name == "auto":
        return "bfloat16" if multiplies_bfloat16(device) else "float32"
    _warn_of_slowness(name == "bfloat16", device)
    return name


def choose_mixed_precision(name: str = "auto", device: torch.device | None = None) -> str:
    """The `mixed_precision` of an `Accelerator`; warns of bf16 where a processor is slower with it.

    Args:
        name: `"auto"`, which takes what accelerate's configuration names unless that is "no", else bf16 where the
            hardware multiplies it faster, else "no"; or one of `MIXED_PRECISIONS`.
        device: Where the model runs, by default accelerate's.

    Raises:
        ValueError: If there is no such name.
    """
    if name not in MIXED_PRECISIONS:
        raise ValueError(f"`mixed_precision` must be one of {', '.join(MIXED_PRECISIONS)}, but is {name!r}.")
    device = default_device() if device is None else device
    if name == "auto" and (name := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) == "no":
        return "bf16" if multiplies_bfloat16(device) else "no"
    _warn_of_slowness(name == "bf16", device)
    return name
