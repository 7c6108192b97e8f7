"""Training that makes latents easier to learn for a diffusion model; each option alone, off by default."""

import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from torch import nn
from torch.nn import functional as F

from ..clips import COLOURS, Runs, fold_frames, to_colours, to_runs, unfold_frames
from ..models import AutoencoderViTok
from ..models.posterior import ViTokPosterior
from .arguments import DiffusabilitySettings


SMALLEST = 0.25  # factor of the sides of latents, as in EQ-VAE
COSINE_MARGIN, DISTANCE_MARGIN = 0.5, 0.25  # of VA-VAE
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def scale_and_flip(run: torch.Tensor, size: tuple[int, int], flips: list[int]) -> torch.Tensor:
    """(n, C, T, H, W) at another height and width (bilinear, antialiased), reversed in some dimensions."""
    frames = F.interpolate(fold_frames(run).float(), size=size, mode="bilinear", antialias=True)
    return unfold_frames(frames, run.shape[2]).flip(flips).to(run.dtype)


def add_noise(run: torch.Tensor, scale: float, generators: list[torch.Generator]) -> torch.Tensor:
    """Latents (n, c, ...) with noise of |N(0, `scale`)| for each item, in standard deviations of each channel."""
    std = run.detach().float().std(dim=[dim for dim in range(run.ndim) if dim != 1], correction=0, keepdim=True)
    shape = (len(run),) + (1,) * (run.ndim - 1)
    level = scale * randn_tensor(shape, generators, run.device, torch.float32).abs()
    noise = randn_tensor(run.shape, generators, run.device, torch.float32)
    return (run + std * level * noise).to(run.dtype)


