import struct
from io import BytesIO

import av
import fsspec
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from tests.conftest import ASSETS
from tests.training.conftest import write_video
from vitok_hf.training.media import (
    evenly_spaced,
    iterate_frames,
    load_clip,
    load_evaluation_images,
    load_image,
    probe_rate,
    probe_video,
)


def brightness(clip: np.ndarray) -> np.ndarray:
    return clip.mean(axis=(1, 2, 3)) / 5


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


class TestVideo:
    def test_every_frame(self, video):
        np.testing.assert_allclose(brightness(load_clip(video, 0.4, 8)), np.arange(10, 18), atol=0.5)

    def test_frame_rate(self, video):
        np.testing.assert_allclose(brightness(load_clip(video, 0.2, 4, fps=5)), [5, 10, 15, 20], atol=0.5)
        np.testing.assert_allclose(brightness(load_clip(video, 0.2, 6, fps=60)), [5, 5, 6, 6, 7, 7], atol=0.5)

    def test_seeks(self, tmp_path):
        write_video(tmp_path / "keys.mp4", g="5", bf="0")
        content = bytearray((tmp_path / "keys.mp4").read_bytes())
        start = content.index(b"mdat") + 4
        half = int.from_bytes(content[start - 8 : start - 4], "big") // 2
        content[start : start + half] = bytes(half)
        np.testing.assert_allclose(brightness(load_clip(bytes(content), 1.4, 3)), [35, 36, 37], atol=0.5)
        with pytest.raises(ValueError, match="cannot be read as a video"):
            load_clip(bytes(content), 0.0, 3)

    def test_frames_one_by_one(self, video):
        np.testing.assert_allclose([frame.mean() / 5 for frame in iterate_frames(video)], np.arange(50), atol=0.5)
        content = bytearray(video.read_bytes())
        start = content.index(b"mdat") + 4
        content[start : start + 200] = bytes(200)
        with pytest.raises(ValueError, match="^clip: cannot be read as a video .*remove or replace it"):
            list(iterate_frames(bytes(content), "clip"))

    @pytest.mark.parametrize(
        "matrix, show",
        [
            ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),  # clockwise
            ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
            ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
            ((1, 0, 0, -1), lambda frame: frame[::-1]),
            ((0, 1, 1, 0), lambda frame: frame.transpose(1, 0, 2)),
            ((0, 0, 0, 0), lambda frame: frame),
        ],
    )
    def test_frames_are_upright(self, tmp_path, matrix, show):
        """By the matrix in the track's header: pixel (x, y) is shown at (a x + c y, b x + d y)."""
        path = tmp_path / "ramp.mp4"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            picture = np.zeros((48, 64, 3), np.uint8)
            picture[:16, :16] = 200  # a corner
            for _ in range(4):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode())
        content, (a, b, c, d) = bytearray(path.read_bytes()), matrix
        start, one = content.index(b"tkhd") + 44, 2**16
        content[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 2**30)
        expected = show(load_clip(path, 0.0, 1)[0])
        assert np.array_equal(load_clip(bytes(content), 0.0, 1)[0], expected)
        assert np.array_equal(next(iterate_frames(bytes(content))), expected)

    def test_without_a_duration(self):
        """As what browsers record: written to a stream."""
        stream = BytesIO()
        stream.seekable = lambda: False
        with av.open(stream, "w", format="webm", options={"live": "1"}) as container:
            track = container.add_stream("libvpx", rate=25)
            track.width, track.height, track.pix_fmt = 64, 48, "yuv420p"
            for _ in range(8):
                container.mux(track.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))))
            container.mux(track.encode())
        assert probe_rate(stream.getvalue()) == 25.0 and len(list(iterate_frames(stream.getvalue()))) == 8
        with pytest.raises(ValueError, match="does not tell its duration"):
            probe_video(stream.getvalue())

    def test_end_of_the_video(self, video):
        assert probe_video(video)[0] == pytest.approx(2.0, abs=0.05)
        with pytest.raises(ValueError, match="has 5 frames from 1.80 s"):
            load_clip(video, 1.8, 8)

    def test_bytes(self, video):
        assert np.array_equal(load_clip(video.read_bytes(), 0.4, 3), load_clip(video, 0.4, 3))
        assert probe_video(video.read_bytes()) == probe_video(video)

    def test_messages_do_not_change_between_runs(self):
        for load in (load_image, probe_video):
            messages = []
            for _ in range(2):
                with pytest.raises(ValueError, match="^clip: cannot be read") as error:
                    load(b"no such format" * 10, "clip")
                messages.append(str(error.value))
            assert messages[0] == messages[1] and "0x" not in messages[0]
