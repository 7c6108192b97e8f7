from collections.abc import Iterable

import torch

from ..evaluation.reconstruction import to_float
from ..models import AutoencoderViTok


@torch.no_grad()
def latent_statistics(vae: AutoencoderViTok, batches: Iterable[torch.Tensor]) -> dict[str, list[float]]:
    """`latents_mean` and `latents_std` of each channel, over the modes of the posteriors, in float64.

    Args:
        vae: The autoencoder.
        batches: Training pictures or clips, (B, 3, [T,] H, W) uint8.
    """
    count, total, squares = 0, 0.0, 0.0
    for batch in batches:
        latents = vae.encode(to_float(batch.to(vae.device)).to(vae.dtype)).latent_dist.mode()
        latents = latents.double().transpose(0, 1).flatten(1)  # (c, N)
        count += latents.shape[1]
        total = total + latents.sum(dim=1)
        squares = squares + latents.square().sum(dim=1)
    mean = total / count
    std = (squares / count - mean.square()).sqrt()
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}
