"""Causal video models: what a latent frame holds and sees, and streams that equal the whole."""

import random
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from tests.conftest import ARCHITECTURES, V2, make_vae
from vitok_hf import AutoencoderViTok
from vitok_hf.evaluation.costs import peak_memory, reset_peak_memory
from vitok_hf.models import tiling
from vitok_hf.models.causal import Causal, FrameCache, causal_attention
from vitok_hf.models.layers import windowed_attention


KINDS = {"v1": {}, "v2": V2, "frames": {"temporal_patch_size": 1, "sample_frames": 1}}
SETTINGS = {
    "plain": lambda vae: None,
    "slices": lambda vae: vae.enable_slicing(),
    "tiles": lambda vae: vae.enable_tiling(16, 8, 0.5),
    "window": lambda vae: vae.enable_sliding_window(1),
    "frames": lambda vae: vae.enable_sliding_window(frames=2),
    "both": lambda vae: vae.enable_sliding_window(1, frames=3),
}


def make(kind: str = "v1", **overrides) -> AutoencoderViTok:
    return make_vae("causal", **KINDS[kind] | overrides)


def make_clip(vae: AutoencoderViTok, latent_frames: int = 4, batch_size: int = 2, size=(16, 24)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    shape = batch_size, 3, vae.config.num_frames(latent_frames), *size
    return torch.rand(shape, generator=generator) * 2 - 1


def encode(vae, x):
    return vae.encode(x).latent_dist.mode()


def cut_randomly(video: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """In pieces of 1 to 9 frames, or all of one, or in one piece."""
    rng, frames, lengths = random.Random(seed), video.shape[2], []
    longest = rng.choice([1, 3, 9, frames])
    while sum(lengths) < frames:
        lengths.append(min(rng.randint(1, longest), frames - sum(lengths)))
    return list(video.split(lengths, dim=2))


def join(parts) -> torch.Tensor:
    return torch.cat(list(parts), dim=2)


close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)


@pytest.fixture(params=KINDS)
def vae(request):
    return make(request.param)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


class TestFrames:
    def test_a_clip_has_one_frame_and_multiples_of_q(self, vae):
        q = vae.temporal_compression_ratio
        for t in (1, 2, 3):
            clip = torch.rand(2, 3, 1 + q * (t - 1), 16, 24)
            latents = encode(vae, clip)
            assert latents.shape == (2, 4, t, 2, 3)
            assert vae.decode(latents).sample.shape == vae(clip).sample.shape == clip.shape

    def test_the_first_latent_frame_is_that_of_the_picture(self, vae):
        clip = make_clip(vae)
        picture = encode(vae, clip[:, :, 0])
        assert picture.shape == (2, 4, 2, 3)
        close(picture, encode(vae, clip)[:, :, 0])
        close(picture, encode(vae, clip[:, :, :1])[:, :, 0])
        sample = vae.decode(picture).sample
        assert sample.shape == (2, 3, 16, 24)
        close(sample, vae.decode(encode(vae, clip)).sample[:, :, 0])
        close(sample, vae(clip[:, :, 0]).sample)

    def test_later_frames_hold_q_pictures_each(self):
        """Latent frame i is of frames 1 + q (i - 1) to q i, and is decoded to them."""
        vae = make(encoder_num_layers=1, decoder_num_layers=1)
        vae.enable_sliding_window(frames=1)
        clip = make_clip(vae)
        for frame in range(clip.shape[2]):
            changed = clip.clone()
            changed[:, :, frame] = 0
            moved = (encode(vae, clip) - encode(vae, changed)).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
            assert moved.nonzero().flatten().tolist() == [(frame + 3) // 4]
        latents = encode(vae, clip)
        for place in range(4):
            changed = latents.clone()
            changed[:, :, place] = 0
            moved = (vae.decode(latents).sample - vae.decode(changed).sample).abs().amax(dim=(0, 1, 3, 4)) > 1e-4
            assert moved.nonzero().flatten().tolist() == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]][place]

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_no_frame_sees_later_ones(self, vae, settings):
        SETTINGS[settings](vae)
        clip = make_clip(vae)
        latents, q = encode(vae, clip), vae.temporal_compression_ratio
        sample = vae.decode(latents).sample
        for place in (1, 2, 3):
            changed = clip.clone()
            changed[:, :, 1 + q * (place - 1) :] *= -1
            others = encode(vae, changed)
            close(others[:, :, :place], latents[:, :, :place], atol=1e-6)
            assert (others - latents)[:, :, place:].abs().amax(dim=(0, 1, 3, 4)).min() > 1e-3
            frames = 1 + q * (place - 1)
            close(vae.decode(others).sample[:, :, :frames], sample[:, :, :frames], atol=1e-6)

    def test_every_frame_sees_all_before(self):
        vae = make(encoder_num_layers=1)
        clip = make_clip(vae)
        changed = clip.clone()
        changed[:, :, 0] = 0
        assert (encode(vae, clip) - encode(vae, changed)).abs().amax(dim=(0, 1, 3, 4)).min() > 1e-4
        vae.enable_sliding_window(frames=2)
        moved = (encode(vae, clip) - encode(vae, changed)).abs().amax(dim=(0, 1, 3, 4)) > 1e-5
        assert moved.tolist() == [True, True, False, False]

    def test_lists(self, vae):
        clips = [make_clip(vae, t, 1, size)[0] for t, size in ((3, (9, 17)), (1, (16, 16)), (3, (9, 17)), (2, (8, 8)))]
        items = [*clips, clips[0][:, 0]]
        samples, latents = vae(items).sample, encode(vae, items)
        assert [z.shape for z in latents] == [(4, 3, 2, 3), (4, 1, 2, 2), (4, 3, 2, 3), (4, 2, 1, 1), (4, 2, 3)]
        decoded = vae.decode(latents, sizes=[item.shape[-2:] for item in items]).sample
        for item, sample, other in zip(items, samples, decoded):
            assert sample.shape == item.shape
            close(sample, vae([item]).sample[0])
            close(sample, other)
        close(latents[4], latents[0][:, 0])

    def test_tiles_are_of_space_alone(self):
        vae = make()
        clip = make_clip(vae, size=(40, 24))
        vae.enable_tiling(32, 4)
        whole = vae(clip[..., :32, :]).sample
        vae.disable_tiling()
        close(whole, vae(clip[..., :32, :]).sample)  # one tile, though of more frames
        grids = []
        vae.encoder.register_forward_pre_hook(lambda module, args: grids.append(args[1][0]))
        vae.enable_tiling(16, 4)
        assert vae(clip).sample.shape == clip.shape and set(grids) == {(4, 2, 2)}


