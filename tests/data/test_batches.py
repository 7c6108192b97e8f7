import gc
import json
import weakref
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import assert_same, write_noise
from vitok_hf.data import batches, cropping
from vitok_hf.data.batches import BatchLoader, CropBatches, iterate_pixels, make_dataset
from vitok_hf.data.cropping import Batch, CropSettings
from vitok_hf.data.files import list_files
from vitok_hf.data.media import load_image
from vitok_hf.data.sources import parse_source
from vitok_hf.data.streams import StreamBatches


class TestCropBatches:
    SETTINGS = CropSettings([(32, 32, 1.0), (16, 64, 1.0)], 8 * 32 * 32)

    def test_an_item_depends_on_seed_and_index_alone(self):
        one, other = (CropBatches([str(ASSETS)], self.SETTINGS) for _ in range(2))
        other[5]
        assert torch.equal(one[3].pixels, other[3].pixels)
        assert one[3].pixels.dtype == torch.uint8
        reseeded = CropBatches([str(ASSETS)], CropSettings([(32, 32, 1.0)], 8 * 32 * 32, seed=1))
        plain = CropBatches([str(ASSETS)], CropSettings([(32, 32, 1.0)], 8 * 32 * 32))
        assert not torch.equal(plain[0].pixels, reseeded[0].pixels)

    def test_crops_stay_what_they_were(self):
        settings = CropSettings([(32, 32, 1.0), (16, 64, 2.0)], 8 * 32 * 32)
        dataset = CropBatches([f"{ASSETS}/coffee.png:2", f"{ASSETS}:4"], settings)
        means = [dataset[index].pixels.float().mean().item() for index in range(4)]
        assert means == pytest.approx([93.74, 87.76, 102.84, 109.33], abs=0.1)

    def test_sizes_share_a_pixel_budget(self):
        shapes = {CropBatches([str(ASSETS)], self.SETTINGS)[index].pixels.shape for index in range(12)}
        assert shapes == {(8, 3, 32, 32), (8, 3, 16, 64)}

    def test_source_weights(self, tmp_path):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            (tmp_path / name).mkdir()
            Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / name / "x.png")
            pixels = np.asarray(Image.open(tmp_path / name / "x.png")) // 4 + np.array(colour, dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / "x.png")
        sources = [f"{tmp_path}/red:3", f"{tmp_path}/blue:1"]
        dataset = CropBatches(sources, CropSettings([(8, 8, 1.0)], 400 * 64))
        red = (dataset[0].pixels.float().mean(dim=(2, 3))[:, 0] > 150).float().mean()
        assert red == pytest.approx(0.75, abs=0.08)

    def test_flip(self, tmp_path):
        ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")

        def rising(flip):
            dataset = CropBatches([str(tmp_path)], CropSettings([(32, 32, 1.0)], 64 * 32 * 32, flip=flip))
            pixels = dataset[0].pixels.int()
            return (pixels[:, 0, 0, -1] > pixels[:, 0, 0, 0]).float().mean()

        assert rising(False) == 1.0
        assert 0.3 < rising(True) < 0.7

    def test_flat_crops_are_rare(self, tmp_path):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        pixels[:, :32] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
        Image.fromarray(pixels).save(tmp_path / "half.png")
        batch = CropBatches([str(tmp_path)], CropSettings([(4, 4, 1.0)], 512 * 16))[0].pixels.float()
        assert (batch.std(dim=(1, 2, 3)) < 4).float().mean() < 0.15  # about 0.4 without the rule

    def test_cache_is_bounded(self):
        largest = max(load_image(file).nbytes for file in list_files(ASSETS))
        dataset = CropBatches([str(ASSETS)], self.SETTINGS, cache_bytes=2 * largest)
        reference = CropBatches([str(ASSETS)], self.SETTINGS)
        for index in range(4):
            assert torch.equal(dataset[index].pixels, reference[index].pixels)
            assert dataset.cached_bytes == sum(x.nbytes for x in dataset.cache.values()) <= 2 * largest


