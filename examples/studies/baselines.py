"""What autoencoders are compared with: PCA, and published autoencoders that diffusers has."""

from collections.abc import Iterable
from typing import Any

import diffusers
import torch
from diffusers import ModelMixin

from vitok_hf.clips import to_float, to_uint8
from vitok_hf.models.layers import patchify, unpatchify


class PatchPCA:
    """The best linear code of p x p patches: principal components of all channels, in float64.

    The same number of latents per patch as an autoencoder, no context, no non-linearity.

    Args:
        patch_size: Side p of a patch in pixels.
        latent_channels: Number of components.
        batches: Training pictures, (B, 3, T, H, W) uint8; the patches of all are used.
    """

    def __init__(self, patch_size: int, latent_channels: int, batches: Iterable[torch.Tensor]):
        self.patch_size = patch_size
        size = 3 * patch_size**2
        count, total, products = 0, torch.zeros(size).double(), torch.zeros(size, size).double()
        for batch in batches:
            patches = self._patches(batch).flatten(0, 1)  # (N, 3 * p * p)
            count += len(patches)
            total += patches.sum(dim=0)
            products += patches.T @ patches
        self.mean = total / count
        covariance = products / count - torch.outer(self.mean, self.mean)
        self.basis = torch.linalg.eigh(covariance).eigenvectors[:, -latent_channels:]  # ascending eigenvalues

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        return patchify(to_float(images).double(), 1, self.patch_size, 1)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, T, H, W) uint8, with H and W multiples of p -> the same from `latent_channels` numbers a patch."""
        patches = (self._patches(images) - self.mean) @ self.basis @ self.basis.T + self.mean
        grid = (images.shape[2], images.shape[3] // self.patch_size, images.shape[4] // self.patch_size)
        return to_uint8(unpatchify(patches, grid, 1, self.patch_size, 1))


_SD = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_DC_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3

# name -> class, what differs from its defaults
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "SD-VAE": ("AutoencoderKL", _SD | {"sample_size": 512}),  # stabilityai/sd-vae-ft-mse
    "SDXL-VAE": ("AutoencoderKL", _SD | {"sample_size": 1024, "scaling_factor": 0.13025}),  # stabilityai/sdxl-vae
    "DC-AE f32c32": (  # mit-han-lab/dc-ae-f32c32-in-1.0-diffusers
        "AutoencoderDC",
        {
            "encoder_block_types": _DC_BLOCKS,
            "decoder_block_types": _DC_BLOCKS,
            "encoder_layers_per_block": (0, 4, 8, 2, 2, 2),
            "decoder_layers_per_block": (0, 5, 10, 2, 2, 2),
            "encoder_qkv_multiscales": ((),) * 6,
            "decoder_qkv_multiscales": ((),) * 6,
            "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
            "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
        },
    ),
    "Cosmos CV8x8x8": ("AutoencoderKLCosmos", {}),  # nvidia/Cosmos-1.0-Tokenizer-CV8x8x8
    "Wan 2.1": ("AutoencoderKLWan", {}),  # Wan-AI/Wan2.1-T2V-1.3B-Diffusers
}


def make_peer(name: str) -> ModelMixin:
    """The autoencoder of this name in `PEERS` with random weights, which cost the same as trained ones."""
    class_name, config = PEERS[name]
    return getattr(diffusers, class_name)(**config).eval()
