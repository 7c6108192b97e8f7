from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from vitok_hf.training.data import (
    CropBatches,
    CropSettings,
    list_files,
    load_clip,
    load_evaluation_images,
    load_image,
    make_dataloader,
    parse_size,
    parse_source,
    video_seconds,
)


def write_video(path: Path) -> None:
    """50 frames at 25 a second; frame i has brightness 5 i."""
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(50):
            picture = np.full((48, 64, 3), 5 * index, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "ramp.mp4"
    write_video(path)
    return path


def brightness(clip: np.ndarray) -> np.ndarray:
    return clip.mean(axis=(1, 2, 3)) / 5


class TestFiles:
    def test_list(self, tmp_path):
        for name in ("b/two.JPG", "a/one.png", "notes.txt", "film.mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        assert [file.name for file in list_files(tmp_path)] == ["one.png", "two.JPG", "film.mp4"]
        with pytest.raises(ValueError, match="holds no file"):
            list_files(tmp_path / "empty")

    def test_transparent_pictures_are_put_on_white(self, tmp_path):
        picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        picture.putpixel((0, 0), (0, 0, 255, 255))
        picture.save(tmp_path / "x.png")
        pixels = load_image(tmp_path / "x.png")
        assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[1, 1].tolist() == [255, 255, 255]

    def test_broken_pictures_are_named(self, tmp_path):
        (tmp_path / "broken.png").write_bytes((ASSETS / "coffee.png").read_bytes()[:1000])
        with pytest.raises(ValueError, match="broken.png"):
            load_image(tmp_path / "broken.png")

    def test_evaluation_images(self):
        images = load_evaluation_images(ASSETS, 32, 3)
        assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
        reference = Image.open(ASSETS / "astronaut.png").resize((32, 32), Image.Resampling.BICUBIC)
        difference = images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)
        assert np.abs(difference).mean() < 1.0


class TestVideo:
    def test_every_frame(self, video):
        np.testing.assert_allclose(brightness(load_clip(video, 0.4, 8)), np.arange(10, 18), atol=0.5)

    def test_frame_rate(self, video):
        np.testing.assert_allclose(brightness(load_clip(video, 0.2, 4, fps=5)), [5, 10, 15, 20], atol=0.5)

    def test_end_of_the_video(self, video):
        assert video_seconds(video) == pytest.approx(2.0, abs=0.05)
        with pytest.raises(ValueError, match="has 5 frames from 1.80 s"):
            load_clip(video, 1.8, 8)

    def test_clips_in_batches(self, video):
        dataset = CropBatches([str(video)], CropSettings([(16, 32, 1.0)], 2 * 4 * 16 * 32, num_frames=4, fps=12.5))
        for index in range(6):
            batch = dataset[index]
            assert batch.shape == (2, 3, 4, 16, 32)
            steps = batch.float().mean(dim=(1, 3, 4)).diff(dim=1) / 5
            torch.testing.assert_close(steps, torch.full((2, 3), 2.0), rtol=0, atol=0.5)

    def test_frames_of_videos_train_image_models(self, video):
        batch = CropBatches([str(video)], CropSettings([(16, 16, 1.0)], 4 * 16 * 16))[0]
        assert batch.shape == (4, 3, 16, 16)


class TestCropBatches:
    SETTINGS = CropSettings([(32, 32, 1.0), (16, 64, 1.0)], 8 * 32 * 32)

    def test_an_item_depends_on_seed_and_index_alone(self):
        one, other = (CropBatches([str(ASSETS)], self.SETTINGS) for _ in range(2))
        other[5]
        assert torch.equal(one[3], other[3])
        assert one[3].dtype == torch.uint8
        reseeded = CropBatches([str(ASSETS)], CropSettings([(32, 32, 1.0)], 8 * 32 * 32, seed=1))
        plain = CropBatches([str(ASSETS)], CropSettings([(32, 32, 1.0)], 8 * 32 * 32))
        assert not torch.equal(plain[0], reseeded[0])

    def test_sizes_share_a_pixel_budget(self):
        shapes = {CropBatches([str(ASSETS)], self.SETTINGS)[index].shape for index in range(12)}
        assert shapes == {(8, 3, 32, 32), (8, 3, 16, 64)}

    def test_workers_and_start_do_not_matter(self):
        dataset = CropBatches([str(ASSETS)], self.SETTINGS)
        batches = list(make_dataloader(dataset, range(2, 8, 2), num_workers=2))
        assert len(batches) == 3
        assert all(torch.equal(batch, dataset[index]) for batch, index in zip(batches, (2, 4, 6)))

    def test_source_weights(self, tmp_path):
        for name, colour in (("red", (200, 0, 0)), ("blue", (0, 0, 200))):
            (tmp_path / name).mkdir()
            Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / name / "x.png")
            pixels = np.asarray(Image.open(tmp_path / name / "x.png")) // 4 + np.array(colour, dtype=np.uint8)
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / "x.png")
        sources = [f"{tmp_path}/red:3", f"{tmp_path}/blue:1"]
        dataset = CropBatches(sources, CropSettings([(8, 8, 1.0)], 400 * 64))
        red = (dataset[0].float().mean(dim=(2, 3))[:, 0] > 150).float().mean()
        assert red == pytest.approx(0.75, abs=0.08)

    def test_flip(self, tmp_path):
        ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")

        def rising(flip):
            dataset = CropBatches([str(tmp_path)], CropSettings([(32, 32, 1.0)], 64 * 32 * 32, flip=flip))
            return (dataset[0][:, 0, 0, -1].int() > dataset[0][:, 0, 0, 0].int()).float().mean()

        assert rising(False) == 1.0
        assert 0.3 < rising(True) < 0.7

    def test_flat_crops_are_rare(self, tmp_path):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        pixels[:, :32] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
        Image.fromarray(pixels).save(tmp_path / "half.png")
        batch = CropBatches([str(tmp_path)], CropSettings([(4, 4, 1.0)], 512 * 16))[0].float()
        assert (batch.std(dim=(1, 2, 3)) < 4).float().mean() < 0.15  # about 0.4 without the rule

    def test_cache_is_bounded(self):
        largest = max(load_image(file).nbytes for file in list_files(ASSETS))
        dataset = CropBatches([str(ASSETS)], self.SETTINGS, cache_bytes=2 * largest)
        reference = CropBatches([str(ASSETS)], self.SETTINGS)
        for index in range(4):
            assert torch.equal(dataset[index], reference[index])
            assert dataset.cached_bytes == sum(x.nbytes for x in dataset.cache.values()) <= 2 * largest


class TestParsing:
    def test_sources(self):
        assert parse_source("a/b:0.5") == ("a/b", 0.5)
        assert parse_source("a/b") == ("a/b", None)
        assert parse_source("C:folder") == ("C:folder", None)

    def test_sizes(self):
        assert parse_size("128") == (128, 128, 1.0)
        assert parse_size("64x128:0.5") == (64, 128, 0.5)
        with pytest.raises(ValueError, match='"12y" must be'):
            parse_size("12y")

    def test_weights_that_make_no_distribution(self):
        with pytest.raises(ValueError, match="must not be negative nor all 0"):
            CropBatches([f"{ASSETS}:0"], CropSettings([(8, 8, 1.0)], 64))
