"""Strict reading of checkpoints, which may be damaged or of strangers: JSON files, configs, and tensors.

What is wrong raises a `ValueError` that names the file and the key. Nothing here runs code of a checkpoint.
"""

import inspect
import json
import math
import numbers
import os
import pickle
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from diffusers.utils.hub_utils import _add_variant
from safetensors import SafetensorError, safe_open
from torch import nn

from ..checks import show


Header = dict[str, tuple[int, ...]]

FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn")}
# What diffusers calls these arguments of `from_pretrained`; before 0.40 it had but the second.
DTYPE_NAMES = {
    "dtype": "dtype" if [*map(int, diffusers.__version__.split(".")[:2])] >= [0, 40] else "torch_dtype",
    "torch_dtype": "torch_dtype",
}
NO_WEIGHTS = {
    b"version https://git-lfs": "a pointer of Git LFS, fetch the file by `git lfs pull`",
    b"<!doctype": "a web page, download the file itself",
    b"<html": "a web page, download the file itself",
}
MAX_JSON_BYTES = 2**26
DAMAGED = "it is damaged or its download was cut. Fetch it again, with force_download=True if it came from the Hub."


@dataclass
class Reading:
    """What holds in one call of `from_pretrained`: whether values are looked at, and the headers read so far."""

    checks_values: bool = True
    headers: dict[Path, Header] = field(default_factory=dict)


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)


@contextmanager
def reading(check_finite: bool | None = None) -> Iterator[None]:
    """In this block files are taken not to change; whether `check_values` does anything, if `None` as outside."""
    if check_finite not in (None, True, False):
        raise ValueError(f"`check_finite` must be True or False, but is {check_finite!r}.")
    outside = _reading.get() or Reading()
    token = _reading.set(Reading(outside.checks_values if check_finite is None else bool(check_finite)))
    try:
        yield
    finally:
        _reading.reset(token)


def check_file(path: str | os.PathLike) -> Path:
    """Raises `ValueError` for pipes, folders and the like, on which reading may never end."""
    if not Path(path).is_file():
        state = "is no regular file" if os.path.lexists(path) else "is missing"
        raise ValueError(f'"{path}" {state}: put the file in its place, or correct the path.')
    return Path(path)


def read_text(path: str | os.PathLike) -> str:
    """What a file of text holds; raises `ValueError`, naming the file, if it is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f'"{path}" is no text in UTF-8 ({error}): correct it, or name another.') from error


def read_json(path: str | os.PathLike) -> Any:
    """What a JSON file holds; raises `ValueError`, naming the file, if it is damaged or something else."""
    if check_file(path).stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f'"{path}" has more than {MAX_JSON_BYTES} bytes, too many for a JSON file of a checkpoint.')
    try:
        return json.loads(Path(path).read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f'"{path}" is no JSON file, or damaged ({error}): correct it, or name another.') from error


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """As `read_json`, of a file that holds an object."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f'"{path}" must hold a JSON object, but holds {show(content)}: correct it.')
    return content


def public_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, without what diffusers notes besides, as the folder that a model came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def has_type(value: Any, annotation: Any) -> bool:
    """Whether a value of a config is what the annotation says; a bool is no number, and numbers are finite."""
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return any(has_type(value, kind) for kind in typing.get_args(annotation))
    if typing.get_origin(annotation) is list:
        (kind,) = typing.get_args(annotation)
        return isinstance(value, (list, tuple)) and all(has_type(item, kind) for item in value)
    if annotation in (int, float):
        kind = numbers.Integral if annotation is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool) and value < math.inf and not value <= -math.inf
    return isinstance(value, typing.get_origin(annotation) or annotation)


SIMPLE = (int, float, bool, str, types.NoneType, list[float], list[int])


def check_types(config: dict[str, Any], constructor: Callable, simple: bool = False) -> None:
    """Raises `ValueError` for entries that are not of the types that the arguments of a constructor have.

    With `simple`, annotations with other types than numbers, strings and their lists are left out.
    """
    for name, parameter in inspect.signature(constructor).parameters.items():
        kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
        if name not in config or config[name] is parameter.default or (simple and not set(kinds) <= set(SIMPLE)):
            continue
        if not has_type(config[name], parameter.annotation):
            kind = getattr(parameter.annotation, "__name__", str(parameter.annotation))
            raise ValueError(f"`{name}` must be {kind} (numbers finite), but is {show(config[name])}.")


