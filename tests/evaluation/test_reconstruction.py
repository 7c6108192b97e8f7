from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS, make_vae
from vitok_hf.clips import pad_to_size, to_float, to_uint8
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation.reconstruction import StreamCodec, comparison, reconstruct, save_comparison
from vitok_hf.evaluation.visuals import ContactSheet, VideoWriter


@pytest.fixture(scope="module")
def images():
    return load_evaluation_images(ASSETS, 64, 4)


class TestReconstruct:
    @pytest.mark.parametrize(
        "architecture, shape", [("v1", (2, 3, 1, 13, 21)), ("video", (1, 3, 3, 13, 21)), ("causal", (1, 3, 3, 13, 21))]
    )
    def test_sizes_that_do_not_fit_are_padded_and_restored(self, architecture, shape):
        vae = make_vae(architecture)
        images = torch.randint(0, 256, shape, dtype=torch.uint8)
        padded = pad_to_size(to_float(images), ({"v1": 1, "video": 4, "causal": 5}[architecture], 16, 24))
        assert torch.equal(padded[..., 13:, :], padded[..., 12:13, :].expand(*padded.shape[:-2], 3, 24))
        with torch.no_grad():
            expected = to_uint8(vae(padded).sample)[:, :, : shape[2], :13, :21]
        assert torch.equal(reconstruct(vae, images), expected)

    def test_numbers_that_are_not_finite_are_no_picture(self, images):
        vae = make_vae("v1")
        with torch.no_grad():
            vae.decoder.proj_out.bias[0] = torch.nan
        with pytest.raises(ValueError, match="AutoencoderViTok gives numbers that are not finite in torch.float32"):
            reconstruct(vae, images)


class TestStreamCodec:
    @pytest.mark.parametrize("seen", [None, 2])
    def test_clips_of_any_whole_latent_frames_are_as_the_whole(self, seen):
        vae = make_vae("causal")
        video = torch.randint(0, 256, (1, 3, 35, 13, 24), dtype=torch.uint8)  # of 9 latent frames the last lacks 2
        codec = StreamCodec(vae, None, seen)
        parts = [codec(clip) for clip in video.split([1, 16, 8, 10], dim=2)]
        assert [part.shape[2] for part in parts] == [1, 16, 8, 10]
        if seen:
            vae.enable_sliding_window(frames=seen)
        whole = reconstruct(vae, video)
        assert (torch.cat(parts, dim=2).int() - whole.int()).abs().max() <= 1  # rounding
        vae.disable_sliding_window()
        differs = (whole.int() - reconstruct(vae, video).int()).abs().max() > 1
        assert differs == (seen is not None)

    def test_latents_are_changed_between(self):
        vae, noted = make_vae("causal"), []
        video = torch.randint(0, 256, (1, 3, 9, 16, 24), dtype=torch.uint8)
        codec = StreamCodec(vae, lambda latents: noted.append(latents.shape) or latents * 0)
        parts = [codec(clip) for clip in video.split([5, 4], dim=2)]
        assert noted == [(1, 4, 2, 2, 3), (1, 4, 1, 2, 3)]
        assert torch.equal(torch.cat(parts, dim=2), reconstruct(vae, video, torch.zeros_like))


def test_comparison_of_clips(images):
    clips = images[:, :, 0].unfold(0, 2, 2).permute(0, 1, 4, 2, 3)  # (2, 3, 2, 64, 64)
    grid = comparison(clips, 255 - clips)
    assert grid.shape == (4 * 64, 2 * 64, 3)
    assert np.array_equal(grid[128:192, 64:], images[3, :, 0].permute(1, 2, 0).numpy())
    assert np.array_equal(grid[192:], 255 - grid[128:192])


def test_comparison(images, tmp_path):
    save_comparison(tmp_path / "new" / "comparison.png", images, 255 - images)
    with Image.open(tmp_path / "new" / "comparison.png") as picture:
        assert picture.size == (128, 256)
        left, right = picture.getpixel((5, 70)), picture.getpixel((69, 70))
    assert left == tuple(images[1, :, 0, 6, 5].tolist()) and right == tuple(255 - value for value in left)


@pytest.mark.parametrize("num_frames", [0, 3])
def test_half_written_videos_do_not_stay(tmp_path, num_frames):
    with pytest.raises(OSError, match="cut off"):
        with VideoWriter(tmp_path / "x.mp4", Fraction(8)) as writer:
            writer.write(torch.zeros(num_frames, 16, 16, 3, dtype=torch.uint8))
            raise OSError("cut off")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("height, width", [(17, 24), (18, 23), (17, 23), (18, 24)])
def test_videos_keep_their_size(tmp_path, height, width):
    frames = torch.full((3, height, width, 3), 30, dtype=torch.uint8)
    frames[:, -1] = frames[:, :, -1] = 200  # the last row and column are there
    with VideoWriter(tmp_path / "x.mp4", Fraction(8)) as writer:
        writer.write(frames)
    shown = [frame.astype(int) for _, frame in iterate_timed_frames(tmp_path / "x.mp4")]
    assert len(shown) == 3 and shown[0].shape == (height, width, 3)
    assert abs(shown[2] - frames[2].numpy()).mean() < 6


@pytest.mark.parametrize(
    "count, shown",
    [(1, [0]), (3, [0, 1, 2]), (36, range(0, 36, 5)), (1023, [0, 128, 288, 416, 576, 704, 864, 992])],
    ids=["1", "3", "36", "1023"],
)
def test_contact_sheets(tmp_path, count, shown):
    """Of 1023 frames, every 32nd is kept."""
    sheet, numbers = ContactSheet(), torch.arange(count)
    colours = torch.stack([numbers // 256, numbers % 256, torch.zeros_like(numbers)]).to(torch.uint8)
    frames = colours[None, :, :, None, None].expand(-1, -1, -1, 300, 600)
    for clip in frames.split(7, dim=2):
        sheet.add(clip, 255 - clip)
    assert len(sheet.pairs) < 64 and sheet.pairs[0].nbytes == 2 * 128 * 256 * 3
    sheet.save(tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png"))
    assert pixels.shape == (2 * 128, len(shown) * 256, 3)
    originals, reconstructions = pixels[5, 5::256], pixels[133, 5::256]
    assert [256 * int(high) + int(low) for high, low, _ in originals] == list(shown)
    assert np.array_equal(reconstructions, 255 - originals)


@pytest.mark.parametrize("seconds", [None, [0.0, 3.0, 3.04, 3.04]])
def test_videos_show_frames_at_their_times(tmp_path, monkeypatch, seconds):
    monkeypatch.chdir(tmp_path)
    with VideoWriter("a:b.mp4", Fraction(8)) as writer:  # no protocol, but a name
        for part in (slice(0, 3), slice(3, 4)):
            writer.write(torch.zeros(4, 16, 16, 3, dtype=torch.uint8)[part], seconds and seconds[part])
    times = [second for second, _ in iterate_timed_frames("a:b.mp4")]
    assert times == pytest.approx(seconds or [0.0, 0.125, 0.25, 0.375], abs=2e-4)
