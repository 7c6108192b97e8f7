import io
import json
from collections import Counter
from itertools import islice, takewhile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import assert_same, cut, write_noise
from vitok_hf.data import batches, items
from vitok_hf.data.batches import Batch, StreamBatches
from vitok_hf.data.items import Clip, Item
from vitok_hf.data.views import CropView, NativeView


def test_batch_counts_its_items():
    runs = [torch.zeros(2, 3, 1, 8, 8), torch.zeros(3, 3, 1, 8, 16)]
    assert Batch(runs).num_items == 5 and Batch(moments=torch.zeros(4, 2, 16, 1, 2, 2)).num_items == 4


class TestDrawnBatches:
    VIEW = CropView([(8, 8, 1.0)], 32 * 64)

    def test_an_item_depends_on_seed_and_index_alone(self):
        one, other, reseeded = (cut(self.VIEW, ASSETS, seed=seed) for seed in (0, 0, 1))
        other[5]
        assert_same(one[3], other[3])
        assert not torch.equal(one[3].pixels[0], reseeded[3].pixels[0])

    def test_broken_files_are_skipped_and_named(self, tmp_path):
        paths = write_noise(tmp_path, 60)
        whole = paths[0].read_bytes()
        chunk = whole.replace(b"IDAT", b"I\x00\x01T")  # Pillow raises a SyntaxError
        broken = {paths[5]: whole[:500], paths[20]: b"", paths[21]: b"no picture", paths[40]: chunk}
        for path, content in broken.items():
            path.write_bytes(content)
        dataset, again = (cut(self.VIEW, tmp_path) for _ in range(2))
        paths[50].unlink()
        drawn = [dataset[index] for index in range(12)]
        assert {batch.num_items for batch in drawn} == {32}
        named = {reason.split(": ")[0] for batch in drawn for reason in batch.skipped}
        assert named == {str(path) for path in (*broken, paths[50])}
        assert_same(again[7], drawn[7])

    def test_broken_videos(self, tmp_path, video, monkeypatch):
        whole = video.read_bytes()
        contents = {"whole": whole, "cut": whole[:2000], "empty": b"", "text": b"no video" * 1000}
        for name, content in contents.items():
            (tmp_path / f"{name}.mp4").write_bytes(content)
        batch = cut(CropView([(8, 8, 1.0)], 24 * 64 * 4, Clip(4)), tmp_path)[0]
        assert batch.pixels[0].shape == (24, 3, 4, 8, 8)
        named = {reason.split(": ")[0] for reason in batch.skipped}
        assert named == {str(tmp_path / f"{name}.mp4") for name in ("cut", "empty", "text")}
        longest = cut(CropView([(8, 8, 1.0)], 4 * 40 * 64, Clip(40)), video)
        assert [longest[index].skipped for index in range(3)] == [[]] * 3  # 40 of the 50 frames
        monkeypatch.setattr(batches, "MAX_FAILURES", 2)
        with pytest.raises(ValueError, match=r"2 .* in a row .*ramp.mp4: has 50 frames"):
            cut(CropView([(8, 8, 1.0)], 1, Clip(60)), video)[0]

    def test_nothing_readable(self, tmp_path):
        (tmp_path / "x.png").touch()
        with pytest.raises(ValueError, match="100 pictures or videos in a row could not be read; check .*x.png"):
            cut(self.VIEW, tmp_path)[0]


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


ONE = NativeView(max_tokens=1, max_pixels=64, token_size=(1, 8))  # a picture a batch
SEVERAL = NativeView(max_tokens=7, max_pixels=192, token_size=(1, 8))  # of 1 to 3 tokens each


def numbers(batches) -> list[int]:
    return [int(picture[0, 0, 0, 0]) for batch in batches for run in batch.pixels for picture in run]


