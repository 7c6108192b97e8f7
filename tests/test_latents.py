import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from tests.conftest import make_vae
from vitok_hf import compute_latent_statistics, denormalize_latents, normalize_latents


def make_batches(vae, count=3):
    generator = torch.Generator().manual_seed(0)
    frames = () if getattr(vae, "is_image_model", True) else (4,)
    return [
        torch.randint(0, 256, (2, 3, *frames, 16, 16 + 8 * index), generator=generator, dtype=torch.uint8)
        for index in range(count)
    ]


def encode(vae, batch):
    return vae.encode(batch.float() / 127.5 - 1).latent_dist.mode()


class TestStatistics:
    @torch.no_grad()
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_normalised_latents_have_zero_mean_and_unit_variance(self, vae, per_channel):
        batches = make_batches(vae)
        statistics = compute_latent_statistics(vae, batches)
        vae.register_to_config(**statistics.to_config(per_channel))
        latents = [encode(vae, batch) for batch in batches]
        normalised = [normalize_latents(x, vae).transpose(0, 1).flatten(1) for x in latents]
        values = torch.cat(normalised, dim=1)
        assert statistics.num_items == 6 and statistics.num_latents == values.shape[1]
        dims = {"dim": 1} if per_channel else {}
        torch.testing.assert_close(values.mean(**dims), torch.zeros(4 if per_channel else ()), rtol=0, atol=1e-5)
        std = values.std(correction=0, **dims)
        torch.testing.assert_close(std, torch.ones_like(std), rtol=0, atol=1e-4)
        for x in latents:
            torch.testing.assert_close(denormalize_latents(normalize_latents(x, vae), vae), x, rtol=1e-5, atol=1e-6)

    def test_config_is_saved(self, vae, tmp_path):
        config = compute_latent_statistics(vae, make_batches(vae)).to_config()
        vae.register_to_config(**config)
        vae.save_pretrained(tmp_path)
        loaded = type(vae).from_pretrained(tmp_path)
        assert {key: loaded.config[key] for key in config} == config

    def test_far_from_zero(self):
        """Sums in float64: a mean a thousand times the deviation does not spoil it."""
        vae = make_vae("v1")
        with torch.no_grad():
            vae.encoder.proj_out.bias += 1000.0
        statistics = compute_latent_statistics(vae, make_batches(vae))
        latents = torch.cat(
            [encode(vae, x).detach().double().transpose(0, 1).flatten(1) for x in make_batches(vae)], 1
        )
        expected = latents.std(dim=1, correction=0)
        torch.testing.assert_close(torch.tensor(statistics.channel_std).double(), expected, rtol=1e-3, atol=0)

    def test_other_autoencoders(self):
        kl = AutoencoderKL(norm_num_groups=4, block_out_channels=(8,), latent_channels=2).eval()
        dc = AutoencoderDC(
            latent_channels=2,
            attention_head_dim=2,
            encoder_block_out_channels=(4, 4),
            decoder_block_out_channels=(4, 4),
            encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1),
            encoder_qkv_multiscales=((), ()),
            decoder_qkv_multiscales=((), ()),
            encoder_block_types="ResBlock",
            decoder_block_types="ResBlock",
        ).eval()
        for vae in (kl, dc):
            statistics = compute_latent_statistics(vae, make_batches(vae))
            assert statistics.num_items == 6 and len(statistics.channel_std) == 2 and statistics.std > 0

    def test_pictures_that_are_floats(self):
        with pytest.raises(ValueError, match="must be uint8, from 0 to 255, but are torch.float32"):
            compute_latent_statistics(make_vae("v1"), [torch.zeros(1, 3, 16, 16)])

    def test_nothing(self):
        with pytest.raises(ValueError, match="no pictures"):
            compute_latent_statistics(make_vae("v1"), [])


class TestFormula:
    def test_matches_the_pipelines(self):
        """(latents - shift_factor) * scaling_factor of SD3; (latents - mean) / std * scaling_factor of SDXL."""
        latents = torch.randn(2, 4, 3, 3)
        vae = make_vae("v1", scaling_factor=0.5, shift_factor=0.25)
        torch.testing.assert_close(normalize_latents(latents, vae), (latents - 0.25) * 0.5)
        vae = make_vae("v1", scaling_factor=0.5, latents_mean=[0.0, 1.0, 2.0, 3.0], latents_std=[1.0, 2.0, 3.0, 4.0])
        mean, std = (torch.tensor(vae.config[name]).view(1, 4, 1, 1) for name in ("latents_mean", "latents_std"))
        torch.testing.assert_close(normalize_latents(latents, vae), (latents - mean) / std * 0.5)
        video = latents.unsqueeze(2)
        torch.testing.assert_close(normalize_latents(video, vae)[:, :, 0], normalize_latents(latents, vae))

    def test_latents_without_a_batch_dimension(self):
        vae = make_vae("v1", latents_mean=[0.0] * 4, latents_std=[1.0, 2.0, 3.0, 4.0])
        for shape in ((4, 4, 4), (1, 3, 4, 4)):
            with pytest.raises(ValueError, match=r"must be \(B, 4, h, w\) or \(B, 4, t, h, w\), but have shape"):
                normalize_latents(torch.zeros(shape), vae)

    def test_dtype(self):
        latents = torch.randn(1, 4, 2, 2).bfloat16()
        assert denormalize_latents(normalize_latents(latents, make_vae("v1")), make_vae("v1")).dtype == torch.bfloat16
