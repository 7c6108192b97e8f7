from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ASSETS, make_vae
from vitok_hf.clips import pad_to_size, to_float, to_uint8
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation import reconstruct_files
from vitok_hf.evaluation.reconstruction import comparison, reconstruct, save_comparison
from vitok_hf.evaluation.visuals import VideoWriter


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


@pytest.mark.parametrize("seconds", [None, [0.0, 3.0, 3.04, 3.04]])
def test_videos_show_frames_at_their_times(tmp_path, monkeypatch, seconds):
    monkeypatch.chdir(tmp_path)
    with VideoWriter("a:b.mp4", Fraction(8)) as writer:  # no protocol, but a name
        for part in (slice(0, 3), slice(3, 4)):
            writer.write(torch.zeros(4, 16, 16, 3, dtype=torch.uint8)[part], seconds and seconds[part])
    times = [second for second, _ in iterate_timed_frames("a:b.mp4")]
    assert times == pytest.approx(seconds or [0.0, 0.125, 0.25, 0.375], abs=2e-4)


class TestFiles:
    @pytest.mark.parametrize("sample_frames, latent_frames", [(1, 2 + 2 + 2), (9, 3 + 2)])
    def test_videos_of_any_length_go_through_causal_models(self, tmp_path, sample_frames, latent_frames):
        vae, count = make_vae("causal", sample_frames=sample_frames), 12
        frames = torch.randint(0, 256, (1, 3, count, 16, 24), dtype=torch.uint8)
        with VideoWriter(tmp_path / "x.mp4", Fraction(8)) as writer:
            writer.write(frames[0].permute(1, 2, 3, 0))
        line = reconstruct_files.reconstruct_file(vae, tmp_path / "x.mp4", str(tmp_path / "y"))
        assert f"{count} frames" in line and f"{latent_frames * 4 * 2 * 3} numbers" in line
        assert len(list(iterate_timed_frames(tmp_path / "y_reconstruction.mp4"))) == count

    @pytest.mark.parametrize(
        "given, limit, radius", [(None, 2**16, None), (None, 10, 16), (2, 2**16, 2), (0, 10, None)]
    )
    def test_attention_of_large_pictures_is_local(self, tmp_path, monkeypatch, given, limit, radius):
        monkeypatch.setattr(reconstruct_files, "MAX_TOKENS", limit)
        vae, images = make_vae("v1"), torch.randint(0, 256, (1, 3, 1, 64, 72), dtype=torch.uint8)
        Image.fromarray(images[0, :, 0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        line = reconstruct_files.reconstruct_file(vae, tmp_path / "x.png", str(tmp_path / "x"), given)
        assert ("window of radius" in line) == (radius is not None)
        other = make_vae("v1")
        if radius is not None:
            other.enable_sliding_window(radius)
        saved = torch.from_numpy(np.asarray(Image.open(tmp_path / "x_reconstruction.png")).copy())
        assert torch.equal(saved, reconstruct(other, images)[0, :, 0].permute(1, 2, 0))
