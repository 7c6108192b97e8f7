import torch
from torchmetrics.functional.image import structural_similarity_index_measure


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures (B, C, ..., H, W), one value an item: (B,), float64."""
    error = (images.double() - references.double()).square().flatten(1).mean(dim=1)
    return 10.0 * torch.log10(255.0**2 / error)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) of uint8 pictures (B, C, H, W), one value a picture: (B,), float64.

    Gaussian window of 11 pixels, at all its positions inside the picture, as in the reference implementation.
    """
    _, similarity = structural_similarity_index_measure(
        images.double(), references.double(), data_range=255.0, reduction="none", return_full_image=True
    )
    return similarity[..., 5:-5, 5:-5].flatten(1).mean(dim=1)  # the library pads by half a window
