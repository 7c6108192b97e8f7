import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures (B, C, ..., H, W), one value an item: (B,), float64."""
    error = (images.double() - references.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(255.0**2 / error)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004; Gaussian window) of uint8 pictures (B, C, H, W): (B,), float64."""
    return structural_similarity_index_measure(
        images.double(), references.double(), data_range=255.0, reduction="none"
    )
