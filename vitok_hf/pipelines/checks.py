"""What `ViTokDiTPipeline` does not take: each check raises a `ValueError` that says what to do."""

import inspect
import math
from typing import Any

from diffusers import DDPMParallelScheduler, DDPMScheduler, SchedulerMixin
from diffusers.utils import logging


logger = logging.get_logger(__name__)


def check_counts(**counts: int) -> None:
    for name, count in counts.items():
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


def check_scheduler(scheduler: SchedulerMixin, eta: float, predicts_variance: bool) -> None:
    """Whether it takes `eta`, and a model that predicts variances, or none."""
    name = type(scheduler).__name__
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"`eta` is {eta}, but {name} takes none: it is DDIM's.")
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be from 0 to 1, but is {eta}.")
    if has_learned_variance(scheduler) and not (predicts_variance and takes_variance(scheduler)):
        reason = "it takes pictures of three channels only" if predicts_variance else "the model predicts none"
        raise ValueError(
            f'{name} has variance_type="{scheduler.config.variance_type}", but {reason}: make it with another, '
            '"fixed_small" for DDPM, None for others.'
        )
