"""Pictures and videos as they are stored, and the frames that are read of them."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from .media import Source, load_image
from .video import load_clip, load_random_clip


T_co = TypeVar("T_co", covariant=True)


class Item(NamedTuple):
    """A picture or video as it is stored.

    `source` is the file's path, its address for fsspec ("hf://...", "https://..."), its bytes, the exception that was
    raised in their place, for whoever loads the item. `name` stands for it in messages.
    """

    name: str
    source: Source
    is_video: bool = False


class Decoded(NamedTuple):
    """A picture that has been decoded, (H, W, 3) uint8."""

    pixels: np.ndarray


class Indexed(Protocol[T_co]):
    """What is read by index, as lists are."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> T_co: ...


class Choice(NamedTuple):
    """What a sampler chose: the place of an item, whether to mirror it, and its class; streams leave no choice."""

    place: int = 0
    mirrored: bool = False
    label: int | None = None


@dataclass(frozen=True)
class Clip:
    """What is read of videos: `num_frames` frames, `fps` a second, or with `None` every frame.

    `with_pictures` lets pictures through beside clips, as clips of one frame, which causal models take.
    """

    num_frames: int = 1
    fps: float | None = None
    with_pictures: bool = False

    @property
    def least_frames(self) -> int:
        """Those of what is read: 1, if it may be a picture."""
        return 1 if self.with_pictures else self.num_frames

    def load(self, item: Item | Decoded, rng: np.random.Generator | None = None) -> np.ndarray:
        """(T, H, W, 3) uint8: a picture with T = 1, or a clip from a random second of a video, or its first.

        Raises:
            ValueError: "name: reason", if it cannot be read.
        """
        if isinstance(item, Decoded):
            return item.pixels[None]
        if not item.is_video:
            return load_image(item.source, item.name)[None]
        if rng is None:
            return load_clip(item.source, 0.0, self.num_frames, self.fps, item.name)
        return load_random_clip(item.source, self.num_frames, self.fps, rng, item.name)
