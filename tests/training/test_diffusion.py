import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, FlowMatchEulerDiscreteScheduler

from vitok_hf.training.diffusion import (
    add_noise,
    bucket_timesteps,
    diffusion_losses,
    drop_labels,
    make_scheduler,
    min_snr_weights,
    sample_timesteps,
)


PREDICTION_TYPES = ("epsilon", "v_prediction", "flow_prediction")
SHAPE = (3, 2, 2, 4, 6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw():
    return torch.randn(SHAPE, generator=seeded(1)), torch.randn(SHAPE, generator=seeded(2))


def alpha_bar(timestep):
    """Product of 1 - beta over the timesteps up to this one, betas from 1e-4 to 0.02 in 1000 equal steps."""
    betas = [1e-4 + (0.02 - 1e-4) * index / 999 for index in range(timestep + 1)]
    return math.prod(1.0 - beta for beta in betas)


class TestSchedulers:
    def test_kinds(self):
        for kind in ("epsilon", "v_prediction"):
            scheduler = make_scheduler(kind)
            assert isinstance(scheduler, DDIMScheduler) and scheduler.config.prediction_type == kind
            assert scheduler.config.clip_sample is False
            torch.testing.assert_close(scheduler.alphas_cumprod, DDPMScheduler().alphas_cumprod)
            assert scheduler.alphas_cumprod[700].item() == pytest.approx(alpha_bar(700), rel=1e-4)
        assert isinstance(make_scheduler("flow_prediction"), FlowMatchEulerDiscreteScheduler)


class TestTargets:
    def test_diffusion(self):
        latents, noise = draw()
        timesteps = [0, 500, 999]
        for kind in ("epsilon", "v_prediction"):
            noisy, target = add_noise(make_scheduler(kind), latents, noise, torch.tensor(timesteps))
            for index, timestep in enumerate(timesteps):
                signal, spread = math.sqrt(alpha_bar(timestep)), math.sqrt(1 - alpha_bar(timestep))
                x, e = latents[index], noise[index]
                torch.testing.assert_close(noisy[index], signal * x + spread * e, rtol=1e-3, atol=1e-3)
                expected = e if kind == "epsilon" else signal * e - spread * x
                torch.testing.assert_close(target[index], expected, rtol=1e-3, atol=1e-3)

    def test_flow(self):
        latents, noise = draw()
        noisy, target = add_noise(
            make_scheduler("flow_prediction"), latents, noise, torch.tensor([0.0, 250.5, 1000.0])
        )
        torch.testing.assert_close(noisy[0], latents[0])
        torch.testing.assert_close(noisy[1], 0.7495 * latents[1] + 0.2505 * noise[1])
        torch.testing.assert_close(noisy[2], noise[2])
        assert torch.equal(target, noise - latents)

    def test_flow_is_what_the_scheduler_integrates(self):
        """One step over the whole schedule along the target ends at the latents."""
        latents, noise = draw()
        scheduler = make_scheduler("flow_prediction")
        _, target = add_noise(scheduler, latents, noise, torch.full((3,), 1000.0))
        scheduler.set_timesteps(1)
        assert scheduler.timesteps.tolist() == [1000.0]
        sample = scheduler.step(target, scheduler.timesteps[0], noise).prev_sample
        torch.testing.assert_close(sample, latents)

    @pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
    def test_ddim_undoes_the_noise(self, kind):
        latents, noise = draw()
        scheduler = make_scheduler(kind)
        noisy, target = add_noise(scheduler, latents, noise, torch.full((3,), 600))
        scheduler.set_timesteps(5)
        clean = scheduler.step(target, 600, noisy).pred_original_sample
        torch.testing.assert_close(clean, latents, rtol=1e-3, atol=1e-3)


class TestLoss:
    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    def test_perfect_predictions(self, kind):
        latents, noise = draw()
        scheduler, labels = make_scheduler(kind), torch.tensor([0, 1, 2])
        timesteps = sample_timesteps(scheduler, 3, generator=seeded())
        noisy, target = add_noise(scheduler, latents, noise, timesteps)

        def model(hidden_states, timestep, class_labels, return_dict):
            assert torch.equal(hidden_states, noisy) and torch.equal(timestep, timesteps)
            assert torch.equal(class_labels, labels) and not return_dict
            return (prediction,)

        prediction = target
        assert diffusion_losses(model, scheduler, latents, labels, noise, timesteps).tolist() == [0.0] * 3
        prediction = target + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
        losses = diffusion_losses(model, scheduler, latents, labels, noise, timesteps)
        assert losses.tolist() == pytest.approx([1.0, 4.0, 9.0], rel=1e-5)
        if kind != "flow_prediction":
            weighted = diffusion_losses(model, scheduler, latents, labels, noise, timesteps, snr_gamma=5.0)
            torch.testing.assert_close(weighted, losses * min_snr_weights(scheduler, timesteps, 5.0))

    def test_min_snr(self):
        for timestep in (10, 300, 900):
            snr = alpha_bar(timestep) / (1 - alpha_bar(timestep))
            for kind, scale in (("epsilon", snr), ("v_prediction", snr + 1)):
                weight = min_snr_weights(make_scheduler(kind), torch.tensor([timestep]), 5.0).item()
                assert weight == pytest.approx(min(snr, 5.0) / scale, rel=1e-3)


class TestTimesteps:
    def test_diffusion(self):
        timesteps = sample_timesteps(make_scheduler("epsilon"), 20_000, generator=seeded())
        assert timesteps.dtype == torch.int64 and timesteps.min() == 0 and timesteps.max() == 999
        assert timesteps.float().mean().item() == pytest.approx(499.5, abs=8)

    def test_flow(self):
        scheduler = make_scheduler("flow_prediction")
        uniform = sample_timesteps(scheduler, 20_000, generator=seeded()) / 1000
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.01)
        assert uniform.var().item() == pytest.approx(1 / 12, rel=0.05)
        logits = torch.logit(sample_timesteps(scheduler, 20_000, "logit_normal", seeded()) / 1000)
        assert logits.mean().item() == pytest.approx(0.0, abs=0.03)
        assert logits.std().item() == pytest.approx(1.0, abs=0.02)

    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    def test_determinism(self, kind):
        scheduler = make_scheduler(kind)
        first, again, other = (sample_timesteps(scheduler, 8, generator=seeded(seed)) for seed in (0, 0, 1))
        assert torch.equal(first, again) and not torch.equal(first, other)

    @pytest.mark.parametrize("kind", PREDICTION_TYPES)
    def test_buckets(self, kind):
        buckets = bucket_timesteps(make_scheduler(kind), 4, 500, seeded())
        assert list(buckets) == ["0-250", "250-500", "500-750", "750-1000"]
        for index, timesteps in enumerate(buckets.values()):
            assert timesteps.min() >= 250 * index and timesteps.max() < 250 * (index + 1)
            assert timesteps.float().mean().item() == pytest.approx(250 * index + 125, abs=15)


class TestDropout:
    def test_rate(self):
        labels = torch.arange(20_000) % 7
        dropped = drop_labels(labels, 7, 0.1, seeded())
        assert (dropped == 7).float().mean().item() == pytest.approx(0.1, abs=0.01)
        assert torch.equal(dropped[dropped != 7], labels[dropped != 7])
        assert torch.equal(dropped, drop_labels(labels, 7, 0.1, seeded()))
