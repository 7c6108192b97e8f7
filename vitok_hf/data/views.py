"""Views, what a batch shows of its items: random crops, whole pictures, squares with classes, cached latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..clips import Runs, to_runs
from .batches import Batch, Draw
from .items import Clip, Decoded, Item
from .media import resize, resize_and_crop


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


def to_pixels(clips: Sequence[np.ndarray]) -> torch.Tensor:
    """Clips (T, H, W, C) of one size -> (B, C, T, H, W)."""
    return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).contiguous()


def make_runs(clips: Sequence[np.ndarray]) -> Runs:
    """Clips (T, H, W, C) of any sizes -> a run for each size."""
    return to_runs([to_pixels([clip])[0] for clip in clips])[0]


def resize_clip(clip: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` of each frame of (T, H, W, C) at `size` (width, height)."""
    return np.stack([resize(frame, size, box) for frame in clip])


def mirror(clip: np.ndarray, mirrored: bool = True) -> np.ndarray:
    """(T, H, W, C) left to right, if it is to be."""
    return clip[:, :, ::-1] if mirrored else clip


@dataclass(frozen=True)
class CropView:
    """Random crops; all of a batch have one size.

    A crop shows a random share of its picture, log-uniform between the crop's own resolution and the whole picture, so
    that detail and composition are both seen; pictures smaller than the crop are enlarged. Of nearly flat crops only
    one in eight is kept.

    Args:
        sizes: (height, width, share of the batches).
        pixels_per_batch: A batch has as many crops as fit into this number of pixels, times frames, but at least one.
        clip: What is read of videos; of one frame, it mixes with pictures. Beside longer clips, pictures are a run of
            their own, and each takes the place of a clip.
        flip: Flip half of the crops left to right.
    """

    sizes: list[tuple[int, int, float]]
    pixels_per_batch: int
    clip: Clip = Clip()
    flip: bool = True

    def __post_init__(self):
        shares = [share for _, _, share in self.sizes]
        if not shares or min(shares) < 0 or sum(shares) <= 0:
            raise ValueError(f"The shares of `sizes` must not be negative nor all 0, but are {shares}.")
        if self.pixels_per_batch < 1:
            raise ValueError(f"`pixels_per_batch` must be at least 1, but is {self.pixels_per_batch}.")

    def __call__(self, seed: tuple[int, ...], draw: Draw) -> tuple[Batch, bool]:
        rng = np.random.default_rng(seed)
        total = sum(share for _, _, share in self.sizes)
        height, width, _ = self.sizes[rng.choice(len(self.sizes), p=[share / total for _, _, share in self.sizes])]
        batch_size = max(1, self.pixels_per_batch // (height * width * self.clip.num_frames))
        return Batch(make_runs([self._crop(rng, draw, height, width) for _ in range(batch_size)])), False

    def _crop(self, rng: np.random.Generator, draw: Draw, height: int, width: int) -> np.ndarray:
        while True:
            clip, _ = draw(rng, lambda item: self.clip.load(item, rng))  # (T, h, w, C)
            largest = min(clip.shape[1] / height, clip.shape[2] / width)
            scale = min(largest, np.exp(rng.uniform(0.0, np.log(max(largest, 1.0)))))
            # rounding must not make the box larger than the picture
            box_height, box_width = min(scale * height, clip.shape[1]), min(scale * width, clip.shape[2])
            top, left = rng.uniform(0, clip.shape[1] - box_height), rng.uniform(0, clip.shape[2] - box_width)
            crop = resize_clip(clip, (width, height), (left, top, left + box_width, top + box_height))
            if crop.std(axis=(0, 1, 2)).max() > 4.0 or rng.random() < 0.125:
                return mirror(crop, self.flip and rng.random() < 0.5)


@dataclass(frozen=True)
class NativeView:
    """Whole pictures in their own aspect ratio, as many as fit into `max_tokens`.

    A picture has ceil(H / p) * ceil(W / p) * ceil(T / q) tokens.

    Args:
        max_tokens: Tokens of a batch.
        max_pixels: Pictures of more pixels (a frame) are scaled down to it, smaller ones stay.
        token_size: (q, p), the frames and pixels a side of a token.
        clip: What is read of videos; of one frame, it mixes with pictures.
        flip: Flip half of the pictures left to right.
    """

    max_tokens: int
    max_pixels: int
    token_size: tuple[int, int] = (1, 16)
    clip: Clip = Clip()
    flip: bool = True

    def __post_init__(self):
        side, least = math.isqrt(self.max_pixels), self.token_size[1]
        if side < least:
            raise ValueError(f"`max_pixels` is {self.max_pixels}, less than a token of {least} x {least}: raise it.")
        if self.tokens(side, side) > self.max_tokens:
            raise ValueError(
                f"`max_tokens` is {self.max_tokens}, but a picture of `max_pixels` {self.max_pixels} has "
                f"{self.tokens(side, side)} tokens: raise `max_tokens` or lower `max_pixels`."
            )

    def tokens(self, height: int, width: int, num_frames: int | None = None) -> int:
        """Tokens of a picture or clip of this size, by default with the frames of a clip; partial tokens count."""
        (q, p), frames = self.token_size, self.clip.num_frames if num_frames is None else num_frames
        return math.ceil(height / p) * math.ceil(width / p) * math.ceil(frames / q)

    def native_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) at which a picture is shown: of at most `max_pixels`, no side below a token's.

        It has at most `max_tokens`, also where partial tokens add up. The aspect ratio changes only where all cannot
        be had, beyond max_pixels / p ** 2 to 1.
        """
        p = self.token_size[1]

        def scaled(side: int) -> int:
            return min(max(p, int(side * scale + 1e-6)), self.max_pixels // p)  # 1e-6 keeps 768 * (1 / 3) at 256

        scale = min(max(1.0, p / min(height, width)), math.sqrt(self.max_pixels / (height * width)))
        while self.tokens(scaled(height), scaled(width)) > self.max_tokens:
            # the next at which there is a row or a column of tokens less
            scale = max((math.ceil(scaled(side) / p) - 1) * p / side for side in (height, width))
        return scaled(height), scaled(width)

    def __call__(self, seed: tuple[int, ...], draw: Draw) -> tuple[Batch, bool]:
        rng, room, left_over = np.random.default_rng(seed), self.max_tokens, False
        pictures: list[np.ndarray] = []  # (T, H, W, C)
        while room > 0:
            clip, _ = draw(rng, lambda item: self.clip.load(item, rng))  # (T, h, w, C)
            height, width = self.native_size(*clip.shape[1:3])
            room -= self.tokens(height, width, len(clip))
            if left_over := room < 0:
                break
            if clip.shape[1:3] != (height, width):
                clip = resize_clip(clip, (width, height), (0, 0, clip.shape[2], clip.shape[1]))
            pictures.append(mirror(clip, self.flip and rng.random() < 0.5))
        return Batch(make_runs(pictures)), left_over


@dataclass(frozen=True)
class SquareView:
    """Squares and their classes, mirrored where the sampler says so (see `classes.ClassSampler`).

    Central ones, as diffusion models are trained on. With `min_share` below 1, random ones whose side is that share of
    the shorter side or more, as classifiers are: `DrawnBatches(files, ClassSampler(files.labels, files.classes,
    class_balanced=True), SquareView(64, 32, min_share=0.5), seed)`, `files` being `LabelledFiles`.

    Args:
        resolution: Side of the squares in pixels.
        batch_size: Squares of a batch.
        clip: What is read of videos.
        min_share: Least share of the shorter side of a picture that is seen.
    """

    resolution: int
    batch_size: int
    clip: Clip = Clip()
    min_share: float = 1.0

    def __call__(self, seed: tuple[int, ...], draw: Draw) -> tuple[Batch, bool]:
        rng = np.random.default_rng(seed)
        places = np.random.default_rng((*seed, 1))  # of crops and clips: what is drawn next does not depend on them
        drawn = [draw(rng, lambda item: self.load(item, places)) for _ in range(self.batch_size)]
        pixels = to_pixels([mirror(square, choice.mirrored) for square, choice in drawn])
        return Batch([pixels], labels=torch.tensor([choice.label for _, choice in drawn])), False

    def load(self, item: Item | Decoded, rng: np.random.Generator) -> np.ndarray:
        """(T, resolution, resolution, C) uint8. Raises as `Clip.load`."""
        clip = self.clip.load(item, rng)
        if self.min_share >= 1.0:
            return np.stack([resize_and_crop(frame, self.resolution) for frame in clip])
        side = min(clip.shape[1:3]) * rng.uniform(self.min_share, 1.0)
        top, left = (rng.uniform(0, length - side) for length in clip.shape[1:3])
        return resize_clip(clip, (self.resolution, self.resolution), (left, top, left + side, top + side))


@dataclass(frozen=True)
class LatentView:
    """Cached latents and their classes, of a `LatentCache`: the same pictures, mirrored alike, as of `SquareView`."""

    batch_size: int

    def __call__(self, seed: tuple[int, ...], draw: Draw) -> tuple[Batch, bool]:
        rng = np.random.default_rng(seed)
        drawn = [draw(rng, lambda both: both) for _ in range(self.batch_size)]
        moments = torch.stack([both[int(choice.mirrored)] for both, choice in drawn])
        return Batch(moments=moments, labels=torch.tensor([choice.label for _, choice in drawn])), False
