from collections.abc import Callable

import pytorch_msssim
import torch

from ..clips import fold_frames


Metric = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # two batches of pictures (B, C, H, W) to (B,)

SSIM_MIN_SIZE = 11  # pixels a side: the window
MS_SSIM_MIN_SIZE = 161  # the same on the coarsest of five scales
ROUNDING_ERROR = 1 / 12  # mean square of errors that are spread evenly from -0.5 to 0.5


def check_size(metric: str, least: int, images: torch.Tensor) -> None:
    if min(images.shape[-2:]) < least:
        height, width = images.shape[-2:]
        raise ValueError(f"{metric} needs {least} pixels a side, but the pictures are {height} x {width}.")


def frame_values(metric: Metric, images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """A metric of each frame of pictures or clips (B, C, T, H, W): (B, T)."""
    return metric(fold_frames(images), fold_frames(references)).view(len(images), -1)


def _one_by_one(metric: Callable[..., torch.Tensor], images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """(B,) float64, in memory that does not grow with B."""
    pairs = zip(images.double().split(1), references.double().split(1))
    return torch.cat([metric(*pair, data_range=255.0, size_average=False) for pair in pairs])


def psnr(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of uint8 pictures (B, C, ..., H, W), one value an item: (B,), float64.

    Errors count as at least 1/12, the mean square of what rounding to whole numbers leaves: no value is above
    58.92 dB, that of pictures which are equal but for rounding, and one of these does not make a mean infinite.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(dim=1).clamp(min=ROUNDING_ERROR)
    return 10.0 * torch.log10(255.0**2 / error)


def ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al., 2004) of uint8 pictures (B, C, H, W), one value a picture: (B,), float64.

    Gaussian window of 11 pixels, at all its positions inside the picture, as in the reference implementation.

    Raises:
        ValueError: If a side has less than 11 pixels.
    """
    check_size("SSIM", SSIM_MIN_SIZE, images)
    return _one_by_one(pytorch_msssim.ssim, images, references)


def ms_ssim(images: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """Multi-scale structural similarity (Wang et al., 2003) of uint8 pictures (B, C, H, W): (B,), float64.

    Five scales with the exponents of the paper, windows inside the picture on each, a mean over the channels, as in
    TensorFlow.

    Raises:
        ValueError: If a side has less than 161 pixels.
    """
    check_size("MS-SSIM", MS_SSIM_MIN_SIZE, images)
    return _one_by_one(pytorch_msssim.ms_ssim, images, references)
