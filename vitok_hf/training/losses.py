import logging
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from ..clips import COLOURS, Runs, fold_frames, to_colours
from ..evaluation import networks
from .arguments import LossSettings


logger = logging.getLogger(__name__)


def load_lpips() -> nn.Module | None:
    """The frozen LPIPS network of the package `lpips` (VGG), or `None`, with a message, if it cannot be had."""
    try:
        return networks.load_lpips(trunk="vgg").module.get_submodule("network")
    except (ImportError, OSError) as error:  # not installed, or the weights of VGG are neither cached nor downloadable
        remedy = "Install `lpips`"
        if not isinstance(error, ImportError):
            remedy = (
                "Download the VGG-16 weights of torchvision once with a network, or copy them to the folder "
                "checkpoints/ of `torch.hub.get_dir()`"
            )
        logger.warning("The LPIPS loss is OFF (its weight is set to 0): %s. %s.", error, remedy)
        return None


def load_dino(name_or_path: str) -> nn.Module:
    """The frozen perceptual loss of the package `dino-perceptual`, with the network of this folder or Hub id."""
    try:
        from dino_perceptual import DINOPerceptual

        return DINOPerceptual(model_name=name_or_path).eval().requires_grad_(False)
    except (ImportError, OSError) as error:
        raise ValueError(
            f'`dino_weight` needs the package dino-perceptual and the network "{name_or_path}" ({error}): pip install '
            "dino-perceptual, ask for access to the network on the Hub, or name another one, also a folder, as "
            "`dino_model_name_or_path`."
        ) from error


def one_minus_ssim(sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - SSIM of (B, C, H, W) in [-1, 1], a mean; SSIM itself is defined for values from 0 on."""
    from torchmetrics.functional.image import structural_similarity_index_measure  # of an extra

    return 1.0 - structural_similarity_index_measure((sample + 1) / 2, (target + 1) / 2, data_range=1.0)


TERMS = ("mse", "l1", "charbonnier", "ssim", "lpips", "dino", "kl")


class ReconstructionLoss(nn.Module):
    """The losses of a reconstruction: section 3 of the paper, and those of ViTok-v2.

    All terms are means in float32: over pixels, over frames for SSIM and the networks, and over latent elements for
    the KL divergence, whose weight is thereby independent of the resolution. In a batch of several sizes every pixel
    counts alike, and every latent element; in a step of several batches too, if the loss is told their average
    numbers. `patch_border_weight` is what a squared error in the outermost rows and columns of a patch counts
    relative to one inside: above 1, it evens out the patch grid. Terms with weight 0 are not computed.

    Args:
        settings: The weights.
        patch_size: Of the model.
        with_kl: Whether the encoder is trained: else the KL divergence is none of the terms.
        in_channels: Of the model. Networks see grey repeated, and RGBA, whose colours are premultiplied, on grey.

    Raises:
        ValueError: If all weights are 0, or a network has a positive weight and the channels are no colours.
    """

    patch_weights: torch.Tensor

    def __init__(self, settings: LossSettings, patch_size: int, with_kl: bool = True, in_channels: int = 3):
        super().__init__()
        self.weights = {name: getattr(settings, f"{name}_weight") for name in TERMS}
        for name in ("lpips", "dino"):
            if self.weights[name] > 0.0 and in_channels not in COLOURS:
                raise ValueError(
                    f"`{name}_weight` is {self.weights[name]}, but its network sees colours, and this model has "
                    f"in_channels {in_channels}: set it to 0."
                )
        self.weights["kl"] *= with_kl
        self.networks = nn.ModuleDict()
        if self.weights["lpips"] > 0.0 and (network := load_lpips()) is not None:
            self.networks["lpips"] = network
        if self.weights["dino"] > 0.0:
            self.networks["dino"] = load_dino(settings.dino_model_name_or_path)
        self.weights["lpips"] *= "lpips" in self.networks
        if not any(self.weights.values()):
            raise ValueError(f"All weights are 0: {self.weights}. Give at least one of them a positive value.")
        patch = torch.full((patch_size, patch_size), settings.patch_border_weight)
        patch[1:-1, 1:-1] = 1.0
        self.register_buffer("patch_weights", patch / patch.mean(), persistent=False)

    def _mse(self, sample: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        height, width = sample.shape[-2:]
        side = len(self.patch_weights)
        weights = self.patch_weights.repeat(-(-height // side), -(-width // side))[:height, :width]
        return ((sample - target).square() * weights).mean()

    def _terms(self, sample: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of frames, (B, C, H, W)."""
        functions: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
            "mse": self._mse,
            "l1": F.l1_loss,
            "charbonnier": lambda x, y: ((x - y).square() + 1e-6).sqrt().mean(),
            "ssim": one_minus_ssim,
            "lpips": lambda x, y: self.networks["lpips"](to_colours(x), to_colours(y)).mean(),
            "dino": lambda x, y: self.networks["dino"](to_colours(x), to_colours(y)).mean(),
        }
        return {name: function(sample, target) for name, function in functions.items() if self.weights[name] > 0.0}

    def forward(
        self,
        samples: Runs,
        targets: Runs,
        kl: torch.Tensor | None = None,
        num_latents: torch.Tensor | int = 1,
        num_values: torch.Tensor | int | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Returns (loss, logs of the terms without their weights).

        Args:
            samples, targets: In [-1, 1].
            kl: (N,), summed over the latents of an item.
            num_latents: Number of the latent elements of all items, or of an average batch of the step.
            num_values: Number of values, pixels times channels, of an average batch; default: of this one.
        """
        num_values = sum(target.numel() for target in targets) if num_values is None else num_values
        logs: dict[str, torch.Tensor] = {}
        for sample, target in zip(samples, targets):
            for name, value in self._terms(fold_frames(sample).float(), fold_frames(target).float()).items():
                logs[name] = logs.get(name, 0.0) + value * (target.numel() / num_values)
        if kl is not None and self.weights["kl"] > 0.0:
            logs["kl"] = kl.float().sum() / num_latents
        loss = sum(
            (self.weights[name] * value for name, value in logs.items()), torch.zeros_like(next(iter(logs.values())))
        )
        return loss, {name: value.detach() for name, value in logs.items()}
