"""Held-out pictures and clips, for evaluation while and after training, and how they are measured."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from .files import VIDEO_SUFFIXES, list_files
from .items import Clip, Indexed, Item
from .media import evenly_spaced, resize_and_crop, resize_then_crop
from .video import probe_rate


Codec = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, C, T, H, W) to its reconstruction
CROPS = {  # what is kept of a picture, by which function, and the filter
    "central square": (resize_and_crop, "bicubic, antialiased (Pillow, reducing_gap 3)"),
    "central square of the resized picture": (resize_then_crop, "bicubic, antialiased (Pillow)"),
}
CHANNELS = {
    1: "grey, the luma of Pillow's L; networks see it repeated",
    3: "RGB",
    4: "RGBA, colours premultiplied; networks see them on grey",
}


@dataclass(frozen=True)
class Protocol:
    """Everything that a value depends on besides the model and the data.

    The fields after `fps` say in words what the code of this package does, so that results of a version that does
    otherwise are told apart.

    Args:
        resolution: Side in pixels of the square that a picture is brought to; `None`: every picture as it is.
        num_frames: Frames of a clip, the first of each video; 1: pictures.
        fps: Frames a second of clips; `None`: all frames of the video.
        channels: Those of the pictures, see `vitok_hf.data.media.load_image`.
        crop: Which part of the picture is kept, one of `CROPS`. "central square of the resized picture" is what the
            evaluation script of ViTok-v2 does with datasets of the Hub.
        resize_filter: Filter that brings it to `resolution`; by default that of the crop.
        value_range: In which, and in what precision, pixels are compared; by default that of the channels.
        rounding: What happens to a model's output before anything is measured.
        averaging: PSNR, SSIM, MS-SSIM and LPIPS are means of values of single pictures, for clips of the means over
            their frames. No PSNR is above 58.92 dB, see `vitok_hf.evaluation.metrics.psnr`.
        statistics: How features become values.
        networks: "inception", "dino", "i3d", "lpips" -> {"name": architecture and preprocessing, "sha256": of the
            weights}, those that were used.
    """

    resolution: int | None = 256
    num_frames: int = 1
    fps: float | None = None
    channels: int = 3
    crop: str = "central square"
    resize_filter: str = ""
    value_range: str = ""
    rounding: str = "clipped and rounded to uint8"
    averaging: str = "mean over frames, then over items; PSNR at most 58.92 dB"
    statistics: str = "float64; unbiased covariances; IS of 10 splits, shuffled; precision and recall of 3 neighbours"
    networks: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("resolution", "num_frames", "fps", "channels"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` is {value}, but must be positive.")
        if self.resolution is None:
            object.__setattr__(self, "crop", "none")
            object.__setattr__(self, "resize_filter", "none")
        if not self.resize_filter and self.crop in CROPS:
            object.__setattr__(self, "resize_filter", CROPS[self.crop][1])
        if not self.value_range:
            kind = CHANNELS.get(self.channels, f"{self.channels} channels")
            object.__setattr__(self, "value_range", f"0 to 255, {kind}, float64")

    @classmethod
    def from_dict(cls, values: dict) -> "Protocol":
        """Inverse of `dataclasses.asdict`; raises `ValueError` for a protocol with other fields.

        Those of earlier versions, without `channels`, are of RGB.
        """
        values = {"channels": 3} | values
        if other := sorted(set(values) ^ {f.name for f in fields(cls)}):
            raise ValueError(
                f"The stored protocol and this version's differ in the fields {', '.join(other)}: measure again."
            )
        return cls(**values)

    @property
    def clip(self) -> Clip:
        """What is read of pictures and videos."""
        return Clip(self.num_frames, self.fps, channels=self.channels)

    @classmethod
    def vitok_v2(cls, resolution: int | None = None, channels: int = 3) -> "Protocol":
        """Pictures as the evaluation script of ViTok-v2 takes them from the Hub, 256 pixels a side by default.

        Its published table is of 5,000 pictures, COCO val2017, at 256 and 512 pixels. Of folders, it takes whole
        pictures or unscaled centres; which of these the table is of, is not said, but its PSNR, higher by 1.8 dB at
        512 pixels, speaks for scaled pictures.
        """
        return cls(resolution or 256, channels=channels, crop="central square of the resized picture")

    def differences(self, other: "Protocol") -> list[str]:
        """Names of the fields that differ. A network counts that both used: without it, its metrics are missing."""
        names = [f.name for f in fields(self) if f.name != "networks"]
        differing = [name for name in names if getattr(self, name) != getattr(other, name)]
        shared = sorted(set(self.networks) & set(other.networks))
        return differing + [f"networks.{name}" for name in shared if self.networks[name] != other.networks[name]]


class EvaluationData:
    """Pictures and clips, (C, T, H, W) uint8, decoded one at a time, as the protocol crops them.

    Held-out data are fixed: one that cannot be read is not skipped.

    Args:
        items: Where they are: `FolderFiles` or `HubRows` of `vitok_hf.data.sources`, or a list of `Item`s.
        protocol: Resolution, frames, frame rate and channels. Of each video, the first clip is taken; where the
            protocol has one frame, the first frame.
        limit: At most so many, evenly spaced.
        random_clips: Take of each video a clip at a random second, always the same one.

    Raises:
        ValueError: If there are none; on access, "name: reason", if one cannot be read.
    """

    def __init__(self, items: Indexed[Item], protocol: Protocol, limit: int | None = None, random_clips: bool = False):
        if len(items) == 0:
            raise ValueError("There are no pictures to measure on: name others.")
        if protocol.crop not in (*CROPS, "none"):
            raise ValueError(f'There is no `crop` "{protocol.crop}": choose from {", ".join(CROPS)}.')
        self.items, self.protocol, self.random_clips = items, protocol, random_clips
        self.indices = evenly_spaced(len(items), limit)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        number, protocol = self.indices[index], self.protocol
        rng = np.random.default_rng(number) if self.random_clips else None
        frames = protocol.clip.load(self.items[number], rng)  # (T, H, W, C)
        if protocol.resolution is not None:
            crop, _ = CROPS[protocol.crop]
            frames = np.stack([crop(frame, protocol.resolution) for frame in frames])
        return torch.tensor(frames).permute(3, 0, 1, 2)

    def frame_rate(self, index: int) -> float:
        """Frames a second of a clip."""
        item = self.items[self.indices[index]]
        return self.protocol.fps or probe_rate(item.source, item.name)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
        """(B, C, T, H, W), in the order of `indices`; neighbours of different sizes go apart."""
        batch: list[torch.Tensor] = []
        for index in indices:
            item = self[index]
            if batch and (len(batch) == batch_size or item.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(item)
        if batch:
            yield torch.stack(batch)


def load_evaluation_images(
    path: str | Path, size: int, limit: int, num_frames: int = 1, fps: float | None = None, channels: int = 3
) -> torch.Tensor:
    """At most `limit` pictures of a folder, evenly spaced in its sorted list: (N, channels, 1, size, size) uint8.

    With `num_frames` > 1, the first clip of as many videos: (N, channels, num_frames, size, size).

    Raises:
        ValueError: If there is none, or one that cannot be read, which it names.
    """
    protocol, is_video = Protocol(size, num_frames, fps, channels), num_frames > 1
    files = list_files(path, protocol.clip.suffixes - (frozenset() if is_video else VIDEO_SUFFIXES))
    data = EvaluationData([Item(str(file), file, is_video) for file in files], protocol, limit)
    return torch.stack([data[index] for index in range(len(data))])