class TestSources:
    def test_sources(self):
        assert parse_source("a/b:0.5") == ("a/b", 0.5)
        assert parse_source("a/b") == ("a/b", None)
        assert parse_source("C:folder") == ("C:folder", None)

    def test_weights_that_make_no_distribution(self):
        with pytest.raises(ValueError, match="must not be negative nor all 0"):
            CropBatches([f"{ASSETS}:0"], CropSettings([(8, 8, 1.0)], 64))

    @pytest.mark.parametrize(
        "weights, shares", [(("", ""), (4, 1)), (("", ":0.5"), (2, 1)), ((":3", ""), (3, 1)), ((":1", ":9"), (1, 9))]
    )
    def test_weights_that_are_left_out(self, weights, shares):
        sources = [str(path) + weight for path, weight in zip((ASSETS, ASSETS / "coffee.png"), weights)]
        dataset = CropBatches(sources, CropSettings([(8, 8, 1.0)], 64))
        assert dataset.source_probabilities.tolist() == pytest.approx([share / sum(shares) for share in shares])

    def test_pictures_whose_crop_is_rounded_to_more_than_they_have(self, tmp_path):
        write_noise(tmp_path, 1, (116, 150))
        dataset = CropBatches([str(tmp_path)], CropSettings([(224, 224, 1.0)], 224 * 224))
        assert dataset[0].pixels.shape == (1, 3, 224, 224)


class TestVideos:
    def test_clips_of_every_frame_end_before_the_video(self, video):
        dataset = CropBatches([str(video)], CropSettings([(8, 8, 1.0)], 4 * 40 * 64, num_frames=40))
        assert [dataset[index].skipped for index in range(3)] == [[]] * 3  # 40 of the 50 frames

    def test_clips_in_batches(self, video):
        dataset = CropBatches([str(video)], CropSettings([(16, 32, 1.0)], 2 * 4 * 16 * 32, num_frames=4, fps=12.5))
        for index in range(6):
            batch = dataset[index].pixels
            assert batch.shape == (2, 3, 4, 16, 32)
            steps = batch.float().mean(dim=(1, 3, 4)).diff(dim=1) / 5
            torch.testing.assert_close(steps, torch.full((2, 3), 2.0), rtol=0, atol=0.5)

    def test_frames_of_videos_train_image_models(self, video):
        batch = CropBatches([str(video)], CropSettings([(16, 16, 1.0)], 4 * 16 * 16))[0].pixels
        assert batch.shape == (4, 3, 16, 16)


class TestBrokenFiles:
    SETTINGS = CropSettings([(8, 8, 1.0)], 32 * 64)

    def test_are_skipped_and_named(self, tmp_path):
        paths = write_noise(tmp_path, 60)
        whole = paths[0].read_bytes()
        chunk = whole.replace(b"IDAT", b"I\x00\x01T")  # Pillow raises a SyntaxError
        broken = {paths[5]: whole[:500], paths[20]: b"", paths[21]: b"no picture", paths[40]: chunk}
        for path, content in broken.items():
            path.write_bytes(content)
        dataset = CropBatches([str(tmp_path)], self.SETTINGS)
        again = CropBatches([str(tmp_path)], self.SETTINGS)
        paths[50].unlink()
        batches = [dataset[index] for index in range(12)]
        assert {len(batch.pixels) for batch in batches} == {32}
        named = {reason.split(": ")[0] for batch in batches for reason in batch.skipped}
        assert named == {str(path) for path in (*broken, paths[50])}
        assert_same(again[7], batches[7])

    def test_huge_pictures_are_read(self, tmp_path, monkeypatch):
        """Beyond twice its limit, Pillow refuses them."""
        write_noise(tmp_path, 3)
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 32 // 2 - 1)
        batch = CropBatches([str(tmp_path)], self.SETTINGS)[0]
        assert len(batch.pixels) == 32 and not batch.skipped

    def test_videos(self, tmp_path, video, monkeypatch):
        whole = video.read_bytes()
        contents = {"whole": whole, "cut": whole[:2000], "empty": b"", "text": b"no video" * 1000}
        for name, content in contents.items():
            (tmp_path / f"{name}.mp4").write_bytes(content)
        dataset = CropBatches([str(tmp_path)], CropSettings([(8, 8, 1.0)], 24 * 64 * 4, num_frames=4))
        batch = dataset[0]
        assert batch.pixels.shape == (24, 3, 4, 8, 8)
        named = {reason.split(": ")[0] for reason in batch.skipped}
        assert named == {str(tmp_path / f"{name}.mp4") for name in ("cut", "empty", "text")}
        monkeypatch.setattr(cropping, "MAX_FAILURES", 2)
        too_long = CropBatches([str(video)], CropSettings([(8, 8, 1.0)], 1, num_frames=60))
        with pytest.raises(ValueError, match=r"2 .* in a row .*ramp.mp4: has 50 frames"):
            too_long[0]

    def test_nothing_readable(self, tmp_path):
        (tmp_path / "x.png").touch()
        with pytest.raises(ValueError, match="100 pictures or videos in a row could not be read; check .*x.png"):
            CropBatches([str(tmp_path)], self.SETTINGS)[0]

    def test_are_logged_where_only_pixels_are_wanted(self, tmp_path, caplog):
        write_noise(tmp_path, 2)[1].write_bytes(b"")
        pixels = list(iterate_pixels(CropBatches([str(tmp_path)], self.SETTINGS), 2))
        assert [batch.shape for batch in pixels] == [(32, 3, 8, 8)] * 2
        assert "001.png" in caplog.text


