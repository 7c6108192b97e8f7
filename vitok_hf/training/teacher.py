"""Another autoencoder, whose latents a ViTok learns."""

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import nn

from ..clips import Runs, fold_frames, to_runs, unfold_frames
from ..evaluation.autoencoders import encode_moments, fit_shape, load_autoencoder, read_channels, takes_videos
from ..latents import NO_STATISTICS, latent_spread
from ..models import AutoencoderViTok
from ..models.codes import CODE_FIELDS
from ..models.posterior import ViTokPosterior
from .arguments import TeacherSettings


Shape = tuple[int, ...]


@dataclass
class Lesson:
    """Means and standard deviations of the teacher's posteriors, runs (n, c, t, h, w); the second may be `None`."""

    means: Runs
    stds: Runs | None

    def sample(self, generators: list[torch.Generator]) -> Runs:
        """The latents that the decoder is to learn from, with the noise of these generators, one for each item."""
        if self.stds is None:
            return self.means
        rest, samples = list(generators), []
        for mean, std in zip(self.means, self.stds):
            mine, rest = rest[: len(mean)], rest[len(mean) :]
            samples.append(mean + std * randn_tensor(mean.shape, mine, mean.device, mean.dtype))
        return samples


class Teacher(nn.Module):
    """The teacher, frozen, and what its latents cost a student that misses them.

    The loss is the mean squared error of means and standard deviations, each in units of the teacher's spread in its
    channel: the standard deviation of the latents by the statistics in the teacher's config.

    Raises:
        ValueError: If the teacher's pictures have other channels than the student's, or its latents other factors or
            channels, or wrong statistics, or none.
    """

    spread: torch.Tensor

    def __init__(self, settings: TeacherSettings, student: AutoencoderViTok):
        super().__init__()
        self.part, self.weight, name = settings.distill, settings.latent_weight, settings.teacher_model_name_or_path
        assert name is not None  # there is a teacher
        if (channels := read_channels(name, settings.teacher_subfolder)) != student.config.in_channels:
            raise ValueError(
                f'The teacher "{name}" takes pictures of {channels} channels, this model of '
                f"{student.config.in_channels}: give it as many `in_channels`."
            )
        vae: Any = load_autoencoder(name, settings.teacher_subfolder, dtype=torch.float32)
        self.vae: ModelMixin = vae.eval().requires_grad_(False)
        check_latents(self.vae, student, name)
        self.patch_size = student.config.patch_size
        try:
            student.check_config(student.config | self.statistics)
        except ValueError as error:
            raise ValueError(f'The config of the teacher "{name}" has wrong statistics: {error}') from error
        self.register_buffer("spread", latent_spread(self.vae).view(1, -1, 1, 1, 1), persistent=False)

    @property
    def statistics(self) -> dict[str, Any]:
        """Those of the teacher's config, for the student's."""
        found = {name: self.vae.config.get(name) for name in NO_STATISTICS}
        return {name: list(value) if name.startswith("latents") and value else value for name, value in found.items()}

    @torch.no_grad()
    def teach(self, runs: Runs) -> Lesson:
        """What pixels in [-1, 1] are to become, padded as the student pads them."""
        moments = [self._encode(run) for run in to_runs(runs, self.patch_size)[0]]
        means, stds = [mean for mean, _ in moments], [std for _, std in moments if std is not None]
        return Lesson(means, stds or None)

    def _encode(self, run: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        if takes_videos(self.vae):
            return encode_moments(self.vae, run)
        moments = encode_moments(self.vae, fold_frames(run))
        mean, std = (None if part is None else unfold_frames(part, run.shape[2]) for part in moments)
        assert mean is not None
        return mean, std

    def options(self, lesson: Lesson, generators: list[torch.Generator]) -> dict[str, Any]:
        """Arguments of the student's forward."""
        options: dict[str, Any] = {"encode": self.part != "decoder", "decode": self.part != "encoder"}
        return options | ({} if self.part == "encoder" else {"latents": lesson.sample(generators)})

    def loss(
        self, parameters: Runs, lesson: Lesson, num_latents: torch.Tensor | int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of the student's posteriors, with its weight, and logs.

        `num_latents` is the number of latent elements of an average batch of the step.
        """
        squares = []
        for index, (run, mean) in enumerate(zip(parameters, lesson.means)):
            posterior = ViTokPosterior(run, deterministic=run.shape[1] == mean.shape[1])
            std_errors = torch.zeros_like(posterior.std)
            if lesson.stds is not None and not posterior.deterministic:
                std_errors = posterior.std - lesson.stds[index]
            errors = torch.stack([posterior.mean - mean, std_errors]) / self.spread
            squares.append(errors.square().flatten(1).sum(dim=1))
        latents, stds = torch.stack(squares).sum(dim=0) / num_latents
        return self.weight * (latents + stds), {"latents": latents.detach(), "latent_stds": stds.detach()}


def check_latents(teacher: ModelMixin, student: AutoencoderViTok, name: str) -> None:
    """Raises `ValueError` unless both turn the same clip into latents of one shape."""
    config, side = student.config, 4 * student.config.patch_size
    if cut := [field for field in CODE_FIELDS if config[field] is not None]:
        raise ValueError(
            f"The model has `{cut[0]}` {config[cut[0]]}, but the latents of a teacher are whole: take another."
        )
    shape = (1, config.in_channels, config.sample_frames, side, side)
    wanted = (config.latent_channels, config.num_latent_frames(config.sample_frames), 4, 4)
    fitted = fit_shape(teacher, shape)
    with torch.no_grad():
        mean, _ = encode_moments(teacher, torch.zeros(fitted))
    found = tuple(mean.shape[1:]) if len(fitted) == 5 else (mean.shape[1], config.sample_frames, *mean.shape[2:])
    if fitted[-2:] != shape[-2:] or (len(fitted) == 5 and fitted != shape) or found != wanted:
        taken = fitted[1:] if len(fitted) == 5 else (fitted[1], shape[2], *fitted[2:])
        raise ValueError(
            f'The teacher "{name}" turns {words(taken)} values into {words(found)} latents, this model '
            f"{words(shape[1:])} into {words(wanted)} (channels x frames x height x width): give it the teacher's "
            f"`latent_channels`, {found[0]}, patch size and frames."
        )


def words(shape: Shape) -> str:
    return " x ".join(map(str, shape))
