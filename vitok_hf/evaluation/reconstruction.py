from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from einops import rearrange
from PIL import Image

from ..clips import fold_frames, pad_to_size, to_float, to_uint8, unfold_frames
from .autoencoders import fit_shape, run_autoencoder
from .metrics import ROUNDING_ERROR, psnr, ssim


@torch.no_grad()
def reconstruct(vae, images: torch.Tensor, latent_bits: int | None = None) -> torch.Tensor:
    """Reconstructions of uint8 pictures or clips from the mode of the posterior.

    Args:
        vae: Any autoencoder of diffusers. Those of single pictures see the frames of a clip one by one.
        images: (B, 3, H, W) or (B, 3, T, H, W) of any size. Sizes that do not fit the model are padded by repeating
            the last row, column or frame, and cropped back.
        latent_bits: Quantizes the latents to so many bits; `None`: they stay as they are.

    Returns:
        uint8 of the shape of `images`, on its device.

    Raises:
        ValueError: If the model gives another size than it took, or numbers that are not finite.
    """
    video = images if images.ndim == 5 else images.unsqueeze(2)
    frames, height, width = video.shape[2:]
    fitted = fit_shape(vae, tuple(images.shape))
    padded_frames = fitted[2] if len(fitted) == 5 else frames
    pixels = pad_to_size(to_float(video.to(vae.device)), (padded_frames, *fitted[-2:])).to(vae.dtype)
    sample = run_autoencoder(vae, pixels if len(fitted) == 5 else fold_frames(pixels), latent_bits)
    if sample.shape != fitted:
        raise ValueError(
            f"{type(vae).__name__} gives {tuple(sample.shape)} for {fitted}: it has sizes or numbers of frames of its "
            "own; bring the pictures to what it gives."
        )
    if not sample.isfinite().all():  # as black or white pixels they would count like others
        raise ValueError(
            f"{type(vae).__name__} gives numbers that are not finite in {vae.dtype}: take float32, or bfloat16."
        )
    sample = to_uint8(sample if len(fitted) == 5 else unfold_frames(sample, frames))
    sample = sample[:, :, :frames, :height, :width].to(images.device)
    return sample.reshape(images.shape)


@torch.no_grad()
def evaluate_reconstruction(vae, images: torch.Tensor, batch_size: int = 4) -> tuple[dict[str, float], torch.Tensor]:
    """Mean PSNR (dB) and SSIM over the frames of (N, 3, [T,] H, W) uint8, and its reconstruction.

    In a run of several processes, which must all call it, each reconstructs its share; all get the whole result.
    """
    state = PartialState()
    rounds = -(-len(images) // state.num_processes)  # as many for every process
    mine = torch.arange(rounds) * state.num_processes + state.process_index
    images, whole = images[mine % len(images)], images
    reconstructions = torch.cat([reconstruct(vae, batch) for batch in images.split(batch_size)])
    pair = fold_frames(reconstructions), fold_frames(images)
    metrics = {"psnr": psnr(*pair), "ssim": ssim(*pair)}

    def collect(values: torch.Tensor) -> torch.Tensor:
        values = gather(values.to(state.device)).unflatten(0, (state.num_processes, rounds))
        return values.transpose(0, 1).flatten(0, 1)[: len(whole)].cpu()

    means = {name: collect(x.view(rounds, -1).mean(dim=1).float()).mean().item() for name, x in metrics.items()}
    return means, collect(reconstructions)


def side_by_side(images: torch.Tensor, reconstructions: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8, twice -> (B, H, 2 W, 3): original left, reconstruction right."""
    return rearrange([images, reconstructions], "two b c h w -> b h (two w) c")


def comparison(images: torch.Tensor, reconstructions: torch.Tensor) -> np.ndarray:
    """Pictures or clips, (B, 3, [T,] H, W) uint8, in a column with their reconstructions.

    Pictures have them on the right, (B * H, 2 W, 3), clips below, frame by frame, (B * 2 H, T * W, 3).
    """
    if images.ndim == 5:
        return rearrange([images, reconstructions], "two b c t h w -> (b two h) (t w) c").numpy()
    return side_by_side(images, reconstructions).flatten(0, 1).numpy()


def save_comparison(path: str | Path, images: torch.Tensor, reconstructions: torch.Tensor) -> None:
    """Saves what `comparison` makes."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(comparison(images, reconstructions)).save(path)


def patch_border_ratio(images: torch.Tensor, reconstructions: torch.Tensor, patch_size: int) -> float:
    """Mean squared error in the outermost columns and rows of the patches over that in the inner ones.

    1 means no patch grid. `images` and `reconstructions`: (B, 3, H, W) uint8, with H and W multiples of `patch_size`.
    Errors below those of rounding count as these, as for PSNR: of equal pictures it is 1.

    Raises:
        ValueError: If `patch_size` is below 3, where a patch has no inner pixels.
    """
    if patch_size < 3:
        raise ValueError(f"Patches of {patch_size} x {patch_size} pixels have no inner ones to compare with.")
    error = (images.double() - reconstructions.double()).square()
    error = rearrange(error, "b c (h p) (w r) -> p r (b c h w)", p=patch_size, r=patch_size).mean(dim=-1)
    columns, rows = error.mean(dim=0), error.mean(dim=1)
    outer = columns[[0, -1]].mean() + rows[[0, -1]].mean()
    inner = columns[1:-1].mean() + rows[1:-1].mean()
    return (outer.clamp(min=2 * ROUNDING_ERROR) / inner.clamp(min=2 * ROUNDING_ERROR)).item()


def reconstruct_in_tiles(vae, images: torch.Tensor, height: int, width: int, batch_size: int = 4) -> torch.Tensor:
    """Reconstructs every tile of `height` x `width` pixels alone: how much does quality depend on the size?"""
    rows, columns = images.shape[2] // height, images.shape[3] // width
    tiles = rearrange(images, "b c (i h) (j w) -> (b i j) c h w", i=rows, j=columns)
    tiles = torch.cat([reconstruct(vae, batch) for batch in tiles.split(batch_size)])
    return rearrange(tiles, "(b i j) c h w -> b c (i h) (j w)", i=rows, j=columns)
