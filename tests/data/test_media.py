import fsspec
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.conftest import ASSETS
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.media import evenly_spaced, load_image


class TestPictures:
    def test_pictures_are_upright(self, tmp_path):
        pixels = np.zeros((4, 8, 3), np.uint8)
        pixels[:, 4:] = 255
        turned = Image.Exif()
        turned[ExifTags.Base.Orientation] = 6  # to be shown turned clockwise
        Image.fromarray(pixels).save(tmp_path / "x.png", exif=turned)
        assert np.array_equal(load_image(tmp_path / "x.png"), np.rot90(pixels, -1))

    def test_greys_of_16_bits_are_scaled(self, tmp_path):
        ramp = np.linspace(0, 65535, 64 * 64).astype(np.uint16).reshape(64, 64)
        Image.fromarray(ramp).save(tmp_path / "x.png")
        assert np.array_equal(load_image(tmp_path / "x.png")[..., 1], ramp // 256)

    def test_transparent_pictures_are_put_on_white(self, tmp_path):
        picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        picture.putpixel((0, 0), (0, 0, 255, 255))
        picture.save(tmp_path / "x.png")
        pixels = load_image(tmp_path / "x.png")
        assert pixels[0, 0].tolist() == [0, 0, 255] and pixels[1, 1].tolist() == [255, 255, 255]

    def test_broken_pictures_are_named(self, tmp_path):
        (tmp_path / "broken.png").write_bytes((ASSETS / "coffee.png").read_bytes()[:1000])
        with pytest.raises(ValueError, match="broken.png: cannot be read as a picture"):
            load_image(tmp_path / "broken.png")

    def test_bytes_and_addresses(self):
        data, expected = (ASSETS / "rocket.jpg").read_bytes(), load_image(ASSETS / "rocket.jpg")
        fsspec.filesystem("memory").pipe("/pictures/rocket.jpg", data)
        assert np.array_equal(load_image(data), expected)
        assert np.array_equal(load_image("memory://pictures/rocket.jpg"), expected)
        with pytest.raises(ValueError, match="^memory://pictures/none.jpg: cannot be read .*FileNotFoundError"):
            load_image("memory://pictures/none.jpg")
        with pytest.raises(ValueError, match="^a sample: cannot be read"):
            load_image(data[:100], "a sample")

    def test_evaluation_images(self):
        images = load_evaluation_images(ASSETS, 32, 3)
        assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
        reference = Image.open(ASSETS / "astronaut.png").resize((32, 32), Image.Resampling.BICUBIC)
        difference = images[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(reference)
        assert np.abs(difference).mean() < 1.0


def test_evenly_spaced():
    assert evenly_spaced(5, None) == evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    assert evenly_spaced(5, 3) == [0, 2, 4] and evenly_spaced(5, 0) == []
    with pytest.raises(ValueError, match="must not be negative, but is -1"):
        evenly_spaced(5, -1)


def test_messages_do_not_change_between_runs():
    messages = []
    for _ in range(2):
        with pytest.raises(ValueError, match="^picture: cannot be read") as error:
            load_image(b"no such format" * 10, "picture")
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "0x" not in messages[0]
