"""Pictures and videos to look at: original, reconstruction, and where it is wrong."""

import math
from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from ..clips import to_shown
from ..data.held_out import Codec, EvaluationData
from ..data.media import evenly_spaced, resize
from ..disk import replace_durably, temporary_name
from .reconstruction import save_picture, side_by_side
from .results import Result
from .sound import copy_sound


ERROR_GAIN = 4
CLOCK = Fraction(1, 90000)  # seconds; a multiple of the usual rates, 30000/1001 among them
MAX_THUMBNAILS = 64
THUMBNAIL_SIZE = 256  # pixels, the longer side at most


def error_map(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over the channels, times 4 and clipped: (B, 3, T, H, W) uint8, black is right."""
    error = (images.float() - references.float()).abs().mean(dim=1, keepdim=True) * ERROR_GAIN
    return to_shown(error.clamp(0.0, 255.0).round().to(torch.uint8))


def save_examples(folder: str | Path, data: EvaluationData, codec: Codec, psnr: torch.Tensor, count: int = 8) -> None:
    """Saves `count` evenly spaced pictures and the worst ten by PSNR: original, reconstruction, error map.

    Pictures go to "examples.png" and "worst.png", the worst on top; clips to "examples_00.mp4", "worst_00.mp4", ...

    Args:
        folder: Is made if needed.
        data, codec: As `ReconstructionEvaluator` takes them.
        psnr: PSNR of each picture or clip, (N,).
        count: Examples besides the worst.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups = {"examples": evenly_spaced(len(data), count), "worst": psnr.argsort()[:10].tolist()}
    for group, indices in groups.items():
        rows = []  # (T, H, 3 W, 3) each
        for index in indices:
            image = data[index][None]
            reconstruction = codec(image)
            rows.append(side_by_side(image, reconstruction, error_map(reconstruction, image)))
        if data.protocol.num_frames > 1:
            for rank, (index, frames) in enumerate(zip(indices, rows)):
                rate = Fraction(data.frame_rate(index)).limit_denominator(1001)
                with VideoWriter(folder / f"{group}_{rank:02}.mp4", rate) as writer:
                    writer.write(frames)
        elif rows:
            width = max(row.shape[2] for row in rows)
            rows = [F.pad(row[0], (0, 0, 0, width - row.shape[2]), value=255) for row in rows]  # white, on the right
            Image.fromarray(torch.cat(rows).numpy()).save(folder / f"{group}.png")


class VideoWriter:
    """Writes (T, H, W, 3) uint8 frames to an mp4 file, which is there when the `with` block ends without an error.

    Frames are shown at `rate` a second, or from the seconds on that `write` is told. The sound is that of the file
    `sound_of`, if it has any. Odd sides are kept, without subsampled colours, which h264 has of even ones alone.
    """

    def __init__(self, path: str | Path, rate: Fraction, sound_of: Path | None = None):
        self.path, self.temporary = Path(path), temporary_name(Path(path))
        self.rate, self.stamp, self.count = rate, -1, 0
        self.container = av.open(f"file:{self.temporary}", "w", format="mp4")  # else "a:b.mp4" names a protocol
        self.stream = self.container.add_stream("libx264", rate=rate, options={"crf": "14"})
        self.stream.codec_context.time_base = CLOCK
        self.sound = copy_sound(sound_of, self.container)
        self.next_sound = next(self.sound, math.inf)  # seconds

    def write(self, frames: torch.Tensor, seconds: Sequence[float | Fraction] | None = None) -> None:
        pictures = frames.numpy()
        if not self.stream.codec_context.is_open:
            context = self.stream.codec_context
            self.stream.height, self.stream.width = pictures.shape[1:3]
            self.stream.pix_fmt = "yuv444p" if self.stream.height % 2 or self.stream.width % 2 else "yuv420p"
            # BT.601, limited range, as converted here: without the tags, players guess by the size
            context.colorspace = 6
            context.color_range = 1
        if seconds is None:
            seconds = [(self.count + index) / self.rate for index in range(len(pictures))]
        self.count += len(pictures)
        for picture, second in zip(pictures, seconds, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            self.stamp = max(self.stamp + 1, round(second / CLOCK))  # never twice the same
            frame.pts, frame.time_base = self.stamp, CLOCK
            self._mux(self.stream.encode(frame))

    def _mux(self, packets: Sequence[av.Packet]) -> None:
        """With the sound up to there, so that neither waits for the other in memory."""
        for packet in packets:
            self.container.mux(packet)
            while self.next_sound <= packet.dts * packet.time_base:
                self.next_sound = next(self.sound, math.inf)

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, error_type: type | None, *_) -> None:
        try:
            if error_type is None:
                self._mux(self.stream.encode())
                deque(self.sound, maxlen=0)  # what is left of it
            self.sound.close()
            self.container.close()
            if error_type is None:
                replace_durably(self.temporary, self.path)
        finally:
            self.temporary.unlink(missing_ok=True)  # it is made with the first frame


class ContactSheet:
    """Evenly spaced frames of a video of any length, small, originals above reconstructions.

    Of no more than `MAX_THUMBNAILS`, every other one goes when there are so many, and the next ones are as far apart.
    """

    def __init__(self) -> None:
        self.count, self.step = 0, 1  # frames so far, and from one that is kept to the next
        self.pairs: list[np.ndarray] = []  # (2, h, w, 3) each

    def add(self, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
        """The next frames of the video, (1, C, T, H, W) uint8."""
        for pair in to_shown(torch.cat([images, reconstructions])).permute(2, 0, 3, 4, 1):  # (2, H, W, 3)
            if self.count % self.step == 0:
                height, width = pair.shape[1:3]
                scale = min(1.0, THUMBNAIL_SIZE / max(height, width))
                size = max(1, round(scale * width)), max(1, round(scale * height))
                self.pairs.append(np.stack([resize(x, size, (0, 0, width, height)) for x in pair.numpy()]))
            if len(self.pairs) == MAX_THUMBNAILS:
                self.pairs, self.step = self.pairs[::2], 2 * self.step
            self.count += 1

    def save(self, path: str | Path, columns: int = 8) -> None:
        """As PNG; of fewer frames than columns, all."""
        pairs = [self.pairs[index] for index in evenly_spaced(len(self.pairs), columns)]
        save_picture(path, rearrange(pairs, "t two h w c -> (two h) (t w) c"))


def plot_rates(path: Path, results: Sequence[Result]) -> None:
    """PSNR over the bytes of the code; a line for each model, whose name is that of the row up to its last comma."""
    from matplotlib.figure import Figure  # of an extra

    axes = (figure := Figure((6, 4), layout="constrained")).subplots()
    models = dict.fromkeys(result.name.rpartition(",")[0] for result in results)
    for model in models:
        rows = [result for result in results if result.name.rpartition(",")[0] == model and "bytes" in result.costs]
        points = sorted((result.costs["bytes"], result.metrics["psnr"]) for result in rows)
        axes.plot(*zip(*points), marker="o", label=model)
    axes.set(xscale="log", xlabel="bytes of the code", ylabel="PSNR (dB)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
