"""Cutting training batches out of pictures and clips."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from ..clips import Runs, to_runs
from .media import resize


MAX_FAILURES = 100  # in a row; more are no accident

T, U = TypeVar("T"), TypeVar("U")


@dataclass
class Batch:
    """One batch of training data: pixels or, of cached pictures, moments; items are in the order of the runs.

    Args:
        pixels: Runs of (n, 3, T, H, W) uint8, one for each size; T is 1 for pictures. Empty for cached latents.
        moments: (B, 2, c, t, h, w) float32, mean and standard deviation of the posteriors of cached latents.
        labels: (B,) int64, the classes of data that have any.
        skipped: "name: reason" of each picture or video that could not be read while the batch was drawn.
        position: Where a stream goes on after the batch; `None` for data that are drawn by index.
    """

    pixels: Runs = field(default_factory=list)
    moments: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    position: dict[str, int] | None = None

    @property
    def num_items(self) -> int:
        return sum(map(len, self.pixels)) if self.moments is None else len(self.moments)

    def pin_memory(self) -> "Batch":
        """In memory that a device reads without a copy; a `DataLoader` asks for it."""
        moments, labels = (x if x is None else x.pin_memory() for x in (self.moments, self.labels))
        return replace(self, pixels=[run.pin_memory() for run in self.pixels], moments=moments, labels=labels)


def parse_size(size: str) -> tuple[int, int, float]:
    """ "128x64:2" (height, width, share of the batches) or "128" -> (128, 64, 2.0) or (128, 128, 1.0)."""
    sides, _, share = size.partition(":")
    try:
        height, width = [int(side) for side in sides.split("x")] if "x" in sides else [int(sides)] * 2
        return height, width, float(share or 1.0)
    except ValueError as error:
        raise ValueError(
            f'Size "{size}" must be SIDE or HEIGHTxWIDTH with an optional :SHARE, as "128x64:2".'
        ) from error


@dataclass
class CropSettings:
    """How a batch is cut.

    Args:
        sizes: (height, width, share of the batches) of the random crops; all crops of a batch have one size.
        pixels_per_batch: A batch of random crops has as many as fit into this number of pixels, times frames, but at
            least one.
        num_frames: Frames of a clip; 1: pictures, and single frames of videos.
        fps: Frames a second of the clips; `None`: every frame.
        flip: Flip half of the crops left to right.
        seed: Of everything random.
        max_tokens: Instead of random crops, whole pictures in their own aspect ratio, as many as fit into this number
            of tokens; a picture has ceil(H / p) * ceil(W / p) * ceil(T / q). `sizes` and
            `pixels_per_batch` must be left out.
        max_pixels: With `max_tokens`, pictures of more pixels (a frame) are scaled down to it, smaller ones stay.
        token_size: (q, p), the frames and pixels a side of a token.
    """

    sizes: list[tuple[int, int, float]] = field(default_factory=list)
    pixels_per_batch: int = 0
    num_frames: int = 1
    fps: float | None = None
    flip: bool = True
    seed: int = 0
    max_tokens: int | None = None
    max_pixels: int | None = None
    token_size: tuple[int, int] = (1, 16)

    def __post_init__(self):
        if (self.max_tokens is None) != (self.max_pixels is None):
            raise ValueError(
                f"Set both `max_tokens` ({self.max_tokens}) and `max_pixels` ({self.max_pixels}), or none."
            )
        if self.max_tokens is None:
            shares = [share for _, _, share in self.sizes]
            if not shares or min(shares) < 0 or sum(shares) <= 0:
                raise ValueError(f"The shares of `sizes` must not be negative nor all 0, but are {shares}.")
            if self.pixels_per_batch < 1:
                raise ValueError(f"`pixels_per_batch` must be at least 1, but is {self.pixels_per_batch}.")
            return
        if self.sizes or self.pixels_per_batch:
            raise ValueError("`max_tokens` takes the place of `sizes` and `pixels_per_batch`: leave them out.")
        side, least = math.isqrt(self.max_pixels), self.token_size[1]
        if side < least:
            raise ValueError(f"`max_pixels` is {self.max_pixels}, less than a token of {least} x {least}: raise it.")
        if self.tokens(side, side) > self.max_tokens:
            raise ValueError(
                f"`max_tokens` is {self.max_tokens}, but a picture of `max_pixels` {self.max_pixels} has "
                f"{self.tokens(side, side)} tokens: raise `max_tokens` or lower `max_pixels`."
            )

    def tokens(self, height: int, width: int) -> int:
        """Tokens of a picture, or of a clip of `num_frames` frames, of this size; partial tokens count."""
        q, p = self.token_size
        return math.ceil(height / p) * math.ceil(width / p) * math.ceil(self.num_frames / q)

    def native_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) of a picture under a token budget: of at most `max_pixels`, no side below a token's.

        It has at most `max_tokens`, also where partial tokens add up. The aspect ratio changes only where all cannot
        be had, beyond max_pixels / p ** 2 to 1.
        """
        p = self.token_size[1]
        scale = min(max(1.0, p / min(height, width)), math.sqrt(self.max_pixels / (height * width)))
        while True:
            # the small number keeps 768 * (1 / 3) at 256
            size = tuple(min(max(p, int(side * scale + 1e-6)), self.max_pixels // p) for side in (height, width))
            if self.tokens(*size) <= self.max_tokens:
                return size
            # the next at which there is a row or a column of tokens less
            scale = max((math.ceil(part / p) - 1) * p / side for part, side in zip(size, (height, width)))


def draw_readable(choose: Callable[[], T], load: Callable[[T], U], skipped: list[str]) -> U:
    """`load(choose())`, again while `load` raises a ValueError, whose message is added to `skipped`.

    Raises:
        ValueError: After `MAX_FAILURES` failures in a row.
    """
    for _ in range(MAX_FAILURES):
        choice = choose()
        try:
            return load(choice)
        except ValueError as error:
            skipped.append(str(error))
    raise ValueError(
        f"{MAX_FAILURES} pictures or videos in a row could not be read; check the source of the data. The last: "
        f"{skipped[-1]}"
    )


def to_pixels(clips: Sequence[np.ndarray] | np.ndarray) -> torch.Tensor:
    """Clips (T, H, W, 3) of one size -> (B, 3, T, H, W)."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


class BatchCutter:
    """Cuts batches of what `draw()` returns, clips (T, h, w, 3), as `settings` tell.

    A random crop shows a random share of its picture, log-uniform between the crop's own resolution and the whole
    picture, so that detail and composition are both seen; pictures smaller than the crop are enlarged. Of nearly flat
    crops only one in eight is kept.
    """

    def __init__(self, settings: CropSettings):
        self.settings = settings
        total = sum(share for _, _, share in settings.sizes)
        self.size_probabilities = [share / total for _, _, share in settings.sizes]

    def __call__(self, rng: np.random.Generator, draw: Callable[[], np.ndarray]) -> tuple[Runs, bool]:
        """The pixels of a `Batch`, and whether the last clip that was drawn did not fit and was left out."""
        if self.settings.max_tokens is not None:
            return self._native_pictures(rng, draw)
        height, width, _ = self.settings.sizes[rng.choice(len(self.settings.sizes), p=self.size_probabilities)]
        batch_size = max(1, self.settings.pixels_per_batch // (height * width * self.settings.num_frames))
        crops = np.stack([self._random_crop(rng, draw, height, width) for _ in range(batch_size)])
        return [to_pixels(crops)], False

    def _random_crop(self, rng, draw, height: int, width: int) -> np.ndarray:
        while True:
            clip = draw()  # (T, h, w, 3)
            largest = min(clip.shape[1] / height, clip.shape[2] / width)
            scale = min(largest, np.exp(rng.uniform(0.0, np.log(max(largest, 1.0)))))
            # rounding must not make the box larger than the picture
            box_height, box_width = min(scale * height, clip.shape[1]), min(scale * width, clip.shape[2])
            top, left = rng.uniform(0, clip.shape[1] - box_height), rng.uniform(0, clip.shape[2] - box_width)
            box = (left, top, left + box_width, top + box_height)
            crop = np.stack([resize(frame, (width, height), box) for frame in clip])  # (T, H, W, 3)
            if crop.std(axis=(0, 1, 2)).max() > 4.0 or rng.random() < 0.125:
                return self._flip(rng, crop)

    def _native_pictures(self, rng, draw) -> tuple[Runs, bool]:
        pictures, room = [], self.settings.max_tokens
        while True:
            clip = draw()  # (T, h, w, 3)
            height, width = self.settings.native_size(*clip.shape[1:3])
            room -= self.settings.tokens(height, width)
            if room < 0:
                return to_runs(pictures)[0], True
            if clip.shape[1:3] != (height, width):
                box = (0, 0, clip.shape[2], clip.shape[1])
                clip = np.stack([resize(frame, (width, height), box) for frame in clip])  # (T, H, W, 3)
            pictures.append(to_pixels(self._flip(rng, clip)[None])[0])
            if room <= 0:
                return to_runs(pictures)[0], False

    def _flip(self, rng: np.random.Generator, clip: np.ndarray) -> np.ndarray:
        return clip[:, :, ::-1] if self.settings.flip and rng.random() < 0.5 else clip
