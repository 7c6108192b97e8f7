"""Samples of a class-conditional pipeline beside real pictures: are they of their class, as varied, and new?"""

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch.nn import functional as F

from ..training.media import resize
from .features import Classifier


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


def resize_all(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, 3, H, W) uint8 -> (N, 3, side, side), bicubic and antialiased, as pictures are read from files."""
    box = (0, 0, images.shape[3], images.shape[2])
    resized = [resize(image.permute(1, 2, 0).numpy(), (side, side), box) for image in images]
    return torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).contiguous()


@torch.no_grad()
def classify(images: torch.Tensor, classifier: Classifier, batch_size: int = 64) -> torch.Tensor:
    """(N, 3, H, W) uint8, of the size the classifier was trained with -> (N,) ids."""
    return torch.cat([classifier(batch).argmax(dim=1) for batch in images.split(batch_size)])


def nearest_neighbours(
    images: torch.Tensor, references: torch.Tensor, side: int = 32
) -> tuple[torch.Tensor, torch.Tensor]:
    """The closest reference, or mirror image of one, of each picture.

    Args:
        images: (N, 3, H, W) uint8.
        references: (M, 3, H, W) uint8.
        side: Pictures are compared as means over squares, `side` x `side`: details count little.

    Returns:
        Root mean square differences in grey levels, from 0 to 255, (N,) float32, and indices of references, (N,).
    """

    def flat(pictures: torch.Tensor) -> torch.Tensor:
        return torch.cat([F.adaptive_avg_pool2d(batch.float(), side).flatten(1) for batch in pictures.split(256)])

    known = flat(references)
    mirrored = known.view(-1, 3, side, side).flip(-1).flatten(1)
    distances = torch.minimum(*(torch.cdist(flat(images), pictures) for pictures in (known, mirrored)))
    nearest, indices = distances.min(dim=1)
    return nearest / known.shape[1] ** 0.5, indices
