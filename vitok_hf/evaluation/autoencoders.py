"""Any autoencoder of diffusers: loading it, the sizes that it takes, and a pass through it."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderRAE
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from ..clips import fold_frames, unfold_frames
from ..latents import mode_of
from ..loading import check_place, load_strictly, resolve_bundled
from ..loading.vitok_v2 import is_vitok_v2
from ..models import AutoencoderViTok


Change = Callable[[torch.Tensor], torch.Tensor]  # of latents (B, c, ...)
FOLLOW_CHANNELS = ("AutoencoderViTok", "AutoencoderKL")  # others count more as channels than those of pictures
UNSUPPORTED = {
    "AutoencoderKLAllegro": "it has no pass without tiles",
    "AutoencoderKLTemporalDecoder": "it encodes pictures and decodes videos",
}


def read_channels(name_or_path: str | os.PathLike, subfolder: str | None = None) -> int:
    """Channels of the pictures that the autoencoder takes, read from its config alone.

    Those of diffusers have 3, but for `AutoencoderKL`, whose `in_channels` are those of the pictures.
    """
    source, place = resolve_bundled(name_or_path), {} if subfolder is None else {"subfolder": subfolder}
    check_place(source, subfolder)
    if is_vitok_v2(source, **place):
        return 3
    config = diffusers.AutoencoderKL.load_config(source, **place)
    return config.get("in_channels", 3) if config.get("_class_name") in FOLLOW_CHANNELS else 3


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
    place: dict[str, Any] = {} if subfolder is None else {"subfolder": subfolder}
    if is_vitok_v2(source, **place):
        return AutoencoderViTok.from_pretrained(name_or_path, **place, **kwargs)
    class_name = diffusers.AutoencoderKL.load_config(source, **place).get("_class_name")
    if class_name == AutoencoderViTok.__name__:
        return AutoencoderViTok.from_pretrained(name_or_path, **place, **kwargs)
    cls: Any = getattr(diffusers, class_name or "", None)
    if not (hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise ValueError(
            f'"{name_or_path}" holds a model of class {class_name}, which has no `encode` and `decode` in diffusers '
            f'{diffusers.__version__}: name an autoencoder, in a pipeline by `subfolder="vae"`.'
        )
    if class_name in UNSUPPORTED:
        raise ValueError(f'"{name_or_path}" is a {class_name}, which is not supported: {UNSUPPORTED[class_name]}.')
    return load_strictly(cls.from_pretrained, name_or_path, **place, **kwargs)


def takes_videos(vae: ModelMixin) -> bool:
    """Whether the model itself takes (B, C, T, H, W); sequences of an image model are of single pictures."""
    if isinstance(vae, AutoencoderViTok):
        return not (vae.is_image_model and (vae.config.num_latent_tokens or vae.config.token_counts))
    return any(isinstance(module, nn.Conv3d) for module in vae.modules())


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

    A ViTok takes multiples of q; if it is causal, as the video models of diffusers are, the first latent frame holds
    one frame alone.
    """
    if isinstance(vae, AutoencoderViTok):
        return frames + -(frames + vae.config.lead_frames) % vae.temporal_compression_ratio
    names = ("temporal_compression_ratio", "scale_factor_temporal")
    ratios = [vars(vae).get(name) or vae.config.get(name) for name in names]
    ratio = next((ratio for ratio in ratios if ratio), 1)
    return frames + (1 - frames) % ratio


def fit_shape(vae: ModelMixin, shape: Sequence[int]) -> tuple[int, ...]:
    """(B, C, T, H, W) -> the shape that the model takes for it, padded.

    Models of single pictures see the frames of clips as items of a batch: (B * T, C, H, W).
    """
    batch, channels, frames, height, width = shape
    ratio = spatial_ratio(vae)
    size = (height + -height % ratio, width + -width % ratio)
    if takes_videos(vae):
        return (batch, channels, padded_frames(vae, frames), *size)
    return (batch * frames, channels, *size)


def encode_moments(vae: ModelMixin, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Modes and standard deviations of the posteriors of pixels in [-1, 1]; the latter `None` if there are none."""
    output = vae.encode((pixels + 1.0) / 2.0 if isinstance(vae, AutoencoderRAE) else pixels)  # which takes [0, 1]
    return mode_of(output), getattr(getattr(output, "latent_dist", None), "std", None)


def decode_latents(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Pixels in [-1, 1]; those of clips frame by frame, if the model is one of single pictures."""
    if latents.ndim == 5 and not takes_videos(vae):
        return unfold_frames(decode_latents(vae, fold_frames(latents)), latents.shape[2])
    sample = vae.decode(latents).sample
    return sample * 2.0 - 1.0 if isinstance(vae, AutoencoderRAE) else sample


def run_autoencoder(
    vae: ModelMixin,
    pixels: torch.Tensor,
    change_latents: Change | None = None,
    lengths: dict[str, Any] | None = None,
    decoder: ModelMixin | None = None,
) -> torch.Tensor:
    """Decoded modes of the posteriors of pixels in [-1, 1], a shape of `fit_shape`; the same shape and range.

    With `change_latents`, what it makes of the modes is decoded. `lengths` are arguments of the `encode` of a ViTok
    that say how short its codes are: `num_tokens`, `num_channels`, `min_psnr`. `decoder` decodes, if given.
    """
    if lengths and not isinstance(vae, AutoencoderViTok):
        raise ValueError(
            f"{', '.join(lengths)} cut the codes of a ViTok, but this is a {type(vae).__name__}: leave them out."
        )
    is_sequence = isinstance(vae, AutoencoderViTok) and vae.config.num_latent_tokens is not None
    if decoder is not None and (lengths or is_sequence):
        raise ValueError("Another `decoder` takes whole codes on a grid, not sequences, and not codes that are cut.")
    if lengths or (is_sequence and change_latents is not None):
        codes = vae.encode(pixels, **lengths or {}).latent_dist.mode()
        codes = codes if change_latents is None else change_latents(codes)
        sample = vae.decode(codes, sizes=[tuple(pixels.shape[2:])] * len(pixels)).sample
        return sample if isinstance(sample, torch.Tensor) else torch.stack(sample)
    if isinstance(vae, AutoencoderViTok) and change_latents is None and decoder is None:
        return vae(pixels).sample  # the forward of a prepared model, as in training
    latents, _ = encode_moments(vae, pixels)
    return decode_latents(
        vae if decoder is None else decoder, latents if change_latents is None else change_latents(latents)
    )
