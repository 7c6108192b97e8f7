"""What `ViTokDiTPipeline` does not take: each check raises a `ValueError` that says what to do."""

import copy
import inspect
import math
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin
from diffusers.utils import logging

from ..checkpoints.strict import check_private_entries, check_types, has_type, read_object
from .labels import check_labels


logger = logging.get_logger(__name__)

MAX_TIMESTEPS = 100_000
TRIAL_STEPS = 10

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


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
        if not hasattr(count, "__index__"):
            raise ValueError(f"`{name}` must be an integer, but is {count!r}.")
        if count < 1:
            raise ValueError(f"`{name}` must be positive, but is {count}.")


def check_guidance(scale: float, interval: tuple[float, float], rescale: float) -> None:
    if not 0 <= scale < math.inf:  # nor NaN
        raise ValueError(f"`guidance_scale` must not be negative or infinite, but is {scale}; up to 1 is no guidance.")
    if not 0 <= rescale <= 1:
        raise ValueError(f"`guidance_rescale` must be from 0 to 1, but is {rescale}.")
    start, stop = interval
    if not 0 <= start <= stop <= 1:
        raise ValueError(
            f"`guidance_interval` must be two fractions of the schedule, 0 <= start <= stop <= 1, but is {interval}."
        )


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
    needed = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
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
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"`eta` is {eta}, but {name} takes none: it is DDIM's.")
    if eta is not None and not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be from 0 to 1, but is {eta}.")
    if has_learned_variance(scheduler) and not (predicts_variance and takes_variance(scheduler)):
        reason = "it takes pictures of three channels only" if predicts_variance else "the model predicts none"
        raise ValueError(
            f'{name} has variance_type="{scheduler.config.variance_type}", but {reason}: make it with another, '
            '"fixed_small" for DDPM, None for others.'
        )


def check_folder(folder: str | os.PathLike, constructor: Callable) -> None:
    """Raises `ValueError`, with the name of the file, for what is damaged in the configs of a saved pipeline."""
    path = Path(folder, "model_index.json")
    if not os.path.lexists(path):
        return  # diffusers says so
    config, parameters = read_object(path), {*inspect.signature(constructor).parameters} - {"self"}
    check_private_entries({"_class_name": None} | config, path)
    if unknown := [name for name in config if not name.startswith("_") and name not in parameters]:
        raise ValueError(f'"{path}" has entries that do not exist, {unknown}: it is damaged, or of another pipeline.')
    for name in sorted(parameters - {"id2label"}):
        if not has_type(value := config.get(name), list[str | None]) or len(value) != 2:
            raise ValueError(f'"{path}" must have library and class of "{name}", but has {value!r}.')
    with named(path):
        check_labels(config.get("id2label") or {})
    path, scheduler_class = Path(folder, "scheduler", "scheduler_config.json"), config["scheduler"][1]
    scheduler_class = getattr(diffusers, scheduler_class or "", None)
    if scheduler_class is not None and os.path.lexists(path):
        with named(path):
            check_scheduler_config(config := read_object(path), scheduler_class.__init__)
            check_scheduler_works(scheduler_class.from_config(config))


@contextmanager
def named(path: Path):
    """What is raised in this block is a `ValueError` with the name of the file."""
    try:
        yield
    except Exception as error:  # of diffusers or numpy, of any type
        raise ValueError(f'"{path}" is damaged, or does not fit: {error}') from error


def check_scheduler_config(config: dict[str, Any], constructor: Callable) -> None:
    """Raises `ValueError` for values of other types than those of the constructor, or with which nothing ends."""
    check_private_entries(config, "the config")
    check_types(config, constructor, simple=True)
    steps = config.get("num_train_timesteps", 1)
    if not has_type(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise ValueError(f"`num_train_timesteps` must be from 1 to {MAX_TIMESTEPS}, but is {steps!r}.")
    for name in ("beta_start", "beta_end"):
        if name in config and not (has_type(config[name], float) and 0 <= config[name] < 1):
            raise ValueError(f"`{name}` must be from 0 to less than 1, but is {config[name]!r}.")


def check_scheduler_works(scheduler: SchedulerMixin) -> None:
    """Raises `ValueError` for a scheduler that its config does not let step, which it would say in a call only."""
    if why_unsupported(scheduler) or (has_learned_variance(scheduler) and not takes_variance(scheduler)):
        return  # which `check_scheduler` says
    trial, latents = copy.deepcopy(scheduler), torch.zeros(1, 1, 2, 2)
    options = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    prediction = torch.zeros(1, 2, 2, 2) if takes_variance(scheduler) else latents
    try:
        trial.set_timesteps(TRIAL_STEPS, **options)
        trial.step(prediction, trial.timesteps[0], latents)
    except Exception as error:  # of diffusers or numpy, of any type
        raise ValueError(
            f"{type(scheduler).__name__} does not work with its config ({error}): correct its scheduler_config.json, "
            "or make it with other arguments."
        ) from error
