"""Pictures and videos to look at: original, reconstruction, and where it is wrong."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from einops import rearrange
from PIL import Image

from .pixels import fold_frames


ERROR_GAIN = 4


def error_map(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference over the channels, times 4 and clipped: (B, 3, H, W) uint8, black is right."""
    error = (images.float() - references.float()).abs().mean(dim=1, keepdim=True) * ERROR_GAIN
    return error.clamp(0.0, 255.0).round().to(torch.uint8).expand_as(images)


def with_error_maps(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """(B, 3, [T,] H, W) uint8, twice -> (B * T, H, 3 W, 3): original, reconstruction, error map."""
    pair = fold_frames(images), fold_frames(reconstructions)
    return rearrange([*pair, error_map(pair[1], pair[0])], "three b c h w -> b h (three w) c")


def save_error_maps(path: str | Path, images: list[torch.Tensor], reconstructions: list[torch.Tensor]) -> None:
    """Pictures (1, 3, H, W) of any sizes, one a row: original, reconstruction, error map."""
    rows = [with_error_maps(*pair)[0].numpy() for pair in zip(images, reconstructions)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, 0), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(rows)).save(path)


class VideoWriter:
    """Writes (T, H, W, 3) uint8 frames to an mp4 file; h264 wants even sides, so odd ones get a row or column more."""

    def __init__(self, path: str | Path, rate: Fraction):
        self.container = av.open(str(path), "w")
        self.stream = self.container.add_stream("libx264", rate=rate, options={"crf": "14"})
        self.stream.pix_fmt = "yuv420p"

    def write(self, frames: torch.Tensor) -> None:
        odd = [(0, 0), *((0, side % 2) for side in frames.shape[1:3]), (0, 0)]
        pictures = np.pad(frames.numpy(), odd, mode="edge")
        if not self.stream.codec_context.is_open:
            self.stream.height, self.stream.width = pictures.shape[1:3]
        for picture in pictures:
            self.container.mux(self.stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))

    def close(self) -> None:
        self.container.mux(self.stream.encode())
        self.container.close()
