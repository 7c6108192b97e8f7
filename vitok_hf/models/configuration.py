from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn

from ..checks import has_values, warn_once
from ..clips import check_num_frames
from ..loading.strict import check_types
from .codes import check_counts
from .compat import ViTokConfig
from .rotary import split_rotary_pairs


# The largest values of entries by the end of their names: a model of a damaged config would fill all memory.
MAX_VALUES = {
    "_frames": 2**24,
    "_size": 2**16,
    "_channels": 2**16,
    "_layers": 2**10,
    "_heads": 2**10,
    "_classes": 2**24,
    "_tokens": 2**16,
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


def check_causal(config: ViTokConfig) -> None:
    """Raises `ValueError` for entries of a config that no causal model has."""
    if not config.causal:
        return
    if config.num_latent_tokens is not None:
        raise ValueError(
            f"`num_latent_tokens` is {config.num_latent_tokens}, but 1-D codes are of whole clips, which a causal "
            "model does not see: leave it out, or `causal`."
        )
    check_num_frames("`sample_frames`", config.sample_frames, config.temporal_patch_size, config.lead_frames)


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
    check_counts(config)
    check_causal(config)
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


def warn_of_range(model: Any, x: torch.Tensor, low: float, high: float) -> None:
    """Of pixels from 0 to 255. Off the CPU only the first call of a model looks, because the host has to wait."""
    if not has_values(x):
        return
    if x.device.type != "cpu" and not model._has_seen_pixels:
        model._has_seen_pixels = True
        low, high = (extreme.item() for extreme in x.detach().aminmax())
    if low >= 0 and high > 2:
        warn_once("Pixels seem to be from 0 to 255, but the autoencoder takes -1 to 1: pass `x / 127.5 - 1`.")
