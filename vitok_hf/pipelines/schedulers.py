"""Which schedulers of diffusers the pipeline can sample with, and whether one does what its config says."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDPMParallelScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging

from ..checks import check_number
from ..loading.strict import check_private_entries, check_types, has_type


logger = logging.get_logger(__name__)

MAX_STEPS = 10_000
MAX_TIMESTEPS = 1_000_000
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


def max_steps(scheduler: SchedulerMixin) -> int:
    return max(MAX_STEPS, scheduler.config.get("num_train_timesteps") or 0)


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


def check_scheduler_config(config: dict[str, Any], constructor: Callable) -> None:
    """Raises `ValueError` for values of other types than those of the constructor, or with which nothing ends."""
    check_private_entries(config, "the config")
    check_types(config, constructor, simple=True)
    steps = config.get("num_train_timesteps", 1)
    if not has_type(steps, int) or not 1 <= steps <= MAX_TIMESTEPS:
        raise ValueError(f"`num_train_timesteps` must be from 1 to {MAX_TIMESTEPS}, but is {steps!r}.")
    for name in ("beta_start", "beta_end"):
        if name in config and not (has_type(config[name], float) and 0 <= config[name] <= 1):
            raise ValueError(f"`{name}` must be from 0 to 1, but is {config[name]!r}.")


def check_scheduler_works(scheduler: SchedulerMixin) -> None:
    """Raises what a scheduler raises that its config does not let step, which it would do in a call only."""
    if why_unsupported(scheduler) or (has_learned_variance(scheduler) and not takes_variance(scheduler)):
        return  # which `check_scheduler` says
    latents = torch.zeros(1, 1, 2, 2)
    options = {"mu": 1.0} if scheduler.config.get("use_dynamic_shifting") else {}
    prediction = torch.zeros(1, 2, 2, 2) if takes_variance(scheduler) else latents
    for count in (10, 1):  # some have few, some need several
        try:
            with torch.random.fork_rng(devices=[]):
                scheduler.set_timesteps(count, **options)
                timestep = scheduler.timesteps[0]
                if hasattr(scheduler, "scale_model_input"):
                    scheduler.scale_model_input(latents, timestep)
                scheduler.step(prediction, timestep, latents)
            return
        except Exception:  # of diffusers or numpy, of any type
            if count == 1:
                raise
