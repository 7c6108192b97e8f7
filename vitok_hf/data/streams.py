"""Batches of data that can only be read in order, with exact resumption from a small position."""

import itertools
from collections.abc import Iterator

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .cropping import Batch, BatchCutter, CropSettings, draw_readable
from .items import load_item
from .media import Item


START = {"epoch": 0, "block": 0, "shard": 0, "sample": 0, "offset": 0, "batch": 0}
MAX_EMPTY_EPOCHS = 10  # in a row, for a reader; one may be dealt an empty shard


class StreamBatches(IterableDataset):
    """Endless `Batch`es from a stream (see `sources`).

    A reader is one worker of one process. In every epoch the shards are shuffled by (seed, epoch) and dealt out to the
    readers; if there are fewer shards than readers, each reader takes its share of the samples of every shard. A
    reader shuffles blocks of `shuffle_buffer` samples, as they are stored, by (seed, epoch, reader, block). Over all
    readers, an epoch has every sample once. A position names the start of a block and an offset in it, so that a
    resumed reader reads its block once more, and goes on exactly where it stopped. Under a token budget, the picture
    that did not fit opens the next batch.

    Args:
        source: `HubStream`, `TarStream` or alike.
        settings: How batches are cut.
        shuffle_buffer: Samples of a block. They are held in memory, undecoded, by each reader, and are read before the
            first of them is used.

    Raises:
        ValueError: If there are no shards; while reading, if a reader gets no sample in ten epochs, or if 100 samples
            in a row cannot be read.
    """

    def __init__(self, source, settings: CropSettings, shuffle_buffer: int = 1000):
        if source.num_shards < 1:
            raise ValueError(f'"{source.name}" has no shards: name at least one.')
        if shuffle_buffer < 1:
            raise ValueError(f"`shuffle_buffer` must be at least 1 sample, but is {shuffle_buffer}.")
        self.source, self.settings, self.shuffle_buffer = source, settings, shuffle_buffer
        self.cutter = BatchCutter(settings)
        self.start(0, 1, 0, None)

    def start(self, process_index: int, num_processes: int, batches: int, positions: list[dict | None] | None) -> None:
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
        return self.read(reader, self.num_processes * num_workers, self.positions and self.positions[worker])

    def read(self, reader: int, num_readers: int, position: dict[str, int] | None = None) -> Iterator[Batch]:
        """The batches of one of `num_readers` readers, after `position`."""
        position = position or START
        settings = self.settings
        items, waiting, taken = self._items(reader, num_readers, position), [], []

        def take() -> Item:
            taken.append(waiting.pop() if waiting else next(items))
            return taken[-1][0]

        def draw() -> np.ndarray:
            return draw_readable(take, lambda item: load_item(item, settings.num_frames, settings.fps, rng), skipped)

        for number in itertools.count(position["batch"]):
            rng, skipped = np.random.default_rng((settings.seed, reader, number)), []
            taken.clear()
            pixels, left_out = self.cutter(rng, draw)
            if left_out:
                waiting.append(taken.pop())
            yield Batch(pixels, skipped=skipped, position=taken[-1][1] | {"batch": number + 1})

    def _items(self, reader: int, num_readers: int, position: dict[str, int]) -> Iterator[tuple[Item, dict[str, int]]]:
        """Endless shuffled items, each with the position after it."""
        epoch, block, shard, sample, offset = (position[name] for name in START if name != "batch")
        empty_epochs = 0
        while empty_epochs < MAX_EMPTY_EPOCHS:
            stored = self._stored_items(epoch, reader, num_readers, shard, sample)
            while items := list(itertools.islice(stored, self.shuffle_buffer)):
                _, *end = items[-1]
                order = np.random.default_rng((self.settings.seed, epoch, reader, block)).permutation(len(items))
                for index in order[offset:]:
                    offset += 1
                    (item, _, _), items[index] = items[index], None  # frees what has been used
                    start = {"epoch": epoch, "block": block, "shard": shard, "sample": sample}
                    yield item, start | {"offset": offset}
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
        order = np.random.default_rng((self.settings.seed, epoch)).permutation(self.source.num_shards).tolist()
        share = len(order) < num_readers
        shards = order if share else order[reader::num_readers]
        for place in range(first, len(shards)):
            items = itertools.islice(enumerate(self.source.items(shards[place])), sample, None)
            for index, item in items:
                if not share or (index + shards[place]) % num_readers == reader:
                    yield item, place, index + 1
            sample = 0
