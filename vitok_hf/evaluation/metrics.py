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
    values = []
    for pair in zip(images.float().split(1), references.float().split(1)):  # one at a time: bounded memory
        _, similarity = structural_similarity_index_measure(*pair, data_range=255.0, return_full_image=True)
        values.append(similarity[..., 5:-5, 5:-5].double().mean())  # the library pads by half a window
    return torch.stack(values)
