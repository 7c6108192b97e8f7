import logging

import torch
from torch import nn
from torch.nn import functional as F

from ..evaluation.reconstruction import fold_frames


logger = logging.getLogger(__name__)


def load_lpips() -> nn.Module | None:
    """The frozen LPIPS network of the package `lpips` (VGG), or `None`, with a message, if it cannot be had."""
    try:
        import lpips

        network = lpips.LPIPS(net="vgg", verbose=False)
    except (ImportError, OSError) as error:  # not installed, or the weights of VGG are neither cached nor downloadable
        logger.warning(
            "The LPIPS loss is OFF (its weight is set to 0): %s. Install `lpips`, and download the VGG-16 weights of "
            "torchvision once with a network, or copy them to the folder checkpoints/ of `torch.hub.get_dir()`.",
            error,
        )
        return None
    return network.eval().requires_grad_(False)


class ReconstructionLoss(nn.Module):
    """Loss of stage 1 (section 3 of the paper): weighted squared error, absolute error, LPIPS and KL divergence.

    All terms are means in float32: over pixels, over frames for LPIPS, and over latent elements for the KL divergence,
    whose weight is thereby independent of the resolution. `patch_border_weight` is what a squared error in the
    outermost rows and columns of a patch counts relative to one inside: above 1, it evens out the patch grid.
    """

    def __init__(
        self,
        mse_weight: float,
        l1_weight: float,
        lpips_weight: float,
        kl_weight: float,
        patch_border_weight: float,
        patch_size: int,
    ):
        super().__init__()
        self.mse_weight, self.l1_weight, self.kl_weight = mse_weight, l1_weight, kl_weight
        patch = torch.full((patch_size, patch_size), patch_border_weight)
        patch[1:-1, 1:-1] = 1.0
        self.register_buffer("patch_weights", patch / patch.mean(), persistent=False)
        self.lpips = load_lpips() if lpips_weight > 0.0 else None
        self.lpips_weight = lpips_weight if self.lpips is not None else 0.0

    def forward(
        self, sample: torch.Tensor, target: torch.Tensor, kl: torch.Tensor | None, latents_per_item: int
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns (loss, logs).

        `sample` and `target` are (B, C, [T,] H, W) in [-1, 1]; `kl` (B,) is the sum over the latents of an item.
        """
        sample, target = sample.float(), target.float()
        squared_error = (sample - target).square()
        repeats = [side // len(self.patch_weights) for side in sample.shape[-2:]]
        logs = {"mse": squared_error.mean()}
        loss = self.mse_weight * (squared_error * self.patch_weights.repeat(repeats)).mean()
        if self.l1_weight > 0.0:
            logs["l1"] = F.l1_loss(sample, target)
            loss = loss + self.l1_weight * logs["l1"]
        if self.lpips is not None:
            logs["lpips"] = self.lpips(fold_frames(sample), fold_frames(target)).mean()
            loss = loss + self.lpips_weight * logs["lpips"]
        if kl is not None:
            logs["kl"] = kl.float().mean() / latents_per_item
            loss = loss + self.kl_weight * logs["kl"]
        logs["loss"] = loss
        return loss, {name: value.detach() for name, value in logs.items()}
