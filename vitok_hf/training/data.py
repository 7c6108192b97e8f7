"""Training batches cut from folders of pictures and videos.

A batch is a pure function of (seed, index), so that a run resumes exactly wherever it stopped, with any number of
workers. One worker cuts a whole batch: all its crops have one size, drawn from a list, and share a pixel budget.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})


def load_image(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8; transparent pictures are put on white."""
    try:
        with Image.open(path) as image:
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.asarray(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f'"{path}" cannot be read as a picture ({error}): remove or replace it.') from error


def resize(image: np.ndarray, size: tuple[int, int], box: tuple[float, float, float, float]) -> np.ndarray:
    """The part `box` (left, top, right, bottom) of (H, W, 3) at `size` (width, height): bicubic, antialiased."""
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def load_clip(path: str | Path, start: float, num_frames: int, fps: float | None = None) -> np.ndarray:
    """`num_frames` frames (T, H, W, 3) uint8 from second `start` on, at `fps` (`None`: every frame of the video)."""
    frames, due = [], start
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        origin = (stream.start_time or 0) * stream.time_base
        container.seek(int((start + float(origin)) / stream.time_base), stream=stream)
        for frame in container.decode(stream):
            # half a frame of tolerance: time stamps are rounded
            if frame.pts * stream.time_base - origin < due - 0.5 / stream.average_rate:
                continue
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == num_frames:
                return np.stack(frames)
            due = start + len(frames) / fps if fps else 0.0
    raise ValueError(
        f'"{path}" has {len(frames)} frames from {start:.2f} s on at fps={fps}, but {num_frames} are needed.'
    )


def video_seconds(path: str | Path) -> float:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        if stream.duration is not None:
            return float(stream.duration * stream.time_base)
        if container.duration is not None:
            return container.duration / av.time_base
    raise ValueError(f'"{path}" does not tell its duration: re-mux it, for example to mp4.')


