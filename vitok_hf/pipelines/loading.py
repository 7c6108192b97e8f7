"""Reading of saved pipelines: their own configs, and those of schedulers, may be damaged or of strangers."""

import inspect
import os
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

from diffusers.schedulers.scheduling_utils import SchedulerMixin

from ..loading.strict import check_entries, check_private_entries, has_type, read_object
from ..models import AutoencoderViTok, ViTokDiTModel
from .checks import check_guidance
from .labels import check_id2label
from .schedulers import check_scheduler_config, check_scheduler_works


KINDS = {"transformer": ViTokDiTModel, "vae": AutoencoderViTok, "scheduler": SchedulerMixin}


def check_folder(folder: str | os.PathLike, constructor: Callable) -> None:
    """Raises `ValueError`, with the name of the file, for what is damaged in the configs of a saved pipeline."""
    path = Path(folder, "model_index.json")
    if os.path.isdir(folder) and not os.path.lexists(path):
        raise OSError(f'"{folder}" has no model_index.json, but {sorted(os.listdir(folder))}: name a pipeline.')
    config, parameters = read_object(path), {*inspect.signature(constructor).parameters} - {"self"}
    check_private_entries({"_class_name": None} | config, path)
    check_entries(config, config.keys() - parameters, sorted(parameters), path)
    for name in sorted(KINDS):
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
        check_guidance(config.get("guidance_scale"), config.get("guidance_rescale"))
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
