"""Loading by name, strictly; the bundled weights are `from_pretrained` folders in `checkpoints`."""

import difflib
import inspect
import os
from pathlib import Path
from types import MethodType
from typing import Any

from huggingface_hub import constants

from ..presets import V1_PATTERN, V2_PATTERN
from .strict import DTYPE_NAMES, check_folder, public_config, read_object, reading, to_dtype


KEYWORDS = (
    "dtype torch_dtype device_map max_memory offload_folder offload_state_dict variant low_cpu_mem_usage token "
    "use_safetensors quantization_config subfolder revision cache_dir force_download local_files_only "
    "ignore_mismatched_sizes output_loading_info"
).split()
BUNDLED = Path(__file__).parents[1] / "checkpoints"


def list_bundled() -> list[str]:
    """Names of the bundled checkpoints, autoencoders and pipelines alike, for `from_pretrained`."""
    return sorted(
        folder.parent.name for name in ("config.json", "model_index.json") for folder in BUNDLED.glob(f"*/{name}")
    )


def resolve_bundled(name_or_path: Any) -> Any:
    """The folder of a bundled checkpoint, or the argument itself if it names none, or a folder that there is.

    A folder without weights, whose config.json has the key "_bundled", stands for the bundled model of that name. The
    autoencoder of a bundled pipeline is one, also in a copy.

    Raises:
        ValueError: If it is no name, there is no such bundled model, or its config differs from that of the folder.
    """
    if not isinstance(name_or_path, (str, os.PathLike)) or not os.fspath(name_or_path):
        raise ValueError(f"A checkpoint is a folder, a Hub id or one of {list_bundled()}, but not {name_or_path!r}.")
    folder = Path(name_or_path)
    if not folder.is_dir():
        if str(name_or_path) in list_bundled():
            return str(BUNDLED / name_or_path)
        _check_name(os.fspath(name_or_path))
        return name_or_path
    if not os.path.lexists(folder / "config.json") or any(folder.glob("diffusion_pytorch_model*")):
        return name_or_path
    config = read_object(folder / "config.json")
    if "_bundled" not in config:
        return name_or_path
    name = config["_bundled"]
    if name not in list_bundled():
        raise ValueError(
            f'"{folder}" has "_bundled": "{name}" in its config.json, but there is only {list_bundled()}.'
        )
    bundled = read_object(BUNDLED / name / "config.json")
    keys = [key for key in public_config(config | bundled) if config.get(key) != bundled.get(key)]
    if keys:
        raise ValueError(
            f'"{folder}" has no weights and takes those of the bundled "{name}" ("_bundled" in its config.json), but '
            "the configs differ: "
            + "; ".join(f"{key} is {config.get(key)}, bundled {bundled.get(key)}" for key in keys)
            + ". Make them equal, or save a model with weights there."
        )
    return str(BUNDLED / name)


def _check_name(name: str) -> None:
    """Raises an error for what is no Hub id either, which the Hub would be asked for, again and again."""
    if os.path.isfile(name):
        raise ValueError(f'"{name}" is a file: pass the folder that it is in.')
    if V1_PATTERN.fullmatch(name) or V2_PATTERN.fullmatch(name):
        raise ValueError(f'"{name}" is an architecture: `from_variant` makes it, with random weights.')
    if name.count("/") != 1 or name[0] in "./~\\":
        close = difflib.get_close_matches(name, list_bundled(), 1)
        hint = f'did you mean the bundled "{close[0]}"?' if close else f"bundled are {list_bundled()}."
        raise OSError(f'There is no folder "{name}", and a Hub id is OWNER/NAME: {hint}')


def check_place(folder: str | os.PathLike, subfolder: str | None) -> None:
    """Raises `ValueError` if `folder` is there, but not its `subfolder` (diffusers would take `folder` itself).

    The same without a `subfolder`, if it is needed because `folder` is a pipeline.
    """
    if not os.path.isdir(folder):
        return
    parts = sorted(
        {path.parent.name for name in ("config.json", "*.safetensors") for path in Path(folder).glob(f"*/{name}")}
    )
    if subfolder and not Path(folder, subfolder).is_dir():
        allowed = f"may be one of {parts}, or left out" if parts else "is to be left out"
        raise ValueError(f'"{folder}" has no folder "{subfolder}": `subfolder` {allowed}.')
    if not subfolder and Path(folder, "model_index.json").is_file() and not Path(folder, "config.json").is_file():
        raise ValueError(f'"{folder}" is a pipeline: name the model in it by `subfolder`, one of {parts}.')


def load_strictly(
    from_pretrained: MethodType, name_or_path: str | os.PathLike, check_finite: bool | None = None, **kwargs: Any
) -> Any:
    """What diffusers' `from_pretrained` gives, unless something is damaged or does not fit.

    Args:
        check_finite: Look at all weights, by default, unless it is of a pipeline that is loaded without.

    Raises:
        ValueError: If a file cannot be read, its tensors are missing or unexpected, or a config has wrong values.
    """
    if constants.HF_HUB_OFFLINE:  # diffusers asks the Hub about sharded weights unless it is told not to
        kwargs["local_files_only"] = True
    _check_keywords(kwargs, from_pretrained.__self__)
    output_loading_info = kwargs.pop("output_loading_info", False)
    for name in {*DTYPE_NAMES} & set(kwargs):
        kwargs[DTYPE_NAMES[name]] = to_dtype(kwargs.pop(name))
    folder = resolve_bundled(name_or_path)
    check_place(folder, kwargs.get("subfolder"))
    with reading(check_finite):
        if os.path.isdir(folder):
            folder = resolve_bundled(Path(folder, kwargs.pop("subfolder", None) or ""))
            check_folder(Path(folder), kwargs.get("variant"))
        model, info = from_pretrained(folder, output_loading_info=True, **kwargs)
    check_loading_info(info, name_or_path)
    return (model, info) if output_loading_info else model


def _check_keywords(kwargs: dict[str, Any], model_class: Any) -> None:
    """Raises `ValueError` for what seems to be one of diffusers' arguments, or of the config, with a typing error."""
    known = {*KEYWORDS, *inspect.signature(model_class).parameters}
    for name in kwargs.keys() - known:
        if close := difflib.get_close_matches(name, sorted(known), 1, 0.75):
            raise ValueError(f"There is no argument `{name}`: did you mean `{close[0]}`?")


def check_loading_info(info: dict[str, Any], name_or_path: str | os.PathLike) -> None:
    """Raises `ValueError` if diffusers left weights of the model unset, or weights of the checkpoint unused."""
    for problem in ("missing", "unexpected"):
        if keys := sorted(info[f"{problem}_keys"]):
            raise ValueError(
                f"The weights of {name_or_path} do not fit its config: {len(keys)} tensors are {problem} "
                f"({', '.join(keys[:5])}{', ...' if keys[5:] else ''}). Use the config that they were saved with."
            )