@dataclass
class Change:
    """What becomes of the latents of a batch before they are decoded, and of the pixels that they are to give.

    Args:
        factor: Of height and width, or `None`: they are neither scaled nor flipped.
        flips: Reversed dimensions.
        noise: As for `add_noise`.
    """

    factor: float | None = None
    flips: tuple[int, ...] = ()
    noise: float = 0.0

    def _apply(self, run: torch.Tensor, step: int) -> torch.Tensor:
        assert self.factor is not None
        size = [max(1, round(side // step * self.factor)) * step for side in run.shape[-2:]]
        return scale_and_flip(run, (size[0], size[1]), list(self.flips))

    def pixels(self, runs: Runs, patch_size: int) -> Runs:
        """What the changed latents are to be decoded to: scaled pictures are padded to whole patches before."""
        if self.factor is None:
            return runs
        return [self._apply(run, patch_size) for run in to_runs(runs, patch_size)[0]]

    def bind(self, generators: list[torch.Generator]) -> Callable[[Runs], Runs] | None:
        """What the model is to do with its latents, with noise from one generator for each item; `None`: nothing."""
        return None if self == Change() else partial(self.latents, generators=generators)

    def latents(self, runs: Runs, generators: list[torch.Generator]) -> Runs:
        if self.factor is not None:
            runs = [self._apply(run, 1) for run in runs]
        if self.noise == 0.0:
            return runs
        rest = iter(generators)
        return [add_noise(run, self.noise, [*itertools.islice(rest, len(run))]) for run in runs]


def draw_change(settings: DiffusabilitySettings) -> Change:
    """That of a batch: in `equivariance` of them a scale in [0.25, 1], and flips in either direction."""
    if settings.equivariance == 0.0 or torch.rand(()).item() >= settings.equivariance:
        return Change(noise=settings.latent_noise)
    factor, *flips = torch.rand(3).tolist()
    reversed_dims = tuple(dim for dim, value in zip((-2, -1), flips) if value < 0.5)
    return Change(SMALLEST + (1 - SMALLEST) * factor, reversed_dims, settings.latent_noise)


class Alignment(nn.Module):
    """How far latents are from the features of a frozen vision transformer (VA-VAE, arXiv 2501.01423).

    The picture is resized so that it has a patch for each latent. Two terms: 1 - 0.5 - cosine of the features and what
    a linear map makes of the latent, and the difference of cosines between two latents and between their features,
    less 0.25, where these are positive. The map is that of least squares for the latents of the batch, not a learned
    one, and the weight is a constant, not a ratio of gradients.

    Raises:
        ValueError: If the network gives no features for patches.
    """

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, settings: DiffusabilitySettings, vae: AutoencoderViTok):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModel

        self.name, self.weight, config = settings.alignment_model_name_or_path, settings.alignment_weight, vae.config
        network: Any = AutoModel.from_pretrained(self.name, dtype=torch.float32)
        self.network, self.patch_size = network.eval().requires_grad_(False), config.patch_size
        self.variational = config.variational
        self.side = getattr(network.config, "patch_size", None)
        if not isinstance(self.side, int):
            raise ValueError(f'"{self.name}" is a {type(network).__name__} without a `patch_size`: name a ViT.')
        takes_sizes = "interpolate_pos_encoding" in inspect.signature(network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if takes_sizes else {}
        try:
            processor = AutoImageProcessor.from_pretrained(self.name)
            statistics = processor.image_mean, processor.image_std
        except OSError:  # it was saved without
            statistics = IMAGENET
        for name, values in zip(("mean", "std"), statistics):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, C, H, W) in [-1, 1] -> (n, H/p * W/p, D)."""
        grid = [size // self.patch_size for size in images.shape[-2:]]
        size = [number * self.side for number in grid]
        pixels = F.interpolate(to_colours(images).float(), size=size, mode="bicubic", antialias=True).clamp(-1, 1)
        output = self.network(pixel_values=((pixels + 1) / 2 - self.mean) / self.std, **self.options)
        features, count = output.last_hidden_state, grid[0] * grid[1]
        if features.ndim != 3 or features.shape[1] < count:
            raise ValueError(
                f'"{self.name}" gives features {tuple(features.shape[1:])} of {grid[0]} x {grid[1]} patches: name a '
                "vision transformer with one for each."
            )
        return features[:, -count:].float()  # before them stand a class token and registers

    def loss(
        self, parameters: Runs, runs: Runs, num_latents: torch.Tensor | int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of the means of posteriors, with the weight, and logs.

        `num_latents` is the number of latent elements of an average batch of the step.
        """
        terms = torch.zeros(2, device=self.mean.device)
        for run, pixels in zip(parameters, to_runs(runs, self.patch_size)[0]):  # padded as the encoder pads them
            latents = ViTokPosterior(run, deterministic=not self.variational).mean
            with torch.autocast(run.device.type, enabled=False):
                values = alignment_terms(latents.flatten(2).mT, self.features(fold_frames(pixels)))
            terms = terms + values * (latents.numel() / num_latents)
        cosines, distances = terms
        return self.weight * terms.sum(), {
            "alignment_cosine": cosines.detach(),
            "alignment_distance": distances.detach(),
        }


def alignment_terms(latents: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """The two terms, (2,), of float32 latents (n, L, c) and features (n, L, D) in the same places."""
    with torch.no_grad():
        flat, ridge = latents.flatten(0, 1), 1e-4 * torch.eye(latents.shape[2], device=latents.device)
        scale = flat.square().mean() + 1e-12
        product = flat.mT @ flat / (len(flat) * scale) + ridge
        projection = torch.linalg.solve(product, flat.mT @ features.flatten(0, 1) / (len(flat) * scale))
    cosines = F.cosine_similarity(latents @ projection, features, dim=-1)
    unit, wanted = F.normalize(latents, dim=-1), F.normalize(features, dim=-1)
    differences = (unit @ unit.mT - wanted @ wanted.mT).abs()
    return torch.stack([F.relu(1 - COSINE_MARGIN - cosines).mean(), F.relu(differences - DISTANCE_MARGIN).mean()])


def check_diffusability(settings: Any, vae: AutoencoderViTok) -> None:
    """Raises `ValueError` for an option that has no effect, or does not go with the model.

    `settings` are `AutoencoderArguments`.
    """
    sequences = [name for name in ("num_latent_tokens", "token_counts") if vae.config[name] is not None]
    has_places = vae.is_image_model and vae.config.num_latent_tokens is None and vae.config.in_channels in COLOURS
    decodes_itself = not settings.freeze_encoder and settings.distill is None
    for name, fits, reason in (
        ("equivariance", decodes_itself and settings.stage == 1, "the encoder learns nothing from what is decoded"),
        ("equivariance", not sequences, f"latents of a model with {sequences} are on no grid"),
        ("alignment_model_name_or_path", decodes_itself, "the encoder is frozen, or learns a teacher's latents"),
        ("alignment_model_name_or_path", has_places, "the model has no colours, or no pictures on a grid"),
        ("latent_noise", settings.distill != "encoder", "no decoder is trained"),
    ):
        if getattr(settings, name) and not fits:
            raise ValueError(f"`{name}` is {getattr(settings, name)!r}, but {reason}: leave it out.")
