"""What an autoencoder costs: parameters, operations and numbers in its code, counted, and memory, measured."""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.modeling_utils import ModelMixin
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..latents import encode_mode
from .autoencoders import fit_shape


def without_storage(model: ModelMixin) -> ModelMixin:
    """A copy of the architecture on the device "meta": shapes and no numbers."""
    with torch.device("meta"):
        return type(model).from_config(model.config).to("meta")  # some buffers come from elsewhere


def count_macs(model: ModelMixin, shape: Sequence[int], part: str | None = None) -> int:
    """Multiply-accumulates of `model`'s forward on an input of `shape`: matrix products, convolutions and attention.

    Counted on a copy without storage, so that any size can be counted anywhere. The paper's "GFLOPs" are this number
    divided by 1e9. With `part`, "encoder" or "decoder", only those of the submodule of this name.
    """
    twin = without_storage(model)
    with torch.device("meta"):
        # the fused kernels of some devices have no formula; as two matrix products, attention counts the same
        with (
            FlopCounterMode(display=False) as counter,
            attention_backend("native"),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            twin(torch.empty(tuple(shape)))
    if part is not None:
        return sum(counter.get_flop_counts()[f"{type(twin).__name__}.{part}"].values()) // 2
    return counter.get_total_flops() // 2


def mean_costs(
    vae: ModelMixin, shapes: Mapping[tuple[int, ...], int], lengths: Mapping[str, int] | None = None
) -> dict[str, float]:
    """What pictures and clips of these shapes cost: (C, T, H, W) -> how many there are. Nothing is computed.

    "parameters_M" in millions; and means over all pictures or clips: "GMACs", 1e9 multiply-accumulates of encoding and
    decoding, "E", the numbers in the code, "compression", values of a picture for each of them, and their "bytes" at
    16 bits. `lengths` are the `num_tokens` and `num_channels` that a ViTok cuts its codes to.
    """
    total, macs, num_latents, values = sum(shapes.values()), 0, 0, 0
    twin = without_storage(vae)
    for shape, number in shapes.items():
        fitted = fit_shape(vae, (1, *shape))
        with torch.no_grad(), torch.device("meta"):
            pixels = torch.empty(fitted)
            code = twin.encode(pixels, **lengths).latent_dist.mode() if lengths else encode_mode(twin, pixels)
        num_latents += number * code.numel()
        macs += number * count_macs(vae, fitted)
        values += number * prod(shape)
    return {
        "parameters_M": sum(parameter.numel() for parameter in vae.parameters()) / 1e6,
        "GMACs": macs / total / 1e9,
        "E": num_latents / total,
        "compression": values / num_latents,
        "bytes": 2 * num_latents / total,
    }


def _memory_of(device: torch.device | str) -> Any:
    """Where PyTorch counts the memory of an accelerator: the older ones in the device's own module, as torch.cuda."""
    return torch.accelerator if hasattr(torch.accelerator, "max_memory_allocated") else torch.get_device_module(device)


def reset_peak_memory(device: torch.device | str = "cpu") -> int:
    """Makes `peak_memory` count from now on. Returns the bytes that are in use now.

    Raises:
        OSError: On a CPU, if the system is not Linux.
    """
    if torch.device(device).type != "cpu":
        _memory_of(device).reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def peak_memory(device: torch.device | str = "cpu") -> int:
    """Largest number of bytes since the last reset: allocated on an accelerator, or the resident set (Linux).

    The resident set has the mapped files, too.
    """
    if torch.device(device).type != "cpu":
        return _memory_of(device).max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
