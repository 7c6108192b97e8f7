"""Held-out pictures and clips, decoded one at a time."""

from collections.abc import Callable, Iterator, Sequence

import torch

from .media import Item, evenly_spaced, load_image, resize_and_crop
from .protocol import Protocol
from .video import load_clip, probe_rate


Codec = Callable[[torch.Tensor], torch.Tensor]  # uint8 (B, 3, T, H, W) to its reconstruction


class EvaluationData:
    """Pictures and clips (3, T, H, W) uint8, T = 1 for pictures, as the protocol crops them.

    Args:
        items: Where they are: `FolderFiles` or `HubRows` of `vitok_hf.data.sources`, or a list of `Item`s.
        protocol: Resolution, frames and frame rate. Of each video, the first clip is taken; where the protocol has
            one frame, the first frame.
        limit: At most so many, evenly spaced.

    Raises:
        ValueError: If there are none; on access, "name: reason", if one cannot be read.
    """

    def __init__(self, items: Sequence[Item], protocol: Protocol, limit: int | None = None):
        if len(items) == 0:
            raise ValueError("There are no pictures to measure on: name others.")
        self.items, self.protocol = items, protocol
        self.indices = evenly_spaced(len(items), limit)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> torch.Tensor:
        item, protocol = self.items[self.indices[index]], self.protocol
        if item.is_video:
            frames = load_clip(item.source, 0.0, protocol.num_frames, protocol.fps, item.name)
        else:
            frames = load_image(item.source, item.name)[None]
        if protocol.resolution is not None:
            frames = [resize_and_crop(frame, protocol.resolution) for frame in frames]
        return torch.stack([torch.tensor(frame) for frame in frames]).permute(3, 0, 1, 2)  # (3, T, H, W)

    def frame_rate(self, index: int) -> float:
        """Frames a second of a clip."""
        item = self.items[self.indices[index]]
        return self.protocol.fps or probe_rate(item.source, item.name)

    def batches(self, indices: Sequence[int], batch_size: int) -> Iterator[torch.Tensor]:
        """(B, 3, T, H, W), in the order of `indices`; neighbours of different sizes go apart."""
        batch: list[torch.Tensor] = []
        for index in indices:
            item = self[index]
            if batch and (len(batch) == batch_size or item.shape != batch[0].shape):
                yield torch.stack(batch)
                batch = []
            batch.append(item)
        if batch:
            yield torch.stack(batch)
