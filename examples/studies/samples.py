"""Generated samples beside real pictures, by class: sets that are read in shares, files, and the nearest pictures."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch import nn
from torch.nn import functional as F

from vitok_hf.clips import fold_frames, to_colours, to_picture, to_shown
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.held_out import EvaluationData, Protocol
from vitok_hf.data.media import resize
from vitok_hf.data.samples_file import SamplesFile
from vitok_hf.disk import atomic_file, inside, locked
from vitok_hf.evaluation.generation import generate_samples
from vitok_hf.evaluation.processes import gather_rows, share_of


@dataclass
class Labelled:
    """Pictures, and their class ids (N,)."""

    data: EvaluationData
    labels: np.ndarray
    change: Callable[[torch.Tensor], torch.Tensor] = nn.Identity()  # what is done to each batch

    @classmethod
    def open(
        cls, folders: list[str | Path], classes: list[str], limit: int | None, side: int, channels: int = 3
    ) -> "Labelled":
        protocol = Protocol(side, channels=channels)
        files = LabelledFiles(folders, classes, protocol.clip, limit)
        return cls(EvaluationData(files, protocol), files.labels)

    @classmethod
    def open_file(cls, path: str | Path, num_classes: int | None = None, side: int | None = None) -> "Labelled":
        """A .npz file as of `vitok generate --save_npz`, with ids of so many classes, and pictures of this size.

        Without `num_classes` it needs no ids, and all are of one class. Raises `ValueError` for other sizes and ids.
        """
        file = SamplesFile(path)
        height, width = file.pixels.shape[1:3]
        side = height if side is None else side
        if (height, width) != (side, side):
            raise ValueError(f'"{path}" has pictures of {height} x {width} pixels, but they must be {side} x {side}.')
        labels = np.zeros(len(file), dtype=np.int64) if num_classes is None else file.labels
        if labels is None or not 0 <= labels.min() <= labels.max() < (num_classes or 1):
            found = "none" if labels is None else f"{labels.min()} to {labels.max()}"
            raise ValueError(f'"{path}" must have class ids from 0 to {(num_classes or 1) - 1}, but has {found}.')
        return cls(EvaluationData(file, Protocol(side)), labels)

    def __len__(self) -> int:
        return len(self.data)

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """(B, C, 1, H, W) uint8 on the process's device: this process's share."""
        for images in self.data.batches(share_of(len(self)), batch_size):
            yield self.change(images.to(PartialState().device))

    def choose(self, counts: np.ndarray, seed: int) -> "Labelled":
        """`counts[label]` random pictures of each class."""
        rng = np.random.default_rng(seed)
        members = [np.flatnonzero(self.labels == label) for label in range(len(counts))]
        chosen = np.concatenate([rng.choice(group, count, replace=False) for group, count in zip(members, counts)])
        items = [self.data.items[index] for index in chosen]
        return Labelled(EvaluationData(items, self.data.protocol), self.labels[chosen])


def save_samples(
    pipe: DiffusionPipeline, class_ids: list[int], folder: Path, batch_size: int = 32, seed: int = 0, **options: Any
) -> None:
    """Writes the samples of `generate_samples` to files, `folder`/class/number.png, as far as they are not there yet.

    Every process of a run makes its share; all must call it. Raises `ValueError` if another run writes to the folder,
    or a class has a name that leads out of it.
    """
    folders = {label: inside(folder, pipe.config.id2label[label]) for label in set(class_ids)}
    files = [folders[label] / f"{index:06}.png" for index, label in enumerate(class_ids)]
    with locked(folder):
        share = share_of(len(files))
        for start in range(share.start, share.stop, batch_size):
            batch = range(start, min(start + batch_size, share.stop))
            if all(files[index].exists() for index in batch):
                continue
            images = generate_samples(pipe, [class_ids[index] for index in batch], batch_size, seed + start, **options)
            for index, image in zip(batch, images):
                files[index].parent.mkdir(parents=True, exist_ok=True)
                with atomic_file(files[index]) as temporary:
                    to_picture(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        PartialState().wait_for_everyone()


def resize_all(images: torch.Tensor, side: int) -> torch.Tensor:
    """Colours of (N, C, 1, H, W) uint8, (N, 3, side, side): bicubic, antialiased, as pictures are read from files."""
    box, colours = (0, 0, images.shape[4], images.shape[3]), fold_frames(to_colours(images))
    resized = [resize(image.permute(1, 2, 0).cpu().numpy(), (side, side), box) for image in colours]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def thumbnails(images: torch.Tensor, side: int = 32) -> torch.Tensor:
    """(N, C, 1, H, W) uint8 -> (N, C, side, side) float32, means over squares."""
    return F.adaptive_avg_pool2d(fold_frames(images).float(), side)


class NearestNeighbours:
    """The closest reference, or mirror image of one, of each picture. References are seen once and not kept.

    Every process of a run sees a share of the references, and all see the same pictures.

    Args:
        images: (N, C, H, W) float32, what `thumbnails` gives: details count little.
    """

    def __init__(self, images: torch.Tensor):
        self.images = images.flatten(1).double()
        self.distances = torch.full((len(images),), float("inf"), device=images.device).double()
        self.indices = torch.full((len(images),), -1, device=images.device)

    def update(self, references: torch.Tensor, indices: Sequence[int]) -> None:
        """Adds references (B, C, H, W) float32, and the numbers they go by."""
        for pictures in (references, references.flip(-1)):
            # in float32, the products that it sums up would leave nothing of small distances
            distances, nearest = torch.cdist(self.images, pictures.flatten(1).to(self.images)).min(dim=1)
            numbers = torch.tensor(indices, device=nearest.device)[nearest]
            self.indices = torch.where(distances < self.distances, numbers, self.indices)
            self.distances = torch.minimum(distances, self.distances)

    def compute(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Root mean square differences in grey levels (0 to 255), (N,) float64, and numbers of references, (N,)."""
        distances, process = gather_rows(self.distances[None]).min(dim=0)
        indices = gather_rows(self.indices[None]).gather(0, process[None])[0]
        return distances / self.images.shape[1] ** 0.5, indices


def save_neighbours(
    file: Path, pictures: Labelled, known: Labelled, distances: np.ndarray, indices: list[int], rows: int = 20
) -> None:
    """A row for each of the first classes: the 6 pictures closest to a training picture, each beside that one."""
    classes, count, side = np.unique(pictures.labels)[:rows], 6, pictures.data.protocol.resolution
    grid = np.zeros((len(classes), side, count, 2, side, 3), np.uint8)
    for row, label in zip(grid, classes):
        members = np.flatnonzero(pictures.labels == label)
        for column, index in enumerate(members[np.argsort(distances[members])[:count]]):
            for place, picture in enumerate((pictures.data[index], known.data[indices[index]])):
                row[:, column, place] = to_shown(picture[None])[0, :, 0].permute(1, 2, 0).numpy()
    Image.fromarray(grid.reshape(len(classes) * side, -1, 3)).save(file)
