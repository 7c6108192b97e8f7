"""Pictures and clips alike: a random one for training, fixed ones for evaluation."""

from pathlib import Path

import numpy as np
import torch

from .files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files
from .media import Item, evenly_spaced, load_image, resize_and_crop
from .video import load_clip, load_random_clip


def load_item(item: Item, num_frames: int, fps: float | None, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8: the picture with T = 1, or a clip of T = `num_frames` from a random second of the video.

    Raises:
        ValueError: "name: reason", if it cannot be read.
    """
    if not item.is_video:
        return load_image(item.source, item.name)[None]
    return load_random_clip(item.source, num_frames, fps, rng, item.name)


def load_evaluation_images(
    path: str | Path, size: int, limit: int, num_frames: int = 1, fps: float | None = None
) -> torch.Tensor:
    """At most `limit` pictures of a folder, evenly spaced in its sorted list: (N, 3, 1, size, size) uint8.

    With `num_frames` > 1, the first clip of as many videos: (N, 3, num_frames, size, size). Held-out data are fixed:
    a file that cannot be read raises a ValueError that names it.
    """
    files = list_files(path, IMAGE_SUFFIXES if num_frames == 1 else VIDEO_SUFFIXES)
    files = [files[index] for index in evenly_spaced(len(files), limit)]
    clips = [load_image(file)[None] if num_frames == 1 else load_clip(file, 0.0, num_frames, fps) for file in files]
    clips = np.stack([np.stack([resize_and_crop(frame, size) for frame in clip]) for clip in clips])
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()  # (N, 3, T, size, size)
