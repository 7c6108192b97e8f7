import io
import json
from itertools import islice, takewhile

import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import assert_same
from vitok_hf.data import streams
from vitok_hf.data.batches import BatchLoader
from vitok_hf.data.cropping import CropSettings
from vitok_hf.data.media import Item
from vitok_hf.data.streams import StreamBatches


def numbered_picture(number: int, width: int = 8) -> bytes:
    """A PNG of 8 rows of the grey `number` and its opposite."""
    file = io.BytesIO()
    pixels = np.full((8, width, 3), number, dtype=np.uint8)
    pixels[1::2] = 255 - number
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Numbers:
    """A stream of numbered pictures, of a width that differs; `shards` holds their numbers, `broken` some of them."""

    name = "numbers"

    def __init__(self, shards: list[list[int]], broken: set[int] = frozenset()):
        self.shards, self.broken = shards, broken

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def items(self, shard: int):
        for number in self.shards[shard]:
            picture = numbered_picture(number, width=8 * (1 + number % 3))
            yield Item(str(number), picture[:40] if number in self.broken else picture)


def make_shards(lengths: list[int]) -> list[list[int]]:
    ends = np.cumsum(lengths)
    return [list(range(end - length, end)) for end, length in zip(ends, lengths)]


ONE = CropSettings(max_tokens=1, max_pixels=64, token_size=(1, 8))  # a picture a batch
SEVERAL = CropSettings(max_tokens=7, max_pixels=192, token_size=(1, 8))  # of 1 to 3 tokens each


def numbers(batches) -> list[int]:
    return [int(picture[0, 0, 0]) for batch in batches for picture in batch.pixels]


def read_epoch(stream: StreamBatches, reader: int, num_readers: int, epoch: int = 0) -> list[int]:
    batches = takewhile(lambda batch: batch.position["epoch"] <= epoch, stream.read(reader, num_readers))
    return numbers(batch for batch in batches if batch.position["epoch"] == epoch)


class TestOrder:
    @pytest.mark.parametrize("num_readers", [1, 2, 3, 5, 7])
    @pytest.mark.parametrize("epoch", [0, 1])
    def test_every_sample_once_an_epoch(self, num_readers, epoch):
        stream = StreamBatches(Numbers(make_shards([7, 0, 12, 9, 8])), ONE, shuffle_buffer=4)
        parts = [read_epoch(stream, reader, num_readers, epoch) for reader in range(num_readers)]
        assert sorted(sum(parts, [])) == list(range(36))

    def test_readers_share_a_few_shards_evenly(self):
        stream = StreamBatches(Numbers(make_shards([20, 22])), ONE)
        assert {len(read_epoch(stream, reader, 4)) for reader in range(4)} <= {10, 11}

    def test_shards_are_shuffled_every_epoch(self):
        shards = make_shards([2] * 8)
        stream = StreamBatches(Numbers(shards), ONE, shuffle_buffer=1)
        epochs = [read_epoch(stream, 0, 1, epoch) for epoch in range(2)]
        assert epochs[0] != epochs[1] and list(range(16)) not in epochs
        assert all(epoch[::2] == [number - 1 for number in epoch[1::2]] for epoch in epochs)  # in order in a shard
        reseeded = CropSettings(max_tokens=1, max_pixels=64, token_size=(1, 8), seed=1)
        assert read_epoch(StreamBatches(Numbers(shards), reseeded, shuffle_buffer=1), 0, 1) != epochs[0]

    def test_samples_are_shuffled_in_blocks(self):
        stream = StreamBatches(Numbers(make_shards([24])), ONE, shuffle_buffer=8)
        for epoch in range(2):
            order = read_epoch(stream, 0, 1, epoch)
            blocks = [order[start : start + 8] for start in (0, 8, 16)]
            assert [sorted(block) for block in blocks] == make_shards([8, 8, 8])
            assert len({tuple(number % 8 for number in block) for block in blocks}) == 3
        assert read_epoch(stream, 0, 1, 0) != read_epoch(stream, 0, 1, 1)

    def test_the_buffer_is_not_decoded(self, monkeypatch):
        loaded, load_item = [], streams.load_item

        def count(item, *args):
            loaded.append(item.name)
            return load_item(item, *args)

        monkeypatch.setattr(streams, "load_item", count)
        next(StreamBatches(Numbers(make_shards([50])), ONE, shuffle_buffer=50).read(0, 1))
        assert len(loaded) == 1

    def test_crops_differ_between_readers_and_batches(self):
        class Same(Numbers):
            def items(self, shard):
                pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                return (Item(str(number), file.getvalue()) for number in self.shards[shard])

        stream = StreamBatches(Same(make_shards([4, 4])), CropSettings([(8, 8, 1.0)], 64))
        batches = [batch for reader in range(2) for batch in islice(stream.read(reader, 2), 3)]
        assert len({batch.pixels.numpy().tobytes() for batch in batches}) == 6


class TestTokenBudget:
    def test_what_does_not_fit_opens_the_next_batch(self):
        stream = StreamBatches(Numbers(make_shards([9, 10, 11])), SEVERAL, shuffle_buffer=6)
        batches = list(islice(stream.read(0, 1), 40))
        order = numbers(batches)
        assert sorted(order[:30]) == sorted(order[30:60]) == list(range(30))
        tokens = [[1 + number % 3 for number in numbers([batch])] for batch in batches]
        assert max(map(sum, tokens)) == 7
        assert all(sum(batch) + following[0] > 7 for batch, following in zip(tokens, tokens[1:]))


