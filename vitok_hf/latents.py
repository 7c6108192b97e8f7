"""Normalisation of latents: the statistics, and the one formula that applies them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput

from .checks import check_bool, check_finite, check_tensor, refuse, show
from .clips import add_row, to_float


# In a config, what leaves latents as they are; so does `None`.
NO_STATISTICS = {"latents_mean": None, "latents_std": None, "scaling_factor": 1.0, "shift_factor": 0.0}


def _statistics(vae: ModelMixin, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Mean and standard deviation that broadcast over (B, c, ...), and the factor."""
    check_tensor("latents", latents)
    check_finite("latents", latents)
    if (config := getattr(vae, "config", None)) is None:
        refuse("vae", "an autoencoder with a `config`", vae)
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    counts = {len(values) for values in (mean, std) if values is not None} - {1}
    prefixes = getattr(config, "channel_counts", None) or ()  # whose statistics are a prefix
    are_sequences = any(getattr(config, name, None) for name in ("token_counts", "num_latent_tokens"))
    ranks = (3, 4, 5) if are_sequences else (4, 5)
    if counts and (latents.ndim not in ranks or latents.shape[1] not in counts | {*prefixes}):
        raise ValueError(
            f"Latents must be (B, {max(counts)}, h, w) or (B, {max(counts)}, t, h, w), but have shape "
            f"{tuple(latents.shape)}; add a batch dimension to items of a list."
        )
    if std is not None and not all(value > 0 for value in std):
        raise ValueError(f"`latents_std` of the config must be positive, but is {std}.")
    shift = getattr(config, "shift_factor", None) or 0.0
    mean = [shift] if mean is None else mean[: latents.shape[1]]
    std = [1.0] if std is None else std[: latents.shape[1]]
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
        ValueError: If the latents have another number of dimensions, or of channels than there are statistics, are no
            floats, or, on a CPU, are not finite.
    """
    mean, std, factor = _statistics(vae, latents)
    return ((latents.float() - mean) / std * factor).to(latents.dtype)


def denormalize_latents(latents: torch.Tensor, vae: ModelMixin) -> torch.Tensor:
    """Inverse of `normalize_latents`: what a diffusion model gives -> what `vae.decode` takes."""
    mean, std, factor = _statistics(vae, latents)
    return (latents.float() / factor * std + mean).to(latents.dtype)


def latent_spread(vae: ModelMixin) -> torch.Tensor:
    """The standard deviation of the latents by the statistics in the config, (c,) or, one for all, (1,).

    Raises:
        ValueError: If the config has none, or wrong ones.
    """
    std, factor = vae.config.get("latents_std"), vae.config.get("scaling_factor") or 1.0
    if std is None and factor == 1.0:
        raise ValueError(
            f"The config of the {type(vae).__name__} has no statistics of its latents: write what "
            "`compute_latent_statistics` measures, `vae.register_to_config(**statistics.to_config())`."
        )
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    spread = torch.tensor([1.0] if std is None else list(std), dtype=torch.float32) / factor
    if len(spread) not in (1, channels or len(spread)) or not ((spread > 0) & spread.isfinite()).all():
        raise ValueError(
            f"The config of the {type(vae).__name__} has `latents_std` {std} and `scaling_factor` {factor:g} for "
            f"{channels} channels: they must be positive, one for all or one for each channel."
        )
    return spread


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
        check_bool(per_channel=per_channel)
        if per_channel:
            statistics = {"latents_mean": self.channel_mean, "latents_std": self.channel_std}
            return statistics | {"scaling_factor": 1.0, "shift_factor": 0.0}
        factors = {"scaling_factor": 1.0 / self.std, "shift_factor": self.mean}
        return factors | {"latents_mean": None, "latents_std": None}


def _check_finite(latents: torch.Tensor, num_before: int) -> None:
    """Of pictures that follow `num_before` others, (c, B, N)."""
    for index, channels in enumerate(latents.isfinite().all(dim=2).T.tolist()):
        if not all(channels):
            raise ValueError(
                f"The latents of picture {num_before + index} are not finite in channel {channels.index(False)}: "
                "leave the picture out, or encode in float32."
            )


def _check_moments(batches: Iterable[Any]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """The batches, each of which must be a mean and a standard deviation or `None`."""
    if isinstance(batches, torch.Tensor) or not hasattr(batches, "__iter__"):
        refuse("batches", "an iterable of pairs of mean and standard deviation", batches)
    for index, batch in enumerate(batches):
        name = f"batches[{index}]"
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            refuse(name, "a pair of mean and standard deviation", batch)
        for tensor in batch[: 1 if batch[1] is None else 2]:
            check_tensor(name, tensor)
        if batch[1] is not None and batch[1].shape != batch[0].shape:
            refuse(name, f"a mean and a standard deviation of one shape, {tuple(batch[0].shape)}", batch[1])
        if batch[1] is not None and (batch[1] < 0).any():
            raise ValueError(f"`{name}` has negative standard deviations: pass `posterior.std`, not its logarithm.")
        yield batch[0], batch[1]


def summarize_latents(batches: Iterable[tuple[torch.Tensor, torch.Tensor | None]]) -> LatentStatistics:
    """Statistics of samples of posteriors, in float64, merged batch by batch (Chan et al., 1983).

    Args:
        batches: Mean and standard deviation of the posteriors of a batch, (B, c, h, w) or (B, c, t, h, w) each; the
            second is `None` where the latents are certain.

    Raises:
        ValueError: If there is no picture, a shape does not fit, a latent is not finite, or a channel is constant.
    """
    num_items, count = 0, 0
    mean = squares = torch.zeros((), dtype=torch.float64)  # squares: sum of squared distances from the mean
    for latents, std in _check_moments(batches):
        if not latents.numel():
            continue
        if latents.ndim not in (4, 5) or (count and latents.shape[1] != len(mean)):
            expected = f", with the {len(mean)} channels of those before" if count else ""
            raise ValueError(
                f"Latents must be (B, c, h, w) or (B, c, t, h, w){expected}, but have shape {tuple(latents.shape)}."
            )
        latents = latents.double().transpose(0, 1).flatten(2)  # (c, B, t * h * w)
        variances = torch.zeros_like(latents) if std is None else std.double().transpose(0, 1).flatten(2).square()
        _check_finite(latents + variances, num_items)
        variance = latents.var(dim=(1, 2), correction=0) + variances.mean(dim=(1, 2))  # (c,)
        new, num_items = latents[0].numel(), num_items + latents.shape[1]
        distance, count = latents.mean(dim=(1, 2)) - mean, count + new
        squares = squares + new * (variance + distance.square() * ((count - new) / count))
        mean = mean + distance * (new / count)
    if count == 0:
        raise ValueError("There are no pictures to compute statistics from.")
    variance = squares / count
    constant = (variance.sqrt() <= 1e-7 * mean.abs()).nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"Channels {constant} of the latents are constant in {num_items} pictures and cannot be normalised: pass "
            "more pictures, or another autoencoder."
        )
    return LatentStatistics(
        channel_mean=mean.tolist(),
        channel_std=variance.sqrt().tolist(),
        mean=mean.mean().item(),
        std=(variance.mean() + mean.var(correction=0)).sqrt().item(),
        num_items=num_items,
        num_latents=count,
    )


def encode_mode(vae: ModelMixin, pixels: torch.Tensor) -> torch.Tensor:
    """The latents of any diffusers autoencoder: the mode of its `latent_dist`, or its `latent` or `latents`."""
    _check_autoencoder(vae)
    return mode_of(vae.encode(pixels))


def _check_autoencoder(vae: Any) -> None:
    if isinstance(vae, str) or not callable(getattr(vae, "encode", None)):  # strings have one, too
        refuse("vae", "an autoencoder with an `encode`", vae)


def mode_of(output: BaseOutput) -> torch.Tensor:
    """The latents in what `encode` of an autoencoder gives."""
    if hasattr(output, "latent_dist"):
        return output.latent_dist.mode()
    return output.latent if hasattr(output, "latent") else output.latents


@torch.no_grad()
def compute_latent_statistics(
    vae: ModelMixin, batches: Iterable[torch.Tensor | list[torch.Tensor]]
) -> LatentStatistics:
    """Statistics of the latents of any diffusers autoencoder: of samples of the posteriors, if it has posteriors.

    Diffusion models are trained on samples, whose variance is that of the posteriors' means and, on average, theirs.
    Write the statistics with `vae.register_to_config(**statistics.to_config())`.

    Args:
        vae: An autoencoder whose `encode` gives a `latent_dist`, or the latents themselves (`latent`, `latents`).
        batches: Pictures or clips, (B, 3, H, W) or (B, 3, T, H, W) uint8, of sizes that fit the autoencoder; or, if it
            takes them, lists of (3, H, W) or (3, T, H, W).

    Raises:
        ValueError: If there is no picture, pictures are not uint8, a latent is not finite (numbered from 0), or a
            channel is constant.
    """

    def prepare(pixels: torch.Tensor) -> torch.Tensor:
        if not isinstance(pixels, torch.Tensor) or pixels.dtype != torch.uint8:
            kind = pixels.dtype if isinstance(pixels, torch.Tensor) else show(pixels)
            raise ValueError(f"Pictures of `batches` must be uint8, from 0 to 255, but are {kind}.")
        return to_float(pixels.to(vae.device)).to(vae.dtype)

    def moments() -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        for batch in batches:
            if isinstance(batch, (list, tuple)):
                if not batch:
                    continue
                for posterior in vae.encode(list(map(prepare, batch))).latent_dist:
                    yield add_row(posterior.mode()), add_row(posterior.std)
            elif not isinstance(batch, torch.Tensor) or batch.numel():
                output = vae.encode(prepare(batch))
                std = getattr(getattr(output, "latent_dist", None), "std", None)
                yield add_row(mode_of(output)), None if std is None else add_row(std)

    _check_autoencoder(vae)
    iterates = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if isinstance(batches, (torch.Tensor, str)) or not iterates:
        refuse("batches", "an iterable of uint8 batches, such as [pictures]", batches)
    return summarize_latents(moments())
