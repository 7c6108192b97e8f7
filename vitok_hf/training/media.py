"""Finding pictures and videos, and reading pictures from files, from bytes and from addresses."""

from collections.abc import Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})

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
    if isinstance(source, str) and "://" in source:
        with fsspec.open(source, "rb") as file:
            return BytesIO(file.read())
    return BytesIO(source) if isinstance(source, bytes) else str(source)


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
    """(H, W, 3) uint8, upright; transparent pictures are put on white, 16-bit greys are scaled to 8 bits.

    Raises:
        ValueError: "name: reason", if it is no picture; `name` is the path by default.
    """
    with _errors_name(name or _describe(source), "picture"), Image.open(_open(source)) as image:
        ImageOps.exif_transpose(image, in_place=True)  # cameras store pictures as the sensor lies
        if image.mode.startswith("I;16"):  # which `convert` would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(image.convert("RGB"))


def resize(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of (H, W, 3) at `size` (width, height): bicubic, antialiased."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def list_files(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES | VIDEO_SUFFIXES) -> list[Path]:
    """The pictures and videos in a folder and its subfolders, sorted, or the one file that `path` names."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f'"{path}" does not exist: name a folder or a file.')
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in files if file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f'"{path}" holds no file that ends in {", ".join(sorted(suffixes))}.')
    return files


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The last folder of each path, with as many before it ("train-emoji") as tell all of them apart."""
    parts = [Path(path).absolute().parts[1:] for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return ["-".join(part[-depth:]) for part in parts]


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
