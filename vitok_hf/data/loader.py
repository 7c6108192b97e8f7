"""The endless batches of one process, and where they go on after an interruption.

Positions are kept here rather than by torchdata's `StatefulDataLoader` (0.11.0, tried with PyTorch 2.14). With it,
data drawn by index and streams resume exactly and without replaying, if the stream keeps its position itself, as
`StreamBatches` does; batches come as fast, and a state has a few hundred bytes. But a state belongs to one number of
workers: with another one, a bare `AssertionError` ends the run, even where one number says all, as of data drawn by
index. It knows nothing of other processes and shards, so that most of what is below would stay, for one more
dependency.
"""

import gc
import itertools
import logging
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import DataLoader

from .batches import Batch, DrawnBatches, StreamBatches
from .sources import DecodedPictures, HubRows, HubStream, MixedSources, TarStream
from .views import CropView, NativeView


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceSettings:
    """Where training data come from: exactly one of folders, a dataset of the Hub, and tar shards.

    Args:
        train_data_dir: Folders or files with optional weights, as "DIR:0.5".
        dataset_name: Dataset on the Hub, or a local folder, for `datasets.load_dataset`.
        dataset_config_name: Its configuration.
        dataset_split: Its split.
        data_column: Its column of pictures or videos; default: "image", or "video" for clips.
        streaming: Do not download the dataset first.
        train_shards: Tar shards for `webdataset`, as "shards/{000..012}.tar".
        shuffle_buffer: Samples of a stream that are shuffled at once, in each worker.
        cache_gib: Bound of the memory for decoded pictures, in each worker; streams keep none.
    """

    train_data_dir: list[str] = field(default_factory=list)
    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_split: str = "train"
    data_column: str | None = None
    streaming: bool = False
    train_shards: list[str] = field(default_factory=list)
    shuffle_buffer: int = 1000
    cache_gib: float = 1.0

    def __post_init__(self):
        places = {name: getattr(self, name) for name in ("train_data_dir", "dataset_name", "train_shards")}
        if sum(bool(place) for place in places.values()) != 1:
            raise ValueError(f"Set exactly one of {', '.join(places)}, but they are {places}.")
        of_hub = {name: getattr(self, name) for name in ("dataset_config_name", "data_column", "streaming")}
        if not self.dataset_name and any(of_hub.values()):
            raise ValueError(f"{', '.join(of_hub)} belong to `dataset_name`, which is not set, but they are {of_hub}.")


def make_dataset(view: CropView | NativeView, sources: SourceSettings, seed: int = 0) -> DrawnBatches | StreamBatches:
    """Batches that `view` cuts from where `sources` tell.

    Raises:
        ValueError: If there are none, or no weights are positive.
        ImportError: If the package that reads them is not installed.
    """
    clip = view.clip
    if sources.train_shards:
        return StreamBatches(TarStream(sources.train_shards, clip), view, seed, sources.shuffle_buffer)
    items: list = sources.train_data_dir
    if sources.dataset_name:
        column = sources.dataset_config_name, sources.dataset_split, sources.data_column, clip
        if sources.streaming:
            return StreamBatches(HubStream(sources.dataset_name, *column), view, seed, sources.shuffle_buffer)
        items = [HubRows(sources.dataset_name, *column)]
    mixed = MixedSources(items, clip)
    return DrawnBatches(DecodedPictures(mixed, sources.cache_gib * 2**30, clip), mixed.draw, view, seed)


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
        self, dataset: DrawnBatches | StreamBatches, num_workers: int, process_index: int = 0, num_processes: int = 1
    ):
        self.dataset, self.num_workers = dataset, num_workers
        self.process_index, self.num_processes = process_index, num_processes
        self.batches = 0  # of a stream: handed out by this process; else the index of the next on process 0
        self.positions: list[dict[str, int] | None] = [None] * max(1, num_workers)  # of a stream

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._make_dataloader():
            if isinstance(self.dataset, StreamBatches):
                self.positions[self.batches % len(self.positions)] = batch.position
                self.batches += 1
            else:
                self.batches += self.num_processes
            yield batch

    def _make_dataloader(self) -> DataLoader:
        if self.num_workers:
            gc.collect()  # a worker that inherits PyAV's garbage waits for ever for threads that it has not
        sampler = None
        if isinstance(self.dataset, StreamBatches):
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

    def state_dict(self) -> dict[str, Any]:
        """Where to go on after the last batch that was handed out; JSON-able.

        Of data that are drawn by index it is the same on all processes, which must have had the same number of
        batches, and may be loaded with any number of processes and workers. Of a stream, every process has its own.
        """
        if not isinstance(self.dataset, StreamBatches):
            return {"batches": self.batches}
        readers = {
            "num_processes": self.num_processes,
            "num_workers": len(self.positions),
            "process_index": self.process_index,
            "num_shards": self.dataset.source.num_shards,
            "shuffle_buffer": self.dataset.shuffle_buffer,
            "seed": self.dataset.seed,
        }
        return {"batches": self.batches, "readers": readers, "positions": list(self.positions)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` was taken, from the next `iter` on.

        Raises:
            ValueError: If the state is of another kind of data, or, of a stream, of other readers.
        """
        kinds = ["a stream" if "readers" in x else "data drawn by index" for x in (state, self.state_dict())]
        if kinds[0] != kinds[1]:
            raise ValueError(
                f"The state is of {kinds[0]}, but the data are {kinds[1]}: resume with the data it started with."
            )
        saved, ours = (x.get("readers") for x in (state, self.state_dict()))
        if saved != ours:
            raise ValueError(
                f"A stream resumes with the readers, shards and shuffling it was saved with, {saved}, but these are "
                f"{ours}: restore them, or start the data anew."
            )
        self.batches = state["batches"]
        self.positions = list(state.get("positions", self.positions))


def iterate_pixels(dataset: DrawnBatches | StreamBatches, num_batches: int) -> Iterator[torch.Tensor]:
    """The runs of the first batches, for measurements over training data; logs what could not be read."""
    for batch in itertools.islice(BatchLoader(dataset, num_workers=0), num_batches):
        for reason in batch.skipped:
            logger.warning("Skipped %s", reason)
        yield from batch.pixels
