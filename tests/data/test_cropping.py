import numpy as np
import pytest
import torch

from tests.data.conftest import write_noise
from vitok_hf.data.batches import CropBatches
from vitok_hf.data.cropping import CropSettings, parse_size
from vitok_hf.data.media import load_image


def test_parse_size():
    assert parse_size("128") == (128, 128, 1.0)
    assert parse_size("64x128:0.5") == (64, 128, 0.5)
    with pytest.raises(ValueError, match='"12y" must be'):
        parse_size("12y")


class TestNativePictures:
    def settings(self, **overrides):
        defaults = {"max_tokens": 40, "max_pixels": 64 * 64, "token_size": (1, 16), "flip": False}
        return CropSettings(**defaults | overrides)

    @pytest.mark.parametrize(
        "size, expected",
        [
            ((64, 64), (64, 64)),
            ((30, 50), (30, 50)),  # never enlarged, need not fit the tokens
            ((192, 192), (64, 64)),
            ((32, 512), (16, 256)),
            ((100, 300), (36, 110)),
            ((4, 8), (16, 32)),  # but at least a token a side
            ((2, 4000), (16, 256)),
        ],
    )
    def test_size(self, size, expected):
        assert self.settings().native_size(*size) == expected
        assert self.settings().native_size(*size[::-1]) == expected[::-1]

    @pytest.mark.parametrize("size, expected", [((17, 240), (16, 225)), ((65, 63), (64, 62)), ((10, 3000), (16, 256))])
    def test_no_picture_exceeds_the_budget(self, size, expected):
        """Of 4096 pixels and 16 tokens: 17 x 240 would have 30, of which most are padding."""
        settings = self.settings(max_tokens=16)
        assert settings.native_size(*size) == expected and settings.native_size(*size[::-1]) == expected[::-1]
        assert settings.tokens(*expected) <= 16

    @pytest.mark.parametrize("max_tokens, max_pixels, patch", [(9, 4500, 32), (25, 5000, 16), (9, 150, 4)])
    def test_any_picture_fits_into_the_budget(self, max_tokens, max_pixels, patch):
        overrides = {"max_tokens": max_tokens * 2, "max_pixels": max_pixels, "token_size": (2, patch)}
        settings = self.settings(num_frames=4, **overrides)
        for height in (*range(1, 150, 7), 1000):
            for width in (*range(1, 150, 5), 4000):
                size = settings.native_size(height, width)
                assert settings.tokens(*size) <= 2 * max_tokens and size[0] * size[1] <= max_pixels
                assert min(size) >= patch

    def test_a_batch_of_thin_pictures(self, tmp_path):
        write_noise(tmp_path, 2, (240, 17))
        dataset = CropBatches([str(tmp_path)], self.settings(max_tokens=20))
        assert all([x.shape for x in dataset[index].pixels] == [(3, 16, 225)] for index in range(3))  # 15 tokens

    def test_whole_pictures_within_the_budget(self, tmp_path):
        sizes = [(64, 64), (100, 20), (20, 100), (300, 200)]
        for size in sizes:
            write_noise(tmp_path / str(size), 1, size)
        settings = self.settings()
        expected = {(3, *settings.native_size(height, width)) for width, height in sizes}
        dataset = CropBatches([str(tmp_path)], settings)
        batches = [dataset[index].pixels for index in range(8)]
        assert {tuple(picture.shape) for batch in batches for picture in batch} == expected
        tokens = [sum(settings.tokens(*picture.shape[1:]) for picture in batch) for batch in batches]
        assert all(40 - 16 < total <= 40 for total in tokens)
        unscaled = load_image(tmp_path / "(100, 20)" / "000.png")
        thin = next(picture for batch in batches for picture in batch if picture.shape == (3, 20, 100))
        assert np.array_equal(thin.permute(1, 2, 0).numpy(), unscaled)

    def test_flips(self, tmp_path):
        (path,) = write_noise(tmp_path, 1, (16, 16))
        pictures = CropBatches([str(tmp_path)], self.settings(flip=True))[0].pixels
        original = torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)
        flipped = [torch.equal(picture, original.flip(2)) for picture in pictures]
        assert 0 < sum(flipped) < len(pictures) == 40
        assert all(flip or torch.equal(picture, original) for flip, picture in zip(flipped, pictures))

    def test_clips(self, video):
        settings = self.settings(num_frames=4, token_size=(2, 16), max_tokens=50)  # 2 * 12 tokens a clip of 64 x 48
        pictures = CropBatches([str(video)], settings)[0].pixels
        assert [picture.shape for picture in pictures] == [(3, 4, 48, 64)] * 2

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"max_pixels": None}, r"Set both `max_tokens` \(40\) and `max_pixels` \(None\)"),
            ({"max_tokens": 15}, "`max_tokens` is 15, but a picture of `max_pixels` 4096 has 16 tokens"),
            ({"max_pixels": 100}, "`max_pixels` is 100, less than a token of 16 x 16"),
            ({"sizes": [(8, 8, 1.0)]}, "`max_tokens` takes the place of `sizes`"),
            ({"max_tokens": None, "max_pixels": None}, "shares of `sizes`"),
            ({"max_tokens": None, "max_pixels": None, "sizes": [(8, 8, 2.0), (9, 9, -1.0)]}, "shares of `sizes`"),
            (
                {"max_tokens": None, "max_pixels": None, "sizes": [(8, 8, 1.0)]},
                "`pixels_per_batch` must be at least 1, but is 0",
            ),
        ],
    )
    def test_errors(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            self.settings(**overrides)
