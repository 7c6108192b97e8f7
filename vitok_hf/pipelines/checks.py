"""What `ViTokDiTPipeline` does not take: each check raises a `ValueError` that says what to do."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FasterCacheConfig
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import FrozenDict

from ..checks import check_number, refuse
from ..clips import COLOURS
from ..models import AutoencoderViTok


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Of all samples of a call; 16 pictures of 8192 x 8192 pixels in patches of 16. More is a typing error.
MAX_TOKENS = 2**22
MAX_GUIDANCE_SCALE = 1e6


def check_guidance(guidance_scale: Any, guidance_rescale: Any, interval: Any = (0.0, 1.0)) -> None:
    """`None` stands for a default."""
    if guidance_scale is not None:
        check_number("guidance_scale", guidance_scale, 0.0, MAX_GUIDANCE_SCALE)  # up to 1 is no guidance
    if guidance_rescale is not None:
        check_number("guidance_rescale", guidance_rescale, 0.0, 1.0)
    wanted = "two fractions of the schedule, 0 <= start <= stop <= 1"
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        refuse("guidance_interval", wanted, interval)
    start, stop = (check_number("guidance_interval", bound, 0.0, 1.0, wanted) for bound in interval)
    if start > stop:
        refuse("guidance_interval", wanted, interval)


def check_size(num_tokens: int, **sizes: int | None) -> None:
    if num_tokens > MAX_TOKENS:
        given = ", ".join(f"`{name}` {size}" for name, size in sizes.items() if size is not None)
        raise ValueError(
            f"{given} make {num_tokens} tokens, more than {MAX_TOKENS} in a call: ask for less at a time."
        )


def check_components(transformer: Any, vae: Any, scheduler: Any) -> None:
    """Each may be missing (`None`), but must else be of its kind."""
    entries = {"transformer": "num_classes", "vae": "temporal_compression_ratio"}
    for (name, entry), model in zip(entries.items(), (transformer, vae)):
        if model is not None and not hasattr(getattr(model, "config", None), entry):
            refuse(name, f"a model with `{entry}` in its config", type(model))
    if scheduler is not None and not isinstance(getattr(scheduler, "config", None), dict):
        refuse("scheduler", "a scheduler of diffusers", scheduler)


def check_models(config: FrozenDict, vae: AutoencoderViTok | None, id2label: dict[int, str]) -> None:
    channels = config.in_channels if vae is None else vae.config.latent_channels
    if vae is not None and config.in_channels in (vae.config.get("channel_counts") or ()):  # of a prefix
        channels = config.in_channels
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    if config.in_channels != channels or out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"The autoencoder has latent_channels={channels}, but the transformer in_channels="
            f"{config.in_channels} and out_channels={out_channels}: these must be {channels}, and {channels} or "
            f"{2 * channels}."
        )
    if vae is not None and vae.config.get("num_latent_tokens") and config.patch_size > 1:
        raise ValueError(
            f"The autoencoder's codes are sequences, but the transformer has patch_size={config.patch_size}: make it "
            "with 1."
        )
    if unknown := [index for index in id2label if not 0 <= index < config.num_classes]:
        raise ValueError(f"`id2label` has ids {unknown}, but the transformer num_classes={config.num_classes}.")


def check_cache(cache: Any, guided: bool, is_video: bool) -> None:
    """FasterCache guesses one half of every batch from the other."""
    if not isinstance(cache, FasterCacheConfig):
        return
    kind, wanted = ("clips", "BCFHW") if is_video else ("pictures", "BCHW")
    if is_video == (cache.tensor_format == "BCHW"):
        raise ValueError(
            f'FasterCache has tensor_format="{cache.tensor_format}", but these latents are {kind}: make it with '
            f'"{wanted}".'
        )
    if not cache.is_guidance_distilled and not guided:
        raise ValueError(
            "FasterCache needs guidance in every step: set guidance_scale > 1, class_labels and no "
            "guidance_interval, or make it with is_guidance_distilled=True."
        )


def check_callback(callback: Any, tensor_inputs: Any, known: list[str]) -> list[str]:
    """The names of the tensors that it gets."""
    if callback is not None and not callable(callback):
        refuse("callback_on_step_end", "a function or None", callback)
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    if not isinstance(tensor_inputs, (list, tuple, type(None))):
        refuse("callback_on_step_end_tensor_inputs", f"a list of {known}", tensor_inputs)
    if unknown := [name for name in tensor_inputs or [] if name not in known]:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}, not of {known}.")
    return list(tensor_inputs or [])


def check_changes(changes: Any, latents: torch.Tensor) -> torch.Tensor:
    """The latents in what a callback returns, or those that there are."""
    if not isinstance(changes, (Mapping, type(None))):
        refuse("callback_on_step_end", "a function that returns a dict", changes)
    changed = (changes or {}).get("latents", latents)
    if getattr(changed, "shape", None) != latents.shape:
        refuse("latents", f"of shape {tuple(latents.shape)} in what `callback_on_step_end` returns", changed)
    return changed


def check_output_type(output_type: Any, config: Mapping[str, Any], is_video: bool) -> None:
    """`config` is that of the autoencoder."""
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        refuse("output_type", f"one of {', '.join(OUTPUT_TYPES)}", output_type)
    if output_type != "latent" and config.get("component") == "encoder":
        raise ValueError(f'`output_type` is {output_type!r}, but the autoencoder has no decoder: take "latent".')
    if output_type == "pil" and config["in_channels"] not in ((1, 3) if is_video else COLOURS):
        raise ValueError(
            f'`output_type` is "pil", but the autoencoder has in_channels {config["in_channels"]}, of which Pillow '
            f'makes no {"frames" if is_video else "pictures"}: take "np" or "pt".'
        )