class TestBatchLoader:
    SETTINGS = CropSettings([(16, 16, 1.0), (8, 32, 1.0)], 4 * 256)

    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        folder = tmp_path_factory.mktemp("noise")
        write_noise(folder, 12)[3].write_bytes(b"")
        return str(folder)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_resumes_after_the_last_batch_handed_out(self, folder, num_workers):
        dataset = CropBatches([folder], self.SETTINGS)
        loader = BatchLoader(dataset, num_workers)
        assert all(map(same_as(dataset, [0, 1, 2]), islice(loader, 3)))
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = BatchLoader(CropBatches([folder], self.SETTINGS), 2 - num_workers)
        resumed.load_state_dict(state)
        assert all(map(same_as(dataset, [3, 4, 5]), islice(resumed, 3)))
        assert all(map(same_as(dataset, [3, 4]), islice(loader, 2)))  # the next `iter` goes on, too

    def test_processes_share_the_indices_and_may_change_in_number(self, folder):
        dataset = CropBatches([folder], self.SETTINGS)
        loaders = [BatchLoader(dataset, 0, rank, 2) for rank in range(2)]
        for rank, loader in enumerate(loaders):
            assert all(map(same_as(dataset, [rank, rank + 2]), islice(loader, 2)))
        assert loaders[0].state_dict() == loaders[1].state_dict()
        for rank in range(3):
            resumed = BatchLoader(dataset, 0, rank, 3)
            resumed.load_state_dict(loaders[1].state_dict())
            assert all(map(same_as(dataset, [4 + rank, 7 + rank]), islice(resumed, 2)))

    def test_leaves_the_random_numbers_of_the_run_alone(self, folder):
        before = torch.get_rng_state()
        next(iter(BatchLoader(CropBatches([folder], self.SETTINGS), 1)))
        assert torch.equal(torch.get_rng_state(), before)

    @pytest.mark.parametrize("available", [False, True])
    def test_pins_memory_for_accelerators(self, folder, monkeypatch, available):
        options = {}

        def record(dataset, **kwargs):
            options.update(kwargs)
            return []

        monkeypatch.setattr(batches, "DataLoader", record)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: available)
        list(BatchLoader(CropBatches([folder], self.SETTINGS), 0))
        assert options["pin_memory"] is available

    def test_workers_inherit_no_garbage(self, folder, monkeypatch):
        """Frames of PyAV wait for their threads when they are freed, and a forked process has no threads."""

        class Cycle:
            pass

        gc.disable()
        try:
            cycle = Cycle()
            cycle.own, alive = cycle, weakref.ref(cycle)
            del cycle
            monkeypatch.setattr(batches, "DataLoader", lambda *args, **kwargs: [alive()])
            assert list(BatchLoader(CropBatches([folder], self.SETTINGS), 1)) == [None]
        finally:
            gc.enable()

    def test_states_of_streams_are_refused(self, folder):
        loader = BatchLoader(CropBatches([folder], self.SETTINGS), 0)
        with pytest.raises(ValueError, match="The state is of a stream, but the data are data drawn by index"):
            loader.load_state_dict({"batches": 3, "readers": {}, "positions": [None]})


def same_as(dataset: CropBatches, indices: list[int]):
    """Compares one batch after the other with items of the dataset."""
    expected = iter(indices)

    def check(batch: Batch) -> bool:
        assert_same(batch, dataset[next(expected)])
        return True

    return check


class TestMakeDataset:
    SETTINGS = CropSettings([(8, 8, 1.0)], 256)

    def test_folders(self, tmp_path):
        write_noise(tmp_path, 2)
        dataset = make_dataset(self.SETTINGS, train_data_dir=[f"{tmp_path}:2"], cache_bytes=7)
        assert isinstance(dataset, CropBatches) and dataset.cache_bytes == 7
        assert_same(dataset[1], CropBatches([str(tmp_path)], self.SETTINGS)[1])

    def test_shards(self):
        dataset = make_dataset(self.SETTINGS, train_shards=["a/{00..02}.tar", "b.tar"], shuffle_buffer=5)
        assert isinstance(dataset, StreamBatches) and dataset.shuffle_buffer == 5
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
            make_dataset(self.SETTINGS, **places)
