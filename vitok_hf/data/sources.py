"""Where training data come from: folders, datasets of the Hub and tar shards, all as `Item`s that nobody decoded yet.

A source that is drawn from by index is a `Sequence[Item]`. Of a `Stream`, `items(shard)` yields the items of one shard
in their order and never raises: what is broken becomes an item whose source is the exception, so that every run counts
it in the same place.
"""

import importlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from .files import VIDEO_SUFFIXES, FileList, is_hidden, iterate_files, suffix_of
from .items import PICTURE, Choice, Clip, Decoded, Indexed, Item


class Stream(Protocol):
    """What can only be read in order, shard by shard."""

    name: str

    @property
    def num_shards(self) -> int: ...

    def items(self, shard: int) -> Iterator[Item]: ...


def import_optional(package: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(
            f'Reading these data needs the package "{package}": pip install "vitok-hf[train]".'
        ) from error


def parse_source(source: str) -> tuple[str, float | None]:
    """ "folder:0.5" -> ("folder", 0.5), "folder" -> ("folder", None), and "folder:0.5", too, if there is one."""
    path, _, text = source.rpartition(":")
    try:
        weight = float(text)
    except ValueError:
        return source, None  # the colon belongs to the path
    return (path, weight) if path and math.isfinite(weight) and not os.path.lexists(source) else (source, None)


class FolderFiles:
    """The pictures and videos in a folder and its subfolders, or one file, that `clip` can be read of."""

    def __init__(self, path: str | Path, clip: Clip = PICTURE):
        self.files = FileList(iterate_files(path, clip.suffixes))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        path = self.files[index]
        return Item(str(path), path, suffix_of(path.name) in VIDEO_SUFFIXES)


class MixedSources:
    """The items of several sources, one source after the other; `draw` chooses by the weights of the sources.

    Args:
        sources: Folders or files, each with an optional weight ("DIR:0.5", unless a folder has this whole name), or
            sequences of `Item`s; the weight is the share of the pictures and videos that come from there, 1 if only
            others have one; if none has, all files are as likely.
        clip: What is read of them: files of which it cannot be read do not count.

    Raises:
        ValueError: If a source is empty or no weights are positive.
    """

    def __init__(self, sources: Sequence[str | Indexed[Item]], clip: Clip = PICTURE):
        parsed = [parse_source(source) if isinstance(source, str) else (source, None) for source in sources]
        self.sources = [FolderFiles(x, clip) if isinstance(x, str) else x for x, _ in parsed]
        counts = list(map(len, self.sources))
        weighted = any(weight is not None for _, weight in parsed)
        defaults = [1.0 if weighted else count for count in counts]
        weights = np.array([default if weight is None else weight for default, (_, weight) in zip(defaults, parsed)])
        if not len(weights) or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"The weights of the sources must not be negative nor all 0: {sources}.")
        self.probabilities = weights / weights.sum()
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> Item:
        number = int(np.searchsorted(self.ends, index, side="right"))
        source = self.sources[number]
        return source[index - int(self.ends[number]) + len(source)]

    def draw(self, rng: np.random.Generator) -> Choice:
        number = rng.choice(len(self.sources), p=self.probabilities)
        count = len(self.sources[number])
        return Choice(int(self.ends[number]) - count + int(rng.integers(count)))


class DecodedPictures:
    """Items whose pictures are decoded, the last ones from memory, which holds at most `max_bytes`, or one picture.

    They have the channels of `clip`.

    Raises:
        ValueError: On access, "name: reason", if a picture cannot be read.
    """

    def __init__(self, items: Indexed[Item], max_bytes: float = 2**30, clip: Clip = PICTURE):
        self.items, self.max_bytes, self.clip = items, max_bytes, clip
        self.kept: OrderedDict[int, Decoded] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item | Decoded:
        if index in self.kept:
            self.kept.move_to_end(index)
            return self.kept[index]
        item = self.items[index]
        if item.is_video:
            return item
        picture = self.kept[index] = Decoded(self.clip.load(item)[0])
        self.num_bytes += picture.pixels.nbytes
        while self.num_bytes > self.max_bytes and len(self.kept) > 1:
            self.num_bytes -= self.kept.popitem(last=False)[1].pixels.nbytes
        return picture


