"""Reading pictures and clips from files, from bytes and from addresses."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import av
import fsspec
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from .files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, list_files
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


def _upright(frame: av.VideoFrame) -> np.ndarray:
    """(H, W, 3) uint8, turned and mirrored as players show it: telephones store videos as the sensor lies."""
    pixels, matrix = frame.to_ndarray(format="rgb24"), frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))
    if a * d == b * c:  # nothing that can be shown
        return pixels
    return np.rot90(pixels[::-1] if a * d < b * c else pixels, round(frame.rotation / 90))


def load_clip(
    source: Source, start: float, num_frames: int, fps: float | None = None, name: str | None = None
) -> np.ndarray:
    """`num_frames` frames (T, H, W, 3) uint8, upright, from second `start` on, at `fps` (`None`: every frame).

    An `fps` above the video's rate repeats frames.
    Decodes from the key frame before `start` on, not from the beginning.

    Raises:
        ValueError: "name: reason", if it is no video or ends too early.
    """
    name = name or _describe(source)
    frames, due = [], start
    with _errors_name(name, "video"), av.open(_open(source)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        origin = (stream.start_time or 0) * stream.time_base
        container.seek(int((start + float(origin)) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            # half a frame of tolerance: time stamps are rounded
            shown = frame.pts * stream.time_base - origin + 0.5 / stream.average_rate
            while shown >= due:  # more than once, if `fps` is above the video's rate
                frames.append(_upright(frame))
                if len(frames) == num_frames:
                    return np.stack(frames)
                if not fps:
                    due = 0.0
                    break
                due = start + len(frames) / fps
    raise ValueError(f"{name}: has {len(frames)} frames from {start:.2f} s on at fps={fps}, but needs {num_frames}.")


def iterate_frames(source: Source, name: str | None = None) -> Iterator[np.ndarray]:
    """Every frame of a video, (H, W, 3) uint8, upright, decoded as it is asked for.

    Raises:
        ValueError: "name: reason", if it is no video or breaks off.
    """
    with _errors_name(name or _describe(source), "video"), av.open(_open(source)) as container:
        for frame in container.decode(video=0):
            yield np.ascontiguousarray(_upright(frame))


def probe_rate(source: Source, name: str | None = None) -> float:
    """Frames a second, as the container tells them, without decoding.

    Raises:
        ValueError: "name: reason", if it is no video.
    """
    with _errors_name(name or _describe(source), "video"), av.open(_open(source)) as container:
        return float(container.streams.video[0].average_rate)


def probe_video(source: Source, name: str | None = None) -> tuple[float, float]:
    """Length in seconds and frames a second, as the container tells them, without decoding.

    Raises:
        ValueError: "name: reason", if it is no video or does not tell its length.
    """
    with _errors_name(name or _describe(source), "video"), av.open(_open(source)) as container:
        stream = container.streams.video[0]
        if stream.duration is not None:
            return float(stream.duration * stream.time_base), float(stream.average_rate)
        if container.duration is not None:
            return container.duration / av.time_base, float(stream.average_rate)
        raise ValueError("it does not tell its duration: re-mux it, for example to mp4")


def load_item(item: Item, num_frames: int, fps: float | None, rng: np.random.Generator) -> np.ndarray:
    """(T, H, W, 3) uint8: the picture with T = 1, or a clip of T = `num_frames` from a random second of the video.

    Raises:
        ValueError: "name: reason", if it cannot be read.
    """
    if not item.is_video:
        return load_image(item.source, item.name)[None]
    seconds, rate = probe_video(item.source, item.name)
    length = num_frames / fps if fps else (num_frames - 1) / rate
    start = rng.uniform(0.0, max(0.0, seconds - length - 0.5))
    return load_clip(item.source, start, num_frames, fps, item.name)


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


def load_evaluation_images(
    path: str | Path, size: int, limit: int, num_frames: int = 1, fps: float | None = None
) -> torch.Tensor:
    """At most `limit` pictures of a folder, evenly spaced in its sorted list: (N, 3, size, size) uint8.

    With `num_frames` > 1, the first clip of as many videos: (N, 3, num_frames, size, size). Held-out data are fixed:
    a file that cannot be read raises a ValueError that names it.
    """
    files = list_files(path, IMAGE_SUFFIXES if num_frames == 1 else VIDEO_SUFFIXES)
    files = [files[index] for index in evenly_spaced(len(files), limit)]
    clips = [load_image(file)[None] if num_frames == 1 else load_clip(file, 0.0, num_frames, fps) for file in files]
    clips = np.stack([np.stack([resize_and_crop(frame, size) for frame in clip]) for clip in clips])
    clips = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()  # (N, 3, T, size, size)
    return clips.squeeze(2) if num_frames == 1 else clips
