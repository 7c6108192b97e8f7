"""Tiles and streams."""

import pytest
import torch

from tests.conftest import ASSETS, frames_of, make_input, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_float
from vitok_hf.data.media import load_image
from vitok_hf.evaluation.costs import peak_memory, reset_peak_memory
from vitok_hf.models.tiles import Tiling, apply_tiled, overlap_add, windows


def pieces_of(video, lengths, dim=2):
    return video.split(lengths, dim=dim)


class TestWindows:
    @pytest.mark.parametrize("length", range(1, 14))
    @pytest.mark.parametrize("size, overlap", [(4, 2), (4, 0), (1, 0), (5, 1), (None, 0)])
    def test_cover_and_join(self, length, size, overlap):
        x = torch.arange(float(length)).view(1, 1, length)
        whole = list(windows([x], 2, size, overlap))
        assert all(window.shape[2] == min(size or length, length) for _, window in whole)
        assert all(shared >= overlap for shared, _ in whole[1:])
        torch.testing.assert_close(torch.cat(list(overlap_add(whole, 2)), dim=2), x)
        cut = list(windows(pieces_of(x, [1] * length), 2, size, overlap))
        assert [shared for shared, _ in cut] == [shared for shared, _ in whole]
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(cut, whole))

    def test_blending_is_linear(self):
        tiles = [(0, torch.zeros(1, 1, 5)), (3, torch.ones(1, 1, 5))]
        joined = torch.cat(list(overlap_add(tiles, 2)), dim=2)
        assert joined.flatten().tolist() == [0, 0, 0.25, 0.5, 0.75, 1, 1]

    @pytest.mark.parametrize("shape", [(3, 5, 7), (8, 4, 4), (1, 9, 2), (2, 13, 13)])
    def test_all_axes(self, shape):
        """A function of single tokens does not notice the tiles."""
        x = torch.randn(2, 1, *(size * step for size, step in zip(shape, (2, 3, 3))))
        pool = torch.nn.AvgPool3d((2, 3, 3))
        parts = list(apply_tiled(pool, [x], Tiling((2, 4, 3), (1, 2, 1)), (2, 3, 3), (1, 1, 1)))
        torch.testing.assert_close(torch.cat(parts, dim=2), pool(x))


class TestTiling:
    @torch.no_grad()
    def test_no_tile_is_larger_than_asked(self, vae):
        sizes = []
        for tower in (vae.encoder, vae.decoder):
            tower.register_forward_pre_hook(lambda module, args: sizes.append(args[1][0]))
        x = make_input(vae, height=40, width=56)
        full = vae(x).sample
        assert sizes[0][-2:] == (5, 7)
        sizes.clear()
        vae.enable_tiling(24, max(vae.temporal_compression_ratio, 2))
        tiled = vae(x).sample
        grid = (3, 3) if vae.is_image_model else (2 if vae.config.causal else 1, 3, 3)  # causal: whole in time
        assert set(sizes) == {grid} and len(sizes) > 2
        assert tiled.shape == full.shape and not torch.allclose(tiled, full, atol=1e-4)
        vae.disable_tiling()
        assert torch.equal(vae(x).sample, full)

    @torch.no_grad()
    def test_one_tile_is_no_tile(self, vae):
        x = make_input(vae, height=40, width=56)
        expected = vae(x).sample
        vae.enable_tiling(64)
        torch.testing.assert_close(vae(x).sample, expected, rtol=0, atol=1e-6)

    @pytest.mark.parametrize(
        "q, factor, overlap", [(8, 0.25, 1), (4, 0.25, 1), (2, 0.25, 2), (8, 0.0, 0), (16, 0.25, 1)]
    )
    def test_tiles_of_two_latent_frames_overlap(self, q, factor, overlap):
        vae = make_vae("video", temporal_patch_size=q, sample_frames=16, sample_size=8)
        vae.enable_tiling(tile_overlap_factor=factor)
        assert vae.tiling.sizes == (max(16 // q, 2), 2, 2)
        assert vae.tiling.overlaps == (overlap, *[1 if factor else 0] * 2)

    @torch.no_grad()
    def test_blended_codes_are_normalized(self):
        """As all codes of v2 are: each latent has zero mean and unit variance over its channels."""
        vae = make_vae("v2", temporal_patch_size=2, sample_frames=4)
        video = torch.rand(1, 3, 8, 24, 24) * 2 - 1
        vae.enable_tiling(16, 4, 0.5)
        latents = vae.encode(video).latent_dist.mode()
        assert latents.shape == (1, 4, 4, 3, 3)
        for codes in (latents, vae.encode([video[0]]).latent_dist.mode()[0][None], *vae.encode_stream([video])):
            assert codes.mean(dim=1).abs().max() < 1e-5
            assert (codes.var(dim=1, unbiased=False) - 1).abs().max() < 1e-3

    @torch.no_grad()
    def test_lists_and_slices(self, vae):
        vae.enable_tiling(16, tile_overlap_factor=0.5)
        items = [torch.rand(3, *frames_of(vae), *size) for size in ((40, 17), (9, 9), (40, 17))]
        expected = [vae([item]).sample[0] for item in items]
        vae.enable_slicing()
        for sample, other in zip(vae(items).sample, expected):
            torch.testing.assert_close(sample, other, rtol=0, atol=1e-5)

    @torch.inference_mode()
    @pytest.mark.parametrize("name, size", [("astronaut.png", 256), ("coffee.png", 192)])
    def test_no_seams(self, name, size):
        """On a photograph, tiles differ from the whole no more than 1.5 times as much where they meet as inside."""
        vae = AutoencoderViTok.from_pretrained("vitok-tiny-f8x8")
        picture = to_float(torch.tensor(load_image(ASSETS / name)).permute(2, 0, 1)).unsqueeze(0)
        full = vae(picture).sample
        vae.enable_tiling(size)
        error = (vae(picture).sample - full).square().mean(dim=1)[0]
        border = torch.zeros_like(error, dtype=torch.bool)
        for dim in (0, 1):
            places = torch.arange(error.shape[dim]).view(1, 1, -1)
            cuts = list(windows([places], 2, size, int(0.25 * size / 8) * 8))
            for shared, window in cuts[1:]:
                start = int(window[0, 0, 0])
                border.narrow(dim, start, shared).fill_(True)
        assert 0.1 < border.float().mean() < 0.9
        assert error[border].mean() < 1.5 * error[~border].mean()

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"tile_sample_min_size": 4}, "at least tile_sample_min_size=8"),
            ({"tile_sample_min_frames": 1}, "tile_sample_min_frames=2"),
            ({"tile_overlap_factor": 0.6}, "from 0 to 0.5, but is 0.6"),
        ],
    )
    def test_errors(self, arguments, message):
        vae = make_vae("video")
        with pytest.raises(ValueError, match=message):
            vae.enable_tiling(**arguments)
        assert not vae.use_tiling


