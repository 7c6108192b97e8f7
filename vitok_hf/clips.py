"""Runs, the one form that pictures and clips have inside the package: a list of (n, C, T, H, W), one for each size.

A batch is one run, a picture has T = 1, and pictures of their own sizes are several runs. `to_runs` makes them from
what a user passes, and `Form` gives back what was passed. Needs nothing but PyTorch: `import vitok_hf` comes here.
"""

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


Runs = list[torch.Tensor]


@dataclass(frozen=True)
class Form:
    """What `to_runs` was given: a batch, a list of items of any sizes, or runs.

    `items` are, of a list, the indices of the items in each run, else `None`; `has_time`, for each run, whether its
    clips came with the dimension T.
    """

    is_batch: bool
    items: list[list[int]] | None
    has_time: list[bool]

    def give_back(self, runs: Runs) -> torch.Tensor | list[torch.Tensor]:
        """The runs, which may have other numbers of channels, frames, rows and columns, in the form of what came."""
        runs = [run if has_time else run.squeeze(2) for run, has_time in zip(runs, self.has_time)]
        if self.is_batch:
            return runs[0]
        if self.items is None:
            return runs
        items = dict(zip(itertools.chain(*self.items), itertools.chain(*runs)))
        return [items[index] for index in range(len(items))]


def to_runs(x: torch.Tensor | Sequence[torch.Tensor]) -> tuple[Runs, Form]:
    """Runs of a batch, (B, C, H, W) or (B, C, T, H, W), of a list of (C, H, W) or (C, T, H, W), or of runs."""
    if isinstance(x, torch.Tensor):
        batches, items = [x], None
    elif x[0].ndim == 5:
        batches, items = list(x), None
    else:
        groups: dict[torch.Size, list[int]] = {}  # equal sizes make a run
        for index, item in enumerate(x):
            groups.setdefault(item.shape, []).append(index)
        items = list(groups.values())
        batches = [torch.stack([x[index] for index in indices]) for indices in items]
    has_time = [batch.ndim == 5 for batch in batches]
    runs = [batch if timed else batch.unsqueeze(2) for batch, timed in zip(batches, has_time)]  # (n, C, T, H, W)
    return runs, Form(isinstance(x, torch.Tensor), items, has_time)


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(sample: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, clipped and rounded."""
    return ((sample.float() + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)


def pad_to_size(pixels: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Repeats the last frame, row and column of (B, C, T, H, W) until (T, H, W) is `size`."""
    frames, height, width = (to - side for to, side in zip(size, pixels.shape[2:]))
    return F.pad(pixels, (0, width, 0, height, 0, frames), mode="replicate")


def fold_frames(images: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W); pictures stay as they are."""
    return images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images


def unfold_frames(images: torch.Tensor, frames: int) -> torch.Tensor:
    """Inverse of `fold_frames` for clips: (B * T, C, H, W) -> (B, C, T, H, W)."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


def sha256_each(images: torch.Tensor) -> torch.Tensor:
    """Checksums of the bytes of (N, ...) uint8 pictures, (N, 32) uint8."""
    return torch.tensor([list(hashlib.sha256(x.contiguous().numpy()).digest()) for x in images], dtype=torch.uint8)
