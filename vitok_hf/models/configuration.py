from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..checks import check_finite, check_int, check_tensor, has_values, refuse, warn_once
from ..loading.strict import check_types
from .compat import ViTokConfig
from .layers import split_rotary_pairs


# The largest values of entries by the end of their names: a model of a damaged config would fill all memory.
MAX_VALUES = {
    "_frames": 2**24,
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
    if not (
        (config.scaling_factor is None or config.scaling_factor > 0)
        and all(value > 0 for value in config.latents_std or ())
    ):
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


def has_hooks(module: nn.Module) -> bool:
    """Of diffusers, accelerate or others, which may cast or move what the module is called with."""
    hooks = getattr(getattr(module, "_diffusers_hook", None), "hooks", None)
    return bool(hooks) or hasattr(module, "_hf_hook") or len(module._forward_pre_hooks) > 0


def check_fits(name: str, tensor: torch.Tensor, *modules: nn.Module) -> None:
    """Its dtype and device against those of the last of `modules`, the layer that it goes to, in the first, the model.

    Only where nothing would cast or move it: no autocast, no hooks, no quantised and no sharded weights.
    """
    weight = getattr(modules[-1], "weight", None)
    if type(weight) is not nn.Parameter or any(map(has_hooks, modules[1:])):
        return
    if tensor.dtype != weight.dtype:
        kind = weight.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if not (autocast and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)):
            raise ValueError(
                f"`{name}` must be {weight.dtype}, as the weights are, but is {tensor.dtype}: pass "
                f"`{name}.to({weight.dtype})`, or use torch.autocast."
            )
    if tensor.device != weight.device and not has_hooks(modules[0]):
        raise ValueError(
            f"`{name}` must be on {weight.device}, as the weights are, but is on {tensor.device}: pass "
            f'`{name}.to("{weight.device}")`.'
        )


def check_input(
    name: str, x: Any, channels: int, steps: tuple[int, int], needs_frames: bool, *modules: nn.Module
) -> tuple[float, float]:
    """Raises `ValueError` unless `x` is a batch, or a list of items, whose sizes are multiples of `steps` (q, p).

    Returns the lowest and the highest value, where these can be looked at. `modules` are those of `check_fits`.
    """
    is_list = isinstance(x, (list, tuple))
    if is_list and len(x) == 0:
        raise ValueError(f"`{name}` is an empty list.")
    ranges = []
    for index, item in enumerate(x if is_list else [x]):
        label = f"{name}[{index}]" if is_list else name
        check_tensor(label, item)
        check_shape(label, item.shape, 0 if is_list else 1, channels, steps, needs_frames)
        if is_list and (item.dtype, item.device) != (x[0].dtype, x[0].device):
            kind = f"{x[0].dtype} on {x[0].device}"
            raise ValueError(f"`{label}` must be {kind}, as `{name}[0]` is, but is {item.dtype} on {item.device}.")
        check_fits(label, item, *modules)
        ranges.append(check_finite(label, item))
    lows, highs = zip(*ranges)
    return min(lows), max(highs)


def check_shape(
    name: str, shape: torch.Size, batch_dims: int, channels: int, steps: tuple[int, int], needs_frames: bool
) -> None:
    """`shape` is that of `batch_dims` batch dimensions and an item, which must be multiples of `steps`."""
    (q, p), batch, item = steps, "B, " * batch_dims, shape[batch_dims:]
    if len(item) not in (3, 4):
        hint = f": add the batch, `{name}.unsqueeze(0)`" if len(item) == 2 and shape[0] == channels else ""
        raise ValueError(
            f"`{name}` must be ({batch}C, H, W) or ({batch}C, T, H, W), but has shape {tuple(shape)}{hint}."
        )
    if item[0] != channels:
        hint = ""
        if channels in item:  # as in arrays of pictures, or lists of frames
            hint = f": move them there, `{name}.movedim({batch_dims + item.index(channels)}, {batch_dims})`"
        raise ValueError(
            f"`{name}` must have {channels} channels in dimension {batch_dims}, but has shape {tuple(shape)}{hint}."
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


def check_sizes(sizes: Any, z: torch.Tensor | list[torch.Tensor], patch_size: int) -> None:
    """Raises `ValueError` unless they are the heights and widths of pictures with the latents `z`, a list."""
    is_list = isinstance(sizes, (list, tuple))
    if not is_list or any(not isinstance(size, (list, tuple)) or len(size) != 2 for size in sizes):
        refuse("sizes", "a list of (height, width)", sizes)
    if not torch.compiler.is_compiling():
        for index, size in enumerate(sizes):
            for side in size:
                check_int(f"sizes[{index}]", side)
    if isinstance(z, torch.Tensor):
        raise ValueError(f"`sizes` {sizes} are for a list of latents, but `z` is a batch: leave them out, and crop.")
    grids = [tuple(item.shape[-2:]) for item in z]
    if [(-(-height // patch_size), -(-width // patch_size)) for height, width in sizes] != grids:
        raise ValueError(
            f"`sizes` {sizes} do not fit a list of latents of {grids} patches of {patch_size} x {patch_size} pixels."
        )


def warn_of_range(model: nn.Module, x: torch.Tensor, low: float, high: float) -> None:
    """Of pixels from 0 to 255. Off the CPU only the first call of a model looks, because the host has to wait."""
    if not has_values(x):
        return
    if x.device.type != "cpu" and not model._has_seen_pixels:
        model._has_seen_pixels = True
        low, high = (extreme.item() for extreme in x.detach().aminmax())
    if low >= 0 and high > 2:
        warn_once("Pixels seem to be from 0 to 255, but the autoencoder takes -1 to 1: pass `x / 127.5 - 1`.")
