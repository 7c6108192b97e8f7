"""Any autoencoder of diffusers: loading it, its latents, and what it costs."""

import os
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderRAE, ModelMixin
from torch import nn

from ..latents import encode_mode
from ..loading import check_place, load_strictly, resolve_bundled
from ..loading.vitok_v2 import is_vitok_v2
from ..models import AutoencoderViTok
from .macs import count_macs, without_storage


UNSUPPORTED = {
    "AutoencoderKLAllegro": "it has no pass without tiles",
    "AutoencoderKLTemporalDecoder": "it encodes pictures and decodes videos",
}


def load_autoencoder(name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any) -> ModelMixin:
    """The autoencoder of a folder or Hub id, of the diffusers class that its config names, or a ViTok of any source.

    Args:
        name_or_path: What `AutoencoderViTok.from_pretrained` takes, or a folder or Hub id of diffusers' layout.
        subfolder: Folder inside it, as "vae" for a pipeline.
        kwargs: Other arguments of `from_pretrained`, as `dtype`.

    Raises:
        ValueError: If the config names no autoencoder of diffusers, or one of `UNSUPPORTED`; or weights do not fit.
        OSError: If nothing can be found or fetched under this name.
    """
    source = resolve_bundled(name_or_path)
    check_place(source, subfolder)
    place = {} if subfolder is None else {"subfolder": subfolder}
    if is_vitok_v2(source, **place):
        return AutoencoderViTok.from_pretrained(name_or_path, **place, **kwargs)
    class_name = diffusers.AutoencoderKL.load_config(source, **place).get("_class_name")
    if class_name == AutoencoderViTok.__name__:
        return AutoencoderViTok.from_pretrained(name_or_path, **place, **kwargs)
    cls = getattr(diffusers, class_name or "", None)
    if not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise ValueError(
            f'"{name_or_path}" holds a model of class {class_name}, which has no `encode` and `decode` in diffusers '
            f'{diffusers.__version__}: name an autoencoder, in a pipeline by `subfolder="vae"`.'
        )
    if class_name in UNSUPPORTED:
        raise ValueError(f'"{name_or_path}" is a {class_name}, which is not supported: {UNSUPPORTED[class_name]}.')
    return load_strictly(cls.from_pretrained, name_or_path, **place, **kwargs)


def takes_videos(vae: ModelMixin) -> bool:
    """Whether the model itself takes (B, C, T, H, W)."""
    return isinstance(vae, AutoencoderViTok) or any(isinstance(module, nn.Conv3d) for module in vae.modules())


def spatial_ratio(vae: ModelMixin) -> int:
    """Pixels a side of a latent; 1 if the class does not tell."""
    if isinstance(vae, AutoencoderRAE):
        return vae.config.patch_size
    if ratio := vars(vae).get("spatial_compression_ratio") or vae.config.get("spatial_compression_ratio"):
        return ratio
    if isinstance(vae, AutoencoderViTok):
        return vae.spatial_compression_ratio
    return 2 ** (len(vae.config.get("block_out_channels", [0])) - 1)


def padded_frames(vae: ModelMixin, frames: int) -> int:
    """The smallest number of frames from `frames` on that fits the model.

    A ViTok takes multiples of q; in the video models of diffusers, the first latent frame holds one frame alone.
    """
    if isinstance(vae, AutoencoderViTok):
        return frames + -frames % vae.temporal_compression_ratio
    names = ("temporal_compression_ratio", "scale_factor_temporal")
    ratios = [vars(vae).get(name) or vae.config.get(name) for name in names]
    ratio = next((ratio for ratio in ratios if ratio), 1)
    return frames + (1 - frames) % ratio


def fit_shape(vae: ModelMixin, shape: tuple[int, ...]) -> tuple[int, ...]:
    """(B, C, [T,] H, W) -> the shape that the model takes for it: padded, with T only where the model has it.

    Models of single pictures see the T frames of a clip as T items of a batch.
    """
    batch, channels, *frames, height, width = shape
    ratio = spatial_ratio(vae)
    size = (height + -height % ratio, width + -width % ratio)
    frames = frames[0] if frames else 1
    if takes_videos(vae):
        return (batch, channels, padded_frames(vae, frames), *size)
    return (batch * frames, channels, *size)


def quantize(latents: torch.Tensor, bits: int) -> torch.Tensor:
    """(B, c, ...) rounded to 2 ** `bits` levels, evenly from the least to the largest of each channel of an item.

    Raises:
        ValueError: If `bits` is not from 1 to 16.
    """
    if not 1 <= bits <= 16:
        raise ValueError(f"Latents can be quantized to 1 to 16 bits, but not to {bits}.")
    flat = latents.flatten(2).float()
    low, high = flat.aminmax(dim=2, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(flat.dtype).tiny)
    levels = ((flat - low) / step).round()
    return (levels * step + low).view_as(latents).to(latents.dtype)


def run_autoencoder(vae: ModelMixin, pixels: torch.Tensor, latent_bits: int | None = None) -> torch.Tensor:
    """Decoded modes of the posteriors of pixels in [-1, 1], a shape of `fit_shape`; the same shape and range.

    With `latent_bits` the modes are quantized before they are decoded.
    """
    if isinstance(vae, AutoencoderViTok) and latent_bits is None:
        return vae(pixels).sample  # the forward of a prepared model, as in training
    is_rae = isinstance(vae, AutoencoderRAE)  # takes and gives [0, 1]
    latents = encode_mode(vae, (pixels + 1.0) / 2.0 if is_rae else pixels)
    sample = vae.decode(latents if latent_bits is None else quantize(latents, latent_bits)).sample
    return sample * 2.0 - 1.0 if is_rae else sample


@dataclass(frozen=True)
class Cost:
    """What one picture or clip costs.

    Args:
        parameters: Of the whole model.
        macs: Multiply-accumulates of encoding and decoding.
        num_latents: Numbers in the code: E of the paper.
        num_channels: Channels of the code, counted for each frame where the model sees frames one by one.
        compression: Values of the picture or clip over `num_latents`.
    """

    parameters: int
    macs: int
    num_latents: int
    num_channels: int
    compression: float

    def num_bytes(self, latent_bits: int | None) -> int:
        """Of the code: at 16 bits as it is, or quantized by `quantize`, with two float32 for each channel."""
        if latent_bits is None:
            return 2 * self.num_latents
        return -(-self.num_latents * latent_bits // 8) + 8 * self.num_channels


def count_cost(vae: ModelMixin, shape: tuple[int, ...]) -> Cost:
    """`Cost` of one picture or clip of `shape`, (C, [T,] H, W), without computing it."""
    fitted = fit_shape(vae, (1, *shape))
    twin = without_storage(vae)
    with torch.no_grad(), torch.device("meta"):
        latents = encode_mode(twin, torch.empty(fitted))
    return Cost(
        parameters=sum(parameter.numel() for parameter in vae.parameters()),
        macs=count_macs(vae, fitted),
        num_latents=latents.numel(),
        num_channels=latents.shape[0] * latents.shape[1],
        compression=torch.Size(shape).numel() / latents.numel(),
    )