def read_epoch(stream: StreamBatches, reader: int, num_readers: int, epoch: int = 0) -> list[int]:
    batches = takewhile(lambda batch: batch.position["epoch"] <= epoch, stream.read(reader, num_readers))
    return numbers(batch for batch in batches if batch.position["epoch"] == epoch)


class TestStreamOrder:
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
        assert read_epoch(StreamBatches(Numbers(shards), ONE, 1, shuffle_buffer=1), 0, 1) != epochs[0]

    def test_samples_are_shuffled_in_blocks(self):
        stream = StreamBatches(Numbers(make_shards([24])), ONE, shuffle_buffer=8)
        for epoch in range(2):
            order = read_epoch(stream, 0, 1, epoch)
            blocks = [order[start : start + 8] for start in (0, 8, 16)]
            assert [sorted(block) for block in blocks] == make_shards([8, 8, 8])
            assert len({tuple(number % 8 for number in block) for block in blocks}) == 3
        assert read_epoch(stream, 0, 1, 0) != read_epoch(stream, 0, 1, 1)

    def test_the_buffer_is_not_decoded(self, monkeypatch):
        loaded, load_image = [], items.load_image
        monkeypatch.setattr(items, "load_image", lambda *args: loaded.append(args) or load_image(*args))
        next(StreamBatches(Numbers(make_shards([50])), ONE, shuffle_buffer=50).read(0, 1))
        assert len(loaded) == 1

    def test_crops_differ_between_readers_and_batches(self):
        class Same(Numbers):
            def items(self, shard):
                pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
                file = io.BytesIO()
                Image.fromarray(pixels).save(file, "PNG")
                return (Item(str(number), file.getvalue()) for number in self.shards[shard])

        stream = StreamBatches(Same(make_shards([4, 4])), CropView([(8, 8, 1.0)], 64))
        drawn = [batch for reader in range(2) for batch in islice(stream.read(reader, 2), 3)]
        assert len({batch.pixels[0].numpy().tobytes() for batch in drawn}) == 6


class TestStreamBudget:
    def test_what_does_not_fit_opens_the_next_batch(self):
        stream = StreamBatches(Numbers(make_shards([9, 10, 11])), SEVERAL, shuffle_buffer=6)
        drawn = list(islice(stream.read(0, 1), 40))
        counts = Counter(numbers(drawn))  # nothing is lost
        assert len(counts) == 30 and max(counts.values()) - min(counts.values()) <= 1
        tokens = [[1 + number % 3 for number in numbers([batch])] for batch in drawn]
        assert max(map(sum, tokens)) == 7
        assert all(sum(batch) + following[0] > 7 for batch, following in zip(tokens, tokens[1:]))


class TestStreamPositions:
    @pytest.mark.parametrize("view", [ONE, SEVERAL, CropView([(4, 4, 1.0), (8, 2, 1.0)], 5 * 16)])
    @pytest.mark.parametrize("reader, num_readers", [(0, 1), (1, 2), (2, 5)])
    def test_from_every_position(self, view, reader, num_readers):
        source = Numbers(make_shards([7, 1, 12, 9]), broken={2, 9, 10, 25})
        stream = StreamBatches(source, view, shuffle_buffer=5)
        straight = list(islice(stream.read(reader, num_readers), 33))
        assert straight[-1].position["epoch"] > 0 and any(batch.skipped for batch in straight)
        for index, batch in enumerate(straight[:30]):
            position = json.loads(json.dumps(batch.position))
            for ours, theirs in zip(islice(stream.read(reader, num_readers, position), 3), straight[index + 1 :]):
                assert_same(ours, theirs)


class TestStreamErrors:
    def test_broken_samples_are_skipped_and_named_once_an_epoch(self):
        broken = {4, 17}
        stream = StreamBatches(Numbers(make_shards([20, 20]), broken), ONE)
        drawn = list(islice(stream.read(0, 1), 2 * 38))
        assert sorted(numbers(drawn)[:38]) == sorted(set(range(40)) - broken)
        reasons = [reason for batch in drawn for reason in batch.skipped]
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