class TestStreams:
    @torch.no_grad()
    @pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 7], [10, 2]])
    @pytest.mark.parametrize("overlap", [0.0, 0.5])
    def test_equal_to_tiles(self, vae, lengths, overlap):
        lengths = [vae.config.causal + lengths[0], *lengths[1:]]  # a causal model takes 13 frames
        video = torch.rand(2, 3, sum(lengths), 16, 24)
        vae.enable_tiling(16, 4, overlap)
        latents = vae.encode(video).latent_dist.mode()
        streamed = list(vae.encode_stream(pieces_of(video, lengths)))
        torch.testing.assert_close(torch.cat(streamed, dim=2), latents, rtol=0, atol=1e-5)
        samples = list(vae.decode_stream(iter(streamed)))
        assert len(samples) > 1
        torch.testing.assert_close(torch.cat(samples, dim=2), vae.decode(latents).sample, rtol=0, atol=1e-5)

    @torch.no_grad()
    def test_lazy(self, vae):
        """Results come while the video is still being read, and nothing is read ahead."""
        vae.enable_tiling(tile_sample_min_frames=4)
        read = []

        def frames():
            for index in range(100):
                read.append(index)
                yield torch.zeros(1, 3, 2, 16, 16)

        next(vae.encode_stream(frames()))
        assert len(read) <= 6

    @torch.inference_mode()
    def test_memory_does_not_grow_with_the_video(self):
        vae = make_vae("video", sample_frames=16)
        peaks = []
        for length in (64, 64, 512):  # the first run fills the allocator's pools
            before = reset_peak_memory()
            frames = (torch.rand(1, 3, 4, 128, 128) * 2 - 1 for _ in range(length // 4))
            decoded = sum(samples.shape[2] for samples in vae.decode_stream(vae.encode_stream(frames)))
            assert decoded == length
            peaks.append(peak_memory() - before)
        assert peaks[2] < peaks[1] + 10e6  # a video of 512 frames has 100 MB

    @torch.no_grad()
    def test_default_windows(self):
        vae = make_vae("video")
        latents = torch.cat(list(vae.encode_stream([torch.rand(1, 3, 20, 8, 8)])), dim=2)
        assert latents.shape == (1, 4, 10, 1, 1)
        assert not vae.use_tiling

    def test_wrong_number_of_frames(self):
        vae = make_vae("video")
        with pytest.raises(ValueError, match="frames"):
            list(vae.encode_stream([torch.zeros(1, 3, 7, 8, 8)]))
        with pytest.raises(ValueError, match="multiple of temporal_patch_size=2, but is 3"):
            list(vae.encode_stream([torch.zeros(1, 3, 3, 8, 8)]))
        assert list(vae.encode_stream([])) == []
