import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import write_noise
from vitok_hf.data.held_out import EvaluationData, Protocol, load_evaluation_images
from vitok_hf.data.items import Item
from vitok_hf.data.sources import FolderFiles


class TestEvaluationData:
    def test_items_as_they_are(self, tmp_path):
        sizes = ((40, 32), (40, 32), (40, 32), (24, 16))
        for index, size in enumerate(sizes):
            write_noise(tmp_path / str(index), 1, size)
        data = EvaluationData(FolderFiles(tmp_path), Protocol(None))
        assert [run.shape for run in data.batches(range(4), 2)] == [
            (2, 3, 1, 32, 40),
            (1, 3, 1, 32, 40),
            (1, 3, 1, 16, 24),
        ]
        picture = np.asarray(Image.open(tmp_path / "3" / "000.png"))
        assert np.array_equal(data[3][:, 0].permute(1, 2, 0).numpy(), picture)
        with pytest.raises(IndexError):
            data[4]

    def test_random_clips_are_always_the_same(self, video):
        items, protocol = [Item("a", video, True)] * 6, Protocol(16, 2, 5.0)
        first, random, again = (EvaluationData(items, protocol, random_clips=where) for where in (False, True, True))
        assert first[3].shape == (3, 2, 16, 16) and torch.equal(first[0], first[3])
        assert all(torch.equal(random[index], again[index]) for index in range(6))
        assert len({int(random[index][0, 0, 0, 0]) for index in range(6)}) > 3
        assert first.frame_rate(0) == 5.0 and EvaluationData(items, Protocol(16, 2)).frame_rate(0) == 25.0

    def test_what_cannot_be_measured(self, tmp_path):
        with pytest.raises(ValueError, match="There are no pictures to measure on"):
            EvaluationData([], Protocol())
        with pytest.raises(ValueError, match="gone.png: cannot be read as a picture"):
            EvaluationData([Item("gone.png", tmp_path / "gone.png")], Protocol())[0]


class TestImages:
    def test_squares_evenly_spaced(self):
        images = load_evaluation_images(ASSETS, 32, 3)
        assert images.shape == (3, 3, 1, 32, 32) and images.dtype == torch.uint8
        reference = Image.open(ASSETS / "astronaut.png").resize((32, 32), Image.Resampling.BICUBIC)
        difference = images[0, :, 0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)
        assert np.abs(difference).mean() < 1.0
        assert torch.equal(images, load_evaluation_images(ASSETS, 32, 99)[[0, 2, 3]])

    def test_pictures_or_clips(self, video, tmp_path):
        write_noise(tmp_path, 1)
        (tmp_path / "x.mp4").write_bytes(video.read_bytes())
        assert load_evaluation_images(tmp_path, 16, 9).shape == (1, 3, 1, 16, 16)
        assert load_evaluation_images(tmp_path, 16, 9, 4, 5.0).shape == (1, 3, 4, 16, 16)
