"""Samples of a class-conditional pipeline."""

from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from ..checks import check_int


def generate_samples(
    pipe: DiffusionPipeline, class_ids: list[int], batch_size: int = 32, seed: int = 0, **options: Any
) -> torch.Tensor:
    """One sample for each id, (N, C, H, W) uint8; sample `i` has a generator of its own, with the seed `seed + i`.

    Args:
        pipe: An image pipeline, called as `ViTokDiTPipeline`.
        class_ids: Classes, or names of classes.
        batch_size: Samples of one call. The samples do not depend on it.
        seed: Of the first sample.
        options: Further arguments of the call.

    Raises:
        ValueError: If the seed is no number of 64 bits.
    """
    check_int("seed", seed, -(2**63), 2**63 - 1)
    samples = []
    for start in range(0, len(class_ids), batch_size):
        ids = class_ids[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(ids))]
        images = pipe(ids, generator=generators, output_type="pt", return_dict=False, **options)[0]  # in [0, 1]
        samples.append((images.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(samples)