def to_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype by its name, as "bfloat16", or the argument itself; raises `ValueError` for what is none."""
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in DTYPES:
        return DTYPES[dtype.removeprefix("torch.")]
    if isinstance(dtype, str) and dtype == "auto":
        return None  # as saved
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise ValueError(
        f"`dtype` must be a dtype, as torch.bfloat16, or the name of one of {[*DTYPES]}, but is {dtype!r}."
    )


def _read_pickle(path: Path) -> Header:
    """As `read_header`, of a file that `torch.save` wrote; nothing in it is run."""
    try:
        tensors = torch.load(path, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be read as weights ({type(error).__name__}): {DAMAGED}") from error
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} holds a {type(tensors).__name__}, no weights by name: {DAMAGED}")
    for key, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f'"{path}" holds "{key}" as {show(tensor)}, but weights are tensors of floats: {DAMAGED}')
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _read_safetensors(path: Path) -> Header:
    try:
        with safe_open(path, framework="pt") as file:
            slices = {key: file.get_slice(key) for key in file.keys()}
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
            header = {key: tuple(part.get_shape()) for key, part in slices.items()}
    except (SafetensorError, OSError, UnicodeError) as error:
        with open(path, "rb") as beginning:
            start = beginning.read(40).lower()
        reasons = (f": it is {what}." for text, what in NO_WEIGHTS.items() if start.startswith(text))
        raise ValueError(f"{path} cannot be read as safetensors{next(reasons, f' ({error}): {DAMAGED}')}") from error
    for key, dtype in dtypes.items():
        if dtype not in FLOATS:
            raise ValueError(f'"{path}" holds "{key}" as {dtype}, but weights are one of {sorted(FLOATS)}: {DAMAGED}')
    if {"F16", "BF16"} <= set(dtypes.values()):  # which differ in a letter, but not in size
        raise ValueError(f'"{path}" holds tensors as F16 and as BF16, and one must be wrong: {DAMAGED}')
    return header


def read_header(path: str | os.PathLike) -> Header:
    """Names and shapes of the tensors in a file of weights, which must be of floats; read once in a `reading`."""
    path, call = Path(path), _reading.get() or Reading()
    if path not in call.headers:
        read = _read_safetensors if path.suffix == ".safetensors" else _read_pickle
        call.headers[path] = read(check_file(path))
    return call.headers[path]


def read_index(folder: Path, variant: str | None) -> tuple[dict[str, str], list[Path]]:
    """The file of each tensor, if there is an index, and the safetensors files that diffusers loads from a folder."""
    index = folder / _add_variant(SAFE_WEIGHTS_INDEX_NAME, variant)
    if not os.path.lexists(index):
        single = folder / _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)
        return {}, [single] if os.path.lexists(single) else []
    content = read_object(index)
    weight_map = content.get("weight_map")
    is_map = isinstance(weight_map, dict) and weight_map and has_type([*weight_map.values()], list[str])
    if not isinstance(content.get("metadata"), dict) or not isinstance(weight_map, dict) or not is_map:
        raise ValueError(f'"{index}" must have "metadata" and "weight_map", objects, the second of names of files.')
    for name, file in weight_map.items():
        if Path(file).name != file:
            raise ValueError(f'"{index}" has "{name}" in "{file}", which leaves the folder: {DAMAGED}')
    return weight_map, [folder / file for file in sorted(set(weight_map.values()))]


def check_folder(folder: Path, variant: str | None) -> None:
    """Raises `ValueError` if a file of a model in diffusers' layout cannot be read, `OSError` if it is missing."""
    names = sorted(path.name for path in folder.iterdir())
    if "config.json" not in names:
        raise OSError(f'"{folder}" has no config.json, but {names}: name the folder of a model.')
    if quantization := read_object(folder / "config.json").get("quantization_config"):
        if not isinstance(quantization, dict):
            raise ValueError(f'"{folder}/config.json" has `quantization_config` {show(quantization)}, no object.')
        return
    weight_map, files = read_index(folder, variant)
    weights = [name for name in names if name.startswith("diffusion_pytorch_model")]
    if not files and not any(name.endswith((".index.json", ".bin")) for name in weights or names):
        wanted = _add_variant(SAFETENSORS_WEIGHTS_NAME, variant)  # diffusers has more names for some
        raise OSError(f'"{folder}" has no {wanted}, but {weights or names}: name its `variant`, or fetch it.')
    for file in files:
        for name in read_header(file):
            if weight_map.get(name, file.name) != file.name:
                raise ValueError(f'"{file}" holds "{name}", which is in "{weight_map[name]}" by the index: {DAMAGED}')


