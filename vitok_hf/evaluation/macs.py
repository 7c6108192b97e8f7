from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