def list_files(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES | VIDEO_SUFFIXES) -> list[Path]:
    """The pictures and videos in a folder and its subfolders, sorted, or the one file that `path` names."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in files if file.suffix.lower() in suffixes]
    if not files:
        raise ValueError(f'"{path}" holds no file that ends in {", ".join(sorted(suffixes))}.')
    return files


def parse_source(source: str) -> tuple[str, float | None]:
    """ "folder:0.5" -> ("folder", 0.5); without a weight, the number of files is the weight."""
    path, _, weight = source.rpartition(":")
    try:
        return (path, float(weight)) if path else (source, None)
    except ValueError:
        return source, None  # the colon belongs to the path


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
    """What `CropBatches` cuts; see the arguments of the same names in `TrainingArguments`."""

    sizes: list[tuple[int, int, float]]
    pixels_per_batch: int
    num_frames: int = 1
    fps: float | None = None
    flip: bool = True
    seed: int = 0


class CropBatches(Dataset):
    """Map-style dataset whose item `i` is a batch: uint8 (B, 3, H, W), or (B, 3, T, H, W) for clips of T > 1 frames.

    A crop shows a random share of its picture, log-uniform between the crop's own resolution and the whole picture, so
    that detail and composition are both seen; pictures smaller than the crop are enlarged. Of nearly flat crops only
    one in eight is kept. `cache_bytes` bounds the memory of decoded pictures, a worker.
    """

    def __init__(self, sources: list[str], settings: CropSettings, cache_bytes: int = 2**30):
        self.settings = settings
        suffixes = VIDEO_SUFFIXES if settings.num_frames > 1 else IMAGE_SUFFIXES | VIDEO_SUFFIXES
        parsed = [parse_source(source) for source in sources]
        self.files = [list_files(path, suffixes) for path, _ in parsed]
        weights = np.array(
            [len(files) if weight is None else weight for files, (_, weight) in zip(self.files, parsed)]
        )
        shares = np.array([share for _, _, share in settings.sizes])
        if weights.min() < 0 or weights.sum() <= 0 or shares.min() < 0 or shares.sum() <= 0:
            raise ValueError(f"Weights must not be negative nor all 0: sources {sources}, sizes {settings.sizes}.")
        self.source_probabilities = weights / weights.sum()
        self.size_probabilities = shares / shares.sum()
        self.cache_bytes = cache_bytes
        self.cache: OrderedDict[Path, np.ndarray] = OrderedDict()
        self.cached_bytes = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        rng = np.random.default_rng((self.settings.seed, index))
        height, width, _ = self.settings.sizes[rng.choice(len(self.settings.sizes), p=self.size_probabilities)]
        batch_size = max(1, self.settings.pixels_per_batch // (height * width * self.settings.num_frames))
        batch = np.stack([self._crop(rng, height, width) for _ in range(batch_size)])  # (B, T, H, W, 3)
        batch = torch.from_numpy(batch).permute(0, 4, 1, 2, 3).contiguous()  # (B, 3, T, H, W)
        return batch.squeeze(2) if self.settings.num_frames == 1 else batch

    def _crop(self, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
        while True:
            files = self.files[rng.choice(len(self.files), p=self.source_probabilities)]
            clip = self._load(files[rng.integers(len(files))], rng)  # (T, h, w, 3)
            largest = min(clip.shape[1] / height, clip.shape[2] / width)
            scale = min(largest, np.exp(rng.uniform(0.0, np.log(max(largest, 1.0)))))
            box_height, box_width = scale * height, scale * width
            top, left = rng.uniform(0, clip.shape[1] - box_height), rng.uniform(0, clip.shape[2] - box_width)
            box = (left, top, left + box_width, top + box_height)
            crop = np.stack([resize(frame, (width, height), box) for frame in clip])  # (T, H, W, 3)
            if crop.std(axis=(0, 1, 2)).max() > 4.0 or rng.random() < 0.125:
                return crop[:, :, ::-1] if self.settings.flip and rng.random() < 0.5 else crop

    def _load(self, path: Path, rng: np.random.Generator) -> np.ndarray:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            length = self.settings.num_frames / self.settings.fps if self.settings.fps else 0.0
            start = rng.uniform(0.0, max(0.0, video_seconds(path) - length - 0.5))
            return load_clip(path, start, self.settings.num_frames, self.settings.fps)
        if path in self.cache:
            self.cache.move_to_end(path)
            return self.cache[path]
        picture = load_image(path)[None]  # (1, h, w, 3)
        self.cache[path] = picture
        self.cached_bytes += picture.nbytes
        while self.cached_bytes > self.cache_bytes and len(self.cache) > 1:
            self.cached_bytes -= self.cache.popitem(last=False)[1].nbytes
        return picture


def make_dataloader(dataset: Dataset, indices: range, num_workers: int) -> DataLoader:
    """Yields the batches `indices` in this order; every process passes its own."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        generator=torch.Generator(),  # else it draws a number from the generator of the training run
    )


def resize_and_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Shorter side to `size` (bicubic, antialiased), then the central square: (size, size, 3) uint8."""
    height, width = image.shape[:2]
    side = min(height, width)
    left, top = (width - side) / 2, (height - side) / 2
    box = (left, top, left + side, top + side)
    return resize(image, (size, size), box)


def load_evaluation_images(
    path: str | Path, size: int, limit: int, num_frames: int = 1, fps: float | None = None
) -> torch.Tensor:
    """At most `limit` pictures of a folder, evenly spaced in its sorted list: (N, 3, size, size) uint8.

    With `num_frames` > 1, the first clip of as many videos: (N, 3, num_frames, size, size).
    """
    files = list_files(path, IMAGE_SUFFIXES if num_frames == 1 else VIDEO_SUFFIXES)
    files = [files[index] for index in np.linspace(0, len(files) - 1, min(limit, len(files))).round().astype(int)]
    clips = [load_image(file)[None] if num_frames == 1 else load_clip(file, 0.0, num_frames, fps) for file in files]
    clips = np.stack([np.stack([resize_and_crop(frame, size) for frame in clip]) for clip in clips])
    clips = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).contiguous()  # (N, 3, T, size, size)
    return clips.squeeze(2) if num_frames == 1 else clips
