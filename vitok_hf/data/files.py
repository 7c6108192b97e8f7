"""The files of a data folder: which count, in what order, and under which names."""

import functools
import logging
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import TypeVar

import numpy as np

from ..clips import COLOURS


logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .apng .webp .avif .gif .bmp .dib .tif .tiff .jp2 .j2k .ppm .pgm .pbm .pnm .tga".split()
)
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"})
ARRAY_SUFFIXES = frozenset({".npy", ".npz"})
UNREAD_SUFFIXES = frozenset(  # of pictures and videos
    ".heic .heif .jxl .svg .psd .exr .hdr .ico .dng .cr2 .cr3 .nef .arw .raf .orf .rw2 "
    ".wmv .flv .3gp .ts .mts .m2ts .ogv".split()
)
HIDDEN_FOLDERS = frozenset(
    {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
)

T = TypeVar("T")


def suffixes_for(num_frames: int, channels: int = 3) -> frozenset[str]:
    """Clips need videos; single frames come from pictures, too, and where there is a use for them from arrays.

    Arrays beside RGB pictures are something else. Videos have no alpha, and no channels but colours.
    """
    if num_frames > 1:
        return VIDEO_SUFFIXES
    if channels == 3:
        return IMAGE_SUFFIXES | VIDEO_SUFFIXES
    pictures = IMAGE_SUFFIXES if channels in COLOURS else frozenset({".tif", ".tiff"})
    return pictures | ARRAY_SUFFIXES | (VIDEO_SUFFIXES if channels == 1 else frozenset())


def is_hidden(name: str) -> bool:
    """Whether systems hide what has this name: thumbnails, notebooks' checkpoints, resource forks, bins."""
    return name.startswith(".") or name in HIDDEN_FOLDERS


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _walk(root: str, suffixes: frozenset[str]) -> Iterator[str]:
    """The files of a folder and of all that links in it lead to, unsorted; hidden ones are left out.

    Each folder is listed once, by its own name rather than a link's, and so are files.
    """
    starts, seen, links = [root], set(), []
    unread: Counter[str] = Counter()
    for start in starts:  # which grows by the links to folders that are found
        waiting = [start]
        while waiting:
            folder = waiting.pop()
            if (real := os.path.realpath(folder)) in seen:
                continue
            seen.add(real)
            try:
                entries = sorted(os.scandir(folder), key=attrgetter("name"))
            except PermissionError as error:
                logger.warning("Left out a folder: %s", error)
                continue
            for entry in entries:
                is_link, suffix = entry.is_symlink(), suffix_of(entry.name)
                if is_hidden(entry.name):
                    continue
                if os.path.isdir(entry.path) if is_link else entry.is_dir():
                    (starts if is_link else waiting).append(entry.path)
                elif suffix not in suffixes:
                    unread[suffix] += suffix in UNREAD_SUFFIXES
                elif is_link:
                    links.append(entry.path)
                else:
                    yield entry.path
    realpath = functools.cache(os.path.realpath)
    for link in links:
        folder, name = os.path.split(os.path.join(os.path.dirname(link), os.readlink(link)))
        is_listed = not is_hidden(name) and suffix_of(name) in suffixes and realpath(folder) in seen
        if not is_listed or not os.path.exists(link):  # broken ones fail where they are read
            yield link
    if unread := +unread:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sorted(unread.items()))
        logger.warning('Of "%s", what cannot be read by its ending is left out: %s.', root, counts)


def iterate_files(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES | VIDEO_SUFFIXES) -> Iterator[str]:
    """What `list_files` lists, as strings."""
    root = str(Path(path))
    if not os.path.exists(root):
        raise ValueError(f'"{path}" does not exist: name a folder or a file.')
    if os.path.isfile(root):
        files = [root] if suffix_of(root) in suffixes else []
    else:
        # no name holds "\0", which sorts before all else: by the folders' names, then the files'
        files = sorted(file.replace(os.sep, "\0") for file in _walk(root, suffixes))
    if not files:
        raise ValueError(f'"{path}" holds no file that ends in {", ".join(sorted(suffixes))}.')
    return (file.replace("\0", os.sep) for file in files)


def list_files(path: str | Path, suffixes: frozenset[str] = IMAGE_SUFFIXES | VIDEO_SUFFIXES) -> list[Path]:
    """The pictures and videos in a folder and its subfolders, sorted, or the one file that `path` names.

    Links are followed; one to what the folder holds anyway adds nothing. What systems hide is left out.
    """
    return [Path(file) for file in iterate_files(path, suffixes)]


class FileList:
    """Paths in one buffer, and where each ends: lists of millions are copied to every worker."""

    def __init__(self, paths: Iterable[str | Path]):
        names, ends = bytearray(), array("q", [0])
        for path in paths:
            names += os.fsencode(path)
            ends.append(len(names))
        self.names, self.ends = bytes(names), np.array(ends)

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __iter__(self) -> Iterator[Path]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Path:
        index = range(len(self))[index]
        return Path(os.fsdecode(self.names[self.ends[index] : self.ends[index + 1]]))


def printable(name: str) -> str:
    """A file's name with escapes in place of the bytes that are no UTF-8, which `print` and text files refuse."""
    return name.encode(errors="backslashreplace").decode()


def short_names(paths: Sequence[str | Path]) -> list[str]:
    """The last folder of each path, with as many before it ("train-emoji") as tell all of them apart."""
    parts = [Path(os.path.abspath(path)).parts[1:] for path in paths]
    depth = 1
    while len({part[-depth:] for part in parts}) < len(set(parts)):
        depth += 1
    return [printable("-".join(part[-depth:])) for part in parts]


def read_each(files: Iterable[T], read: Callable[[T], object]) -> list[str]:
    """Calls `read` with each file, and goes on after one that cannot be read; returns the reasons, "name: reason"."""
    reasons = []
    for file in files:
        try:
            read(file)
        except ValueError as error:
            reasons.append(str(error))
    return reasons
