"""Training batches for diffusion models: pictures by class, and the latents of pictures from a cache.

A batch is a pure function of (seed, index), and from a cache of files that could all be read shows the same pictures
and videos, mirrored alike, as without. A cache has one clip of each video; without it, every draw takes another one.
"""

import itertools
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from .cropping import Batch, draw_readable, to_pixels
from .files import FileList, iterate_files, printable
from .items import load_item
from .media import Item, resize_and_crop, suffixes_for
from .sources import FolderFiles


def read_classes(path: str | Path) -> list[str]:
    """The classes in a file, one a line.

    Raises:
        ValueError: If there is none, or one twice.
    """
    classes = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f'"{path}" must have one class a line and each once, but has {classes}.')
    return classes


def class_of(file: str | Path) -> str:
    """The name of the folder that holds the file, or the link to it."""
    return printable(os.path.basename(os.path.dirname(os.path.abspath(file))))


def limit_each_class(files: Sequence[str | Path], limit: int) -> list[str | Path]:
    """At most `limit` files of each class: a random choice, but always the same.

    Raises:
        ValueError: If `limit` is not positive.
    """
    if limit < 1:
        raise ValueError(f"`max_files_per_class` must be positive, but is {limit}.")
    members = {}
    for index, file in enumerate(files):
        members.setdefault(class_of(file), []).append(index)
    chosen = (random.Random(0).sample(group, min(limit, len(group))) for group in members.values())
    return [files[index] for index in sorted(itertools.chain.from_iterable(chosen))]


class LabelledFiles(FolderFiles):
    """The pictures and videos in folders and their subfolders; the class is the folder that holds the file.

    Args:
        folders: Where they are.
        classes: In the order of their ids; default: those that there are, sorted.
        num_frames: Frames of a clip; for more than 1, only videos count.
        max_files_per_class: Of a class that has more, only so many: a random choice, but always the same.

    Raises:
        ValueError: If there is no file, or one outside of the classes.
    """

    def __init__(
        self,
        folders: list[str | Path],
        classes: list[str] | None = None,
        num_frames: int = 1,
        max_files_per_class: int | None = None,
    ):
        files = (file for folder in folders for file in iterate_files(folder, suffixes_for(num_frames)))
        if max_files_per_class is not None:
            files = limit_each_class(list(files), max_files_per_class)
        found, numbers = {}, array("q")

        def note_class(file: str) -> str:
            numbers.append(found.setdefault(class_of(file), len(found)))
            return file

        self.files = FileList(map(note_class, files))
        self.classes = sorted(found) if classes is None else list(classes)
        ids = {name: index for index, name in enumerate(self.classes)}
        self.labels = np.array([ids.get(name, -1) for name in found])[np.array(numbers)]
        if len(strangers := np.flatnonzero(self.labels < 0)):
            file = self.files[strangers[0]]
            raise ValueError(
                f'"{file}" is in folder "{class_of(file)}", which is no class: add it to the list of classes, or move '
                f"the file. The classes are {', '.join(self.classes)}."
            )

    @property
    def items(self) -> Sequence[Item]:
        """What `self[index]` gives."""
        return self


class ClassSampler:
    """Draws items, and whether to mirror them.

    Args:
        labels: (N,) class of each item.
        classes: Names of the classes.
        flip: Mirror half of them.
        no_flip_classes: Names of classes that are never mirrored.
        class_balanced: Draw a class first, each as often, and then one of its items.

    Raises:
        ValueError: If `no_flip_classes` has unknown names.
    """

    def __init__(
        self,
        labels: np.ndarray,
        classes: list[str],
        flip: bool = True,
        no_flip_classes: Sequence[str] = (),
        class_balanced: bool = False,
    ):
        if unknown := sorted(set(no_flip_classes) - set(classes)):
            raise ValueError(f"`no_flip_classes` has {unknown}, but the classes are {', '.join(classes)}.")
        self.labels = labels
        self.flips = np.array([flip and name not in no_flip_classes for name in classes])
        self.members = [np.flatnonzero(labels == label) for label in np.unique(labels)] if class_balanced else None

    def __call__(self, rng: np.random.Generator) -> tuple[int, bool]:
        if self.members is None:
            index = rng.integers(len(self.labels))
        else:
            index = rng.choice(self.members[rng.integers(len(self.members))])
        mirrored = rng.random() < 0.5  # drawn in any case: the numbers that follow do not depend on the class
        return int(index), bool(mirrored and self.flips[self.labels[index]])


def load_square(
    item: Item, resolution: int, num_frames: int, fps: float | None, rng: np.random.Generator
) -> np.ndarray:
    """The central square of a picture or clip, (T, resolution, resolution, 3) uint8. Raises as `load_item`."""
    return np.stack([resize_and_crop(frame, resolution) for frame in load_item(item, num_frames, fps, rng)])


class PictureBatches(Dataset):
    """Map-style dataset whose item `i` is a `Batch` of central squares and their classes.

    What cannot be read is skipped, and another picture drawn in its place.

    Args:
        files: The pictures or videos.
        sampler: Draws them; by default uniformly, half of them mirrored.
        resolution: Side of the squares in pixels.
        batch_size: Squares of a batch.
        num_frames, fps: Of clips, which begin at random; `fps` `None`: every frame.
        seed: Of everything random.
    """

    def __init__(
        self,
        files: LabelledFiles,
        sampler: ClassSampler,
        resolution: int,
        batch_size: int,
        num_frames: int = 1,
        fps: float | None = None,
        seed: int = 0,
    ):
        self.files, self.sampler, self.batch_size, self.seed = files, sampler, batch_size, seed
        self.shape = (resolution, num_frames, fps)

    def __getitem__(self, index: int) -> Batch:
        rng, skipped = np.random.default_rng((self.seed, index)), []
        starts = np.random.default_rng((self.seed, index, 1))  # of clips: what is drawn next does not depend on them

        def load(choice: tuple[int, bool]) -> tuple[np.ndarray, int]:
            place, mirrored = choice
            clip = load_square(self.files[place], *self.shape, starts)
            return clip[:, :, ::-1] if mirrored else clip, self.files.labels[place]

        drawn = [draw_readable(lambda: self.sampler(rng), load, skipped) for _ in range(self.batch_size)]
        clips, labels = zip(*drawn)
        return Batch([to_pixels(clips)], labels=torch.tensor(labels), skipped=skipped)

    def iterate(self, num_batches: int) -> Iterator[torch.Tensor]:
        """The pixels of the first batches, for measurements."""
        return itertools.chain.from_iterable(self[index].pixels for index in range(num_batches))
