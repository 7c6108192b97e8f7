"""Batches of what a view cuts: of data drawn at random by index, and of streams that can only be read in order.

A view (see `views`) knows what a batch looks like; here it is decided which items it is cut from, and what cannot be
read is skipped. One worker cuts a whole batch.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..clips import Runs
from .items import Choice, Indexed, Item
from .sources import Stream


MAX_FAILURES = 100  # in a row; more are no accident
MAX_EMPTY_EPOCHS = 10  # in a row, for a reader; one may be dealt an empty shard
START = {"epoch": 0, "block": 0, "shard": 0, "sample": 0, "offset": 0, "batch": 0}

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Batch:
    """One batch of training data: pixels or, of cached pictures, moments; items are in the order of the runs.

    Args:
        pixels: Runs of (n, C, T, H, W) uint8, one for each size; T is 1 for pictures. Empty for cached latents.
        moments: (B, 2, c, t, h, w) float32, mean and standard deviation of the posteriors of cached latents.
        labels: (B,) int64, the classes of data that have any.
        skipped: "name: reason" of each picture or video that could not be read while the batch was drawn.
        position: Where a stream goes on after the batch; `None` for data that are drawn by index.
    """

    pixels: Runs = field(default_factory=list)
    moments: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    skipped: list[str] = field(default_factory=list)
    position: dict[str, int] | None = None

    @property
    def num_items(self) -> int:
        return sum(map(len, self.pixels)) if self.moments is None else len(self.moments)

    def pin_memory(self) -> "Batch":
        """The same batch in memory that a device reads without a copy; a `DataLoader` asks for it."""
        moments, labels = (x if x is None else x.pin_memory() for x in (self.moments, self.labels))
        return replace(self, pixels=[run.pin_memory() for run in self.pixels], moments=moments, labels=labels)


class Draw(Protocol):
    """`draw(rng, load)` chooses an item that can be read, by `rng` if there is any choice: what `load` makes of it.

    An item is an `Item` that is not decoded yet, or what else the data consist of.
    """

    def __call__(self, rng: np.random.Generator, load: Callable[[Any], T]) -> tuple[T, Choice]: ...


class View(Protocol):
    """Cuts the batch of a seed out of what `draw` gives, and says whether the last item did not fit into it."""

    def __call__(self, seed: tuple[int, ...], draw: Draw) -> tuple[Batch, bool]: ...


def draw_readable(choose: Callable[[], T], load: Callable[[T], U], skipped: list[str]) -> U:
    """`load(choose())`, again while `load` raises a ValueError, whose message is added to `skipped`.

    Raises:
        ValueError: After `MAX_FAILURES` failures in a row.
    """
    for _ in range(MAX_FAILURES):
        choice = choose()
        try:
            return load(choice)
        except ValueError as error:
            skipped.append(str(error))
    raise ValueError(
        f"{MAX_FAILURES} pictures or videos in a row could not be read; check the source of the data. The last: "
        f"{skipped[-1]}"
    )


class DrawnBatches(Dataset):
    """Map-style dataset whose item `i` is a `Batch`, a pure function of (seed, i).

    Args:
        items: `Item`s, or what else the view takes.
        sampler: Chooses among them.
        view: Cuts the batches; what does not fit into one is dropped.
        seed: Seed of everything random.

    Raises:
        ValueError: From items, if 100 in a row cannot be read.
    """

    def __init__(
        self, items: Indexed[Any], sampler: Callable[[np.random.Generator], Choice], view: View, seed: int = 0
    ):
        self.items, self.sampler, self.view, self.seed = items, sampler, view, seed

    def __getitem__(self, index: int) -> Batch:
        skipped: list[str] = []

        def draw(rng: np.random.Generator, load: Callable[[Any], T]) -> tuple[T, Choice]:
            return draw_readable(
                lambda: self.sampler(rng), lambda choice: (load(self.items[choice.place]), choice), skipped
            )

        batch, _ = self.view((self.seed, index), draw)
        return replace(batch, skipped=skipped)


class StreamBatches(IterableDataset):
    """Endless `Batch`es from a stream (see `sources`).

    A reader is one worker of one process. In every epoch the shards are shuffled by (seed, epoch) and dealt out to the
    readers; if there are fewer shards than readers, each reader takes its share of the samples of every shard. A
    reader shuffles blocks of `shuffle_buffer` samples, as they are stored, by (seed, epoch, reader, block). Over all
    readers, an epoch has every sample once. A position names the start of a block and an offset in it, so that a
    resumed reader reads its block once more, and goes on exactly where it stopped. What does not fit into a batch
    opens the next one.

    Args:
        source: `HubStream`, `TarStream` or alike.
        view: Cuts the batches.
        seed: Seed of everything random.
        shuffle_buffer: Samples of a block. They are held in memory, undecoded, by each reader, and are read before the
            first of them is used.

    Raises:
        ValueError: If there are no shards; while reading, if a reader gets no sample in ten epochs, or if 100 samples
            in a row cannot be read.
    """

    def __init__(self, source: Stream, view: View, seed: int = 0, shuffle_buffer: int = 1000):
        if source.num_shards < 1:
            raise ValueError(f'"{source.name}" has no shards: name at least one.')
        if shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1 sample, but is {shuffle_buffer}.")
        self.source, self.view, self.seed, self.shuffle_buffer = source, view, seed, shuffle_buffer
        self.start(0, 1, 0, [])

    def start(
        self, process_index: int, num_processes: int, batches: int, positions: list[dict[str, int] | None]
    ) -> None:
        """What `iter` reads: the part of a process that has had `batches` batches, and where its workers stopped.

        Workers of a DataLoader take turns; their turns go on after `batches`.
        """
        self.process_index, self.num_processes = process_index, num_processes
        self.batches, self.positions = batches, positions

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        worker = (worker + self.batches) % num_workers
        reader = self.process_index * num_workers + worker
        return self.read(reader, self.num_processes * num_workers, self.positions[worker] if self.positions else None)

    def read(self, reader: int, num_readers: int, position: dict[str, int] | None = None) -> Iterator[Batch]:
        """The batches of one of `num_readers` readers, after `position`."""
        position = position or START
        items = self._items(reader, num_readers, position)
        waiting: list[tuple[Item, dict[str, int]]] = []
        taken: list[tuple[Item, dict[str, int]]] = []

        def take() -> Item:
            taken.append(waiting.pop() if waiting else next(items))
            return taken[-1][0]

        def draw(rng: np.random.Generator, load: Callable[[Any], T]) -> tuple[T, Choice]:
            return draw_readable(take, load, skipped), Choice()

        for number in itertools.count(position["batch"]):
            skipped: list[str] = []
            taken.clear()
            batch, left_over = self.view((self.seed, reader, number), draw)
            if left_over:
                waiting.append(taken.pop())
            yield replace(batch, skipped=skipped, position=taken[-1][1] | {"batch": number + 1})

    def _items(self, reader: int, num_readers: int, position: dict[str, int]) -> Iterator[tuple[Item, dict[str, int]]]:
        """Endless shuffled items, each with the position after it."""
        epoch, block, shard, sample, offset = (position[name] for name in START if name != "batch")
        empty_epochs = 0
        while empty_epochs < MAX_EMPTY_EPOCHS:
            stored = self._stored_items(epoch, reader, num_readers, shard, sample)
            while items := dict(enumerate(itertools.islice(stored, self.shuffle_buffer))):
                _, *end = items[len(items) - 1]
                order = np.random.default_rng((self.seed, epoch, reader, block)).permutation(len(items)).tolist()
                start = {"epoch": epoch, "block": block, "shard": shard, "sample": sample}
                for index in order[offset:]:
                    offset += 1
                    yield items.pop(index)[0], start | {"offset": offset}
                block, (shard, sample), offset = block + 1, end, 0
            empty_epochs = 0 if block else empty_epochs + 1
            epoch, block, shard, sample, offset = epoch + 1, 0, 0, 0, 0
        raise ValueError(
            f'"{self.source.name}" had no sample for reader {reader} of {num_readers} in {MAX_EMPTY_EPOCHS} epochs: '
            "check the source, or use fewer workers or processes."
        )

    def _stored_items(
        self, epoch: int, reader: int, num_readers: int, first: int, sample: int
    ) -> Iterator[tuple[Item, int, int]]:
        """What the reader has to read of an epoch, from a place in its order of shards and a sample in that shard on.

        Each item comes with the place and sample that follow it.
        """
        order = np.random.default_rng((self.seed, epoch)).permutation(self.source.num_shards).tolist()
        share = len(order) < num_readers
        shards = order if share else order[reader::num_readers]
        for place in range(first, len(shards)):
            items = itertools.islice(enumerate(self.source.items(shards[place])), sample, None)
            for index, item in items:
                if not share or (index + shards[place]) % num_readers == reader:
                    yield item, place, index + 1
            sample = 0
