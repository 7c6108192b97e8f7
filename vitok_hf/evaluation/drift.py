"""How far a student's latents are from its teacher's, and what their halves make of each other's."""

import time
from collections.abc import Iterator

import torch
from diffusers.models.modeling_utils import ModelMixin

from ..clips import fold_frames
from ..latents import latent_spread
from ..pipelines.checks import check_components
from ..pipelines.pipeline_vitok_dit import ViTokDiTPipeline
from .autoencoders import encode_moments
from .evaluator import Row
from .metrics import psnr
from .processes import gather_rows
from .reconstruction import fit_pixels, reconstruct


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class Relay:
    """A codec: one autoencoder encodes, another decodes. Each half is timed, and the latents are compared.

    Args:
        encoder, decoder: Any autoencoders of diffusers with latents of the same factors and channels.
        teacher: That whose latents are the right ones, with their statistics in its config.
    """

    def __init__(self, encoder: ModelMixin, decoder: ModelMixin, teacher: ModelMixin):
        self.encoder, self.decoder, self.teacher = encoder, decoder, teacher
        self.spread = latent_spread(teacher)
        # of each batch: seconds of encoding, of decoding, pictures, squared errors of latents, latents
        self.measured: list[list[float]] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructions, uint8 of the shape of `images`, (B, 3, T, H, W)."""
        times, codes = [_now(self.encoder.device)], []

        def keep(latents: torch.Tensor) -> torch.Tensor:
            codes.append(latents)
            times.append(_now(self.encoder.device))
            return latents

        sample = reconstruct(self.encoder, images, keep, decoder=self.decoder)
        times.append(_now(self.encoder.device))
        error = 0.0
        if self.encoder is not self.teacher:
            with torch.no_grad():
                right, _ = encode_moments(self.teacher, fit_pixels(self.teacher, images))
            code, right = fold_frames(codes[0]), fold_frames(right)  # those of single pictures have no T
            if code.shape != right.shape:
                raise ValueError(
                    f"The teacher gives latents of shape {tuple(right.shape)}, not {tuple(code.shape)}: both models "
                    "must have the same channels, patch size and frames."
                )
            error = ((code - right).float() / self.spread.to(right.device).view(1, -1, 1, 1)).square().sum().item()
        seconds = [end - start for start, end in zip(times, times[1:])]
        self.measured.append([*seconds, len(images), error, codes[0].numel()])
        return sample

    def costs(self) -> dict[str, float]:
        """Seconds a picture of each half, without the first batch if there are more, and "latent_error".

        That is the root mean square of the distance from the teacher's latents in units of their spread.
        """
        measured = torch.tensor(self.measured, dtype=torch.float64)
        timed, whole = measured[1:] if len(measured) > 1 else measured, measured
        encoding, decoding, count = gather_rows(timed).sum(dim=0)[:3].tolist()
        errors, number = gather_rows(whole).sum(dim=0)[3:].tolist()
        costs = {"encode_seconds": encoding / count, "decode_seconds": decoding / count}
        return costs | {"latent_error": (errors / number) ** 0.5}


def drift_rows(
    teacher_name: str, teacher: ModelMixin, students: Iterator[tuple[str, ModelMixin]], device: torch.device | str
) -> Iterator[Row]:
    """The teacher, and of each student: itself, decoding the teacher's latents, and decoded by the teacher."""

    def row(name: str, encoder: ModelMixin, decoder: ModelMixin) -> Row:
        relay = Relay(encoder, decoder, teacher)
        return Row(name, relay, relay.costs)

    yield row(teacher_name, teacher.to(device), teacher)
    for name, student in students:
        yield row(name, student.to(device), student)
        yield row(f"{teacher_name} to {name}", teacher, student)
        yield row(f"{name} to {teacher_name}", student, teacher)


@torch.no_grad()
def pipeline_drift(
    pipe: ViTokDiTPipeline, student: ModelMixin, num_images: int = 16, seed: int = 0, **kwargs
) -> float:
    """Mean PSNR (dB) of a pipeline's pictures with the student in its autoencoder's place, against those without.

    Classes in turn, each picture from a seed of its own, the same for both; `kwargs` are arguments of the pipeline.
    """
    labels: list[str | int] = [index % max(1, pipe.transformer.config.num_classes) for index in range(num_images)]
    check_components(pipe.transformer, student, pipe.scheduler)
    teacher, pictures = pipe.vae, []
    try:
        for vae in (teacher, student):
            pipe.vae = vae
            generators = [torch.Generator(pipe.device).manual_seed(seed + index) for index in range(num_images)]
            pictures.append(pipe(labels, generator=generators, output_type="pt", return_dict=False, **kwargs)[0])
    finally:
        pipe.vae = teacher
    first, second = ((255.0 * images).round().to(torch.uint8) for images in pictures)
    if first.shape != second.shape:
        raise ValueError(
            f"The pictures of the student have shape {tuple(second.shape)}, those of the pipeline "
            f"{tuple(first.shape)}: the student must have the same patch size and frames, on a grid."
        )
    return psnr(second, first).double().mean().item()
