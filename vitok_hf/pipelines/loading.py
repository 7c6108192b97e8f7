"""Reading of saved pipelines: their own configs, and those of schedulers, may be damaged or of strangers."""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import SchedulerMixin

from ..loading.strict import check_entries, check_private_entries, check_types, has_type, read_object
from ..models import AutoencoderViTok, ViTokDiTModel
from .checks import check_id2label, has_learned_variance, takes_variance, why_unsupported


MAX_TIMESTEPS = 1_000_000
KINDS = {"transformer": ViTokDiTModel, "vae": AutoencoderViTok, "scheduler": SchedulerMixin}


def check_folder(folder: str | os.PathLike, constructor: Callable) -> None:
    """Raises `ValueError`, with the name of the file, for what is damaged in the configs of a saved pipeline."""
    path = Path(folder, "model_index.json")
    if os.path.isdir(folder) and not os.path.lexists(path):
        raise OSError(f'"{folder}" has no model_index.json, but {sorted(os.listdir(folder))}: name a pipeline.')
    config, parameters = read_object(path), {*inspect.signature(constructor).parameters} - {"self"}
    check_private_entries({"_class_name": None} | config, path)
    check_entries(config, config.keys() - parameters, sorted(parameters), path)
    for name in sorted(parameters - {"id2label"}):
        value = config.get(name)
        if not isinstance(value, list) or not has_type(value, list[str | None]) or len(value) != 2:
            raise ValueError(f'"{path}" must have library and class of "{name}", but has {value!r}.')
        cls, kind = getattr(sys.modules.get(value[0]), value[1] or "", None), KINDS[name]
        if value != [None, None] and not (isinstance(cls, type) and issubclass(cls, kind)):
            raise ValueError(
                f'"{path}" has {value} for "{name}", which is no {kind.__name__}: correct it, or import the library '
                "first."
            )
    with named(path):
        check_id2label(config.get("id2label"))
    library, name = config["scheduler"]
    path = Path(folder, "scheduler", "scheduler_config.json")
    if name is not None and os.path.lexists(path):
        scheduler_class, config = getattr(sys.modules[library], name), read_object(path)
        with named(path):
            if config.get("_class_name", name) != name:
                raise ValueError(f"it is of a {config['_class_name']}, but model_index.json has a {name}.")
            check_scheduler_config(config, scheduler_class.__init__)
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