class TestResume:
    @pytest.mark.parametrize("settings", [ONE, SEVERAL, CropSettings([(4, 4, 1.0), (8, 2, 1.0)], 5 * 16)])
    @pytest.mark.parametrize("reader, num_readers", [(0, 1), (1, 2), (2, 5)])
    def test_from_every_position(self, settings, reader, num_readers):
        source = Numbers(make_shards([7, 1, 12, 9]), broken={2, 9, 10, 25})
        stream = StreamBatches(source, settings, shuffle_buffer=5)
        straight = list(islice(stream.read(reader, num_readers), 33))
        assert straight[-1].position["epoch"] > 0 and any(batch.skipped for batch in straight)
        for index, batch in enumerate(straight[:30]):
            position = json.loads(json.dumps(batch.position))
            for ours, theirs in zip(islice(stream.read(reader, num_readers, position), 3), straight[index + 1 :]):
                assert_same(ours, theirs)

    @pytest.mark.parametrize("num_workers", [0, 2])
    @pytest.mark.parametrize("stop", [3, 4])
    def test_loader(self, num_workers, stop):
        def make_loader(rank):
            stream = StreamBatches(Numbers(make_shards([7, 9, 12, 8, 5])), SEVERAL, shuffle_buffer=5)
            return BatchLoader(stream, num_workers, rank, 2)

        for rank in range(2):
            straight = list(islice(make_loader(rank), 9))
            loader = make_loader(rank)
            for ours, theirs in zip(islice(loader, stop), straight):
                assert_same(ours, theirs)
            resumed = make_loader(rank)
            resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
            for ours, theirs in zip(islice(resumed, 9 - stop), straight[stop:]):
                assert_same(ours, theirs)
            assert resumed.batches == 9

    def test_processes_and_workers_see_different_samples(self):
        for lengths in ([7, 9, 8, 6], [30]):
            stream = StreamBatches(Numbers(make_shards(lengths)), ONE, shuffle_buffer=3)
            seen = [numbers(islice(BatchLoader(stream, 2, rank, 2), 10)) for rank in range(2)]
            assert len(set(seen[0])) == len(set(seen[1])) == 10 and not set(seen[0]) & set(seen[1])

    @pytest.mark.parametrize("change", [{"num_workers": 3}, {"num_processes": 4}, {"process_index": 0}])
    def test_other_readers_are_refused(self, change):
        stream = StreamBatches(Numbers(make_shards([3])), ONE)
        readers = {"num_workers": 2, "process_index": 1, "num_processes": 2}
        state = BatchLoader(stream, **readers).state_dict()
        with pytest.raises(ValueError, match="A stream resumes with the readers"):
            BatchLoader(stream, **readers | change).load_state_dict(state)

    def test_other_streams_are_refused(self):
        state = BatchLoader(StreamBatches(Numbers(make_shards([3, 3])), ONE), 0).state_dict()
        for shards, buffer in (([6], 1000), ([3, 3], 10)):
            other = BatchLoader(StreamBatches(Numbers(make_shards(shards)), ONE, buffer), 0)
            with pytest.raises(ValueError, match="restore them, or start the data anew"):
                other.load_state_dict(state)
        with pytest.raises(ValueError, match="The state is of data drawn by index, but the data are a stream"):
            BatchLoader(StreamBatches(Numbers(make_shards([6])), ONE), 0).load_state_dict({"batches": 3})


class TestErrors:
    def test_broken_samples_are_skipped_and_named_once_an_epoch(self):
        broken = {4, 17}
        stream = StreamBatches(Numbers(make_shards([20, 20]), broken), ONE)
        batches = list(islice(stream.read(0, 1), 2 * 38))
        assert sorted(numbers(batches)[:38]) == sorted(set(range(40)) - broken)
        reasons = [reason for batch in batches for reason in batch.skipped]
        assert sorted(reason.split(": ")[0] for reason in reasons) in (["17", "17", "4", "4"], ["17", "4", "4"])
        assert all("cannot be read as a picture" in reason for reason in reasons)

    def test_nothing_readable(self):
        stream = StreamBatches(Numbers(make_shards([3]), {0, 1, 2}), ONE)
        with pytest.raises(ValueError, match="100 pictures or videos in a row could not be read"):
            next(stream.read(0, 1))

    def test_empty_streams(self):
        with pytest.raises(ValueError, match='"numbers" has no shards'):
            StreamBatches(Numbers([]), ONE)
        with pytest.raises(ValueError, match='"numbers" had no sample for reader 0 of 1'):
            next(StreamBatches(Numbers([[], []]), ONE).read(0, 1))
        with pytest.raises(ValueError, match="had no sample for reader 2 of 3 .*use fewer workers"):
            next(StreamBatches(Numbers([[1, 2]]), ONE).read(2, 3))
        with pytest.raises(ValueError, match="`shuffle_buffer` must be at least 1"):
            StreamBatches(Numbers([[1]]), ONE, shuffle_buffer=0)

    def test_a_reader_may_be_dealt_an_empty_shard(self):
        stream = StreamBatches(Numbers([[1, 2], []]), ONE)
        assert all(set(numbers(islice(stream.read(reader, 2), 4))) == {1, 2} for reader in range(2))
