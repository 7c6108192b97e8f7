"""Pictures and videos by class, which is the folder that holds them, and how they are drawn."""

import itertools
import os
import random
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..loading.strict import read_text
from .files import FileList, iterate_files, printable
from .items import PICTURE, Choice, Clip
from .sources import FolderFiles


def read_classes(path: str | Path) -> list[str]:
    """The classes in a file, one a line.

    Raises:
        ValueError: If there is none, or one twice, or the file is no text.
    """
    classes = [line.strip() for line in read_text(path).splitlines() if line.strip()]
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
    members: dict[str, list[int]] = {}
    for index, file in enumerate(files):
        members.setdefault(class_of(file), []).append(index)
    chosen = (random.Random(0).sample(group, min(limit, len(group))) for group in members.values())
    return [files[index] for index in sorted(itertools.chain.from_iterable(chosen))]


class LabelledFiles(FolderFiles):
    """The pictures and videos in folders and their subfolders; the class is the folder that holds the file.

    Args:
        folders: Where they are.
        classes: In the order of their ids; default: those that there are, sorted.
        clip: What is read of them: files of which it cannot be read do not count.
        max_files_per_class: How many files of a larger class count: a random choice, but always the same.

    Raises:
        ValueError: If there is no file, or one outside of the classes.
    """

    def __init__(
        self,
        folders: Sequence[str | Path],
        classes: list[str] | None = None,
        clip: Clip = PICTURE,
        max_files_per_class: int | None = None,
    ):
        files: Iterable[str | Path] = (file for folder in folders for file in iterate_files(folder, clip.suffixes))
        if max_files_per_class is not None:
            files = limit_each_class(list(files), max_files_per_class)
        found: dict[str, int] = {}
        numbers = array("q")

        def note_class(file: str | Path) -> str | Path:
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

    def __call__(self, rng: np.random.Generator) -> Choice:
        if self.members is None:
            index = rng.integers(len(self.labels))
        else:
            index = rng.choice(self.members[rng.integers(len(self.members))])
        mirrored = rng.random() < 0.5  # drawn in any case: the numbers that follow do not depend on the class
        label = int(self.labels[index])
        return Choice(int(index), bool(mirrored and self.flips[label]), label)
