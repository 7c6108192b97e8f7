"""Pictures of other channels than three."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS
from tests.data.conftest import cut
from tests.data.conftest import video as video
from vitok_hf.clips import to_colours, to_float, to_picture, to_shown
from vitok_hf.data.classes import LabelledFiles
from vitok_hf.data.files import ARRAY_SUFFIXES, IMAGE_SUFFIXES, VIDEO_SUFFIXES
from vitok_hf.data.held_out import EvaluationData, Protocol, load_evaluation_images
from vitok_hf.data.items import Clip, Item
from vitok_hf.data.media import load_image, resize
from vitok_hf.data.sources import FolderFiles, TarStream
from vitok_hf.data.views import CropView, NativeView, SquareView


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def encode(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def encode_array(*arrays: np.ndarray) -> bytes:
    """.npy of one, .npz of several."""
    file = io.BytesIO()
    np.save(file, arrays[0]) if len(arrays) == 1 else np.savez(file, *arrays)
    return file.getvalue()


def encode_pages(*pages: np.ndarray) -> bytes:
    first, *others = map(Image.fromarray, pages)
    return encode(first, "TIFF", save_all=True, append_images=others)


class TestPictures:
    def test_grey_is_the_luma_of_pillow(self):
        picture = Image.fromarray(noise(9, 7, 3))
        loaded = load_image(encode(picture), channels=1)
        assert loaded.shape == (9, 7, 1) and np.array_equal(loaded[..., 0], picture.convert("L"))
        grey = Image.fromarray(noise(9, 7))
        assert np.array_equal(load_image(encode(grey), channels=1)[..., 0], grey)
        deep = Image.fromarray(noise(9, 7).astype(np.uint16) * 257)
        assert np.array_equal(load_image(encode(deep), channels=1)[..., 0], grey)

    def test_grey_of_transparent_pictures_is_on_white(self):
        pixels = noise(9, 7, 4)
        pixels[..., 3] = 0
        assert (load_image(encode(Image.fromarray(pixels)), channels=1) == 255).all()

    def test_colours_are_premultiplied(self):
        pixels = noise(9, 7, 4)
        loaded = load_image(encode(Image.fromarray(pixels)), channels=4)
        expected = pixels[..., :3] * (pixels[..., 3:] / 255)
        assert np.abs(loaded[..., :3] - expected).max() <= 0.51
        assert np.array_equal(loaded[..., 3], pixels[..., 3])
        opaque = load_image(ASSETS / "coffee.png", channels=4)
        assert np.array_equal(opaque[..., :3], load_image(ASSETS / "coffee.png")) and (opaque[..., 3] == 255).all()

    def test_saving_undoes_it(self):
        pixels = noise(30, 20, 4)
        pixels[:, :10, 3] = 255
        saved = np.asarray(to_picture(load_image(encode(Image.fromarray(pixels)), channels=4))).astype(int)
        visible = pixels[..., 3:] > 128
        assert np.abs(np.where(visible, saved - pixels, 0)).max() <= 2
        assert np.array_equal(saved[:, :10], pixels[:, :10])

    def test_modes_of_saved_pictures(self):
        for channels, mode in ((1, "L"), (3, "RGB"), (4, "RGBA")):
            assert to_picture(noise(5, 4, channels)).mode == mode
        with pytest.raises(ValueError, match="no pictures of 5 channels"):
            to_picture(noise(5, 4, 5))


class TestArrays:
    @pytest.mark.parametrize("channels", [1, 2, 4, 5])
    def test_values(self, channels):
        values = noise(channels, 6, 9)
        expected = values.transpose(1, 2, 0)
        for stored in (values, values.astype(np.uint16) * 257, (values / 255), (values / 255).astype(np.float32)):
            for typed in (stored, stored.astype(stored.dtype.newbyteorder(">"))):
                assert np.array_equal(load_image(encode_array(typed), channels=channels), expected)

    def test_files(self, tmp_path):
        values = noise(5, 6, 9)
        np.save(tmp_path / "a.npy", values)
        np.savez_compressed(tmp_path / "b.npz", stack=values)
        for name in ("a.npy", "b.npz"):
            assert np.array_equal(load_image(tmp_path / name, channels=5), values.transpose(1, 2, 0))
        assert np.array_equal(load_image(encode_array(values[0]), channels=1)[..., 0], values[0])  # without channels

    @pytest.mark.parametrize(
        "content, message",
        [
            (encode_array(noise(6, 9, 5)), r"has shape \(6, 9, 5\), but must have \(5, 6, 9\): move the channels"),
            (encode_array(noise(4, 6, 9)), r"has shape \(4, 6, 9\), but must have \(5, height, width\)"),
            (encode_array(noise(6, 9)), r"has shape \(6, 9\), but must have \(5, height, width\)"),
            (encode_array(noise(5, 0, 9)), r"has shape \(5, 0, 9\)"),
            (encode_array(noise(5, 6, 9).astype(np.int32)), r"holds int32: save uint8 \(0 to 255\), uint16"),
            (
                encode_array(noise(5, 6, 9).astype(np.float32)),
                r"values go from .* to 255.0: floats must be in \[0, 1\]",
            ),
            (encode_array(np.full((5, 6, 9), np.nan)), "values go from nan to nan"),
            (encode_array(noise(5, 6, 9), noise(5, 6, 9)), r"holds 2 arrays \(arr_0, arr_1\), but must hold one"),
            (encode_array(np.array([{}])), "allow_pickle=False"),
            (encode_pages(*noise(4, 6, 9)), "is TIFF with 4 page.s., but 5 channels come from TIFF with 5 pages"),
            (encode_pages(*noise(5, 6, 9, 3)), "pages have modes and sizes .*RGB.*, but must all be grey"),
            (encode_pages(*noise(4, 6, 9), noise(6, 8)), "pages have modes and sizes"),
            (encode(Image.fromarray(noise(6, 9, 3))), "is PNG with 1 page"),
        ],
    )
    def test_what_is_refused(self, content, message):
        with pytest.raises(ValueError, match=f"^x.npy: cannot be read as a picture .*{message}"):
            load_image(content, "x.npy", channels=5)

    def test_pages_are_no_rgba(self):
        with pytest.raises(ValueError, match="RGBA has one page: save four channels that are no RGBA as .npy"):
            load_image(encode_pages(*noise(4, 6, 9)), channels=4)

    def test_in_tar_files(self, tmp_path):
        members = {"a.png": encode(Image.new("RGB", (4, 4))), "a.npy": encode_array(noise(5, 6, 9))}
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for name, content in members.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        clip = Clip(channels=5)
        (item,) = TarStream([str(tmp_path / "x.tar")], clip).items(0)
        assert np.array_equal(clip.load(item)[0], noise(5, 6, 9).transpose(1, 2, 0))

    @pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
    def test_pages_of_tiff(self, dtype):
        values = noise(5, 6, 9)
        stored = values.astype(dtype) * (1 if dtype == np.uint8 else 257)
        assert np.array_equal(load_image(encode_pages(*stored), channels=5), values.transpose(1, 2, 0))
        floats = encode_pages(*(values / 255).astype(np.float32))
        assert np.array_equal(load_image(floats, channels=5), values.transpose(1, 2, 0))


class TestSizes:
    @pytest.mark.parametrize("channels", [1, 2, 4, 5])
    def test_planes_are_resized_as_those_of_colours(self, channels):
        pixels, options = noise(31, 40, channels), ((12, 9), (2.5, 1.5, 38.0, 30.0))
        resized = resize(pixels, *options)
        assert resized.shape == (9, 12, channels)
        for index in range(channels):
            repeated = np.repeat(pixels[..., index : index + 1], 3, axis=2)
            assert np.array_equal(resized[..., index], resize(repeated, *options)[..., 0])

    def test_views(self, tmp_path):
        for index in range(3):
            np.save(tmp_path / f"{index}.npy", noise(5, 40, 50))
        clip = Clip(channels=5)
        views = [CropView([(16, 24, 1.0)], 2 * 16 * 24, clip), NativeView(64, 32**2, (1, 8), clip)]
        for view in views:
            batch = cut(view, tmp_path)[0]
            assert not batch.skipped and all(run.shape[1] == 5 for run in batch.pixels)
        square = SquareView(16, 2, clip).load(Item("x", tmp_path / "0.npy"), np.random.default_rng(0))
        assert square.shape == (1, 16, 16, 5)
        assert load_evaluation_images(tmp_path, 16, 2, channels=5).shape == (2, 5, 1, 16, 16)
        data = EvaluationData(FolderFiles(tmp_path, clip), Protocol(None, channels=5))
        assert torch.equal(data[0][:, 0], torch.from_numpy(noise(5, 40, 50)))


class TestFolders:
    def test_endings(self):
        assert Clip().suffixes == IMAGE_SUFFIXES | VIDEO_SUFFIXES  # arrays beside them are something else
        assert Clip(channels=1).suffixes == IMAGE_SUFFIXES | VIDEO_SUFFIXES | ARRAY_SUFFIXES
        assert Clip(channels=4).suffixes == IMAGE_SUFFIXES | ARRAY_SUFFIXES
        assert Clip(channels=5).suffixes == {".tif", ".tiff"} | ARRAY_SUFFIXES
        assert Clip(4, channels=1).suffixes == VIDEO_SUFFIXES
        assert Clip(4, with_pictures=True, channels=1).suffixes == Clip(channels=1).suffixes

    def test_files_by_class(self, tmp_path):
        for name in ("cat/a.png", "cat/a.npy", "dog/b.tif", "dog/b.mp4"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        names = [[file.name for file in LabelledFiles([tmp_path], clip=Clip(channels=n)).files] for n in (3, 4, 5)]
        assert names == [["a.png", "b.mp4", "b.tif"], ["a.npy", "a.png", "b.tif"], ["a.npy", "b.tif"]]


class TestVideos:
    def test_grey(self, video):
        item = Item("x", video, True)
        colours, grey = (Clip(4, 5.0, channels=channels).load(item) for channels in (3, 1))
        assert grey.shape == (*colours.shape[:3], 1)
        assert np.array_equal(grey[2, ..., 0], Image.fromarray(colours[2]).convert("L"))

    def test_of_other_channels(self, video):
        with pytest.raises(ValueError, match="x: is a video, which is read with 1 or 3 channels, not 4"):
            Clip(channels=4).load(Item("x", video, True))
        with pytest.raises(ValueError, match="Clips of 4 frames are read with 1 or 3 channels, not 5"):
            Clip(4, channels=5)


class TestColours:
    def test_networks_see(self):
        images = torch.from_numpy(noise(2, 4, 1, 5, 6))
        images[:, :3] = (images[:, :3].float() * images[:, 3:] / 255).round()  # premultiplied
        assert torch.equal(to_colours(images[:, :3]), images[:, :3])
        assert torch.equal(to_colours(images[:, :1]), images[:, :1].expand(-1, 3, 1, 5, 6))
        expected = images[:, :3] + (255 - images[:, 3:].float()) / 2
        assert (to_colours(images).float() - expected).abs().max() <= 0.51
        assert (to_colours(to_float(images)) - (expected / 127.5 - 1)).abs().max() < 1e-5
        with pytest.raises(ValueError, match="Pictures of 5 channels have no colours"):
            to_colours(torch.zeros(1, 5, 2, 2))

    def test_shown_are(self):
        images = torch.from_numpy(noise(2, 5, 1, 5, 6))
        assert torch.equal(to_shown(images), images[:, :3])
        assert torch.equal(to_shown(images[:, :2]), images[:, :1].expand(-1, 3, 1, 5, 6))


class TestProtocol:
    def test_channels_are_part_of_it(self):
        ours = Protocol()
        assert ours.value_range == "0 to 255, RGB, float64" and Protocol(channels=4).value_range != ours.value_range
        assert ours.differences(Protocol(channels=1)) == ["channels", "value_range"]
        with pytest.raises(ValueError, match="`channels` is 0, but must be positive"):
            Protocol(channels=0)
