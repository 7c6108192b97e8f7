"""Training batches from folders of pictures and videos, from datasets of the Hub and from tar shards.

Folders and downloaded datasets are drawn from at random: a batch is a pure function of (seed, index). Streams are read
in a shuffled order, with a position to resume from (see `streams`). One worker cuts a whole batch.
"""

import gc
import itertools
import logging
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from .cropping import Batch, BatchCutter, CropSettings, draw_readable
from .items import load_item
from .media import Item
from .sources import FolderFiles, HubRows, HubStream, TarStream, parse_source
from .streams import StreamBatches


logger = logging.getLogger(__name__)


class CropBatches(Dataset):
    """Map-style dataset whose item `i` is a `Batch`, cut as `settings` tell.

    What cannot be read is skipped, and another picture drawn in its place from the same random numbers. Under a token
    budget, the picture that does not fit any more is dropped.

    Args:
        sources: Folders or files, each with an optional weight ("DIR:0.5", unless a folder has this whole name), or
            sequences of `Item`s; the weight is the share of the pictures and videos that come from there, 1 if only
            others have one; if none has, all files are as likely.
        settings: How batches are cut.
        cache_bytes: Bound of the memory for decoded pictures, in each worker.

    Raises:
        ValueError: If a source is empty or no weights are positive; from items, if 100 in a row cannot be read.
    """

    def __init__(self, sources: list[str | Sequence[Item]], settings: CropSettings, cache_bytes: int = 2**30):
        self.settings, self.cutter = settings, BatchCutter(settings)
        parsed = [parse_source(source) if isinstance(source, str) else (source, None) for source in sources]
        self.sources = [
            FolderFiles(source, settings.num_frames) if isinstance(source, str) else source for source, _ in parsed
        ]
        weighted = any(weight is not None for _, weight in parsed)
        defaults = [1.0 if weighted else len(source) for source in self.sources]
        weights = np.array([default if weight is None else weight for default, (_, weight) in zip(defaults, parsed)])
        if not len(weights) or weights.min() < 0 or weights.sum() <= 0:
            raise ValueError(f"The weights of the sources must not be negative nor all 0: {sources}.")
        self.source_probabilities = weights / weights.sum()
        self.cache_bytes = cache_bytes
        self.cache: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self.cached_bytes = 0

    def __getitem__(self, index: int) -> Batch:
        rng, skipped = np.random.default_rng((self.settings.seed, index)), []

        def choose() -> tuple[int, int]:
            source = rng.choice(len(self.sources), p=self.source_probabilities)
            return int(source), int(rng.integers(len(self.sources[source])))

        def draw() -> np.ndarray:
            return draw_readable(choose, lambda place: self._load(place, rng), skipped)

        pixels, _ = self.cutter(rng, draw)
        return Batch(pixels, skipped=skipped)

    def _load(self, place: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        if place in self.cache:
            self.cache.move_to_end(place)
            return self.cache[place]
        source, index = place
        item = self.sources[source][index]
        clip = load_item(item, self.settings.num_frames, self.settings.fps, rng)  # (T, h, w, 3)
        if not item.is_video:
            self.cache[place] = clip
            self.cached_bytes += clip.nbytes
            while self.cached_bytes > self.cache_bytes and len(self.cache) > 1:
                self.cached_bytes -= self.cache.popitem(last=False)[1].nbytes
        return clip


def make_dataset(
    settings: CropSettings,
    train_data_dir: list[str] | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    dataset_split: str = "train",
    data_column: str | None = None,
    streaming: bool = False,
    train_shards: list[str] | None = None,
    shuffle_buffer: int = 1000,
    cache_bytes: int = 2**30,
) -> CropBatches | StreamBatches:
    """Training data from exactly one of three places.

    Args:
        settings: How batches are cut.
        train_data_dir: Folders or files with optional weights, as "DIR:0.5".
        dataset_name: Dataset on the Hub, or a local folder, for `datasets.load_dataset`.
        dataset_config_name: Its configuration.
        dataset_split: Its split.
        data_column: Its column of pictures or videos; default: "image", or "video" for clips.
        streaming: Do not download the dataset first.
        train_shards: Tar shards for `webdataset`, as "shards/{000..012}.tar".
        shuffle_buffer: Samples of a stream that are shuffled at once, in each worker.
        cache_bytes: Bound of the memory for decoded pictures, in each worker; streams keep none.

    Raises:
        ValueError: If not exactly one place is named, or a setting does not belong to it.
        ImportError: If the package that reads it is not installed.
    """
    places = {"train_data_dir": train_data_dir, "dataset_name": dataset_name, "train_shards": train_shards}
    if sum(bool(place) for place in places.values()) != 1:
        raise ValueError(f"Set exactly one of {', '.join(places)}, but they are {places}.")
    of_hub = {"dataset_config_name": dataset_config_name, "data_column": data_column, "streaming": streaming}
    if not dataset_name and any(of_hub.values()):
        raise ValueError(f"{', '.join(of_hub)} belong to `dataset_name`, which is not set, but they are {of_hub}.")
    if train_data_dir:
        return CropBatches(train_data_dir, settings, cache_bytes)
    if train_shards:
        return StreamBatches(TarStream(train_shards, settings.num_frames), settings, shuffle_buffer)
    column = (dataset_name, dataset_config_name, dataset_split, data_column, settings.num_frames)
    if streaming:
        return StreamBatches(HubStream(*column), settings, shuffle_buffer)
    return CropBatches([HubRows(*column)], settings, cache_bytes)


class BatchLoader:
    """The endless `Batch`es of one process, prepared by workers, from where `load_state_dict` points.

    Each `iter` goes on after the last batch that was handed out. Batches that workers prepared ahead do not count.

    Args:
        dataset: What `make_dataset` returns.
        num_workers: Processes that cut batches; 0: this one does.
        process_index: Number of this process, over all machines.
        num_processes: Processes that train, on all machines.
    """

    def __init__(
        self, dataset: CropBatches | StreamBatches, num_workers: int, process_index: int = 0, num_processes: int = 1
    ):
        self.dataset, self.num_workers = dataset, num_workers
        self.process_index, self.num_processes = process_index, num_processes
        self.is_stream = isinstance(dataset, StreamBatches)
        self.batches = 0  # of a stream: handed out by this process; else the index of the next on process 0
        self.positions = [None] * max(1, num_workers)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._make_dataloader():
            if self.is_stream:
                self.positions[self.batches % len(self.positions)] = batch.position
            self.batches += 1 if self.is_stream else self.num_processes
            yield batch

    def _make_dataloader(self) -> DataLoader:
        gc.collect()  # a worker that inherits PyAV's garbage waits for ever for threads that it has not
        sampler = None
        if self.is_stream:
            self.dataset.start(self.process_index, self.num_processes, self.batches, list(self.positions))
        else:
            sampler = range(self.batches + self.process_index, sys.maxsize, self.num_processes)
        return DataLoader(
            self.dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            prefetch_factor=4 if self.num_workers else None,
            pin_memory=torch.accelerator.is_available(),
            generator=torch.Generator(),  # else it draws a number from the generator of the training run
        )

    def state_dict(self) -> dict:
        """Where to go on after the last batch that was handed out; JSON-able.

        Of data that are drawn by index it is the same on all processes, which must have had the same number of
        batches, and may be loaded with any number of processes and workers. Of a stream, every process has its own.
        """
        if not self.is_stream:
            return {"batches": self.batches}
        return {"batches": self.batches, "readers": self._readers(), "positions": list(self.positions)}

    def load_state_dict(self, state: dict) -> None:
        """Goes on where `state_dict` was taken, from the next `iter` on.

        Raises:
            ValueError: If the state is of another kind of data, or, of a stream, of other readers.
        """
        if self.is_stream != ("positions" in state):
            kinds = ("a stream", "data drawn by index")
            saved, ours = kinds if "positions" in state else kinds[::-1]
            raise ValueError(
                f"The state is of {saved}, but the data are {ours}: resume with the data it started with."
            )
        if self.is_stream and state["readers"] != self._readers():
            raise ValueError(
                f"A stream resumes with the readers, shards and shuffling it was saved with, {state['readers']}, but "
                f"these are {self._readers()}: restore them, or start the data anew."
            )
        self.batches = state["batches"]
        self.positions = list(state.get("positions", self.positions))

    def _readers(self) -> dict[str, int]:
        return {
            "num_processes": self.num_processes,
            "num_workers": len(self.positions),
            "process_index": self.process_index,
            "num_shards": self.dataset.source.num_shards,
            "shuffle_buffer": self.dataset.shuffle_buffer,
            "seed": self.dataset.settings.seed,
        }


def iterate_pixels(dataset: CropBatches | StreamBatches, num_batches: int) -> Iterator[torch.Tensor]:
    """The runs of the first batches, for measurements over training data; logs what could not be read."""
    for batch in itertools.islice(BatchLoader(dataset, num_workers=0), num_batches):
        for reason in batch.skipped:
            logger.warning("Skipped %s", reason)
        yield from batch.pixels
