"""Latents of few bits: whole numbers, evenly from the least to the largest value of each channel."""

import torch


def quantize(moments: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, uint8, and the least value and the step of each channel, (2, c) float32.

    Of `moments`, (N, 2, c, ...), the codes have the shape, but of 4 bits (N, 1, c, ...): a picture's and its mirror
    image's share a byte.
    """
    low, high = moments.float().transpose(0, 2).flatten(1).aminmax(dim=1)  # (c,)
    grid = torch.stack([low, ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)])
    least, step = grid.view(2, 1, 1, -1, *[1] * (moments.ndim - 3))
    codes = ((moments.float() - least) / step).round().to(torch.uint8)
    return (codes if bits == 8 else codes[:, :1] + 16 * codes[:, 1:]), grid


def dequantize(codes: torch.Tensor, grid: torch.Tensor, bits: int) -> torch.Tensor:
    """(N, 2, c, ...) float32, of what `quantize` gives."""
    codes = codes if bits == 8 else torch.cat([codes % 16, codes // 16], dim=1)
    least, step = grid.view(2, 1, 1, -1, *[1] * (codes.ndim - 3))
    return codes.float() * step + least


def coarse_channels(grid: torch.Tensor, stds: torch.Tensor) -> list[int]:
    """Channels whose means, rounded to `grid`, are off by more than their posteriors' mean standard deviation.

    `stds` are (N, 2, c, ...). Errors are even over a step: their root mean square is step / sqrt(12).
    """
    spread = stds.float().transpose(0, 2).flatten(1).mean(dim=1)
    return ((spread > 0.0) & (grid[1] * 12**-0.5 > spread)).nonzero().flatten().tolist()
