from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange

from ..clips import fold_frames, pad_to_size, to_float, to_picture, to_shown, to_uint8, unfold_frames
from ..disk import atomic_file
from ..models import AutoencoderViTok
from .autoencoders import Change, fit_shape, run_autoencoder
from .metrics import frame_values, psnr, ssim


def _to_pixels(vae: ModelMixin, images: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """uint8 -> pixels in [-1, 1], padded to (T, H, W)."""
    return pad_to_size(to_float(images.to(vae.device)), size).to(vae.dtype)


def _to_images(vae: ModelMixin, sample: torch.Tensor) -> torch.Tensor:
    """What the model gives -> uint8."""
    if not sample.isfinite().all():  # as black or white pixels they would count like others
        raise ValueError(
            f"{type(vae).__name__} gives numbers that are not finite in {vae.dtype}: take float32, or bfloat16."
        )
    return to_uint8(sample)


def fit_pixels(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, T, H, W) -> what the model takes, a shape of `fit_shape`."""
    fitted = fit_shape(vae, images.shape)
    if len(fitted) == 5:
        return _to_pixels(vae, images, (fitted[2], fitted[3], fitted[4]))
    return fold_frames(_to_pixels(vae, images, (images.shape[2], fitted[2], fitted[3])))


@torch.no_grad()
def reconstruct(
    vae: ModelMixin,
    images: torch.Tensor,
    change_latents: Change | None = None,
    lengths: dict[str, Any] | None = None,
    decoder: ModelMixin | None = None,
) -> torch.Tensor:
    """Reconstructions of uint8 pictures or clips from the mode of the posterior.

    Args:
        vae: Any autoencoder of diffusers. Those of single pictures see the frames of a clip one by one.
        images: (B, C, T, H, W) of any size. Sizes that do not fit the model are padded by repeating the last row,
            column or frame, and cropped back.
        change_latents: What is done to the latents before they are decoded, for example quantizing them.
        lengths: How short the codes of a ViTok are, arguments of its `encode`.
        decoder: An autoencoder of the same factors that decodes, in place of `vae`.

    Returns:
        uint8 of the shape of `images`, on its device.

    Raises:
        ValueError: If the model gives another size than it took, or numbers that are not finite.
    """
    frames, height, width = images.shape[2:]
    pixels = fit_pixels(vae, images)
    sample = run_autoencoder(vae, pixels, change_latents, lengths, decoder)
    if sample.shape != pixels.shape:
        raise ValueError(
            f"{type(vae).__name__} gives {tuple(sample.shape)} for {tuple(pixels.shape)}: it has sizes or numbers of "
            "frames of its own; bring the pictures to what it gives."
        )
    sample = _to_images(vae, sample if sample.ndim == 5 else unfold_frames(sample, frames))
    return sample[:, :, :frames, :height, :width].to(images.device)


class StreamCodec:
    """Reconstructs the clips of a video by a causal model, which has seen those before: together, as the whole.

    Args:
        vae: A causal ViTok. Its window, of rows and columns, is the one that it has now.
        change_latents: As of `reconstruct`.
        max_cached_frames: Latent frames that a token sees at most; `None`: all, in memory that grows with the video.
    """

    def __init__(
        self, vae: AutoencoderViTok, change_latents: Change | None = None, max_cached_frames: int | None = None
    ):
        self.vae, self.lead = vae, vae.config.lead_frames
        self.pieces: deque[torch.Tensor] = deque()
        latents = vae.encode_stream(iter(self.pieces.popleft, None), max_cached_frames)
        latents = latents if change_latents is None else map(change_latents, latents)
        self.samples = vae.decode_stream(latents, max_cached_frames)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Reconstructions, uint8 of the shape of `images`, (B, C, T, H, W), the frames that follow in the video.

        All clips but the last must end where a latent frame ends. Sizes that do not fit are padded and cropped back.
        """
        frames, height, width = images.shape[2:]
        fitted = frames + -(frames + self.lead) % self.vae.temporal_compression_ratio
        *_, fitted_height, fitted_width = fit_shape(self.vae, images.shape)
        self.pieces.append(_to_pixels(self.vae, images, (fitted, fitted_height, fitted_width)))
        self.lead, samples = 0, []
        while fitted > 0:
            samples.append(_to_images(self.vae, next(self.samples)))
            fitted -= samples[-1].shape[2]
        return torch.cat(samples, dim=2)[:, :, :frames, :height, :width].to(images.device)


@torch.no_grad()
def evaluate_reconstruction(
    vae: ModelMixin,
    images: torch.Tensor,
    batch_size: int = 4,
    lengths: dict[str, Any] | None = None,
    decoder: ModelMixin | None = None,
) -> tuple[dict[str, float], torch.Tensor]:
    """Mean PSNR (dB) and SSIM over the frames of (N, C, T, H, W) uint8, and its reconstruction; see `reconstruct`.

    In a run of several processes, which must all call it, each reconstructs its share; all get the whole result.
    """
    state = PartialState()
    rounds = -(-len(images) // state.num_processes)  # as many for every process
    mine = torch.arange(rounds) * state.num_processes + state.process_index
    images, whole = images[mine % len(images)], images
    reconstructions = torch.cat(
        [reconstruct(vae, batch, None, lengths, decoder) for batch in images.split(batch_size)]
    )

    def collect(values: torch.Tensor) -> torch.Tensor:
        values = gather(values.to(state.device)).unflatten(0, (state.num_processes, rounds))
        return values.transpose(0, 1).flatten(0, 1)[: len(whole)].cpu()

    means = {}
    for name, metric in (("psnr", psnr), ("ssim", ssim)):
        means[name] = collect(frame_values(metric, reconstructions, images).mean(dim=1).float()).mean().item()
    return means, collect(reconstructions)


def side_by_side(*columns: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) uint8, several times -> (B * T, H, columns * W, 3), for example original and reconstruction."""
    return rearrange([*map(to_shown, columns)], "columns b c t h w -> (b t) h (columns w) c")


def comparison(images: torch.Tensor, reconstructions: torch.Tensor) -> np.ndarray:
    """Pictures or clips, (B, C, T, H, W) uint8, in a column with their reconstructions.

    Pictures have them on the right, (B * H, 2 W, 3), clips below, frame by frame, (B * 2 H, T * W, 3).
    """
    if images.shape[2] > 1:
        return rearrange([to_shown(images), to_shown(reconstructions)], "two b c t h w -> (b two h) (t w) c").numpy()
    return side_by_side(images, reconstructions).flatten(0, 1).numpy()


def save_picture(path: str | Path, pixels: np.ndarray) -> None:
    """Saves (H, W, C) uint8 as PNG, grey, RGB or RGBA (see `to_picture`), whole or not at all."""
    with atomic_file(path) as temporary:
        to_picture(pixels).save(temporary, format="PNG")


def save_comparison(path: str | Path, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
    """Saves what `comparison` makes as PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_picture(path, comparison(images, reconstructions))