class TestAttention:
    @pytest.mark.parametrize("frames", [None, 1, 2])
    @pytest.mark.parametrize("radius", [None, 2])
    def test_equal_to_a_mask(self, frames, radius):
        grid = (4, 5, 3)
        query, key, value = torch.randn(3, 2, 60, 2, 8).unbind()

        def attend(q, k, v, mask=None):
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)

        places = torch.cartesian_prod(*map(torch.arange, grid))
        ages = places[:, None, 0] - places[None, :, 0]
        mask = (ages >= 0) & (ages < (frames or 4))
        look = attend
        if radius is not None:
            start = (places[:, 1:] // radius * radius).unsqueeze(1)
            mask &= ((places[:, 1:] >= start - radius) & (places[:, 1:] < start + 2 * radius)).all(dim=-1)
            look = partial(windowed_attention, grid=grid[1:], radius=radius, attend=attend)
        output = causal_attention(query, key, value, 4, Causal(frames), look)
        torch.testing.assert_close(output, attend(query, key, value, mask))

    def test_a_cache_keeps_as_many_frames_as_are_seen(self):
        key = torch.arange(6.0).view(1, 6, 1, 1, 1)
        for max_frames, kept in ((1, []), (3, [1.0, 2.0]), (9, [0.0, 1.0, 2.0]), (None, [0.0, 1.0, 2.0])):
            cache = FrameCache(max_frames)
            assert cache.extend(key[:, :3], -key[:, :3])[1].flatten().tolist() == [0, -1, -2]
            assert cache.layers[0][0].flatten().tolist() == kept
            cache.start = 3
            keys, _ = cache.extend(key[:, 3:4], key[:, 3:4])
            assert keys.flatten().tolist() == [*kept, 3.0] and len(cache.layers) == 1


class TestErrors:
    @pytest.mark.parametrize("frames, nearest", [(2, "1 or 5"), (4, "1 or 5"), (8, "5 or 9")])
    def test_other_numbers_of_frames(self, frames, nearest):
        for call in (lambda x: make().encode(x), lambda x: make()([x[0]])):
            with pytest.raises(
                ValueError, match=f"1 plus a multiple of temporal_patch_size=4, but is {frames}: make it {nearest}"
            ):  # noqa: E501
                call(torch.zeros(1, 3, frames, 8, 8))

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"sample_frames": 16}, "`sample_frames` must be 1 plus a multiple of .*=4, but is 16: make it 13 or 17"),
            ({"num_latent_tokens": 8}, "`num_latent_tokens` is 8, but 1-D codes are of whole clips"),
            ({"causal": 1}, "`causal`"),
        ],
    )
    def test_config(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            make(**overrides)

    def test_windows_of_frames(self):
        for frames in (0, 1.5, True):
            with pytest.raises(ValueError, match=f"`frames` must be an integer from 1 to .*, but is {frames}"):
                make().enable_sliding_window(frames=frames)
        for call in (
            lambda vae: vae.enable_sliding_window(frames=2),
            lambda vae: vae.encode_stream([], max_cached_frames=2),
            lambda vae: vae.decode_stream([], max_cached_frames=2),
        ):
            for kind in ("v1", "video"):
                with pytest.raises(ValueError, match="frames` is 2, but .* take a model with `causal=True`"):
                    call(make_vae(kind))

    def test_a_window_of_frames_is_not_one_of_places(self):
        vae = make()
        vae.enable_sliding_window(frames=2)
        assert (vae.window_radius, vae.window_frames) == (None, 2)
        vae.enable_sliding_window()
        assert (vae.window_radius, vae.window_frames) == (16, None)
        vae.disable_sliding_window()
        assert (vae.window_radius, vae.window_frames) == (None, None)


class TestVariants:
    @pytest.mark.parametrize("name, frames", [("S-B/4x8", 17), ("S-B/8x8", 17), ("S-B/1x8", 16), ("S-B/16", 1)])
    def test_clips_have_a_frame_more(self, name, frames):
        sizes = {"encoder_num_layers": 1, "decoder_num_layers": 1}
        with torch.device("meta"):
            vae = AutoencoderViTok.from_variant(name, causal=True, **sizes)
            assert vae.config.causal and vae.config.sample_frames == frames
            assert not AutoencoderViTok.from_variant(name, **sizes).config.causal

    def test_save_and_load(self, vae, tmp_path):
        vae.save_pretrained(tmp_path)
        loaded, clip = AutoencoderViTok.from_pretrained(tmp_path), make_clip(vae)
        assert loaded.config.causal
        close(loaded(clip).sample, vae(clip).sample)

    def test_the_weights_are_those_of_other_models(self):
        config = ARCHITECTURES["causal"] | {"causal": False, "sample_frames": 4}
        make().load_state_dict(AutoencoderViTok(**config).state_dict())


class TestStreams:
    @pytest.mark.parametrize("seed", range(50))
    def test_equal_to_the_whole(self, seed):
        vae = make(random.Random(seed).choice([*KINDS]))
        clip = make_clip(vae, random.Random(seed).randint(1, 9))
        latents = encode(vae, clip)
        streamed = join(vae.encode_stream(cut_randomly(clip, seed)))
        assert streamed.shape == latents.shape
        close(streamed, latents)
        sample = join(vae.decode_stream(iter(cut_randomly(latents, seed + 1))))
        assert sample.shape == clip.shape
        close(sample, vae.decode(latents).sample)

    @pytest.mark.parametrize("settings", SETTINGS)
    def test_settings(self, vae, settings):
        SETTINGS[settings](vae)
        clip = make_clip(vae, 5, size=(24, 40))
        latents = encode(vae, clip)
        stream = vae.encode_stream(clip.split([2, 1, clip.shape[2] - 3], dim=2))
        vae.enable_sliding_window(3)  # the stream keeps the settings with which it began
        close(join(stream), latents)
        vae.disable_sliding_window()
        SETTINGS[settings](vae)
        close(join(vae.decode_stream(latents.split([1, 2, 2], dim=2))), vae.decode(latents).sample)

    @pytest.mark.parametrize("frames", [1, 2, 4, 100])
    def test_a_bounded_cache_is_a_window(self, vae, frames):
        clip = make_clip(vae, 7)
        unbounded = encode(vae, clip)
        streams = [join(vae.encode_stream(cut_randomly(clip, seed), max_cached_frames=frames)) for seed in range(4)]
        decoded = join(vae.decode_stream(cut_randomly(unbounded, 0), max_cached_frames=frames))
        vae.enable_sliding_window(frames=frames)
        latents = encode(vae, clip)
        assert torch.allclose(latents, unbounded, atol=1e-5) == (frames == 100)
        for streamed in streams:
            close(streamed, latents)
        close(decoded, vae.decode(unbounded).sample)
        vae.enable_sliding_window(frames=9)  # the narrower of both counts
        close(join(vae.encode_stream([clip], max_cached_frames=frames)), latents)

    def test_what_the_cache_keeps(self, monkeypatch):
        caches = []
        monkeypatch.setattr(tiling, "FrameCache", lambda frames: caches.append(FrameCache(frames)) or caches[-1])
        vae = make()
        for bound in (None, 3):
            clip, sizes = make_clip(vae, 8), []
            for _ in vae.encode_stream(clip.split(4, dim=2), max_cached_frames=bound):
                cache = caches[-1]
                assert len(cache.layers) == 2  # attention layers
                sizes.append([x.untyped_storage().nbytes() for pair in cache.layers for x in pair])
                assert {x.shape[1] for pair in cache.layers for x in pair} == {min(len(sizes), 2 if bound else 8)}
            of_a_frame = 2 * 6 * 32 * 4  # items, tokens, channels, bytes
            kept = [min(frame + 1, 2 if bound else 8) for frame in range(8)]
            assert sizes == [[frames * of_a_frame] * 4 for frames in kept]

    def test_large_pieces_are_taken_in_parts(self):
        vae, counts = make(), []
        vae.encoder.register_forward_pre_hook(lambda module, args: counts.append(args[1][0][0]))
        list(vae.encode_stream([make_clip(vae, 7)]))
        assert counts == [2, 2, 2, 1]
        vae.enable_tiling(tile_sample_min_frames=12)
        counts.clear()
        list(vae.encode_stream([make_clip(vae, 7)]))
        assert counts == [3, 3, 1]

    def test_lazy(self):
        vae, read = make(), []

        def frames():
            for index in range(100):
                read.append(index)
                yield torch.zeros(1, 3, 1, 16, 16)

        stream = vae.encode_stream(frames())
        for count in (1, 5, 9):
            assert next(stream).shape == (1, 4, 1, 2, 2) and len(read) == count

    @pytest.mark.parametrize("frames, missing", [(2, 3), (4, 1), (7, 2)])
    def test_incomplete(self, frames, missing):
        vae = make()
        stream = vae.encode_stream(torch.zeros(1, 3, frames, 8, 8).split(1, dim=2))
        with pytest.raises(ValueError, match=f"{missing} of 4 frames are missing"):
            list(stream)

    def test_nothing_and_wrong_pieces(self):
        vae = make()
        assert list(vae.encode_stream([])) == list(vae.decode_stream([])) == []
        with pytest.raises(ValueError, match=r"`pieces\[1\]` must be"):
            list(vae.encode_stream([torch.zeros(1, 3, 5, 8, 8), torch.zeros(1, 3, 4, 8, 16)]))
        with pytest.raises(ValueError, match="`max_cached_frames` must be an integer from 1"):
            vae.encode_stream([], max_cached_frames=0)

    def test_streams_do_not_disturb_each_other(self, vae):
        clip = make_clip(vae, 4)
        first, second = (vae.encode_stream(x.split(1, dim=2)) for x in (clip, -clip))
        parts = [(next(first), next(second)) for _ in range(4)]
        close(join(a for a, _ in parts), encode(vae, clip))
        close(join(b for _, b in parts), encode(vae, -clip))

    def test_checkpointing_and_gradients(self, vae):
        """Each part has gradients of its own; they do not reach back through the cache."""
        clip, parts = make_clip(vae, 3), []
        vae.train().enable_gradient_checkpointing()
        with torch.enable_grad():
            for part in vae.encode_stream(clip.split(1, dim=2)):
                vae.zero_grad()
                part.square().mean().backward()
                parts.append(part.detach())
                assert vae.encoder.proj_in.weight.grad.abs().sum() > 0
        close(join(parts), encode(vae, clip))

    @pytest.mark.parametrize("bound", [None, 3])
    def test_compiled_blocks(self, vae, bound):
        """They are compiled for whole clips; streams do without, for they would compile each layer anew."""
        clip, counter = make_clip(vae, 9), CompileCounter()
        expected = join(vae.encode_stream([clip], max_cached_frames=bound))
        whole = encode(vae, clip[:, :, :5])
        vae.compile_repeated_blocks(backend=counter, fullgraph=True, dynamic=True)
        close(join(vae.encode_stream(clip.split(1, dim=2), max_cached_frames=bound)), expected)
        assert counter.frame_count == 0
        close(encode(vae, clip[:, :, :5]), whole)
        assert counter.frame_count > 0
        torch._dynamo.reset()

    def test_memory_does_not_grow_with_the_video(self):
        vae, peaks = make(sample_frames=13), []
        for length in (65, 65, 513):  # the first run fills the allocator's pools
            before = reset_peak_memory()
            frames = (torch.rand(1, 3, count, 128, 128) * 2 - 1 for count in [1, *[4] * (length // 4)])
            latents = vae.encode_stream(frames, max_cached_frames=2)
            decoded = sum(samples.shape[2] for samples in vae.decode_stream(latents, max_cached_frames=2))
            assert decoded == length
            peaks.append(peak_memory() - before)
        assert peaks[2] < peaks[1] + 10e6  # a video of 513 frames has 100 MB
