import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import assert_same, cut, write_noise, write_video
from vitok_hf.data.batches import DrawnBatches
from vitok_hf.data.classes import ClassSampler, LabelledFiles
from vitok_hf.data.items import Clip
from vitok_hf.data.media import load_image
from vitok_hf.data.views import CropView, NativeView, SquareView, parse_size


def test_parse_size():
    assert parse_size("128") == (128, 128, 1.0) and parse_size("64x128:0.5") == (64, 128, 0.5)
    with pytest.raises(ValueError, match='"12y" must be'):
        parse_size("12y")


class TestCrops:
    def test_they_stay_what_they_were(self):
        view = CropView([(32, 32, 1.0), (16, 64, 2.0)], 8 * 32 * 32)
        dataset = cut(view, f"{ASSETS}/coffee.png:2", f"{ASSETS}:4")
        means = [dataset[index].pixels[0].float().mean().item() for index in range(4)]
        assert means == pytest.approx([93.74, 87.76, 102.84, 109.33], abs=0.1)

    def test_sizes_share_a_pixel_budget(self):
        dataset = cut(CropView([(32, 32, 1.0), (16, 64, 1.0)], 8 * 32 * 32), ASSETS)
        shapes = {run.shape for index in range(12) for run in dataset[index].pixels}
        assert shapes == {(8, 3, 1, 32, 32), (8, 3, 1, 16, 64)}
        assert dataset[0].num_items == 8 and dataset[0].pixels[0].dtype == torch.uint8

    @pytest.mark.parametrize("flip, least, most", [(False, 1.0, 1.0), (True, 0.3, 0.7)])
    def test_flip(self, tmp_path, flip, least, most):
        ramp = np.repeat(np.arange(0, 256, 4, dtype=np.uint8)[None, :, None], 64, axis=0).repeat(3, axis=2)
        Image.fromarray(ramp).save(tmp_path / "ramp.png")
        pixels = cut(CropView([(32, 32, 1.0)], 64 * 32 * 32, flip=flip), tmp_path)[0].pixels[0].int()
        assert least <= (pixels[:, 0, 0, 0, -1] > pixels[:, 0, 0, 0, 0]).float().mean() <= most

    def test_flat_crops_are_rare(self, tmp_path):
        pixels = np.full((64, 64, 3), 128, dtype=np.uint8)
        pixels[:, :32] = np.random.default_rng(0).integers(0, 256, (64, 32, 3))
        Image.fromarray(pixels).save(tmp_path / "half.png")
        (run,) = cut(CropView([(4, 4, 1.0)], 512 * 16), tmp_path)[0].pixels
        assert (run.float().std(dim=(1, 2, 3, 4)) < 4).float().mean() < 0.15  # about 0.4 without the rule

    def test_pictures_whose_crop_is_rounded_to_more_than_they_have(self, tmp_path):
        write_noise(tmp_path, 1, (116, 150))
        assert cut(CropView([(224, 224, 1.0)], 224 * 224), tmp_path)[0].pixels[0].shape == (1, 3, 1, 224, 224)

    def test_clips(self, video):
        dataset = cut(CropView([(16, 32, 1.0)], 2 * 4 * 16 * 32, Clip(4, 12.5)), video)
        for index in range(6):
            (run,) = dataset[index].pixels
            assert run.shape == (2, 3, 4, 16, 32)
            steps = run.float().mean(dim=(1, 3, 4)).diff(dim=1) / 5
            torch.testing.assert_close(steps, torch.full((2, 3), 2.0), rtol=0, atol=0.5)
        assert cut(CropView([(16, 16, 1.0)], 4 * 256), video)[0].pixels[0].shape == (4, 3, 1, 16, 16)  # single frames

    def test_pictures_beside_clips_are_a_run_of_one_frame(self, tmp_path, video):
        write_noise(tmp_path, 3)
        view = CropView([(16, 32, 1.0)], 12 * 4 * 16 * 32, Clip(4, with_pictures=True))
        for index in range(4):
            batch = cut(view, f"{video}:1", f"{tmp_path}:2")[index]
            clips, pictures = sorted(batch.pixels, key=lambda run: -run.shape[2])
            assert clips.shape[1:] == (3, 4, 16, 32) and pictures.shape[1:] == (3, 1, 16, 32)
            assert batch.num_items == 12
        with pytest.raises(ValueError, match="holds no file that ends in .avi"):
            cut(CropView([(16, 32, 1.0)], 4 * 512, Clip(4)), tmp_path)

    @pytest.mark.parametrize(
        "sizes, pixels, message",
        [
            ([], 64, "shares of `sizes`"),
            ([(8, 8, 2.0), (9, 9, -1.0)], 64, "shares of `sizes`"),
            ([(8, 8, 1.0)], 0, "`pixels_per_batch` must be at least 1, but is 0"),
        ],
    )
    def test_errors(self, sizes, pixels, message):
        with pytest.raises(ValueError, match=message):
            CropView(sizes, pixels)


