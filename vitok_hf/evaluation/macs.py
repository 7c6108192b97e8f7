from collections.abc import Sequence

import torch
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: ModelMixin, shape: Sequence[int]) -> int:
    """Multiply-accumulates of `model`'s forward on an input of `shape`: matrix products, convolutions and attention.

    Counted on a copy without storage, so that any size can be counted anywhere. The paper's "GFLOPs" are this number
    divided by 1e9.
    """
    with torch.device("meta"):
        twin = type(model).from_config(model.config)
        # the fused kernels of some devices have no formula; as two matrix products, attention counts the same
        with (
            FlopCounterMode(display=False) as counter,
            attention_backend("native"),
            sdpa_kernel(SDPBackend.MATH),
            torch.no_grad(),
        ):
            twin(torch.empty(tuple(shape)))
    return counter.get_total_flops() // 2
