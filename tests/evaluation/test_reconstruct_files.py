import gc
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import make_vae
from vitok_hf.data.video import iterate_timed_frames
from vitok_hf.evaluation import reconstruct_files
from vitok_hf.evaluation.metrics import psnr, ssim
from vitok_hf.evaluation.reconstruct_files import CodecSettings, reconstruct_file
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.evaluation.visuals import VideoWriter


def write_film(path, count: int, height: int = 16, width: int = 24) -> torch.Tensor:
    """Noise; returns the frames that a reader gets of it, (1, 3, T, H, W)."""
    frames = torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8)
    with VideoWriter(path, Fraction(8)) as writer:
        writer.write(frames)
    shown = np.stack([frame for _, frame in iterate_timed_frames(path)])
    return torch.from_numpy(shown).permute(3, 0, 1, 2)[None]


class TestFiles:
    @pytest.mark.parametrize("seen", [None, 0, 1])
    def test_causal_models_see_the_whole_video(self, tmp_path, seen):
        vae, video = make_vae("causal"), write_film(tmp_path / "x.mp4", 12)
        settings = CodecSettings(max_cached_frames=seen)
        line = reconstruct_file(vae, tmp_path / "x.mp4", str(tmp_path / "y"), settings)
        if seen != 0:
            vae.enable_sliding_window(frames=2 if seen is None else seen)  # sample_frames, 5, are 2 latent frames
        whole = reconstruct(vae, video)
        values = f"PSNR {psnr(whole[0].transpose(0, 1), video[0].transpose(0, 1)).mean():.2f} dB  SSIM "
        values += f"{ssim(whole[0].transpose(0, 1), video[0].transpose(0, 1)).mean():.4f}"
        assert line.startswith(f"x.mp4, 12 frames: 24x16  {values}  {4 * 4 * 2 * 3} numbers")
        assert len(list(iterate_timed_frames(tmp_path / "y_reconstruction.mp4"))) == 12

    def test_cut_codes_of_causal_models_are_of_clips(self, tmp_path):
        write_film(tmp_path / "x.mp4", 12)
        vae = make_vae("causal", channel_counts=[2, 4])
        line = reconstruct_file(
            vae, tmp_path / "x.mp4", str(tmp_path / "y"), CodecSettings(lengths={"num_channels": 2})
        )
        assert f"{2 * (2 + 2 + 2) * 2 * 3} numbers" in line

    @pytest.mark.parametrize(
        "architecture, settings, message",
        [
            ("video", CodecSettings(max_cached_frames=3), "`max_cached_frames` is 3, but videos through models not"),
            ("causal", CodecSettings(None, 3, {"num_channels": 2}), "is 3, but videos with num_channels go clip by"),
            ("causal", CodecSettings(max_cached_frames=-1), "must be at least 1, or 0 for all, but is -1"),
        ],
    )
    def test_settings_that_do_not_fit(self, tmp_path, architecture, settings, message):
        with pytest.raises(ValueError, match=message):
            reconstruct_file(make_vae(architecture), tmp_path / "x.mp4", str(tmp_path / "y"), settings)

    @pytest.mark.parametrize("architecture", ["v1", "video", "causal"])
    def test_no_more_than_a_few_frames_are_alive(self, tmp_path, monkeypatch, architecture):
        write_film(tmp_path / "x.mp4", 160)
        vae, alive, numbers, most = make_vae(architecture), set(), [], 0

        def count_frames(path):
            nonlocal most
            for index, (second, frame) in enumerate(iterate_timed_frames(path)):
                alive.add(index)
                weakref.finalize(frame, alive.discard, index)
                most = max(most, len(alive))
                if index in (79, 159):  # where clips end: all tensors besides the weights
                    numbers.append(sum(x.numel() for x in gc.get_objects() if type(x) is torch.Tensor))
                yield second, frame
                del frame

        monkeypatch.setattr(reconstruct_files, "iterate_timed_frames", count_frames)
        reconstruct_file(vae, tmp_path / "x.mp4", str(tmp_path / "y"))
        assert most <= 2 * 8 + 1
        assert abs(numbers[1] - numbers[0]) < 16 * 24 * 3 * 16  # not the 80 frames between

    def test_a_sheet_of_frames(self, tmp_path):
        video = write_film(tmp_path / "x.mp4", 11, 17, 23)
        reconstruct_file(make_vae("v1"), tmp_path / "x.mp4", str(tmp_path / "y"))
        sheet = torch.from_numpy(np.asarray(Image.open(tmp_path / "y_frames.png")).copy())
        assert sheet.shape == (2 * 17, 8 * 23, 3)
        for column, frame in enumerate([0, 1, 3, 4, 6, 7, 9, 10]):
            assert torch.equal(sheet[:17, 23 * column : 23 * (column + 1)], video[0, :, frame].permute(1, 2, 0))
        expected = reconstruct(make_vae("v1"), video)[0, :, 10].permute(1, 2, 0)
        assert torch.equal(sheet[17:, -23:], expected)
        with av.open(str(tmp_path / "y_comparison.mp4")) as comparison:
            stream = comparison.streams.video[0]
            assert (stream.height, stream.width, stream.average_rate) == (17, 46, 8)

    def test_nothing_half_written_stays(self, tmp_path, monkeypatch):
        write_film(tmp_path / "x.mp4", 20)

        def break_off(path):
            for index, item in enumerate(iterate_timed_frames(path)):
                if index == 15:
                    raise KeyboardInterrupt
                yield item

        monkeypatch.setattr(reconstruct_files, "iterate_timed_frames", break_off)
        with pytest.raises(KeyboardInterrupt):
            reconstruct_file(make_vae("v1"), tmp_path / "x.mp4", str(tmp_path / "new" / "y"))
        assert not list((tmp_path / "new").iterdir())

    @pytest.mark.parametrize(
        "given, limit, radius", [(None, 2**16, None), (None, 10, 16), (2, 2**16, 2), (0, 10, None)]
    )
    def test_attention_of_large_pictures_is_local(self, tmp_path, monkeypatch, given, limit, radius):
        monkeypatch.setattr(reconstruct_files, "MAX_TOKENS", limit)
        vae, images = make_vae("v1"), torch.randint(0, 256, (1, 3, 1, 64, 72), dtype=torch.uint8)
        Image.fromarray(images[0, :, 0].permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        line = reconstruct_file(vae, tmp_path / "x.png", str(tmp_path / "x"), reconstruct_files.CodecSettings(given))
        assert ("window of radius" in line) == (radius is not None)
        other = make_vae("v1")
        if radius is not None:
            other.enable_sliding_window(radius)
        saved = torch.from_numpy(np.asarray(Image.open(tmp_path / "x_reconstruction.png")).copy())
        assert torch.equal(saved, reconstruct(other, images)[0, :, 0].permute(1, 2, 0))
