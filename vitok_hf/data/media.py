"""Reading pictures from files, from bytes and from addresses."""

import os
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from .files import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from .pictures import read_picture


Source = str | Path | bytes | Exception | None


class Item(NamedTuple):
    """A picture or video as it is stored.

    `source` is the file's path, its address for fsspec ("hf://...", "https://..."), its bytes, or the exception that
    was raised in their place, for whoever loads the item. `name` stands for it in messages.
    """

    name: str
    source: Source
    is_video: bool = False


def suffixes_for(num_frames: int) -> frozenset[str]:
    """Clips need videos; single frames may come from either."""
    return VIDEO_SUFFIXES if num_frames > 1 else IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _describe(source: Source) -> str:
    return f"{len(source)} bytes" if isinstance(source, bytes) else str(source)


def _open(source: Source) -> str | BytesIO:
    if isinstance(source, Exception):
        raise source
    if source is None:
        raise ValueError("it holds neither bytes nor a path")
    if isinstance(source, bytes):
        return BytesIO(source)
    if "://" in str(source) and not os.path.exists(source):
        with fsspec.open(source, "rb") as file:
            return BytesIO(file.read())
    return os.path.abspath(source)  # of "a:b.mp4", PyAV would take "a" for a protocol


@contextmanager
def _errors_name(name: str, kind: str):
    try:
        yield
    except UnidentifiedImageError as error:  # its message holds an address in memory
        raise ValueError(f"{name}: cannot be read as a {kind} (unknown format); remove or replace it.") from error
    except Exception as error:  # on broken files, Pillow and PyAV raise a dozen types
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{name}: cannot be read as a {kind} ({reason}); remove or replace it.") from error


def load_image(source: Source, name: str | None = None) -> np.ndarray:
    """(H, W, 3) uint8 in sRGB, upright, of any size; of an animation, the first frame.

    Transparent pictures are put on white, greys of 16 and 32 bits are scaled to 8 bits, colour profiles converted.
    Damaged metadata are passed over.

    Raises:
        ValueError: "name: reason", if it is no picture; `name` is the path by default.
    """
    with _errors_name(name or _describe(source), "picture"):
        return read_picture(_open(source))


def resize(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of (H, W, 3) at `size` (width, height): bicubic, antialiased."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic, antialiased), then the central square: (size, size, 3) uint8."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return resize(image, (size, size), box)


def evenly_spaced(count: int, limit: int | None) -> list[int]:
    """At most `limit` indices below `count`, the first and the last among them; `None`: all.

    Raises:
        ValueError: If `limit` is negative.
    """
    if limit is not None and limit < 0:
        raise ValueError(f"The number of items must not be negative, but is {limit}.")
    return np.linspace(0, count - 1, count if limit is None else min(limit, count)).round().astype(int).tolist()
