"""Bounded memory: functions of videos on overlapping tiles along any axis, and of videos that arrive in pieces."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..checks import check_int, check_number, check_tensor, refuse
from ..clips import Runs
from .compat import ViTokConfig
from .layers import ViTokTower


Steps = tuple[int, int, int]  # what a token measures: frames, rows and columns


@dataclass
class Tiling:
    """Sizes and overlaps of tiles in tokens, (t, h, w) each; `None` leaves an axis whole."""

    sizes: tuple[int | None, int | None, int | None]
    overlaps: tuple[int, int, int]


class MemorySettings(NamedTuple):
    """Those with which a call starts: it keeps them, whatever other threads set."""

    use_slicing: bool
    tiling: Tiling | None
    window_radius: int | None


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


def check_pieces(pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """The pieces of a stream, of which all must be clips that can be joined in time."""
    if isinstance(pieces, (torch.Tensor, str, bytes)) or not hasattr(pieces, "__iter__"):
        refuse("pieces", "an iterable of clips, such as [clip]", pieces)

    def check() -> Iterator[torch.Tensor]:
        first = None
        for index, piece in enumerate(pieces):
            check_tensor(f"pieces[{index}]", piece, (5,))
            kind = (piece.dtype, piece.device, *piece.shape[:2], *piece.shape[3:])
            if kind != (first := first or kind):
                raise ValueError(
                    f"`pieces[{index}]` must be {first} but for its frames, as `pieces[0]`, but is {kind}."
                )
            yield piece

    return check()


def make_tiling(
    config: ViTokConfig, size: int | None = None, frames: int | None = None, overlap_factor: float = 0.25
) -> Tiling:
    """See `MemoryMixin.enable_tiling`."""
    if frames is None:
        frames = 16 if config.is_image_model else max(config.sample_frames, 2 * config.temporal_patch_size)
    size = max(2 * config.sample_size, config.patch_size) if size is None else size
    size, frames = check_int("tile_sample_min_size", size), check_int("tile_sample_min_frames", frames)
    overlap_factor = check_number("tile_overlap_factor", overlap_factor, 0.0, 0.5)
    if size < config.patch_size or frames < config.temporal_patch_size:
        raise ValueError(
            f"A tile of {frames} frames of {size} x {size} pixels is smaller than a patch: pass at least "
            f"tile_sample_min_size={config.patch_size}, tile_sample_min_frames={config.temporal_patch_size}."
        )
    sizes = (frames // config.temporal_patch_size, size // config.patch_size, size // config.patch_size)
    t, h, w = (max(int(overlap_factor * tokens), min(tokens // 2, 1)) if overlap_factor else 0 for tokens in sizes)
    return Tiling(sizes, (0 if config.is_image_model else t, h, w))


class MemoryMixin:
    """What keeps the memory of an autoencoder bounded: tiles, streams of frames, local attention."""

    config: ViTokConfig
    use_slicing: bool
    use_tiling: bool
    tiling: Tiling
    window_radius: int | None
    _run_tower: Callable
    _encode: Callable
    _decode: Callable
    _posterior: Callable

    def enable_tiling(
        self,
        tile_sample_min_size: int | None = None,
        tile_sample_min_frames: int | None = None,
        tile_overlap_factor: float = 0.25,
    ) -> None:
        """Encodes and decodes large pictures and long videos in overlapping tiles, which are blended linearly.

        Attention does not reach beyond a tile, so that results differ a little from those without tiles. What fits in
        one tile is not affected.

        Args:
            tile_sample_min_size: Height and width of a tile in pixels, by default twice `config.sample_size`.
            tile_sample_min_frames: Frames of a tile, by default `config.sample_frames` but at least two latent
                frames, or 16 for an image model, whose frames are independent and do not overlap.
            tile_overlap_factor: The share of a tile that it has in common with the next, at most 0.5; rounded down to
                whole tokens, but at least one where a tile has two, unless it is 0.

        Raises:
            ValueError: If a tile is smaller than a patch, or the overlap is negative or more than a half.
        """
        self.tiling = make_tiling(self.config, tile_sample_min_size, tile_sample_min_frames, tile_overlap_factor)
        self.use_tiling = True

    def _run_batches(
        self, tower: ViTokTower, runs: Runs, settings: MemorySettings, steps_in: Steps, steps_out: Steps
    ) -> Runs:
        """As `_run_tower`, in slices and tiles if these are on."""
        tiling, radius = settings.tiling, settings.window_radius
        if settings.use_slicing and sum(run.shape[0] for run in runs) > 1:
            return [
                torch.cat(
                    [self._run_batches(tower, [item], settings, steps_in, steps_out)[0] for item in run.split(1)]
                )
                for run in runs
            ]
        if tiling is None:
            return self._run_tower(tower, runs, radius, steps_in, steps_out)

        def run_tile(tile: torch.Tensor) -> torch.Tensor:
            return self._run_tower(tower, [tile], radius, steps_in, steps_out)[0]

        parts = (apply_tiled(run_tile, [run], tiling, steps_in, steps_out) for run in runs)
        return [torch.cat(list(part), dim=2) for part in parts]

    def encode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Encodes a video of any length in memory that does not grow with it.

        Frames are encoded in overlapping windows, those of `enable_tiling`: the parts together are what `encode` with
        tiling gives, or, with the default settings, what it gives with tiles in time only.

        Args:
            pieces: Parts of the video, (B, C, T, H, W) in [-1, 1], of any numbers of frames that add up to a multiple
                of q.

        Yields:
            Modes of the posterior, (B, c, t, H/p, W/p), that follow one another in time.
        """
        steps, settings = ((self.config.temporal_patch_size, 1, 1), (1, 1, 1)), self._memory_settings()
        parts = self._stream(lambda window: self._encode("pieces", window, settings), pieces, *steps)
        return (self._posterior(parameters).mode() for parameters in parts)

    def decode_stream(self, pieces: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Decodes latents of any length in memory that does not grow with it; see `encode_stream`.

        Args:
            pieces: Latents, (B, c, t, h, w), of any lengths, such as `encode_stream` yields.

        Yields:
            Frames, (B, C, T, h * p, w * p), that follow one another in time.
        """
        steps, settings = ((1, 1, 1), (self.config.temporal_patch_size, 1, 1)), self._memory_settings()
        return self._stream(lambda window: self._decode("pieces", window, settings), pieces, *steps)

    def _stream(self, function, pieces, steps_in, steps_out):
        tiling = Tiling((self.tiling.sizes[0], None, None), (self.tiling.overlaps[0], 0, 0))
        return apply_tiled(function, check_pieces(pieces), tiling, steps_in, steps_out)

    def _memory_settings(self) -> MemorySettings:
        tiling = self.tiling if self.use_tiling else None
        return MemorySettings(self.use_slicing, tiling, self.window_radius)

    def enable_sliding_window(self, radius: int = 16) -> None:
        """Makes attention local, so that its time grows with the area of the picture and not with the square of it.

        The grid of tokens is cut into blocks of `radius` tokens a side; a block attends to itself and to all tokens
        at most `radius` rows, columns (and latent frames, in a video model) away. Sizes of up to `radius` tokens a
        side are not affected. The result differs from full attention, with which the models are trained.

        Args:
            radius: In tokens; times `patch_size`, in pixels.
        """
        self.window_radius = check_int("radius", radius)

    def disable_sliding_window(self) -> None:
        """Back to full attention."""
        self.window_radius = None
