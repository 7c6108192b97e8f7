"""Losses of diffusion models: what they predict, at which timesteps, and how these are weighted.

Timesteps are on the scale that the model and diffusers' schedulers share, 0 to 1000. Randomness is of `generator`,
or of PyTorch's own on the device.
"""

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import nn


def make_scheduler(prediction_type: str) -> SchedulerMixin:
    """The scheduler to train with and to sample from: DDIM with linear betas (DiT), or flow matching."""
    if prediction_type == "flow_prediction":
        return FlowMatchEulerDiscreteScheduler()
    return DDIMScheduler(prediction_type=prediction_type, clip_sample=False)  # its betas are those of DiT


def is_flow(scheduler: SchedulerMixin) -> bool:
    return isinstance(scheduler, FlowMatchEulerDiscreteScheduler)


def sample_timesteps(
    scheduler: SchedulerMixin,
    batch_size: int,
    weighting_scheme: str = "none",
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """(B,): whole numbers below 1000 with equal probability; of flow matching any between 0 and 1000.

    These are as likely as `weighting_scheme` says: "logit_normal" (arXiv 2403.03206, section 3.1) draws more in the
    middle, log(t / (1000 - t)) being standard normal, "none" all alike.
    """
    steps = scheduler.config.num_train_timesteps
    if not is_flow(scheduler):
        return torch.randint(steps, (batch_size,), generator=generator, device=device)
    return steps * compute_density_for_timestep_sampling(
        weighting_scheme, batch_size, 0.0, 1.0, device=device, generator=generator
    )


def drop_labels(
    class_labels: torch.Tensor, null_class: int, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """(B,) labels, each replaced by `null_class` with this probability, for classifier-free guidance."""
    dropped = torch.rand(class_labels.shape, generator=generator, device=class_labels.device) < probability
    return torch.where(dropped, null_class, class_labels)


def add_noise(
    scheduler: SchedulerMixin, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents at `timesteps` (B,), and what a model has to predict from them; both of the shape of `latents`.

    Flow matching: sigma = t / 1000, (1 - sigma) * latents + sigma * noise, and noise - latents.
    """
    if is_flow(scheduler):
        sigmas = timesteps.view(-1, 1, 1, 1, 1) / scheduler.config.num_train_timesteps
        return torch.lerp(latents, noise, sigmas), noise - latents
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "v_prediction":
        return noisy, scheduler.get_velocity(latents, noise, timesteps)
    return noisy, noise


def min_snr_weights(scheduler: SchedulerMixin, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """(B,): min(SNR, gamma) of the error in the clean latents, as weights of the prediction (arXiv 2303.09556).

    Its error is the latents' times SNR for epsilon, times SNR + 1 for v-prediction.
    """
    snr = compute_snr(scheduler, timesteps)
    scale = snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr
    return snr.clamp(max=gamma) / scale


def diffusion_losses(
    model: nn.Module,
    scheduler: SchedulerMixin,
    latents: torch.Tensor,
    class_labels: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32.

    Args:
        model: Called as a `ViTokDiTModel`.
        scheduler: What `make_scheduler` returns.
        latents: Normalised, (B, c, t, h, w).
        class_labels: (B,), of which some have been dropped in training.
        noise: Standard normal, of the shape of `latents`.
        timesteps: (B,), of `sample_timesteps`.
        snr_gamma: Weight the samples by `min_snr_weights`.
    """
    noisy, target = add_noise(scheduler, latents, noise, timesteps)
    prediction = model(noisy, timesteps, class_labels, return_dict=False)[0]
    losses = (prediction.float() - target.float()).square().flatten(1).mean(dim=1)
    return losses if snr_gamma is None else losses * min_snr_weights(scheduler, timesteps, snr_gamma)


def bucket_timesteps(
    scheduler: SchedulerMixin, num_buckets: int, batch_size: int, generator: torch.Generator | None = None
) -> dict[str, torch.Tensor]:
    """(B,) timesteps between each two neighbours of evenly spaced bounds, by name, as "0-100"."""
    steps, buckets = scheduler.config.num_train_timesteps, {}
    for index in range(num_buckets):
        low, high = steps * index // num_buckets, steps * (index + 1) // num_buckets
        if is_flow(scheduler):
            timesteps = low + (high - low) * torch.rand(batch_size, generator=generator)
        else:
            timesteps = torch.randint(low, high, (batch_size,), generator=generator)
        buckets[f"{low}-{high}"] = timesteps
    return buckets