def check_shards(files: Sequence[str | os.PathLike], listed: Collection[str], expected: Header) -> None:
    """Raises `ValueError` unless safetensors files are whole, and hold each tensor of their index, each once.

    Args:
        files: The shards.
        listed: Names in their index.
        expected: Shapes that tensors must have where there are such.
    """
    places: dict[str, str | os.PathLike] = {}
    for file in files:
        for name, shape in read_header(file).items():
            if name in places:
                raise ValueError(f'"{file}" holds "{name}", which is in "{places[name]}" too: {DAMAGED}')
            if shape != expected.get(name, shape):
                raise ValueError(
                    f'"{file}" does not fit its config: "{name}" is {shape}, not {expected[name]}. Use the config '
                    "that it was saved with."
                )
            places[name] = file
    if files and (lost := sorted(set(listed) - set(places))):
        more = ", ..." if lost[5:] else ""
        folder = os.path.dirname(files[0])
        raise ValueError(f'The index in "{folder}" lists {", ".join(lost[:5])}{more}, which no file has: {DAMAGED}')


@torch.no_grad()
def check_values(model: nn.Module, source: str | os.PathLike, files: Sequence[str | os.PathLike] = ()) -> None:
    """Raises `ValueError` if a weight is not finite; one pass over those in memory, unless it is turned off."""
    if not (_reading.get() or Reading()).checks_values:
        return
    by_device: dict[torch.device, dict[str, torch.Tensor]] = {}
    for name, weight in model.state_dict().items():
        if weight.device.type != "meta" and weight.numel():
            weight = weight.float() if weight.itemsize == 1 else weight  # fp8 has no extremes
            by_device.setdefault(weight.device, {})[name] = torch.stack(weight.aminmax()).float()
    for extremes in by_device.values():
        for name, finite in zip(extremes, torch.stack([*extremes.values()]).isfinite().all(dim=1).tolist()):
            if not finite:
                source = next((file for file in files if name in read_header(file)), source)
                dtype = str(model.get_parameter(name).dtype).removeprefix("torch.")
                remedy = "load them in another dtype, or " if dtype == "float16" else ""
                raise ValueError(
                    f'The weights of "{source}" are not finite in "{name}" as {dtype}: {remedy}fetch or train them '
                    "again (check_finite=False loads them all the same)."
                )


def check_entries(
    config: dict[str, Any], unknown: Collection[str], expected: Collection[str], path: str | os.PathLike
) -> None:
    """Raises `ValueError` for unknown entries that may be others with a wrong name: where others are missing.

    Else they are those of other libraries, as what `EMAModel.save_pretrained` adds.
    """
    unknown = [name for name in unknown if not name.startswith("_")]
    if unknown and (missing := [name for name in expected if name not in config]):
        lacking = f", and not those that do, {missing}" if any(missing) else ""
        raise ValueError(
            f'"{path}" has entries that do not exist, {unknown}{lacking}: it is damaged, or of another class or '
            "version, by which it can be loaded."
        )


def check_private_entries(config: dict[str, Any], path: str | os.PathLike) -> None:
    """Raises `ValueError` for what diffusers notes in a config and cannot read again."""
    for name, kind in {"_class_name": str | list[str | None], "_use_default_values": list[str]}.items():
        if name in config and (not has_type(config[name], kind) or not config[name]):
            raise ValueError(f'"{path}" has `{name}` {show(config[name])}, but it must be {kind}.')


def check_config_file(
    model_class: type[ModelMixin], config: Any, path: str | os.PathLike, complete: bool = True
) -> None:
    """Raises `ValueError`, with the name of the file, for a config that the constructor would not take.

    One that is not `complete`, as written by hand, has no unknown entries.
    """
    if not isinstance(config, dict):
        raise ValueError(f'The config of "{path}" must be a JSON object, but is {show(config)}.')
    path = Path(path, "config.json") if os.path.isdir(path) else path
    parameters = inspect.signature(model_class).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    check_private_entries(config, path)
    other = getattr(diffusers, str(config.get("_class_name")), None)
    if isinstance(other, type) and not issubclass(other, model_class):
        raise ValueError(f'"{path}" is of class {other.__name__}, not {model_class.__name__}: load it by that.')
    unknown = [name for name in config if not model_class.has_entry(name)]
    check_entries(config, unknown, defaults if complete else [""], path)
    try:
        model_class.check_config(defaults | {name: value for name, value in config.items() if name in defaults})
    except ValueError as error:
        raise ValueError(f'The config of "{path}" does not fit: {error}') from error
