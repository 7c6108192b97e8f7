from collections.abc import Callable
from operator import itemgetter

import torch
from diffusers.configuration_utils import FrozenDict

from ..checkpoints.strict import check_types
from .layers import split_rotary_pairs


class ViTokConfig(FrozenDict):
    """The constructor's arguments, also under the names by which diffusers' pipelines read them off other VAEs."""

    force_upcast = False  # bfloat16 and float16 are safe
    timestep_conditioning = False  # the decoder takes no timestep
    invert_scale_latents = False  # latents are multiplied by `scaling_factor`, unlike CogVideoX 1.5's
    batch_norm_eps = 0.0  # `AutoencoderViTok.bn` has exact variances

    def __missing__(self, name: str):
        """`vae.force_upcast`, which diffusers reads as `vae.config["force_upcast"]`."""
        if name.startswith("_") or not hasattr(self, name):
            raise KeyError(name)
        return getattr(self, name)

    z_dim = property(itemgetter("latent_channels"))
    spatial_compression_ratio = scale_factor_spatial = property(itemgetter("patch_size"))
    temporal_compression_ratio = scale_factor_temporal = property(itemgetter("temporal_patch_size"))

    @property
    def is_image_model(self) -> bool:
        """Without a time axis in the rotary embedding, frames must not attend to each other."""
        return self.temporal_patch_size == 1 and self.sample_frames == 1

    def _halvings(self, name: str) -> int:
        if self[name] & (self[name] - 1):
            raise AttributeError(f"{name}={self[name]} is no power of 2, which pipelines that count halvings need.")
        return self[name].bit_length() - 1

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """One entry more than there would be halvings of the picture: pipelines take p as 2 ** (length - 1)."""
        return (self.encoder_hidden_size,) * (self._halvings("patch_size") + 1)

    encoder_block_out_channels = block_out_channels

    @property
    def temperal_downsample(self) -> tuple[bool, ...]:
        """An entry for each halving of the picture, true if of the frames too: p is 2 ** length, q is 2 ** sum."""
        spatial, temporal = self._halvings("patch_size"), self._halvings("temporal_patch_size")
        if temporal > spatial:
            raise AttributeError(f"temporal_patch_size={2**temporal} exceeds patch_size={2**spatial}.")
        return (False,) * (spatial - temporal) + (True,) * temporal


def is_derived(name: str) -> bool:
    """Whether an entry of configs, as other VAEs have it, follows from others in this one."""
    return isinstance(getattr(ViTokConfig, name, None), property)


# The largest values of entries by the end of their names: a model of a damaged config would fill all memory.
MAX_VALUES = {
    "_frames": 2**16,
    "_size": 2**16,
    "_channels": 2**16,
    "_layers": 2**10,
    "_heads": 2**10,
    "_classes": 2**24,
    "mlp_ratio": 2**6,
}


def check_numbers(config: FrozenDict, constructor: Callable) -> None:
    """Raises `ValueError` for entries of other types than the constructor's arguments, or out of their range."""
    check_types(config, constructor)
    for name, value in config.items():
        maximum = next((MAX_VALUES[end] for end in MAX_VALUES if name.endswith(end)), None)
        if maximum is None or value is None or (name == "num_classes" and value == 0):
            continue
        if not value > 0:
            raise ValueError(
                f"`{name}` must be {'0 (unconditional) or ' if name == 'num_classes' else ''}positive, but is {value}."
            )
        if value > maximum:
            raise ValueError(f"`{name}` must be at most {maximum}, but is {value}.")


def check_config(config: ViTokConfig, constructor: Callable) -> None:
    """Raises `ValueError` for what the constructor of `AutoencoderViTok` does not allow."""
    check_numbers(config, constructor)
    for tower in ("encoder", "decoder"):
        size, heads = config[f"{tower}_hidden_size"], config[f"{tower}_num_attention_heads"]
        if size % heads:
            raise ValueError(
                f"`{tower}_hidden_size` {size} must be divisible by `{tower}_num_attention_heads` {heads}."
            )
        split_rotary_pairs(size // heads, 2 if config.is_image_model else 3)
    if not (config.scaling_factor > 0 and all(value > 0 for value in config.latents_std or ())):
        raise ValueError(
            "`scaling_factor` and `latents_std` must be positive, but are "
            f"{config.scaling_factor} and {config.latents_std}."
        )
    for name in ("latents_mean", "latents_std"):
        if config[name] is not None and len(config[name]) != config.latent_channels:
            raise ValueError(
                f"`{name}` has {len(config[name])} entries, but `latent_channels` is {config.latent_channels}."
            )
    if config.latent_norm and config.variational:
        raise ValueError("`latent_norm=True` normalises the latents themselves: set `variational=False` with it.")
    if config.component not in (None, "encoder", "decoder"):
        raise ValueError(f'`component` must be "encoder", "decoder" or None (both), but is {config.component!r}.')


def check_input(
    name: str, x: torch.Tensor | list[torch.Tensor], channels: int, steps: tuple[int, int], needs_frames: bool
) -> None:
    """Raises `ValueError` unless `x` is a batch, or a list of items, whose sizes are multiples of `steps` (q, p)."""
    if isinstance(x, torch.Tensor):
        check_shape(name, x.shape, 1, channels, steps, needs_frames)
        return
    if len(x) == 0:
        raise ValueError(f"`{name}` is an empty list.")
    for index, item in enumerate(x):
        check_shape(f"{name}[{index}]", item.shape, 0, channels, steps, needs_frames)


def check_shape(
    name: str, shape: torch.Size, batch_dims: int, channels: int, steps: tuple[int, int], needs_frames: bool
) -> None:
    """`shape` is that of `batch_dims` batch dimensions and an item, which must be multiples of `steps`."""
    (q, p), batch, item = steps, "B, " * batch_dims, shape[batch_dims:]
    if len(item) not in (3, 4):
        raise ValueError(f"`{name}` must be ({batch}C, H, W) or ({batch}C, T, H, W), but has shape {tuple(shape)}.")
    if item[0] != channels:
        raise ValueError(
            f"`{name}` must have {channels} channels in dimension {batch_dims}, but has shape {tuple(shape)}."
        )
    if len(item) == 3 and needs_frames:
        raise ValueError(
            f"`{name}` has shape {tuple(shape)}, but this model compresses several frames into one latent frame: "
            f"pass a video, ({batch}C, T, H, W)."
        )
    if item[-1] % p or item[-2] % p:
        raise ValueError(
            f"Height and width must be multiples of patch_size={p}, but are {item[-2]} x {item[-1]}: "
            "pad, crop or resize the input, or pass a list of pictures, which `encode` pads."
        )
    if len(item) == 4 and item[1] % q:
        raise ValueError(
            f"The number of frames must be a multiple of temporal_patch_size={q}, but is {item[1]}: "
            "pad or cut the video."
        )
    if 0 in shape:
        raise ValueError(f"`{name}` is empty: it has shape {tuple(shape)}.")
