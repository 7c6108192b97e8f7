import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from tests.conftest import make_input, make_vae
from vitok_hf.models.posterior import ViTokPosterior


@pytest.fixture(params=[(2, 8, 3, 5), (2, 8, 4, 3, 5)], ids=["image", "video"])
def parameters(request):
    return torch.randn(request.param, generator=torch.Generator().manual_seed(0))


class TestGaussian:
    def test_kl_sums_over_all_but_the_batch(self, parameters):
        posterior = ViTokPosterior(parameters)
        mean, logvar = parameters.chunk(2, dim=1)
        expected = kl_divergence(Normal(mean, torch.exp(0.5 * logvar)), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
        torch.testing.assert_close(posterior.kl(), expected)
        torch.testing.assert_close(posterior.kl(posterior), torch.zeros(2), rtol=0, atol=1e-4)

    def test_kl_between_posteriors(self, parameters):
        one, other = ViTokPosterior(parameters), ViTokPosterior(parameters.flip(0))
        expected = kl_divergence(Normal(one.mean, one.std), Normal(other.mean, other.std)).flatten(1).sum(dim=1)
        torch.testing.assert_close(one.kl(other), expected)

    def test_nll(self, parameters):
        posterior = ViTokPosterior(parameters)
        expected = -Normal(posterior.mean, posterior.std).log_prob(torch.ones_like(posterior.mean))
        torch.testing.assert_close(posterior.nll(torch.ones_like(posterior.mean)), expected.flatten(1).sum(dim=1))

    def test_agrees_with_diffusers_on_images(self):
        parameters = torch.randn(2, 8, 3, 5)
        ours, theirs = ViTokPosterior(parameters), DiagonalGaussianDistribution(parameters)
        torch.testing.assert_close(ours.kl(), theirs.kl())
        samples = [p.sample(torch.Generator().manual_seed(3)) for p in (ours, theirs)]
        torch.testing.assert_close(*samples)

    def test_one_generator_an_item(self, parameters):
        posterior = ViTokPosterior(parameters)
        batch = posterior.sample([torch.Generator().manual_seed(seed) for seed in (1, 2)])
        alone = ViTokPosterior(parameters[1:]).sample([torch.Generator().manual_seed(2)])
        torch.testing.assert_close(batch[1:], alone)

    @torch.no_grad()
    def test_compiled_for_other_sizes(self):
        vae = make_vae("v1")

        def run(x):
            posterior = vae.encode(x).latent_dist
            return posterior.sample(), vae(x, sample_posterior=True).sample, posterior.kl()

        compiled = torch.compile(run, backend="eager", fullgraph=True)
        for height, width in ((16, 16), (24, 32), (8, 40)):
            outputs = []
            for function in (run, compiled):
                torch.manual_seed(0)
                outputs.append(function(make_input(vae, 2, height, width)))
            torch.testing.assert_close(*outputs)

    def test_half_precision_is_computed_in_float32(self, parameters):
        posterior = ViTokPosterior(parameters.bfloat16() * 8)
        assert posterior.mode().dtype == posterior.sample().dtype == torch.bfloat16
        assert posterior.kl().dtype == torch.float32 and posterior.kl().isfinite().all()


class TestDeterministic:
    def test_has_one_value(self, parameters):
        posterior = ViTokPosterior(parameters, deterministic=True)
        assert torch.equal(posterior.mode(), parameters)
        assert torch.equal(posterior.sample(), parameters)
        assert torch.equal(posterior.kl(), torch.zeros(2))
