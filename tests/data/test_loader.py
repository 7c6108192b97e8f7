import gc
import json
import weakref
from itertools import islice

import pytest
import torch

from tests.data.conftest import assert_same, cut, write_noise
from tests.data.test_batches import ONE, SEVERAL, Numbers, make_shards, numbers
from vitok_hf.data import loader as loader_module
from vitok_hf.data.batches import Batch, DrawnBatches, StreamBatches
from vitok_hf.data.loader import BatchLoader, SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.views import CropView


def assert_batches(batches, expected) -> None:
    for ours, theirs in zip(batches, expected, strict=True):
        assert_same(ours, theirs)


def resumed(loader: BatchLoader, state: dict) -> BatchLoader:
    loader.load_state_dict(json.loads(json.dumps(state)))
    return loader


class TestDrawnByIndex:
    @pytest.fixture(scope="class")
    def dataset(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("noise")
        write_noise(folder, 12)[3].write_bytes(b"")
        return cut(CropView([(16, 16, 1.0), (8, 32, 1.0)], 4 * 256), folder)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resumes_after_the_last_batch_handed_out(self, dataset, num_workers):
        loader = BatchLoader(dataset, num_workers)
        assert_batches(islice(loader, 3), map(dataset.__getitem__, range(3)))
        other = resumed(BatchLoader(dataset, 2 - num_workers), loader.state_dict())
        assert_batches(islice(other, 3), map(dataset.__getitem__, range(3, 6)))
        assert_batches(islice(loader, 2), map(dataset.__getitem__, range(3, 5)))  # the next `iter` goes on, too

    def test_processes_share_the_indices_and_may_change_in_number(self, dataset):
        loaders = [BatchLoader(dataset, 0, rank, 2) for rank in range(2)]
        for rank, loader in enumerate(loaders):
            assert_batches(islice(loader, 2), map(dataset.__getitem__, (rank, rank + 2)))
        assert loaders[0].state_dict() == loaders[1].state_dict()
        for rank in range(3):
            loader = resumed(BatchLoader(dataset, 0, rank, 3), loaders[1].state_dict())
            assert_batches(islice(loader, 2), map(dataset.__getitem__, (4 + rank, 7 + rank)))

    def test_leaves_the_random_numbers_of_the_run_alone(self, dataset):
        before = torch.get_rng_state()
        next(iter(BatchLoader(dataset, 1)))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("available", [False, True])
    def test_pins_memory_for_accelerators(self, dataset, monkeypatch, available):
        options = {}
        monkeypatch.setattr(loader_module, "DataLoader", lambda dataset, **kwargs: options.update(kwargs) or [])
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
        list(BatchLoader(dataset, 0))
        assert options["pin_memory"] is available

    def test_pinned_batches(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: x + 1)
        zeros = [torch.zeros(2, 3)] * 2
        batch = Batch(zeros, zeros[0], zeros[1], ["a: reason"], {"epoch": 1}).pin_memory()
        assert all((x == 1).all() for x in (*batch.pixels, batch.moments, batch.labels)) and len(batch.pixels) == 2
        assert batch.skipped == ["a: reason"] and batch.position == {"epoch": 1}
        assert Batch().pin_memory() == Batch()

    def test_workers_inherit_no_garbage(self, dataset, monkeypatch):
        """Frames of PyAV wait for their threads when they are freed, and a forked process has no threads."""

        class Cycle:
            pass

        gc.disable()
        try:
            cycle = Cycle()
            cycle.own, alive = cycle, weakref.ref(cycle)
            del cycle
            monkeypatch.setattr(loader_module, "DataLoader", lambda *args, **kwargs: [alive()])
            assert list(BatchLoader(dataset, 1)) == [None]
        finally:
            gc.enable()

    def test_pixels_alone(self, tmp_path, caplog):
        write_noise(tmp_path, 2)[1].write_bytes(b"")
        pixels = list(iterate_pixels(cut(CropView([(8, 8, 1.0)], 32 * 64), tmp_path), 2))
        assert [run.shape for run in pixels] == [(32, 3, 1, 8, 8)] * 2
        assert "001.png" in caplog.text


class TestStreams:
    @pytest.mark.parametrize("num_workers, stop", [(0, 3), (2, 3), (2, 4)])
    def test_resumes(self, num_workers, stop):
        def make_loader(rank):
            stream = StreamBatches(Numbers(make_shards([7, 9, 12, 8, 5])), SEVERAL, shuffle_buffer=5)
            return BatchLoader(stream, num_workers, rank, 2)

        for rank in range(2):
            straight, loader = list(islice(make_loader(rank), 9)), make_loader(rank)
            assert_batches(islice(loader, stop), straight[:stop])
            other = resumed(make_loader(rank), loader.state_dict())
            assert_batches(islice(other, 9 - stop), straight[stop:])
            assert other.batches == 9

    def test_processes_and_workers_see_different_samples(self):
        for lengths in ([7, 9, 8, 6], [30]):
            stream = StreamBatches(Numbers(make_shards(lengths)), ONE, shuffle_buffer=3)
            seen = [numbers(islice(BatchLoader(stream, 2, rank, 2), 10)) for rank in range(2)]
            assert len(set(seen[0])) == len(set(seen[1])) == 10 and not set(seen[0]) & set(seen[1])

    @pytest.mark.parametrize(
        "change",
        [
            *({"num_workers": 3}, {"num_processes": 4}, {"process_index": 0}),
            *({"lengths": [6]}, {"shuffle_buffer": 10}, {"seed": 1}),
        ],
    )
    def test_other_readers_are_refused(self, change):
        def make_loader(lengths=(3, 3), seed=0, shuffle_buffer=1000, **readers):
            stream = StreamBatches(Numbers(make_shards(lengths)), ONE, seed, shuffle_buffer)
            return BatchLoader(stream, **{"num_workers": 2, "process_index": 1, "num_processes": 2} | readers)

        state = make_loader().state_dict()
        make_loader().load_state_dict(state)
        with pytest.raises(
            ValueError, match="A stream resumes with the readers.*restore them, or start the data anew"
        ):
            make_loader(**change).load_state_dict(state)

    def test_states_of_other_data_are_refused(self, tmp_path):
        write_noise(tmp_path, 1)
        stream = BatchLoader(StreamBatches(Numbers(make_shards([6])), ONE), 0)
        drawn = BatchLoader(cut(ONE, tmp_path), 0)
        with pytest.raises(ValueError, match="The state is of data drawn by index, but the data are a stream"):
            stream.load_state_dict(drawn.state_dict())
        with pytest.raises(ValueError, match="The state is of a stream, but the data are data drawn by index"):
            drawn.load_state_dict(stream.state_dict())


class TestMakeDataset:
    def test_folders(self, tmp_path):
        write_noise(tmp_path, 2)
        dataset = make_dataset(ONE, SourceSettings([f"{tmp_path}:2"], cache_gib=0.5), seed=3)
        assert isinstance(dataset, DrawnBatches) and dataset.items.max_bytes == 2**29 and dataset.seed == 3

    def test_shards(self):
        sources = SourceSettings(train_shards=["a/{00..02}.tar", "b.tar"], shuffle_buffer=5)
        dataset = make_dataset(ONE, sources, seed=3)
        assert isinstance(dataset, StreamBatches) and dataset.shuffle_buffer == 5 and dataset.seed == 3
        assert dataset.source.urls == ["a/00.tar", "a/01.tar", "a/02.tar", "b.tar"]

    @pytest.mark.parametrize(
        "places, message",
        [
            ({}, "Set exactly one of train_data_dir, dataset_name, train_shards"),
            ({"train_data_dir": ["x"], "train_shards": ["y"]}, "Set exactly one of .*'train_shards': \\['y'\\]"),
            ({"train_data_dir": ["x"], "streaming": True}, "belong to `dataset_name`, which is not set"),
            ({"train_shards": ["x"], "data_column": "image"}, "belong to `dataset_name`, which is not set"),
        ],
    )
    def test_errors(self, places, message):
        with pytest.raises(ValueError, match=message):
            SourceSettings(**places)