class TestNativePictures:
    def view(self, **overrides):
        return NativeView(
            **{"max_tokens": 40, "max_pixels": 64 * 64, "token_size": (1, 16), "flip": False} | overrides
        )

    @pytest.mark.parametrize(
        "size, max_tokens, expected",
        [
            ((64, 64), 40, (64, 64)),
            ((30, 50), 40, (30, 50)),  # never enlarged, need not fit the tokens
            ((192, 192), 40, (64, 64)),
            ((32, 512), 40, (16, 256)),
            ((100, 300), 40, (36, 110)),
            ((4, 8), 40, (16, 32)),  # but at least a token a side
            ((2, 4000), 40, (16, 256)),
            ((17, 240), 16, (16, 225)),  # else 30 tokens, of which most are padding
            ((65, 63), 16, (64, 62)),
            ((10, 3000), 16, (16, 256)),
        ],
    )
    def test_size(self, size, max_tokens, expected):
        view = self.view(max_tokens=max_tokens)
        assert view.native_size(*size) == expected and view.native_size(*size[::-1]) == expected[::-1]
        assert view.tokens(*expected) <= max_tokens

    @pytest.mark.parametrize("max_tokens, max_pixels, patch", [(9, 4500, 32), (25, 5000, 16), (9, 150, 4)])
    def test_any_picture_fits_into_the_budget(self, max_tokens, max_pixels, patch):
        view = NativeView(max_tokens * 2, max_pixels, (2, patch), Clip(4))
        for height in (*range(1, 150, 7), 1000):
            for width in (*range(1, 150, 5), 4000):
                size = view.native_size(height, width)
                assert view.tokens(*size) <= 2 * max_tokens and size[0] * size[1] <= max_pixels
                assert min(size) >= patch

    def test_whole_pictures_within_the_budget(self, tmp_path):
        sizes = [(64, 64), (100, 20), (20, 100), (300, 200)]
        for size in sizes:
            write_noise(tmp_path / str(size), 1, size)
        view = self.view()
        expected = {(3, 1, *view.native_size(height, width)) for width, height in sizes}
        batches = [cut(view, tmp_path)[index].pixels for index in range(8)]
        assert {tuple(run.shape[1:]) for batch in batches for run in batch} == expected
        assert all(len({run.shape for run in batch}) == len(batch) for batch in batches)  # a run a size
        tokens = [sum(len(run) * view.tokens(*run.shape[3:]) for run in batch) for batch in batches]
        assert all(40 - 16 < total <= 40 for total in tokens)
        thin = next(run for batch in batches for run in batch if run.shape[3:] == (20, 100))
        unscaled = load_image(tmp_path / "(100, 20)" / "000.png")
        assert np.array_equal(thin[0, :, 0].permute(1, 2, 0).numpy(), unscaled)

    def test_flips(self, tmp_path):
        (path,) = write_noise(tmp_path, 1, (16, 16))
        (pictures,) = cut(self.view(flip=True), tmp_path)[0].pixels
        original = torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)[:, None]
        flipped = [torch.equal(picture, original.flip(3)) for picture in pictures]
        assert 0 < sum(flipped) < len(pictures) == 40
        assert all(flip or torch.equal(picture, original) for flip, picture in zip(flipped, pictures))

    def test_clips(self, video):
        view = self.view(clip=Clip(4), token_size=(2, 16), max_tokens=50)  # 2 * 12 tokens a clip of 64 x 48
        assert [run.shape for run in cut(view, video)[0].pixels] == [(2, 3, 4, 48, 64)]

    def test_pictures_beside_clips_have_fewer_tokens(self, tmp_path, video):
        write_noise(tmp_path, 3, (64, 48))
        view = self.view(clip=Clip(5, with_pictures=True), token_size=(4, 16), max_tokens=120)
        seen = set()
        for index in range(4):  # 24 tokens a clip, 12 a picture
            runs = cut(view, video, tmp_path)[index].pixels
            counts = {run.shape[2]: len(run) for run in runs}
            assert {run.shape[1:2] + run.shape[3:] for run in runs} == {(3, 48, 64)} and set(counts) <= {1, 5}
            assert 120 - 24 < 24 * counts.get(5, 0) + 12 * counts.get(1, 0) <= 120
            seen |= set(counts)
        assert seen == {1, 5}

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"max_tokens": 15}, "`max_tokens` is 15, but a picture of `max_pixels` 4096 has 16 tokens"),
            ({"max_pixels": 100}, "`max_pixels` is 100, less than a token of 16 x 16"),
        ],
    )
    def test_errors(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            self.view(**overrides)


def squares(files: LabelledFiles, *, batch_size: int = 8, seed: int = 0, **options) -> DrawnBatches:
    return DrawnBatches(files, ClassSampler(files.labels, files.classes), SquareView(16, batch_size, **options), seed)


class TestSquares:
    @pytest.fixture
    def files(self, tmp_path):
        """The middle of a wide picture is red left of its own middle and blue right of it; a noisy one besides."""
        picture = np.zeros((16, 48, 3), np.uint8)
        picture[:, 16:24, 0] = picture[:, 24:32, 2] = 255
        (tmp_path / "a").mkdir()
        Image.fromarray(picture).save(tmp_path / "a" / "a.png")
        write_noise(tmp_path / "b", 1)
        return LabelledFiles([tmp_path])

    def test_batch(self, files):
        batch, again, other, seeded = (squares(files, seed=seed)[i] for seed, i in ((0, 3), (0, 3), (0, 4), (1, 3)))
        assert batch.pixels[0].shape == (8, 3, 1, 16, 16) and batch.pixels[0].dtype == torch.uint8
        assert batch.labels.dtype == torch.int64 and set(batch.labels.tolist()) == {0, 1} and batch.num_items == 8
        assert_same(batch, again)
        assert not any(torch.equal(batch.pixels[0], x.pixels[0]) for x in (other, seeded))

    def test_central_squares_and_flips(self, files):
        batch = squares(files, batch_size=64)[0]
        pixels = batch.pixels[0][batch.labels == 0].float()
        left_red, left_blue = (pixels[:, channel, :, :, :8].mean(dim=(1, 2, 3)) > 250 for channel in (0, 2))
        assert torch.equal(left_red, ~left_blue) and 6 < left_red.sum() < 26

    def test_random_squares(self, files):
        """Of half the shorter side or more, anywhere: a third of them would show black alone, and none all colours."""
        batch = squares(files, batch_size=200, min_share=0.5)[0]
        pixels = batch.pixels[0][batch.labels == 0].float()
        black = (pixels.amax(dim=(1, 2, 3, 4)) < 10).float().mean()
        columns = (pixels[:, 0, 0, 8] > 128).sum(dim=1)  # of red, 8 wide in the picture
        assert pixels.shape[1:] == (3, 1, 16, 16) and 0.2 < black < 0.6 and columns.max() >= 12
        central = squares(files, batch_size=200)[0]
        assert torch.equal(batch.labels, central.labels)  # the draws do not depend on the crops

    def test_clips(self, tmp_path):
        write_video(tmp_path / "ramp" / "a.mp4")
        (pixels,) = squares(LabelledFiles([tmp_path], clip=Clip(4)), batch_size=2, clip=Clip(4, 12.5))[0].pixels
        assert pixels.shape == (2, 3, 4, 16, 16)
        steps = pixels.float().mean(dim=(1, 3, 4)).diff(dim=1)
        torch.testing.assert_close(steps, torch.full((2, 3), 10.0), rtol=0, atol=2.0)
