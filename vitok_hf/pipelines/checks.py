"""What `ViTokDiTPipeline` does not take: each check raises a `ValueError` that says what to do."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, FasterCacheConfig, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import logging

from ..checks import LARGEST, check_int, check_number, refuse
from ..models import AutoencoderViTok


logger = logging.get_logger(__name__)

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
DISCRETE = "its samples are discrete tokens"
# Those whose `step` can be called as that of others, but does something else.
UNSUPPORTED_SCHEDULERS = dict.fromkeys(
    ("AmusedScheduler", "BlockRefinementScheduler", "DiscreteDDIMScheduler", "EntropyBoundScheduler"), DISCRETE
) | {
    "VQDiffusionScheduler": DISCRETE,
    "DDPMWuerstchenScheduler": "it takes a timestep for each sample, from 1 to 0",
    "HeliosScheduler": "it goes through stages of several sizes",
    "HeliosDMDScheduler": "it goes through stages of several sizes",
    "PiflowScheduler": "its models predict a policy for several steps",
    "RFD4ProteinaScheduler": "its samples are structures of proteins",
    "SCMScheduler": "its models are trained with TrigFlow",
}


# Of all samples of a call; 16 pictures of 8192 x 8192 pixels in patches of 16. More is a typing error.
MAX_TOKENS = 2**22
MAX_STEPS = 10_000
MAX_GUIDANCE_SCALE = 1e6


def check_guidance(scale: Any, interval: Any, rescale: Any) -> None:
    check_number("guidance_scale", scale, 0.0, MAX_GUIDANCE_SCALE)  # up to 1 is no guidance
    check_number("guidance_rescale", rescale, 0.0, 1.0)
    wanted = "two fractions of the schedule, 0 <= start <= stop <= 1"
    if not isinstance(interval, (tuple, list)) or len(interval) != 2:
        refuse("guidance_interval", wanted, interval)
    start, stop = (check_number("guidance_interval", bound, 0.0, 1.0, wanted) for bound in interval)
    if start > stop:
        refuse("guidance_interval", wanted, interval)


def max_steps(scheduler: SchedulerMixin) -> int:
    return max(MAX_STEPS, scheduler.config.get("num_train_timesteps") or 0)


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
    out_channels = config.in_channels if config.out_channels is None else config.out_channels
    if config.in_channels != channels or out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"The autoencoder has latent_channels={channels}, but the transformer in_channels="
            f"{config.in_channels} and out_channels={out_channels}: these must be {channels}, and {channels} or "
            f"{2 * channels}."
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


def check_id2label(id2label: Any) -> dict[int, str]:
    """With integers for keys, of which JSON makes strings."""
    wanted, table = "a dict of class ids and names", dict[int, str]()
    if id2label is None:
        return table
    if not isinstance(id2label, dict):
        refuse("id2label", wanted, id2label)
    for index, text in id2label.items():
        if not isinstance(text, str):
            refuse("id2label", wanted, id2label)
        is_text = isinstance(index, str) and index.isdecimal() and len(index) < 10
        number = check_int("id2label", int(index) if is_text else index, -LARGEST, LARGEST, wanted)
        if number in table:
            raise ValueError(
                f"`id2label` has the id {number} twice, for {table[number]!r} and {text!r}: leave one out."
            )
        table[number] = text
    return table


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


def check_output_type(output_type: Any, has_decoder: bool) -> None:
    if not isinstance(output_type, str) or output_type not in OUTPUT_TYPES:
        refuse("output_type", f"one of {', '.join(OUTPUT_TYPES)}", output_type)
    if output_type != "latent" and not has_decoder:
        raise ValueError(f'`output_type` is {output_type!r}, but the autoencoder has no decoder: take "latent".')


def own_config(scheduler: SchedulerMixin) -> dict[str, Any]:
    """The entries that its class has a use for: `from_config` keeps those of the scheduler before, too."""
    constructors = [vars(cls)["__init__"] for cls in type(scheduler).__mro__ if "__init__" in vars(cls)]
    parameters = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    return {name: value for name, value in scheduler.config.items() if name in parameters}


def has_learned_variance(scheduler: SchedulerMixin) -> bool:
    return own_config(scheduler).get("variance_type") in ("learned", "learned_range")


def takes_variance(scheduler: SchedulerMixin) -> bool:
    """Whether it wants a learned variance behind the prediction, for any number of channels."""
    return isinstance(scheduler, (DDPMScheduler, DDPMParallelScheduler)) and has_learned_variance(scheduler)


def warn_of_clipping(scheduler: SchedulerMixin) -> None:
    if own_config(scheduler).get("clip_sample"):
        logger.warning("The scheduler cuts latents off at 1: make it with clip_sample=False.")


def why_unsupported(scheduler: SchedulerMixin) -> str | None:
    """The reason for which the pipeline cannot sample with it; `None` if it can."""
    for cls in type(scheduler).__mro__:
        if reason := UNSUPPORTED_SCHEDULERS.get(cls.__name__):
            return reason
    if not (hasattr(scheduler, "step") and hasattr(scheduler, "set_timesteps")):
        return "it has no `step` and `set_timesteps`"
    parameters = list(inspect.signature(type(scheduler).step).parameters.values())[1:]
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in variable]
    if needed[:3] != ["model_output", "timestep", "sample"] or len(needed) > 3:
        return f"its `step` needs {', '.join(needed)}, not model_output, timestep and sample alone"
    return None


def check_timesteps(scheduler: SchedulerMixin) -> None:
    """Noise cannot be predicted where there is nothing else: the clean latents would be noise divided by zero."""
    alphas = getattr(scheduler, "alphas_cumprod", None)
    if alphas is None or own_config(scheduler).get("prediction_type") != "epsilon":
        return
    if (alphas[scheduler.timesteps.to(alphas.device).long()] == 0).any():
        raise ValueError(
            f"{type(scheduler).__name__} starts where there is only noise (rescale_betas_zero_snr) with "
            'prediction_type="epsilon", which divides by zero: take a model and scheduler with "v_prediction" or '
            '"sample", or rescale_betas_zero_snr=False.'
        )


def check_scheduler(scheduler: SchedulerMixin, eta: float | None, predicts_variance: bool) -> None:
    """Whether it is supported, takes `eta`, and a model that predicts variances, or none."""
    name = type(scheduler).__name__
    if reason := why_unsupported(scheduler):
        raise ValueError(f"{name} is not supported: {reason}. Take another, DDIM for instance.")
    if eta is not None:
        check_number("eta", eta, 0.0, 1.0)
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"`eta` is {eta}, but {name} takes none: it is DDIM's.")
    if has_learned_variance(scheduler) and not (predicts_variance and takes_variance(scheduler)):
        reason = "it takes pictures of three channels only" if predicts_variance else "the model predicts none"
        raise ValueError(
            f'{name} has variance_type="{scheduler.config.variance_type}", but {reason}: make it with another, '
            '"fixed_small" for DDPM, None for others.'
        )
