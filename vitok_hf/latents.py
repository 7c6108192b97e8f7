"""Normalisation of latents: the statistics, and the one formula that applies them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ModelMixin

from .evaluation.pixels import to_float


def _statistics(vae: ModelMixin, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and standard deviation that broadcast over (B, c, ...), and the factor."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    counts = {len(values) for values in (mean, std) if values is not None} - {1}
    if counts and (latents.ndim not in (4, 5) or latents.shape[1] not in counts):
        raise ValueError(
            f"Latents must be (B, {max(counts)}, h, w) or (B, {max(counts)}, t, h, w), but have shape "
            f"{tuple(latents.shape)}; add a batch dimension to items of a list."
        )
    shift = getattr(config, "shift_factor", None) or 0.0
    mean = [shift] if mean is None else mean
    std = [1.0] if std is None else std
    shape = (1, -1) + (1,) * (latents.ndim - 2)
    mean, std = (
        torch.tensor(values, device=latents.device, dtype=torch.float32).view(shape) for values in (mean, std)
    )
    return mean, std, getattr(config, "scaling_factor", None) or 1.0


def normalize_latents(latents: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    """Latents as an autoencoder gives them -> as a diffusion model sees them, (latents - mean) / std * scaling_factor.

    The same numbers that diffusers' pipelines use: `latents_mean` and `latents_std` of each channel if the config has
    them, else `shift_factor` for all; and `scaling_factor`.

    Args:
        latents: (B, c, h, w) or (B, c, t, h, w).
        vae: Any diffusers autoencoder.

    Raises:
        ValueError: If the latents have another number of dimensions, or of channels than there are statistics.
    """
    mean, std, factor = _statistics(vae, latents)
    return ((latents.float() - mean) / std * factor).to(latents.dtype)


def denormalize_latents(latents: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    """Inverse of `normalize_latents`: what a diffusion model gives -> what `vae.decode` takes."""
    mean, std, factor = _statistics(vae, latents)
    return (latents.float() / factor * std + mean).to(latents.dtype)


@dataclass
class LatentStatistics:
    """Mean and standard deviation of each latent channel and of all, and the counts that they come from."""

    channel_mean: list[float]
    channel_std: list[float]
    mean: float
    std: float
    num_items: int
    num_latents: int

    def to_config(self, per_channel: bool = True) -> dict[str, Any]:
        """Config entries that give normalised latents zero mean and unit variance.

        Args:
            per_channel: `latents_mean` and `latents_std`, which the pipelines of Wan, LTX, QwenImage, SDXL and Mochi
                read; or, if not, `scaling_factor` and `shift_factor`, for those of Stable Diffusion, SD3, FLUX, DiT
                and PixArt. Never both: SDXL, LTX and Mochi would apply them one after the other.
        """
        if per_channel:
            statistics = {"latents_mean": self.channel_mean, "latents_std": self.channel_std}
            return statistics | {"scaling_factor": 1.0, "shift_factor": 0.0}
        factors = {"scaling_factor": 1.0 / self.std, "shift_factor": self.mean}
        return factors | {"latents_mean": None, "latents_std": None}


def summarize_latents(batches: Iterable[torch.Tensor]) -> LatentStatistics:
    """Statistics of latents, (B, c, h, w) or (B, c, t, h, w), summed up in float64.

    Raises:
        ValueError: If there is no batch.
    """
    num_items, num_latents, total, squares = 0, 0, 0.0, 0.0
    for batch in batches:
        latents = batch.double().transpose(0, 1).flatten(1)  # (c, N)
        num_items += len(batch)
        num_latents += latents.shape[1]
        total = total + latents.sum(dim=1)
        squares = squares + latents.square().sum(dim=1)
    if num_latents == 0:
        raise ValueError("There are no pictures to compute statistics from.")
    mean, mean_square = total / num_latents, squares / num_latents
    return LatentStatistics(
        channel_mean=mean.tolist(),
        channel_std=(mean_square - mean.square()).sqrt().tolist(),
        mean=mean.mean().item(),
        std=(mean_square.mean() - mean.mean().square()).sqrt().item(),
        num_items=num_items,
        num_latents=num_latents,
    )


def encode_mode(vae: ModelMixin, pixels: torch.Tensor) -> torch.Tensor:
    """The latents of any diffusers autoencoder: the mode of its `latent_dist`, or its `latent` or `latents`."""
    output = vae.encode(pixels)
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latent if hasattr(output, "latent") else output.latents


@torch.no_grad()
def compute_latent_statistics(vae: ModelMixin, batches: Iterable[torch.Tensor]) -> LatentStatistics:
    """Statistics of the latents, the modes of the posteriors, of any diffusers autoencoder.

    Write them with `vae.register_to_config(**statistics.to_config())`.

    Args:
        vae: An autoencoder whose `encode` gives a `latent_dist`, or the latents themselves (`latent`, `latents`).
        batches: Pictures or clips, (B, 3, H, W) or (B, 3, T, H, W) uint8, of sizes that fit the autoencoder.

    Raises:
        ValueError: If there is no batch, or pictures are not uint8.
    """

    def encode(batch: torch.Tensor) -> torch.Tensor:
        if batch.dtype != torch.uint8:
            raise ValueError(f"Pictures must be uint8, from 0 to 255, but are {batch.dtype}.")
        return encode_mode(vae, to_float(batch.to(vae.device)).to(vae.dtype))

    return summarize_latents(map(encode, batches))
