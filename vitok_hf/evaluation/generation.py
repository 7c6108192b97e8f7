"""Samples of a class-conditional pipeline beside real pictures: are they of their class, as varied, and new?"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn import functional as F

from ..data.media import resize
from ..disk import atomic_file, inside, locked
from .processes import gather_rows, share_of


def generate_samples(
    pipe: DiffusionPipeline, class_ids: list[int], batch_size: int = 32, seed: int = 0, **options
) -> torch.Tensor:
    """One sample for each id, (N, 3, H, W) uint8; sample `i` has a generator of its own, with the seed `seed + i`.

    Args:
        pipe: An image pipeline, called as `ViTokDiTPipeline`.
        class_ids: Classes, or names of classes.
        batch_size: Samples of one call. The samples do not depend on it.
        seed: Of the first sample.
        options: Further arguments of the call.
    """
    samples = []
    for start in range(0, len(class_ids), batch_size):
        ids = class_ids[start : start + batch_size]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(ids))]
        images = pipe(ids, generator=generators, output_type="pt", return_dict=False, **options)[0]  # in [0, 1]
        samples.append((images.float().cpu() * 255).round().to(torch.uint8))
    return torch.cat(samples)


def save_samples(
    pipe: DiffusionPipeline, class_ids: list[int], folder: Path, batch_size: int = 32, seed: int = 0, **options
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
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        PartialState().wait_for_everyone()


def resize_all(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, side, side), bicubic and antialiased, as pictures are read from files."""
    box = (0, 0, images.shape[3], images.shape[2])
    resized = [resize(image.permute(1, 2, 0).cpu().numpy(), (side, side), box) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


def thumbnails(images: torch.Tensor, side: int = 32) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, side, side) float32, means over squares."""
    return F.adaptive_avg_pool2d(images.float(), side)


class NearestNeighbours:
    """The closest reference, or mirror image of one, of each picture. References are seen once and not kept.

    Every process of a run sees a share of the references, and all see the same pictures.

    Args:
        images: (N, 3, H, W) float32, what `thumbnails` gives: details count little.
    """

    def __init__(self, images: torch.Tensor):
        self.images = images.flatten(1).double()
        self.distances = torch.full((len(images),), float("inf"), device=images.device).double()
        self.indices = torch.full((len(images),), -1, device=images.device)

    def update(self, references: torch.Tensor, indices: Sequence[int]) -> None:
        """Adds references (B, 3, H, W) float32, and the numbers they go by."""
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
