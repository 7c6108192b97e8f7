import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL

from tests.conftest import frames_of, make_vae
from vitok_hf import AutoencoderViTok, compute_latent_statistics, denormalize_latents, normalize_latents
from vitok_hf.latents import summarize_latents


def make_batches(vae, count=3):
    generator = torch.Generator().manual_seed(0)
    frames = frames_of(vae) if isinstance(vae, AutoencoderViTok) else ()
    return [
        torch.randint(0, 256, (2, 3, *frames, 16, 16 + 8 * index), generator=generator, dtype=torch.uint8)
        for index in range(count)
    ]


def encode(vae, batch):
    return vae.encode(batch.float() / 127.5 - 1).latent_dist


def certain(*batches):
    """Latents without posteriors, as `summarize_latents` takes them."""
    return [(batch, None) for batch in batches]


class TestStatistics:
    @torch.no_grad()
    @pytest.mark.parametrize("per_channel", [True, False])
    def test_normalised_latents_have_zero_mean_and_unit_variance(self, vae, per_channel):
        batches = make_batches(vae)
        statistics = compute_latent_statistics(vae, batches)
        vae.register_to_config(**statistics.to_config(per_channel))
        posteriors = [encode(vae, batch) for batch in batches]
        normalised = [normalize_latents(x.mode(), vae).transpose(0, 1).flatten(1) for x in posteriors]
        spreads = [normalize_latents(x.mode() + x.std, vae).transpose(0, 1).flatten(1) for x in posteriors]
        values, spreads = torch.cat(normalised, dim=1), torch.cat(spreads, dim=1)
        assert statistics.num_items == 6 and statistics.num_latents == values.shape[1]
        dims = {"dim": 1} if per_channel else {}
        torch.testing.assert_close(values.mean(**dims), torch.zeros(4 if per_channel else ()), rtol=0, atol=1e-5)
        variance = values.var(correction=0, **dims) + (spreads - values).square().mean(**dims)  # of samples
        torch.testing.assert_close(variance, torch.ones_like(variance), rtol=0, atol=1e-4)
        for x in (posterior.mode() for posterior in posteriors):
            torch.testing.assert_close(denormalize_latents(normalize_latents(x, vae), vae), x, rtol=1e-5, atol=1e-6)

    def test_config_is_saved(self, vae, tmp_path):
        config = compute_latent_statistics(vae, make_batches(vae)).to_config()
        vae.register_to_config(**config)
        vae.save_pretrained(tmp_path)
        loaded = type(vae).from_pretrained(tmp_path)
        assert {key: loaded.config[key] for key in config} == config

    def test_variance_of_the_posteriors_counts(self):
        """Exactly: std^2 = var(mean) + mean(var), of each channel and of all."""
        means, stds = torch.randn(5, 2, 3, 3, 4, dtype=torch.float64).unbind(1)
        stds = stds.abs()
        statistics = summarize_latents(zip(means.split([1, 3, 1]), stds.split([1, 3, 1])))
        expected = means.var(dim=(0, 2, 3), correction=0) + stds.square().mean(dim=(0, 2, 3))
        assert statistics.channel_std == pytest.approx(expected.sqrt().tolist(), rel=1e-12)
        assert statistics.channel_mean == pytest.approx(means.mean(dim=(0, 2, 3)).tolist(), rel=1e-12)
        assert statistics.std == pytest.approx((means.var(correction=0) + stds.square().mean()).sqrt().item())
        assert statistics.mean == pytest.approx(means.mean().item())
        assert (statistics.num_items, statistics.num_latents) == (5, 60)

    def test_far_from_zero(self):
        """A difference of sums of squares would lose most digits of a deviation that is a millionth of the mean."""
        latents = torch.randn(6, 2, 4, 4, dtype=torch.float64)
        expected = latents.std(dim=(0, 2, 3), correction=0).tolist()
        statistics = summarize_latents(certain(*(1e6 + latents).split([1, 2, 3])))
        assert statistics.channel_std == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("dead, channels", [([2], r"\[2\]"), ([0, 1, 2, 3], r"\[0, 1, 2, 3\]")])
    def test_constant_channels(self, dead, channels):
        vae = make_vae("v1", variational=False)
        with torch.no_grad():
            vae.encoder.proj_out.weight[dead] = 0.0
            vae.encoder.proj_out.bias[dead] = 0.1
        with pytest.raises(ValueError, match=f"Channels {channels} of the latents are constant in 6 pictures"):
            compute_latent_statistics(vae, make_batches(vae))

    def test_latents_that_are_not_finite(self):
        for value in (float("nan"), float("inf")):
            latents = torch.randn(5, 4, 2, 2)
            latents[3, 1, 0, 1] = value
            with pytest.raises(ValueError, match="latents of picture 3 are not finite in channel 1: leave"):
                summarize_latents(certain(*latents.split([1, 1, 3])))
            with pytest.raises(ValueError, match="latents of picture 3 are not finite in channel 1: leave"):
                summarize_latents([(torch.randn(5, 4, 2, 2), latents.abs())])

    def test_shapes(self):
        with pytest.raises(
            ValueError, match=r"Latents must be \(B, c, h, w\) or \(B, c, t, h, w\), but have shape \(4,"
        ):
            summarize_latents(certain(torch.randn(4, 2, 2)))
        with pytest.raises(ValueError, match=r"with the 4 channels of those before, but have shape \(1, 3, 2, 2\)"):
            summarize_latents(certain(torch.randn(1, 4, 2, 2), torch.randn(1, 3, 2, 2)))

    def test_lists_and_empty_batches(self, architecture):
        vae = make_vae(architecture)
        batches = make_batches(vae)
        pictures = [picture for batch in batches for picture in batch]
        expected = compute_latent_statistics(vae, batches)
        for other in ([pictures], [batches[0][:0], [], pictures[:4], *batches[2:]]):
            ours = compute_latent_statistics(vae, other)
            assert ours.channel_std == pytest.approx(expected.channel_std, rel=1e-5)
            assert ours.num_items == 6 and ours.num_latents == expected.num_latents
        with pytest.raises(ValueError, match="no pictures"):
            compute_latent_statistics(vae, [batches[0][:0]])

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
        with pytest.raises(ValueError, match="`batches` must be uint8, from 0 to 255, but are torch.float32"):
            compute_latent_statistics(make_vae("v1"), [torch.zeros(1, 3, 16, 16)])

    def test_deviations_that_are_none(self):
        mean = torch.randn(2, 4, 2, 2)
        for std, message in ((-mean.abs(), "has negative standard"), (mean[..., :1].abs(), "deviation of one shape")):
            with pytest.raises(ValueError, match=rf"`batches\[0\]` .*{message}"):
                summarize_latents([(mean, std)])

    def test_a_tuple_of_pictures_is_a_list(self):
        pictures = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
        ours, theirs = (compute_latent_statistics(make_vae("v1"), [kind(pictures)]) for kind in (tuple, list))
        assert ours == theirs

    def test_nothing(self):
        with pytest.raises(ValueError, match="no pictures"):
            compute_latent_statistics(make_vae("v1"), [])

    def test_certain_latents_have_their_own_deviation(self):
        vae = make_vae("v2")
        latents = torch.cat([encode(vae, x).mode().detach().transpose(0, 1).flatten(1) for x in make_batches(vae)], 1)
        statistics = compute_latent_statistics(vae, make_batches(vae))
        assert statistics.channel_std == pytest.approx(latents.std(dim=1, correction=0).tolist(), rel=1e-5)


class TestFormula:
    def test_a_deviation_of_zero(self):
        vae = make_vae("v1")
        vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0, 2.0, 0.0, 4.0])
        for function in (normalize_latents, denormalize_latents):
            with pytest.raises(
                ValueError, match=r"`latents_std` of the config must be positive, but is \[1.0, 2.0, 0.0"
            ):
                function(torch.zeros(1, 4, 2, 2), vae)

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
