import torch

from ..clips import to_float, to_uint8
from ..models.layers import patchify, unpatchify


class PatchPCA:
    """The best linear code of p x p patches: principal components of all channels, in float64.

    A baseline for autoencoders: the same number of latents per patch, no context, no non-linearity.

    Args:
        patch_size: Side p of a patch in pixels.
        latent_channels: Number of components.
        batches: Iterable of training pictures, (B, 3, H, W) uint8; the patches of all are used.
    """

    def __init__(self, patch_size: int, latent_channels: int, batches):
        self.patch_size = patch_size
        count, total, products = 0, 0.0, 0.0
        for batch in batches:
            patches = self._patches(batch).flatten(0, 1)  # (N, 3 * p * p)
            count += len(patches)
            total = total + patches.sum(dim=0)
            products = products + patches.T @ patches
        self.mean = total / count
        covariance = products / count - torch.outer(self.mean, self.mean)
        self.basis = torch.linalg.eigh(covariance).eigenvectors[:, -latent_channels:]  # ascending eigenvalues

    def _patches(self, images: torch.Tensor) -> torch.Tensor:
        return patchify(to_float(images).double().unsqueeze(2), 1, self.patch_size, 1)

    def reconstruct(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) uint8, with H and W multiples of p -> the same from `latent_channels` numbers a patch."""
        patches = self._patches(images) - self.mean
        patches = patches @ self.basis @ self.basis.T + self.mean
        grid = (1, images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        return to_uint8(unpatchify(patches, grid, 1, self.patch_size, 1).squeeze(2))
