"""Pictures as uint8 and as models take them. Needs nothing but PyTorch: `import vitok_hf` comes here."""

import hashlib

import torch
from torch.nn import functional as F


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
