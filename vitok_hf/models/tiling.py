"""Bounded memory: pictures and videos in tiles, and videos that arrive in pieces."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch

from ..checks import check_int, check_number, check_tensor, refuse, show
from ..clips import Runs
from .causal import Causal, FrameCache, causal_stream
from .compat import ViTokConfig
from .layers import ViTokTower, patchify, unpatchify
from .parallel import check_group, spread
from .rotary import Grid
from .tiles import Steps, Tiling, apply_tiled, cut


class MemorySettings(NamedTuple):
    """Those with which a call starts: it keeps them, whatever other threads set."""

    use_slicing: bool
    tiling: Tiling | None
    window_radius: int | None
    causal: Causal | None = None  # of a causal model
    process_group: Any = None  # of processes that each do a share


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


def check_whole(
    runs: Runs, pixel_grids: list[Grid] | None, settings: MemorySettings, steps: Steps, is_image_model: bool
) -> None:
    """Raises `ValueError` where a 1-D code, which is of a whole picture, would be of tiles, a window or frames."""
    grids = pixel_grids or [tuple(side // step for side, step in zip(run.shape[2:], steps)) for run in runs]
    if settings.window_radius is not None:
        raise ValueError("1-D codes are of whole pictures: `disable_sliding_window()` for a model with them.")
    sizes = settings.tiling.sizes if settings.tiling is not None else (None, None, None)
    for grid in grids:
        if any(size is not None and length > size for length, size in zip(grid, sizes)):
            raise ValueError(
                f"1-D codes are of whole pictures, but one of {grid} tokens is larger than a tile of {sizes}: "
                "`disable_tiling()`, or encode its parts apart."
            )
        if is_image_model and grid[0] > 1:
            raise ValueError(
                f"1-D codes of an image model are of pictures, but a clip has {grid[0]} frames: fold them."
            )


class MemoryMixin:
    """What keeps the memory of an autoencoder bounded: tiles, streams of frames, local attention."""

    config: ViTokConfig
    is_image_model: bool
    use_slicing: bool
    use_tiling: bool
    tiling: Tiling
    window_radius: int | None
    window_frames: int | None
    process_group: Any = None
    _encode: Callable
    _decode: Callable
    _posterior: Callable
    _add_channels: Callable

    @property
    def _pixel_steps(self) -> Steps:
        """What a token measures, (T, H, W)."""
        return (self.config.temporal_patch_size, self.config.patch_size, self.config.patch_size)

    def enable_tiling(
        self,
        tile_sample_min_size: int | None = None,
        tile_sample_min_frames: int | None = None,
        tile_overlap_factor: float = 0.25,
    ) -> None:
        """Encodes and decodes large pictures and long videos in overlapping tiles, which are blended linearly.

        Attention does not reach beyond a tile, so that results differ a little from those without tiles. What fits in
        one tile is not affected. A causal model is not cut in time, for its first latent frame is unlike the others:
        of it, the frames of a tile are those that streams take at a time.

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

    def _run_tower(
        self,
        tower: ViTokTower,
        runs: Runs,
        settings: MemorySettings,
        steps_in: Steps,
        steps_out: Steps,
        pixel_grids: list[Grid] | None = None,
    ) -> Runs:
        """Cut into patches of `steps_in`, (n, C, T, H, W) each, and put together from patches of `steps_out`.

        `pixel_grids` are, of 1-D codes, those of the patches that they are decoded to.
        """
        (q, p, _), (q_out, p_out, _) = steps_in, steps_out
        sequences: list[torch.Tensor] = []
        grids: list[Grid] = []
        for run in runs:
            # An image model sees each frame alone.
            frames = 1 if self.is_image_model else run.shape[2]
            sequences.append(patchify(run, q, p, frames))  # (n * items, L, C * q * p * p)
            grids.append((frames // q, run.shape[3] // p, run.shape[4] // p))
        grids = pixel_grids or grids
        axes = [grid[1:] if self.is_image_model else grid for grid in grids]
        outputs = tower(sequences, axes, settings.window_radius, settings.causal)
        if self.config.num_latent_tokens and not tower.is_decoder:
            grids = [(1, 1, self.config.num_latent_tokens)] * len(runs)
        return [
            unpatchify(tokens, grid, q_out, p_out, num_items=tokens.shape[0] // run.shape[0])
            for tokens, grid, run in zip(outputs, grids, runs)
        ]

    def _run_batches(
        self,
        tower: ViTokTower,
        runs: Runs,
        settings: MemorySettings,
        steps_in: Steps,
        steps_out: Steps,
        pixel_grids: list[Grid] | None = None,
    ) -> Runs:
        """As `_run_tower`, in slices and tiles if these are on, and of several processes each a share."""
        steps, group, tiling = (steps_in, steps_out), settings.process_group, settings.tiling
        if tower.num_latent_tokens:
            check_whole(runs, pixel_grids, settings, steps_in, self.is_image_model)
        elif tiling is not None:
            parts = [run.split(1) if settings.use_slicing else [run] for run in runs]
            return [torch.cat([self._run_tiles(tower, x, tiling, settings, *steps) for x in part]) for part in parts]
        if (settings.use_slicing or group is not None) and sum(run.shape[0] for run in runs) > 1:
            grids = [None] * len(runs) if pixel_grids is None else [[grid] for grid in pixel_grids]
            units = [(item, grid) for run, grid in zip(runs, grids) for item in run.split(1)]

            def run_item(unit: tuple[torch.Tensor, list[Grid] | None]) -> torch.Tensor:
                return self._run_tower(tower, [unit[0]], settings, *steps, unit[1])[0]

            items = iter(map(run_item, units) if group is None else spread(run_item, units, runs[0], group))
            return [torch.cat([*itertools.islice(items, run.shape[0])]) for run in runs]
        return self._run_tower(tower, runs, settings, *steps, pixel_grids)

    def _run_tiles(
        self,
        tower: ViTokTower,
        run: torch.Tensor,
        tiling: Tiling,
        settings: MemorySettings,
        steps_in: Steps,
        steps_out: Steps,
    ) -> torch.Tensor:
        def run_tile(tile: torch.Tensor) -> torch.Tensor:
            return self._run_tower(tower, [tile], settings, steps_in, steps_out)[0]

        steps, group = (steps_in, steps_out), settings.process_group
        if group is None:
            return torch.cat([*apply_tiled(run_tile, [run], tiling, *steps)], dim=2)
        tiles = iter(spread(run_tile, [*cut(run, tiling, steps_in)], run, group))
        return torch.cat([*apply_tiled(lambda _: next(tiles), [run], tiling, *steps)], dim=2)

    def encode_stream(
        self, pieces: Iterable[torch.Tensor], max_cached_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Encodes a video of any length piece by piece.

        A causal model keeps the keys and values of earlier latent frames: the parts together are what `encode` of the
        whole gives, up to rounding. Others encode overlapping windows, those of `enable_tiling`, in memory that does
        not grow with the video: the parts together are what `encode` with tiling gives, or, with the default settings,
        what it gives with tiles in time only.

        Args:
            pieces: Parts of the video, (B, C, T, H, W) in [-1, 1], of any numbers of frames that add up to a multiple
                of q, for a causal model to 1 + a multiple of q.
            max_cached_frames: For causal models: latent frames that a token sees at most, its own included, so that
                the memory does not grow with the video, as `enable_sliding_window(frames=max_cached_frames)` does.

        Yields:
            Modes of the posterior, (B, c, t, H/p, W/p), that follow one another in time.

        Raises:
            ValueError: If pieces do not fit the model or one another, the last latent frame lacks frames, or a model
                that is not causal is given `max_cached_frames`.
        """
        settings, steps = self._stream_settings(max_cached_frames), (self._pixel_steps, (1, 1, 1))
        lead = self.config.lead_frames
        parts = self._stream(lambda window: self._encode("pieces", window, settings), pieces, settings, steps, lead)
        return (self._posterior(parameters).mode() for parameters in parts)

    def decode_stream(
        self, pieces: Iterable[torch.Tensor], max_cached_frames: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Decodes latents of any length piece by piece; see `encode_stream`.

        Args:
            pieces: Latents, (B, c, t, h, w), of any lengths, such as `encode_stream` yields.
            max_cached_frames: As of `encode_stream`.

        Yields:
            Frames, (B, C, T, h * p, w * p), that follow one another in time.
        """
        settings, steps = self._stream_settings(max_cached_frames), ((1, 1, 1), self._pixel_steps)
        return self._stream(
            lambda window: self._decode("pieces", self._add_channels(window), settings), pieces, settings, steps
        )

    def _stream_settings(self, max_cached_frames: int | None) -> MemorySettings:
        """Those of a call, with a cache of its own if the model is causal."""
        settings = self._memory_settings()
        if max_cached_frames is not None:
            max_cached_frames = self._check_causal("max_cached_frames", max_cached_frames)
        if settings.causal is None:
            return settings
        bounds = [frames for frames in (max_cached_frames, settings.causal.frames) if frames is not None]
        frames = min(bounds, default=None)
        return settings._replace(causal=Causal(frames, FrameCache(frames)), process_group=None)

    def _stream(self, function, pieces, settings, steps, lead=0):
        if self.config.num_latent_tokens is not None:
            raise ValueError("1-D codes are of whole clips, which do not come in pieces: call `encode` and `decode`.")
        pieces, (size, overlap) = check_pieces(pieces), (self.tiling.sizes[0], self.tiling.overlaps[0])
        if settings.causal is None:
            return apply_tiled(function, pieces, Tiling((size, None, None), (overlap, 0, 0)), *steps)
        assert size is not None  # `make_tiling` cuts time
        return causal_stream(function, pieces, settings.causal.cache, steps[0][0], lead, size)

    def _lead_frames(self, settings: MemorySettings) -> int:
        """Frames that come before the first one of a clip: of a stream, only of its first piece."""
        is_continued = settings.causal is not None and settings.causal.start > 0
        return 0 if is_continued else self.config.lead_frames

    def _memory_settings(self) -> MemorySettings:
        tiling = self.tiling if self.use_tiling else None
        if not self.config.causal:
            return MemorySettings(self.use_slicing, tiling, self.window_radius, None, self.process_group)
        if tiling is not None:
            tiling = Tiling((None, *tiling.sizes[1:]), (0, *tiling.overlaps[1:]))
        causal = Causal(self.window_frames)
        return MemorySettings(self.use_slicing, tiling, self.window_radius, causal, self.process_group)

    def _check_causal(self, name: str, frames: int) -> int:
        """Latent frames that a token may see."""
        if not self.config.causal:
            raise ValueError(
                f"`{name}` is {show(frames)}, but the tokens of this model see all latent frames: leave it out, or "
                "take a model with `causal=True`."
            )
        return check_int(name, frames)

    def enable_parallel(self, process_group: Any = None) -> None:
        """Has several processes compute one call: each does a share of the tiles, or, without tiling, of the items.

        All must make the same calls with the same pixels or latents, under `torch.no_grad()`, and all get the whole,
        what one process gives up to rounding. Of a stream, each piece is shared; causal ones are not.

        Args:
            process_group: Of torch.distributed; default: all processes.

        Raises:
            ValueError: If there is no process group, or this process is not in it.
        """
        self.process_group = check_group(process_group)

    def disable_parallel(self) -> None:
        """Back to one process."""
        self.process_group = None

    def enable_sliding_window(self, radius: int | None = None, frames: int | None = None) -> None:
        """Makes attention local, so that its time grows with the area of the picture and not with the square of it.

        The grid of tokens is cut into blocks of `radius` tokens a side; a block attends to itself and to all tokens
        at most `radius` rows, columns (and latent frames, in a video model that is not causal) away. Sizes of up to
        `radius` tokens a side are not affected. The result differs from full attention, with which the models are
        trained.

        Args:
            radius: In tokens; times `patch_size`, in pixels. By default 16, or, with `frames`, unlimited.
            frames: For causal models: latent frames that a token sees at most, its own included; default: all before.

        Raises:
            ValueError: If one is not positive, or a model that is not causal is given `frames`.
        """
        if frames is not None:
            frames = self._check_causal("frames", frames)
        radius = 16 if radius is None and frames is None else radius
        self.window_radius = None if radius is None else check_int("radius", radius)
        self.window_frames = frames

    def disable_sliding_window(self) -> None:
        """Back to full attention."""
        self.window_radius = self.window_frames = None
