"""Functions of videos on overlapping tiles along any axis, in bounded memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch


Steps = tuple[int, int, int]  # what a token measures: frames, rows and columns


@dataclass
class Tiling:
    """Sizes and overlaps of tiles in tokens, (t, h, w) each; `None` leaves an axis whole."""

    sizes: tuple[int | None, int | None, int | None]
    overlaps: tuple[int, int, int]


def windows(
    pieces: Iterable[torch.Tensor], dim: int, size: int | None, overlap: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Cuts what the pieces make, joined along `dim`, into windows of `size`, and tells what each shares with the last.

    Neighbours share `overlap`, the last two what makes the last one as large as the others. No more than two windows
    and a piece are held at a time.
    """
    shared = 0
    window: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    for piece in pieces:
        rest = piece if rest is None else torch.cat([rest, piece], dim=dim)
        while size is not None and rest.shape[dim] > size:
            window = rest.narrow(dim, 0, size)
            yield shared, window
            shared = overlap
            rest = rest.narrow(dim, size - overlap, rest.shape[dim] - size + overlap)
    if rest is not None and window is not None:
        new, full = rest.shape[dim] - overlap, window.shape[dim]
        rest = torch.cat([window.narrow(dim, new, full - new), rest.narrow(dim, overlap, new)], dim=dim)
        shared = full - new
    if rest is not None:
        yield shared, rest


def cut(run: torch.Tensor, tiling: Tiling, steps: Steps, dim: int = 2) -> Iterator[torch.Tensor]:
    """The tiles of (B, C, T, H, W), in the order in which `apply_tiled` takes them."""
    size, step = tiling.sizes[dim - 2], steps[dim - 2]
    for _, window in windows([run], dim, None if size is None else size * step, tiling.overlaps[dim - 2] * step):
        yield from cut(window, tiling, steps, dim + 1) if dim < 4 else [window]


def overlap_add(tiles: Iterable[tuple[int, torch.Tensor]], dim: int) -> Iterator[torch.Tensor]:
    """Inverse of `windows`: joins tiles along `dim`, neighbours blended linearly, and yields what is final."""
    last = None
    for shared, tile in tiles:
        if last is not None:
            final, end = last.split([last.shape[dim] - shared, shared], dim=dim)
            yield final
            start, rest = tile.split([shared, tile.shape[dim] - shared], dim=dim)
            ramp = torch.arange(1, shared + 1, device=tile.device, dtype=tile.dtype) / (shared + 1)
            blended = torch.lerp(end, start, ramp.view(-1, *[1] * (tile.ndim - dim - 1)))
            tile = torch.cat([blended, rest], dim=dim)
        last = tile
    if last is not None:
        yield last


def apply_tiled(
    function: Callable[[torch.Tensor], torch.Tensor],
    pieces: Iterable[torch.Tensor],
    tiling: Tiling,
    steps_in: Steps,
    steps_out: Steps,
    dim: int = 2,
) -> Iterator[torch.Tensor]:
    """Applies `function` to overlapping tiles and blends the results.

    Args:
        function: From (B, C, T, H, W) to such a tensor of `steps_out` for each `steps_in`.
        pieces: Parts of a video, (B, C, T, H, W), that follow one another along `dim`.
        tiling: Sizes and overlaps in multiples of the steps.
        steps_in, steps_out: What a token measures, (T, H, W), before and after `function`.

    Yields:
        The result in parts, along `dim`.

    Raises:
        ValueError: If the pieces together are no multiple of the step.
    """
    axis = dim - 2
    step_in, step_out, size, overlap = steps_in[axis], steps_out[axis], tiling.sizes[axis], tiling.overlaps[axis]

    def tiles() -> Iterator[tuple[int, torch.Tensor]]:
        for shared, window in windows(pieces, dim, None if size is None else size * step_in, overlap * step_in):
            if shared % step_in:
                raise ValueError(
                    f"The last {step_in - shared % step_in} of each {step_in} frames are missing: pad them."
                )
            if dim < 4:
                parts = apply_tiled(function, [window], tiling, steps_in, steps_out, dim + 1)
                yield shared // step_in * step_out, torch.cat(list(parts), dim=dim + 1)
            else:
                yield shared // step_in * step_out, function(window)

    return overlap_add(tiles(), dim)
