"""Checks of arguments: each raises a `ValueError` at once that has the name, the value and what to do."""

import functools
import math
import numbers
import operator
import reprlib
from typing import Any, NoReturn

import numpy as np
import torch
from diffusers.utils import logging


logger = logging.get_logger(__name__)

LARGEST = 2**31 - 1
BOOLEANS = (bool, np.bool_)


@functools.cache
def warn_once(message: str) -> None:
    """In a process."""
    logger.warning(message)


def show(value: Any) -> str:
    """A short text for any value; of tensors and arrays their kind."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{type(value).__name__} of shape {tuple(value.shape)}, {value.dtype}"
    try:
        return reprlib.repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        return f"a huge {type(value).__name__}"


def plain(value: Any) -> Any:
    """Numbers of numpy, alone or in lists, as those of Python, which JSON has."""
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def refuse(name: str, wanted: str, value: Any) -> NoReturn:
    raise ValueError(f"`{name}` must be {wanted}, but is {show(value)}.")


def _is_boolean(value: Any) -> bool:
    return isinstance(value, BOOLEANS) or getattr(value, "dtype", None) in (torch.bool, np.bool_)


def check_int(name: str, value: Any, low: int = 1, high: int = LARGEST, wanted: str | None = None) -> int:
    """`value` as an `int`: anything with an `__index__`, but no boolean."""
    try:
        number = low - 1 if _is_boolean(value) else operator.index(value)
    except (TypeError, RuntimeError):  # the latter from tensors without values
        number = low - 1
    if not low <= number <= high:
        refuse(name, wanted or f"an integer from {low} to {high}", value)
    return number


def check_number(name: str, value: Any, low: float, high: float, wanted: str | None = None) -> float:
    """`value` as a `float`: a real number, but no boolean."""
    try:
        is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()  # a tensor or an array
        number = float(value) if is_number and not _is_boolean(value) else math.nan
    except (OverflowError, TypeError, RuntimeError):  # the last of complex tensors, and those without values
        number = math.nan
    if not low <= number <= high:
        refuse(name, wanted or f"a number from {low:g} to {high:g}", value)
    return number


def check_bool(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, BOOLEANS):
            refuse(name, "True or False", value)


def check_generator(generator: Any, count: int | None = None, items: str = "items", name: str = "generator") -> None:
    """One, or none, or a list with one for each of `count` items."""
    generators = generator if isinstance(generator, list) else [generator]
    for each in generators:
        if not isinstance(each, torch.Generator) and (each is not None or isinstance(generator, list)):
            refuse(name, "a torch.Generator, None, or a list of them, one for each of the " + items, generator)
    if isinstance(generator, list) and count is not None and len(generator) != count:
        raise ValueError(f"`{name}` has {len(generator)} entries for {count} {items}: pass one for each.")


def _remedy(name: str, value: Any) -> str:
    """For what is no tensor of floats."""
    if hasattr(value, "latent_dist"):
        return f"pass its `.latent_dist.mode()` as `{name}`"
    if callable(getattr(value, "mode", None)) and not isinstance(value, torch.Tensor):
        return f"pass its `.mode()` as `{name}`"
    if isinstance(value, np.ndarray):
        return f"pass `torch.from_numpy({name})`, with channels before height and width"
    if isinstance(value, torch.Tensor) and value.dtype == torch.uint8:
        return f"for pixels from 0 to 255, pass `{name} / 127.5 - 1`"
    if isinstance(value, torch.Tensor):
        return f"pass a dense tensor, as `{name}.float()`"
    if callable(value) and not isinstance(value, type):
        return f"call it, `{name}()`"
    if name.startswith(("x", "sample", "pieces")):
        return "pictures become one in diffusers' `VaeImageProcessor().preprocess(pictures)`"
    return "latents are what `vae.encode(x).latent_dist.mode()` gives"


def check_tensor(name: str, value: Any, ndims: tuple[int, ...] = ()) -> None:
    """A dense tensor of floats, of any size or of one of these numbers of dimensions."""
    is_dense = isinstance(value, torch.Tensor) and value.layout == torch.strided
    if not is_dense or not value.dtype.is_floating_point:
        raise ValueError(f"`{name}` must be a tensor of floats, but is {show(value)}: {_remedy(name, value)}.")
    if ndims and value.ndim not in ndims:
        refuse(name, f"a tensor of {' or '.join(map(str, ndims))} dimensions", value)


def has_values(tensor: torch.Tensor) -> bool:
    """Whether there are values to look at, and no compilation, transform or mode that this would break."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.device.type == "meta":
        return False
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or torch._C._len_torch_dispatch_stack():
        return False  # as fake ones
    return torch._C._functorch.peek_interpreter_stack() is None


def is_readable(tensor: torch.Tensor) -> bool:
    """Whether there are values, and a look at them does not wait for a device."""
    return has_values(tensor) and tensor.device.type == "cpu"


def check_finite(name: str, tensor: torch.Tensor) -> tuple[float, float]:
    """On a CPU; returns the smallest and largest value where it looks, else zeros."""
    if not is_readable(tensor) or not tensor.numel():
        return 0.0, 0.0
    low, high = (x.item() for x in tensor.detach().aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(
            f"`{name}` must be finite, but has values that are {'NaN' if math.isnan(low) else 'infinite'}: leave such "
            "items out, or compute them in float32."
        )
    return low, high
