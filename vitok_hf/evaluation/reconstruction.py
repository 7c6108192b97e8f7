from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from diffusers.models.modeling_utils import ModelMixin
from einops import rearrange
from PIL import Image

from ..clips import fold_frames, pad_to_size, to_float, to_uint8, unfold_frames
from .autoencoders import Change, fit_shape, run_autoencoder
from .metrics import frame_values, psnr, ssim


@torch.no_grad()
def reconstruct(
    vae: ModelMixin,
    images: torch.Tensor,
    change_latents: Change | None = None,
    lengths: dict[str, Any] | None = None,
) -> torch.Tensor:
    """Reconstructions of uint8 pictures or clips from the mode of the posterior.

    Args:
        vae: Any autoencoder of diffusers. Those of single pictures see the frames of a clip one by one.
        images: (B, 3, T, H, W) of any size. Sizes that do not fit the model are padded by repeating the last row,
            column or frame, and cropped back.
        change_latents: What is done to the latents before they are decoded, for example quantizing them.
        lengths: How short the codes of a ViTok are, arguments of its `encode`.

    Returns:
        uint8 of the shape of `images`, on its device.

    Raises:
        ValueError: If the model gives another size than it took, or numbers that are not finite.
    """
    frames, height, width = images.shape[2:]
    fitted = fit_shape(vae, images.shape)
    takes_clips = len(fitted) == 5
    size = (fitted[2] if takes_clips else frames, fitted[-2], fitted[-1])
    pixels = pad_to_size(to_float(images.to(vae.device)), size).to(vae.dtype)
    sample = run_autoencoder(vae, pixels if takes_clips else fold_frames(pixels), change_latents, lengths)
    if sample.shape != fitted:
        raise ValueError(
            f"{type(vae).__name__} gives {tuple(sample.shape)} for {fitted}: it has sizes or numbers of frames of its "
            "own; bring the pictures to what it gives."
        )
    if not sample.isfinite().all():  # as black or white pixels they would count like others
        raise ValueError(
            f"{type(vae).__name__} gives numbers that are not finite in {vae.dtype}: take float32, or bfloat16."
        )
    sample = to_uint8(sample if takes_clips else unfold_frames(sample, frames))
    return sample[:, :, :frames, :height, :width].to(images.device)


@torch.no_grad()
def evaluate_reconstruction(
    vae: ModelMixin, images: torch.Tensor, batch_size: int = 4, lengths: dict[str, Any] | None = None
) -> tuple[dict[str, float], torch.Tensor]:
    """Mean PSNR (dB) and SSIM over the frames of (N, 3, T, H, W) uint8, and its reconstruction.

    In a run of several processes, which must all call it, each reconstructs its share; all get the whole result.
    """
    state = PartialState()
    rounds = -(-len(images) // state.num_processes)  # as many for every process
    mine = torch.arange(rounds) * state.num_processes + state.process_index
    images, whole = images[mine % len(images)], images
    reconstructions = torch.cat([reconstruct(vae, batch, lengths=lengths) for batch in images.split(batch_size)])

    def collect(values: torch.Tensor) -> torch.Tensor:
        values = gather(values.to(state.device)).unflatten(0, (state.num_processes, rounds))
        return values.transpose(0, 1).flatten(0, 1)[: len(whole)].cpu()

    means = {}
    for name, metric in (("psnr", psnr), ("ssim", ssim)):
        means[name] = collect(frame_values(metric, reconstructions, images).mean(dim=1).float()).mean().item()
    return means, collect(reconstructions)


def side_by_side(*columns: torch.Tensor) -> torch.Tensor:
    """(B, 3, T, H, W) uint8, several times -> (B * T, H, columns * W, 3), for example original and reconstruction."""
    return rearrange(list(columns), "columns b c t h w -> (b t) h (columns w) c")


def comparison(images: torch.Tensor, reconstructions: torch.Tensor) -> np.ndarray:
    """Pictures or clips, (B, 3, T, H, W) uint8, in a column with their reconstructions.

    Pictures have them on the right, (B * H, 2 W, 3), clips below, frame by frame, (B * 2 H, T * W, 3).
    """
    if images.shape[2] > 1:
        return rearrange([images, reconstructions], "two b c t h w -> (b two h) (t w) c").numpy()
    return side_by_side(images, reconstructions).flatten(0, 1).numpy()


def save_comparison(path: str | Path, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
    """Saves what `comparison` makes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(comparison(images, reconstructions)).save(path)
