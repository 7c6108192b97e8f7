"""Codes that are cut in channels, in tokens, or in both, and codes without a grid."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch._dynamo.testing import CompileCounter
from torch.export import Dim

from tests.conftest import TINY, assert_close, make_input
from tests.dit import TRANSFORMER, make_transformer
from vitok_hf import AutoencoderViTok, ViTokDiTPipeline, denormalize_latents, normalize_latents
from vitok_hf.models.codes import FILL


COUNTS = {"channel_counts": [1, 2, 4], "token_counts": [1, 3, 6]}
MODELS = {
    "channels": {"channel_counts": [1, 2, 4]},
    "tokens": {"token_counts": [1, 3, 6]},
    "both": COUNTS,
    "latent": {"num_latent_tokens": 5},
    "mask_latent": {"num_latent_tokens": 6} | COUNTS,
    "v2": COUNTS | {"variational": False, "latent_norm": True, "parallel_blocks": True, "qk_norm": True},
    "video": COUNTS | {"temporal_patch_size": 2, "sample_frames": 4, "token_counts": [1, 6, 12]},
    "causal": COUNTS | {"temporal_patch_size": 4, "sample_frames": 5, "causal": True, "token_counts": [1, 6, 12]},
}


DIT = {"sample_size": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4}
DIT |= {"out_channels": 8, "norm_type": "ada_norm_zero", "num_embeds_ada_norm": 1000}


def make(name, **overrides):
    torch.manual_seed(0)
    vae = AutoencoderViTok(**TINY | MODELS[name] | overrides).eval()
    if vae.decoder is not None and vae.decoder.mask_token is not None:
        torch.nn.init.normal_(vae.decoder.mask_token)
    return vae


def sizes_of_batch(x):
    return [tuple(x.shape[2:])] * len(x)


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield
    torch._dynamo.reset()


class TestChannels:
    def test_posteriors_are_narrow_at_first(self):
        """On nothing but biases; of models without nested channels, they are as wide as the prior."""
        for name, variance in (("channels", math.exp(-4)), ("tokens", 1.0)):
            vae = make(name)
            vae.encoder.proj_out.weight.data.zero_()
            assert vae.encode(make_input(vae)).latent_dist.var.unique().tolist() == pytest.approx([variance])

    @pytest.mark.parametrize("name", ["channels", "both", "v2", "video", "causal"])
    def test_a_prefix_is_a_code(self, name):
        vae = make(name)
        x = make_input(vae)
        whole, short = vae.encode(x).latent_dist, vae.encode(x, num_channels=2).latent_dist
        assert torch.equal(short.mode(), whole.mode()[:, :2]) and torch.equal(short.std, whole.std[:, :2])
        filled = whole.mode().clone()
        filled[:, 2:] = FILL
        assert_close(vae.decode(short.mode()).sample, vae.decode(filled).sample)
        assert_close(vae(x, num_channels=2).sample, vae.decode(filled).sample)

    def test_one_for_each_item(self):
        vae = make("channels")
        x = make_input(vae)
        latents = vae.encode(x, num_channels=[1, 4]).latent_dist.mode()
        assert [tuple(item.shape) for item in latents] == [(1, 2, 3), (4, 2, 3)]
        samples = vae.decode(latents).sample
        for index, count in enumerate([1, 4]):
            expected = vae(x[index : index + 1], num_channels=count).sample[0]
            assert_close(samples[index], expected)
            assert_close(vae(x, num_channels=[1, 4]).sample[index], expected)


class TestTokens:
    @pytest.mark.parametrize("name", ["tokens", "both", "v2", "video", "causal", "mask_latent"])
    def test_a_prefix_is_a_code(self, name):
        vae = make(name)
        x, count = make_input(vae), 3 if vae.is_image_model else 6
        whole = vae.encode(x).latent_dist.mode().flatten(2)
        short = vae.encode(x, num_tokens=count).latent_dist.mode()
        assert torch.equal(short, whole[..., :count])
        filled = whole.clone()
        filled[..., count:] = vae.decoder.mask_token[:, None]
        sample = vae.decode(short, sizes=sizes_of_batch(x)).sample
        assert sample.shape == x.shape
        assert_close(sample, vae.decode(filled, sizes=sizes_of_batch(x)).sample)
        assert_close(vae(x, num_tokens=count).sample, sample)

    def test_what_is_cut_off_has_no_effect(self):
        vae = make("both")
        latents = torch.randn(1, 4, 6)
        other = latents.clone()
        other[..., 3:] = torch.randn(1, 4, 3)
        sizes = [(16, 24)]
        assert torch.equal(
            vae.decode(latents[..., :3], sizes=sizes).sample, vae.decode(other[..., :3], sizes=sizes).sample
        )
        assert (vae.decode(latents, sizes=sizes).sample - vae.decode(other, sizes=sizes).sample).abs().max() > 1e-3

    @pytest.mark.parametrize("name", ["tokens", "mask_latent"])
    def test_lists_of_sizes_and_lengths(self, name):
        vae = make(name)
        items = [torch.rand(3, 16, 24) * 2 - 1, torch.rand(3, 20, 17) * 2 - 1, torch.rand(3, 8, 16) * 2 - 1]
        counts, sizes = [2, 5, 1], [item.shape[-2:] for item in items]
        latents = vae.encode(items, num_tokens=counts).latent_dist.mode()
        assert [tuple(item.shape) for item in latents] == [(4, 2), (4, 5), (4, 1)]
        samples = vae.decode(latents, sizes=sizes).sample
        for item, code, sample, other in zip(items, latents, samples, vae(items, num_tokens=counts).sample):
            assert sample.shape == item.shape
            assert_close(other, sample)
            assert_close(vae.decode(code[None], sizes=[item.shape[-2:]]).sample[0], sample)

    def test_the_first_tokens_of_a_causal_model_are_those_of_the_first_picture(self):
        vae = make("causal")
        x = make_input(vae)
        code = vae.encode(x, num_tokens=6).latent_dist.mode()
        assert_close(code, vae.encode(x[:, :, 0]).latent_dist.mode().flatten(2))
        picture = vae.decode(code, sizes=[(1, 16, 24)] * 2).sample
        assert_close(picture[:, :, 0], vae(x[:, :, 0]).sample)
        assert_close(picture, vae.decode(code, sizes=sizes_of_batch(x)).sample[:, :, :1])
        assert_close(vae.decode(code, sizes=[(16, 24)] * 2).sample, picture[:, :, 0])  # (H, W) is a picture
        longest = vae.encode([x[0], x[0, :, 0]], min_psnr=90.0).latent_dist.mode()
        assert [mode.shape for mode in longest] == [(4, 12), (4, 6)]

    def test_default_size(self):
        causal = make("causal", sample_size=16)
        assert causal.decode(torch.randn(1, 4, 3)).sample.shape == (1, 3, 5, 16, 16)  # of `sample_frames` frames
        vae = make("mask_latent")
        assert vae.decode(torch.randn(2, 4, 3)).sample.shape == (2, 3, 32, 32)


class TestLatentTokens:
    @pytest.mark.parametrize("size", [(16, 24), (32, 32), (8, 8)])
    def test_any_size(self, size):
        vae = make("latent")
        x = make_input(vae, 2, *size)
        latents = vae.encode(x).latent_dist
        assert latents.mode().shape == (2, 4, 5) and latents.kl().shape == (2,)
        sample = vae.decode(latents.mode(), sizes=[size] * 2).sample
        assert sample.shape == x.shape
        assert_close(sample, vae(x).sample)

    def test_position_and_order_matter(self):
        vae = make("latent")
        x = make_input(vae)
        latents = vae.encode(x).latent_dist.mode()
        assert (latents - vae.encode(x.flip(-1)).latent_dist.mode()).abs().max() > 1e-4
        sizes = sizes_of_batch(x)
        first, second = (vae.decode(z, sizes=sizes).sample for z in (latents, latents.flip(-1)))
        assert (first - second).abs().max() > 1e-4
        assert (first[..., :8, :8] - first[..., 8:, 16:]).abs().max() > 1e-4

    def test_lists_and_slices(self):
        vae = make("latent")
        items = [torch.rand(3, *size) * 2 - 1 for size in ((16, 24), (9, 30), (16, 24))]
        samples = vae(items).sample
        for item, sample in zip(items, samples):
            assert_close(vae([item]).sample[0], sample)
        vae.enable_slicing()
        for sliced, sample in zip(vae(items).sample, samples):
            assert_close(sliced, sample)

    def test_videos(self):
        vae = make("video", num_latent_tokens=7, token_counts=[2, 7])
        x = make_input(vae)
        latents = vae.encode(x, num_tokens=2, num_channels=1).latent_dist.mode()
        assert latents.shape == (2, 1, 2)
        assert vae.decode(latents, sizes=sizes_of_batch(x)).sample.shape == x.shape

    def test_gradients(self):
        vae = make("mask_latent").train()
        x = make_input(vae)
        with torch.enable_grad():
            output = vae(x, sample_posterior=True, num_tokens=[2, 4], num_channels=[2, 4])
            (output.sample.square().mean() + output.kl.mean()).backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in vae.parameters())


class TestMinPsnr:
    @pytest.mark.parametrize(
        "name, field, allowed", [("channels", "num_channels", [1, 2, 4]), ("tokens", "num_tokens", [1, 2, 3, 4, 5, 6])]
    )
    def test_the_shortest_that_reaches_it(self, name, field, allowed, monkeypatch):
        vae = make(name, **{"token_counts": allowed} if field == "num_tokens" else {})
        images = torch.rand(4, 3, 16, 24) * 2 - 1
        # The further an item is cut, the further is what it is decoded to, and some items need more than others.
        fill, strength = vae._fill, torch.tensor([0.02, 0.2, 0.5, 1.0])
        decodes = []

        def decode(name, latents, settings, sizes=None, grids=None):
            decodes.append(1)
            missing = torch.tensor([allowed[-1] - count for count in latents])
            return images + (strength * missing / allowed[-1]).view(-1, 1, 1, 1) * (0.5 - images.sign())

        monkeypatch.setattr(vae, "_fill", lambda x, latents, tokens, channels: tokens or channels)
        monkeypatch.setattr(vae, "_decode", decode)
        for floor in (5.0, 12.0, 20.0, 30.0, 1000.0):
            tried = []
            for count in allowed:
                sample = decode(None, [count] * 4, None).clamp(-1, 1)
                tried.append(10 * torch.log10(4 / (sample - images).square().flatten(1).mean(1)))
            expected = [
                next((count for count, values in zip(allowed, tried) if values[item] >= floor), allowed[-1])
                for item in range(4)
            ]
            decodes.clear()
            posterior = vae.encode(images).latent_dist
            assert vae._shortest(images, posterior, field, floor, None) == expected
            assert len(decodes) <= math.ceil(math.log2(len(allowed))) + 1
        assert fill is not vae._fill

    def test_codes(self):
        vae = make("both")
        x = make_input(vae)
        easy, hard = (vae.encode(x, min_psnr=floor).latent_dist.mode() for floor in (0.0, 100.0))
        assert [item.shape[-1] for item in easy] == [1, 1] and [item.shape[-1] for item in hard] == [6, 6]
        assert [len(item) for item in vae.encode(x, min_psnr=100.0, num_tokens=3).latent_dist.mode()] == [4, 4]
        assert [len(item) for item in vae.encode(list(x), min_psnr=0.0, num_tokens=3).latent_dist.mode()] == [1, 1]


class TestFeatures:
    @pytest.mark.parametrize("name", MODELS)
    def test_save_and_load(self, name, tmp_path):
        vae = make(name)
        vae.save_pretrained(tmp_path)
        loaded, x = AutoencoderViTok.from_pretrained(tmp_path), make_input(vae)
        assert loaded.config.channel_counts == vae.config.channel_counts
        assert_close(loaded(x).sample, vae(x).sample)
        decoder = AutoencoderViTok.from_pretrained(tmp_path, component="decoder")
        latents = vae.encode(x).latent_dist.mode()
        assert_close(
            decoder.decode(latents, sizes=None if latents.ndim > 3 else sizes_of_batch(x)).sample, vae(x).sample
        )
        assert_close(
            AutoencoderViTok.from_pretrained(tmp_path, component="encoder").encode(x).latent_dist.mode(), latents
        )

    @pytest.mark.parametrize("name", ["both", "mask_latent"])
    def test_fused_and_compiled(self, name):
        vae = make(name)
        x = make_input(vae)
        expected = vae(x, num_tokens=3, num_channels=2).sample
        vae.fuse_qkv_projections()
        compiled = torch.compile(vae, backend="eager", fullgraph=True)
        assert_close(compiled(x, num_tokens=3, num_channels=2).sample, expected)

    @pytest.mark.parametrize("name", ["both", "mask_latent"])
    def test_compiled_once_for_all_sizes(self, name):
        vae, counter = make(name), CompileCounter()
        compiled = torch.compile(vae, backend=counter, fullgraph=True, dynamic=True)
        for x in (make_input(vae, 5, 24, 56), make_input(vae, 3, 32, 40), make_input(vae, 2, 64, 48)):
            assert_close(compiled(x, num_tokens=3, num_channels=2).sample, vae(x, num_tokens=3, num_channels=2).sample)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("name", ["both", "mask_latent"])
    def test_export_of_a_prefix(self, name):
        class Encoder(torch.nn.Module):
            def forward(self, x):
                return self.vae.encode(x, num_tokens=3, num_channels=2).latent_dist.mode()

        encoder = Encoder()
        encoder.vae = vae = make(name)
        shapes = ({0: Dim("batch"), 2: 8 * Dim("h", min=2, max=64), 3: 8 * Dim("w", min=2, max=64)},)
        program = torch.export.export(encoder, (make_input(vae, 5, 24, 56),), dynamic_shapes=shapes).module()
        x = make_input(vae, 3, 32, 40)
        assert_close(program(x), encoder(x))

    def test_tiles_and_streams_of_channel_prefixes(self):
        vae = make("channels")
        x = make_input(vae, 1, 40, 48)
        vae.enable_tiling(16, tile_overlap_factor=0.5)
        latents = vae.encode(x, num_channels=2).latent_dist.mode()
        assert torch.equal(latents, vae.encode(x).latent_dist.mode()[:, :2])
        assert vae.decode(latents).sample.shape == x.shape

    def test_streams_of_codes_without_a_grid(self):
        vae = make("video", num_latent_tokens=12)
        with pytest.raises(ValueError, match="1-D codes are of whole clips"):
            vae.encode_stream([make_input(vae)])
        with pytest.raises(ValueError, match="1-D codes are of whole clips"):
            vae.decode_stream([torch.zeros(1, 4, 2, 2, 2)])

    def test_tiles_of_codes_without_a_grid(self):
        vae = make("latent")
        vae.enable_tiling(16)
        x = make_input(vae, 1, 16, 16)
        assert vae.decode(vae.encode(x).latent_dist.mode(), sizes=[(16, 16)]).sample.shape == x.shape
        with pytest.raises(ValueError, match="1-D codes are of whole pictures"):
            vae.encode(make_input(vae, 1, 16, 24))


class TestDiffusionTransformer:
    def test_sequences_are_rows(self):
        dit = make_transformer(**TRANSFORMER)
        torch.nn.init.normal_(dit.proj_out.weight, std=0.1)
        codes = torch.randn(2, 4, 7)
        sample = dit(codes, 5).sample
        assert sample.shape == codes.shape
        assert_close(sample, dit(codes.unsqueeze(2), 5).sample.squeeze(2))
        assert (dit(codes.flip(-1), 5).sample.flip(-1) - sample).abs().max() > 1e-4

    def test_statistics_of_a_prefix_are_a_prefix(self):
        statistics = {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [1.0, 2.0, 4.0, 8.0]}
        vae, z = make("both", **statistics), torch.randn(2, 4, 6)
        whole = normalize_latents(z, vae)
        assert torch.equal(normalize_latents(z[:, :2], vae), whole[:, :2])
        assert_close(denormalize_latents(whole[:, :2], vae), z[:, :2])
        with pytest.raises(ValueError, match=r"Latents must be \(B, 4, h, w\)"):
            normalize_latents(z[:, :3], vae)


class TestPipeline:
    def make(self, name, **transformer):
        vae = make(name, latents_mean=[1.0, 2.0, 3.0, 4.0], latents_std=[1.0, 2.0, 4.0, 8.0])
        transformer = make_transformer(**TRANSFORMER | transformer)
        pipe = ViTokDiTPipeline(transformer, vae, DDIMScheduler(clip_sample=False))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe, **options):
        generator = torch.Generator().manual_seed(0)
        return pipe([1, 2], num_inference_steps=2, generator=generator, output_type="pt", **options).images

    @pytest.mark.parametrize("name", ["latent", "mask_latent"])
    def test_sequences(self, name):
        pipe = self.make(name)
        assert self.call(pipe).shape == (2, 3, 32, 32) and self.call(pipe, height=16, width=24).shape == (2, 3, 16, 24)
        length = pipe.vae.config.num_latent_tokens
        assert pipe.get_latent_shape(3) == (3, 4, length)
        noise = torch.randn(2, 4, length)
        assert self.call(pipe, latents=noise).shape == (2, 3, 32, 32)
        with pytest.raises(ValueError, match=r"`latents` must have shape \(2, 4,"):
            self.call(pipe, latents=noise[..., 1:])

    def test_prefixes_of_channels(self):
        pipe = self.make("channels", in_channels=2)
        assert self.call(pipe).shape == (2, 3, 32, 32)
        with pytest.raises(ValueError, match="latent_channels=4, but the transformer in_channels=3"):
            self.make("channels", in_channels=3)

    def test_pipelines_that_want_a_grid(self):
        pipe = DiTPipeline(DiTTransformer2DModel(**DIT), make("latent"), DDIMScheduler())
        pipe.set_progress_bar_config(disable=True)
        with pytest.raises(ValueError, match="the codes of this model are sequences"):
            pipe([0], num_inference_steps=1)
