"""Codes that can be cut: a prefix of the channels, of the token sequence, or of both, is a code, too.

A cut keeps the first channels or tokens of a whole code. The decoder gets a whole code again: the channels that are
missing are `FILL`, the tokens that are missing are the learned mask token.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from accelerate.utils import align_module_device
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..checks import LARGEST, check_int, check_number, check_tensor
from ..clips import (
    Expected,
    check_clips,
    check_num_frames,
    check_size_list,
    check_sizes,
    item_sizes,
    size_of,
    sizes_of,
    to_batches,
)
from .compat import ViTokConfig
from .posterior import PosteriorList, ViTokPosterior
from .rotary import Grid


Clips: TypeAlias = torch.Tensor | list[torch.Tensor]
Counts: TypeAlias = int | list[int] | None
Posterior: TypeAlias = ViTokPosterior | PosteriorList


# One standard deviation of the prior from its mean: the decoder sees how many channels there are, and its first norm
# divides by about as much for all lengths. Zeros lose 0.5 to 1.4 dB (examples/results/codes).
FILL = 1.0

CODE_FIELDS = ("channel_counts", "token_counts", "num_latent_tokens")  # of the config


def check_counts(config: ViTokConfig) -> None:
    """Raises `ValueError` for entries of a config by which its codes cannot be cut."""
    for name, last in (("channel_counts", config.latent_channels), ("token_counts", config.num_latent_tokens)):
        counts = config[name]
        if counts is None:
            continue
        if not counts or counts[0] < 1 or any(low >= high for low, high in zip(counts, counts[1:])):
            raise ValueError(f"`{name}` must be an increasing list of positive numbers, but is {counts}.")
        if last is not None and counts[-1] != last:
            whole = "latent_channels" if name == "channel_counts" else "num_latent_tokens"
            raise ValueError(f"`{name}` must end with `{whole}`, {last}, but is {counts}.")


def cut(posterior: ViTokPosterior, num_tokens: int | None, num_channels: int | None) -> ViTokPosterior:
    """Of (B, c, ...) the first channels; with `num_tokens`, the first tokens of the sequence, (B, c, tokens)."""
    parameters, halves = posterior.parameters, 1 if posterior.deterministic else 2  # means and log-variances
    if num_channels is not None:
        parameters = parameters.unflatten(1, (halves, -1))[:, :, :num_channels].flatten(1, 2)
    if num_tokens is not None:
        parameters = parameters.flatten(2)[..., :num_tokens]
    return ViTokPosterior(parameters, posterior.deterministic)


def split(posterior: ViTokPosterior) -> list[ViTokPosterior]:
    """Of the items of a batch."""
    return [ViTokPosterior(item, posterior.deterministic) for item in posterior.parameters.split(1)]


def spread(counts: list[int] | None, num_items: int, default: int | None) -> list[int] | list[int | None]:
    """One for each item, of one for each or one for all."""
    return [default] * num_items if counts is None else counts * (num_items // len(counts))


def fill(
    latents: torch.Tensor, mask_token: torch.Tensor | None, tokens: list[int] | None, channels: list[int] | None
) -> torch.Tensor:
    """(B, c, ...) -> the same but for what is beyond the numbers of tokens and channels that each item keeps."""
    whole, places = latents.flatten(2), partial(torch.arange, device=latents.device)  # (B, c, L)
    if channels is not None:
        kept = places(whole.shape[1]) < torch.tensor(channels, device=latents.device)[:, None]
        whole = whole.masked_fill(~kept.unsqueeze(2), FILL)
    if tokens is not None and mask_token is not None:
        kept = places(whole.shape[2]) < torch.tensor(tokens, device=latents.device)[:, None]
        whole = torch.where(kept.unsqueeze(1), whole, mask_token.to(whole.dtype)[:, None])
    return whole.view(latents.shape)


def psnr(sample: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """(B,), both clipped to [-1, 1]."""
    error = (sample.float().clamp(-1, 1) - x.float().clamp(-1, 1)).square().flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)


class CodesMixin:
    """Cuts codes, and makes them whole again."""

    config: ViTokConfig
    is_image_model: bool
    decoder: Any  # a `ViTokTower`, or `None`
    _decode: Callable
    check_config: Callable
    register_to_config: Callable
    _memory_settings: Callable

    def set_counts(self, channel_counts: list[int] | None = None, token_counts: list[int] | None = None) -> None:
        """Lets codes be cut to these numbers, for which the model is to be trained; `None` leaves them as they are."""
        given = {"channel_counts": channel_counts, "token_counts": token_counts}
        given = {name: counts for name, counts in given.items() if counts is not None}
        self.check_config(self.config | given)
        self.register_to_config(**given)
        if self.config.token_counts is not None and self.decoder is not None and self.decoder.mask_token is None:
            self.decoder.mask_token = nn.Parameter(self.decoder.proj_in.weight.new_zeros(self.config.latent_channels))

    @property
    def _has_codes(self) -> bool:
        return any(self.config[name] is not None for name in CODE_FIELDS)

    @property
    def _sample_frames(self) -> int:
        return max(self.config.sample_frames, self.config.num_frames(1))

    @property
    def _mask_token(self) -> torch.Tensor | None:
        """That of the decoder, fetched if it is offloaded."""
        token = None if self.decoder is None else self.decoder.mask_token
        if token is not None and token.is_meta:
            with align_module_device(self.decoder):
                return self.decoder.mask_token
        return token

    def _grid(self, size: Sequence[int]) -> Grid:
        """(t, h, w) in tokens of a clip, (T, H, W); (H, W) is a picture, or, if there are none, of `sample_frames`."""
        config, p = self.config, self.config.patch_size
        frames = size[0] if len(size) == 3 else 1 if config.causal else self._sample_frames
        return (config.num_latent_frames(frames), -(-size[-2] // p), -(-size[-1] // p))

    def count_tokens(self, size: Sequence[int]) -> int:
        """Tokens of the whole code of a picture, (H, W), or a clip, (T, H, W) pixels."""
        check_size_list([size], (2, 3))
        return self.config.num_latent_tokens or math.prod(self._grid(size))

    def _grids(self, x: Clips) -> list[Grid] | None:
        """The grids of pixels that 1-D codes are decoded to, one for each batch of `to_batches`."""
        if self.config.num_latent_tokens is None:
            return None
        return [self._grid(size_of(batch)) for batch in to_batches(x)[0]]

    def _check_count(self, name: str, value: Any, longest: int, is_for_one: bool) -> int:
        """Raises `ValueError` unless codes may be cut to this number; of one item, to any number of tokens."""
        field = "token_counts" if name == "num_tokens" else "channel_counts"
        if (allowed := self.config[field]) is None:
            raise ValueError(f"`{name}` is {value}, but the model has no `{field}` in its config: leave it out.")
        count = value
        if not torch.compiler.is_compiling():  # else it is a number without a value
            count = check_int(name, value, low=-LARGEST, wanted=f"one of {allowed}")
        is_any = is_for_one and name == "num_tokens"
        if not 0 < count <= longest or (count not in allowed and not is_any):
            fitting = [n for n in allowed if n <= longest]
            wanted = f"from 1 to {longest}" if is_any or not fitting else f"one of {fitting}"
            remedy = "" if is_any or fitting else f": pass a list, for {longest} tokens are fewer than {allowed[0]}"
            raise ValueError(f"`{name}` must be {wanted}, but is {count}{remedy}.")
        return count

    def _counts(self, name: str, counts: Counts, x: Clips) -> list[int] | None:
        """What is kept of each item of `x`, a single number where that is the same for all of a batch, or `None`."""
        if counts is None:
            return None
        is_list = isinstance(counts, (list, tuple))
        sizes = [size_of(x)] if isinstance(x, torch.Tensor) and not is_list else item_sizes(x)
        longest = [self.config.latent_channels] * len(sizes)
        if name == "num_tokens":
            longest = [self.count_tokens(size) for size in sizes]
        if not isinstance(counts, (list, tuple)):
            return [self._check_count(name, counts, length, False) for length in longest]
        if len(counts) != len(sizes):
            raise ValueError(f"`{name}` has {len(counts)} entries for {len(sizes)} items: pass one for each, or one.")
        return [self._check_count(name, count, length, True) for count, length in zip(counts, longest)]

    def _cut(self, x: Clips, posterior: Posterior, num_tokens: Counts, num_channels: Counts) -> Posterior:
        """What `encode` gives: the posterior of `x` cut, for a batch with numbers for each item that of a list."""
        tokens, channels = self._counts("num_tokens", num_tokens, x), self._counts("num_channels", num_channels, x)
        is_for_all = not any(isinstance(counts, (list, tuple)) for counts in (num_tokens, num_channels))
        if isinstance(posterior, ViTokPosterior) and is_for_all:
            whole = self.config.num_latent_tokens
            return cut(posterior, tokens[0] if tokens else whole, channels[0] if channels else None)
        items = posterior.posteriors if isinstance(posterior, PosteriorList) else split(posterior)
        every = spread(tokens, len(items), self.config.num_latent_tokens), spread(channels, len(items), None)
        cuts = [cut(*item) for item in zip(items, *every)]
        return PosteriorList(cuts, lambda batches: [batch.squeeze(0) for batch in batches])

    @apply_forward_hook
    def _fill(self, x: Clips, latents: Clips, num_tokens: Counts, num_channels: Counts) -> Clips:
        """The latents of `x`, of which each item keeps so many tokens and channels."""
        kept = self._counts("num_tokens", num_tokens, x), self._counts("num_channels", num_channels, x)
        mask_token = self._mask_token
        if isinstance(latents, torch.Tensor):
            return fill(latents, mask_token, *kept)
        batches, give_back = to_batches(latents)
        ends = [0, *itertools.accumulate(batch.shape[0] for batch in batches)]
        filled = [
            fill(batch, mask_token, *(counts and counts[start:end] for counts in kept))
            for batch, start, end in zip(batches, ends, ends[1:])
        ]
        return give_back(filled)

    @apply_forward_hook
    def _make_whole(self, z: Clips, sizes: Any) -> tuple[Clips, list[Grid] | None, Any]:
        """What `_decode` takes: whole codes on a grid, the grids of the pixels of 1-D codes, and sizes to crop to.

        `z` is a batch or a list, of latents on the grid or of sequences, (B, c, tokens) or (c, tokens).
        """
        is_batch, side = isinstance(z, torch.Tensor), self.config.sample_size
        if z.ndim < 3 if isinstance(z, torch.Tensor) else not (isinstance(z, (list, tuple)) and z):
            check_clips("z", z, Expected(self.config.latent_channels, axes="cthw"))  # which says what is wrong
        if sizes is not None:
            check_size_list(sizes, (2, 3))
        if sizes is not None and len(sizes) != len(z):
            raise ValueError(f"`sizes` has {len(sizes)} entries for {len(z)} codes: pass one for each.")
        if is_batch and sizes is not None and any(tuple(size) != tuple(sizes[0]) for size in sizes):
            raise ValueError(f"`sizes` of a batch must be equal, but are {sizes}: pass a list of codes.")
        names = ["z"] if is_batch else [f"z[{index}]" for index in range(len(z))]
        for name, item in zip(names, [z] if is_batch else z):
            check_tensor(name, item, (3, 4, 5) if is_batch else (2, 3, 4))
        batches, give_back = to_batches(z)
        default = (side, side) if self.is_image_model else (self._sample_frames, side, side)
        all_sizes = [tuple(size) for size in sizes or [default] * len(batches)]
        for index, size in enumerate(all_sizes):
            if len(size) == 3 and not self.is_image_model:
                q, lead = self.config.temporal_patch_size, self.config.lead_frames
                check_num_frames(f"The number of frames of `sizes[{index}]`", size[0], q, lead)
        if self.config.num_latent_tokens is not None and any(batch.ndim > 3 for batch in batches):
            raise ValueError(
                f"`z` has shape {tuple(batches[0].shape)}, but the codes of this model are sequences, (B, "
                f"{self.config.latent_channels}, {self.config.num_latent_tokens}): `ViTokDiTPipeline` makes these."
            )
        if sizes is not None and (on_grid := [index for index, batch in enumerate(batches) if batch.ndim > 3]):
            grids = [all_sizes[index][-2:] for index in on_grid]
            check_sizes(grids, [batches[index][0] for index in on_grid], self.config.patch_size)
        whole = [self._add_channels(batch) for batch in batches]
        whole = [
            self._add_tokens(name, batch, size) if batch.ndim == 3 else batch
            for name, batch, size in zip(names, whole, all_sizes)
        ]
        grids = [self._grid(size) for size in all_sizes[: len(whole)]]
        return give_back(whole), grids if self.config.num_latent_tokens else None, sizes

    def _add_channels(self, z: torch.Tensor) -> torch.Tensor:
        """(B, k, ...) -> (B, c, ...), if k is one of `channel_counts`."""
        missing = self.config.latent_channels - z.shape[1]
        if z.shape[1] not in (self.config.channel_counts or ()) or not missing:
            return z
        return torch.cat([z, z.new_full((z.shape[0], missing, *z.shape[2:]), FILL)], dim=1)

    def _add_tokens(self, name: str, z: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        """(B, c, tokens) of pictures of this size -> the latents on their grid, or the whole 1-D code as a grid."""
        config, length, count = self.config, self.count_tokens(size), z.shape[2]
        if config.token_counts is None and config.num_latent_tokens is None:
            raise ValueError(f"`{name}` is a sequence, but the codes of this model are on grids: pass (B, c, h, w).")
        if z.shape[1] != config.latent_channels:
            wanted = f"one of {config.channel_counts}" if config.channel_counts else str(config.latent_channels)
            raise ValueError(f"`{name}` must be (B, c, tokens) with c {wanted}, but has {z.shape[1]} channels.")
        if not 0 < count <= length or (count < length and config.token_counts is None):
            wanted = f"1 to {length}" if config.token_counts else str(length)
            raise ValueError(
                f"`{name}` must have {wanted} tokens for {' x '.join(map(str, size))} pixels, but has {count}: pass "
                "the `sizes` that it was encoded from."
            )
        if count < length:
            z = fill(F.pad(z, (0, length - count)), self._mask_token, [count] * z.shape[0], None)
        grid = (1, 1, length) if config.num_latent_tokens else self._grid(size)
        has_time = len(size) == 3 or not (self.is_image_model or config.causal)
        return z.unflatten(2, grid if has_time else grid[1:])

    @torch.no_grad()
    def _shortest(self, x: Clips, posterior: Posterior, name: str, min_psnr: float, other: Counts) -> list[int]:
        """The least number of `name` for each item with which its decoded mode reaches `min_psnr`, else the largest.

        Found by bisection, all items of the batch at once: PSNR is taken to rise with the length.
        """
        sizes, modes = item_sizes(x), posterior.mode()
        counts = self.config.token_counts if name == "num_tokens" else self.config.channel_counts
        lengths = [self.count_tokens(size) if name == "num_tokens" else self.config.latent_channels for size in sizes]
        options = [[count for count in counts if count < length] + [length] for length in lengths]
        low, high = [0] * len(sizes), [len(option) - 1 for option in options]
        while any(start < end for start, end in zip(low, high)):
            middle = [(start + end) // 2 for start, end in zip(low, high)]
            tried = [option[place] for option, place in zip(options, middle)]
            tokens, channels = (tried, other) if name == "num_tokens" else (other, tried)
            latents = self._fill(x, modes, tokens, channels)
            sample = self._decode(None, latents, self._memory_settings(), sizes_of(x), self._grids(x))
            pairs = zip(to_batches(sample)[0], to_batches(x)[0])
            reached = (torch.cat([psnr(*pair) for pair in pairs]) >= min_psnr).tolist()
            for index, (place, enough) in enumerate(zip(middle, reached)):
                if low[index] < high[index]:
                    low[index], high[index] = (low[index], place) if enough else (place + 1, high[index])
        return [option[place] for option, place in zip(options, low)]

    def _searched(self, num_tokens: Counts, num_channels: Counts, min_psnr: float) -> str:
        """Which of the two `min_psnr` chooses."""
        given = (("num_tokens", num_tokens, "token_counts"), ("num_channels", num_channels, "channel_counts"))
        for name, count, field in given:
            if count is None and self.config[field] is not None:
                return name
        if self.config.token_counts is None and self.config.channel_counts is None:
            raise ValueError(f"`min_psnr` is {min_psnr}, but the codes of this model have one length: leave it out.")
        names = " and ".join(f"`{name}`" for name, count, _ in given if count is not None)
        raise ValueError(f"`min_psnr` {min_psnr:g} chooses the length, which {names} fix: leave one of them out.")

    def check_lengths(
        self, num_tokens: int | None = None, num_channels: int | None = None, min_psnr: float | None = None
    ) -> None:
        """Raises `ValueError` for arguments of `encode` with which it takes no picture."""
        for name, count in (("num_tokens", num_tokens), ("num_channels", num_channels)):
            if count is not None:
                longest = self.config.latent_channels if name == "num_channels" else LARGEST
                self._check_count(name, count, longest, is_for_one=True)
        if min_psnr is not None:
            self._searched(num_tokens, num_channels, check_number("min_psnr", min_psnr, 0.0, 1000.0))

    def _choose(
        self, x: Clips, posterior: Posterior, num_tokens: Counts, num_channels: Counts, min_psnr: float | None
    ) -> tuple[Counts, Counts]:
        """The numbers that `encode` cuts to, with those that `min_psnr` stands for."""
        if min_psnr is None:
            return num_tokens, num_channels
        min_psnr = check_number("min_psnr", min_psnr, 0.0, 1000.0)
        name = self._searched(num_tokens, num_channels, min_psnr)
        if name == "num_tokens":
            return self._shortest(x, posterior, name, min_psnr, num_channels), num_channels
        return num_tokens, self._shortest(x, posterior, name, min_psnr, num_tokens)
