"""Pictures and videos as they are stored, and the frames and channels that are read of them."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from .files import suffixes_for
from .media import VIDEO_CHANNELS, Source, load_image, to_channels
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
    """A picture that has been decoded, (H, W, C) uint8."""

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
    """What is read of pictures and videos.

    Args:
        num_frames: Frames of a clip.
        fps: Frames a second; `None`: every frame of the video.
        with_pictures: Let pictures through beside clips, as clips of one frame, which causal models take.
        channels: Those of the model, see `media.load_image`.

    Raises:
        ValueError: For clips of other channels than 1, grey, and 3.
    """

    num_frames: int = 1
    fps: float | None = None
    with_pictures: bool = False
    channels: int = 3

    def __post_init__(self):
        if self.num_frames > 1 and self.channels not in VIDEO_CHANNELS:
            raise ValueError(f"Clips of {self.num_frames} frames are read with 1 or 3 channels, not {self.channels}.")

    @property
    def least_frames(self) -> int:
        """Those of what is read: 1, if it may be a picture."""
        return 1 if self.with_pictures else self.num_frames

    @property
    def suffixes(self) -> frozenset[str]:
        """Of the files that this can be read of."""
        return suffixes_for(self.least_frames, self.channels)

    def load(self, item: Item | Decoded, rng: np.random.Generator | None = None) -> np.ndarray:
        """(T, H, W, C) uint8: a picture with T = 1, or a clip from a random second of a video, or its first.

        Raises:
            ValueError: "name: reason", if it cannot be read.
        """
        if isinstance(item, Decoded):
            return item.pixels[None]
        if not item.is_video:
            return load_image(item.source, item.name, self.channels)[None]
        if self.channels not in VIDEO_CHANNELS:
            raise ValueError(f"{item.name}: is a video, which is read with 1 or 3 channels, not {self.channels}.")
        if rng is None:
            clip = load_clip(item.source, 0.0, self.num_frames, self.fps, item.name)
        else:
            clip = load_random_clip(item.source, self.num_frames, self.fps, rng, item.name)
        return clip if self.channels == 3 else np.stack([to_channels(frame, self.channels) for frame in clip])


PICTURE = Clip()  # what is read where nothing else is asked for: an RGB picture, or the first frame of a video