class HubColumn:
    """One column of a dataset for `datasets.load_dataset`, whose pictures or videos are left undecoded.

    Args:
        name: Name on the Hub, or a local folder that `load_dataset` understands.
        config_name: Configuration of the dataset.
        split: Split, with an optional slice, as "train[:1000]".
        column: Column of pictures or videos; default: "image", or "video" for clips.
        clip: What is read of it; more than one frame make the column a column of videos.
        data_files: The files of the split, as "data/val-*", where others are not to be downloaded.

    Raises:
        ValueError: If there is no such column.
        ImportError: If the package `datasets` is not installed.
    """

    streaming = False

    def __init__(
        self,
        name: str,
        config_name: str | None = None,
        split: str = "train",
        column: str | None = None,
        clip: Clip = PICTURE,
        data_files: str | None = None,
    ):
        datasets = import_optional("datasets")
        files = None if data_files is None else {split.partition("[")[0]: data_files}
        rows = datasets.load_dataset(name, config_name, split=split, data_files=files, streaming=self.streaming)
        column = column or ("video" if clip.num_frames > 1 else "image")
        if rows.features is None:
            raise ValueError(f'The columns of "{name}" are unknown before it is read: do not stream it.')
        if column not in rows.column_names:
            names = ", ".join(rows.column_names)
            raise ValueError(f'"{name}" has no column "{column}": set `data_column` to one of {names}.')
        self.name, self.column = name, column
        self.is_video = clip.num_frames > 1 or isinstance(rows.features[column], datasets.Video)
        feature = datasets.Video(decode=False) if self.is_video else datasets.Image(decode=False)
        if self.streaming:
            rows = rows.decode(False)  # a remote stream comes with threads that decode, before any cast
        self.rows = rows.select_columns([column]).cast_column(column, feature)

    def _item(self, value: dict | None, place: str) -> Item:
        value = value or {}
        data, path = value.get("bytes"), value.get("path")
        name = ", ".join(part for part in (self.name, place, path) if part)
        return Item(name, path if data is None else data, self.is_video)


class HubRows(HubColumn):
    """A downloaded dataset of the Hub as a sequence; see `HubColumn`."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        return self._item(self.rows[int(index)][self.column], f"row {index}")


class HubStream(HubColumn):
    """A dataset of the Hub as a stream; see `HubColumn`."""

    streaming = True

    @property
    def num_shards(self) -> int:
        return self.rows.num_shards

    def items(self, shard: int) -> Iterator[Item]:
        row = 0
        try:
            # not `iter(rows)`: in a worker of a DataLoader it hands a single shard to worker 0 only
            for rows in self.rows.shard(self.num_shards, shard).iter(batch_size=16):
                for value in rows[self.column]:
                    yield self._item(value, f"shard {shard}, row {row}")
                    row += 1
        except Exception as error:  # a broken file ends its shard, not the run
            yield Item(f"{self.name}, shard {shard} after row {row}", error)


def is_shown(member: str) -> bool:
    """Whether systems show a member of an archive: none of its folders is hidden; "./a/x.jpg" is not."""
    return not any(is_hidden(part) for part in member.split("/") if part not in (".", ".."))


class TarStream:
    """Tar shards in the layout of WebDataset: members of one sample follow each other and share the name's stem.

    Of each sample, the first member is taken whose name ends as what `clip` is read of: of clips alone, a video.
    Members that systems hide ("__MACOSX/._x.jpg") are left out.

    Args:
        patterns: Paths or addresses for `webdataset`, with ranges and lists in braces: "shards/{000..012}.tar".
        clip: What is read of the samples.

    Raises:
        ImportError: If the package `webdataset` is not installed.
    """

    def __init__(self, patterns: list[str], clip: Clip = PICTURE):
        import_optional("webdataset")
        expand = importlib.import_module("braceexpand").braceexpand
        self.urls = [
            url for pattern in patterns for url in ([pattern] if os.path.exists(pattern) else expand(pattern))
        ]
        self.name = ", ".join(patterns)
        self.suffixes = clip.suffixes

    @property
    def num_shards(self) -> int:
        return len(self.urls)

    def items(self, shard: int) -> Iterator[Item]:
        url = self.urls[shard]
        errors: list[Exception] = []

        def note(error: Exception) -> bool:
            errors.append(error)
            return True  # go on with what can still be read

        samples = importlib.import_module("webdataset.tariterators").tarfile_samples
        place = os.path.abspath(url) if os.path.exists(url) else url  # "a:b.tar" has no protocol "a"
        for sample in samples([{"url": place}], handler=note, select_files=is_shown):
            yield self._item(f"{url}/{sample['__key__']}", sample)
        for error in errors:
            yield Item(url, error)

    def _item(self, name: str, sample: dict) -> Item:
        for key, data in sample.items():
            suffix = suffix_of(f"x.{key}")
            if suffix in self.suffixes:
                return Item(f"{name}.{key}", data, suffix in VIDEO_SUFFIXES)
        return Item(name, ValueError(f"no member ends in {', '.join(sorted(self.suffixes))}"))
