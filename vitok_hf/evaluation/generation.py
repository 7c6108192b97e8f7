"""Samples of a class-conditional pipeline, as tensors and as files."""

from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image

from ..disk import atomic_file, inside, locked
from .processes import share_of


def generate_samples(
    pipe: DiffusionPipeline, class_ids: list[int], batch_size: int = 32, seed: int = 0, **options: Any
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
                    Image.fromarray(image.permute(1, 2, 0).numpy()).save(temporary, "PNG")
        PartialState().wait_for_everyone()
