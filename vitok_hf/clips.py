"""Runs, the one form that pictures and clips have inside the package: a list of (n, C, T, H, W), one for each size.

A batch is one run, a picture has T = 1, and pictures of their own sizes are several runs. `to_runs` makes them from
what a user passes, after `check_clips`, and `Form` gives back what was passed: nothing else asks for dimensions.
"""

import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from .checks import check_finite, check_int, check_tensor, refuse


Runs = list[torch.Tensor]
COLOURS = (1, 3, 4)  # numbers of channels that pictures have: grey, RGB, and RGBA with premultiplied colours
PAD_HINT = "pad, crop or resize it, or pass a list of pictures, which `encode` pads."


@dataclass(frozen=True)
class Form:
    """What `to_runs` was given: a batch, a list of items of any sizes, or runs.

    `items` are, of a list, the indices of the items in each run, else `None`; `has_time`, for each run, whether its
    clips came with the dimension T.
    """

    is_batch: bool
    items: list[list[int]] | None
    has_time: list[bool]

    def of_runs(self, values: list) -> list:
        """Of values for the items of a list, those for each run; others are for each run already."""
        return values if self.items is None else [values[indices[0]] for indices in self.items]

    def label(self, name: str) -> str:
        """How a message calls what is in the first run."""
        return name if self.is_batch else f"{name}[0]"

    def give_back(self, runs: Runs) -> torch.Tensor | list[torch.Tensor]:
        """The runs, which may have other numbers of channels, frames, rows and columns, in the form of what came."""
        runs = [run if has_time else run.squeeze(2) for run, has_time in zip(runs, self.has_time)]
        if self.is_batch:
            return runs[0]
        if self.items is None:
            return runs
        items = dict(zip(itertools.chain(*self.items), itertools.chain(*runs)))
        return [items[index] for index in range(len(items))]


def to_runs(
    x: torch.Tensor | Sequence[torch.Tensor], multiple: int = 1, kinds: Sequence[Any] = ()
) -> tuple[Runs, Form]:
    """Runs of a batch, (B, C, H, W) or (B, C, T, H, W), of a list of (C, H, W) or (C, T, H, W), or of runs.

    What is in a list is padded with zeros at the bottom and on the right to a `multiple` of height and width. Items of
    other `kinds`, of which each has one, are not in one run.
    """
    if isinstance(x, torch.Tensor):
        batches, items = [x], None
    else:
        x = [F.pad(item, (0, -item.shape[-1] % multiple, 0, -item.shape[-2] % multiple)) for item in x]
        batches, items = list(x), None
        if x[0].ndim < 5:
            groups: dict[Any, list[int]] = {}  # equal sizes make a run
            for index, item in enumerate(x):
                groups.setdefault((item.shape, kinds[index] if kinds else None), []).append(index)
            items = list(groups.values())
            batches = [torch.stack([x[index] for index in indices]) for indices in items]
    has_time = [batch.ndim == 5 for batch in batches]
    runs = [batch if timed else batch.unsqueeze(2) for batch, timed in zip(batches, has_time)]  # (n, C, T, H, W)
    return runs, Form(isinstance(x, torch.Tensor), items, has_time)


def to_batches(x: torch.Tensor | list) -> tuple[list[torch.Tensor], Callable[[list], Any]]:
    """Batches of one, (1, C, ...), for the items of a list, else what is given; and how to give back what came."""
    if isinstance(x, torch.Tensor):
        return [x], itemgetter(0)
    if x[0].ndim == 5:  # runs
        return x, list
    return [item.unsqueeze(0) for item in x], lambda batches: [batch.squeeze(0) for batch in batches]


def add_row(latents: torch.Tensor) -> torch.Tensor:
    """A 1-D code (B, c, l) -> (B, c, 1, l); latents on a grid stay as they are."""
    return latents.unsqueeze(2) if latents.ndim == 3 else latents


def size_of(batch: torch.Tensor) -> tuple[int, int, int]:
    """(T, H, W) of the items of a batch."""
    return (batch.shape[2] if batch.ndim == 5 else 1, *batch.shape[-2:])


def item_sizes(x: torch.Tensor | list[torch.Tensor]) -> list[tuple[int, int, int]]:
    """(T, H, W) of every item of a batch, a list or runs."""
    return [size_of(batch) for batch in to_batches(x)[0] for _ in range(batch.shape[0])]


def sizes_of(x: torch.Tensor | list[torch.Tensor]) -> list[tuple[int, int]] | None:
    """Height and width of each item or run of a list; `None` for a batch."""
    return None if isinstance(x, torch.Tensor) else [(item.shape[-2], item.shape[-1]) for item in x]


@dataclass(frozen=True)
class Expected:
    """What `check_clips` lets pass.

    Args:
        channels: What there must be in dimension C.
        steps: (q, p), of which T, and H and W, must be multiples.
        needs_frames: Whether pictures, without the dimension T, are refused.
        pads_lists: Whether H and W of what is in a list may be any.
        takes_runs: Whether it may be a list of runs, too.
        lead: Frames that T lacks to a multiple of q.
        axes, channels_of: Names in messages: of the dimensions, and what stands before the number of channels.
    """

    channels: int
    steps: tuple[int, int] = (1, 1)
    needs_frames: bool = False
    pads_lists: bool = False
    takes_runs: bool = False
    lead: int = 0
    axes: str = "CTHW"
    channels_of: str = ""


def check_clips(name: str, x: Any, expected: Expected) -> tuple[float, float]:
    """Raises `ValueError` unless `x`, a batch or a list of items, is for `to_runs`, in sizes that fit, and finite.

    Returns the lowest and the highest value, where these can be looked at, else zeros.
    """
    is_list = isinstance(x, (list, tuple))
    if is_list and len(x) == 0:
        raise ValueError(f"`{name}` is an empty list.")
    are_runs = is_list and expected.takes_runs and getattr(x[0], "ndim", None) == 5
    first, (c, t, h, w) = "n, " if are_runs else "" if is_list else "B, ", tuple(expected.axes)
    forms = (
        [f"({first}{c}, {t}, {h}, {w})"] if are_runs else [f"({first}{c}, {h}, {w})", f"({first}{c}, {t}, {h}, {w})"]
    )
    expected = replace(expected, steps=(expected.steps[0], 1)) if is_list and expected.pads_lists else expected
    ranges = []
    for index, item in enumerate(x if is_list else [x]):
        label = f"{name}[{index}]" if is_list else name
        check_tensor(label, item)
        check_shape(label, item.shape, forms, expected)
        if is_list and (item.dtype, item.device) != (x[0].dtype, x[0].device):
            kind = f"{x[0].dtype} on {x[0].device}"
            raise ValueError(f"`{label}` must be {kind}, as `{name}[0]` is, but is {item.dtype} on {item.device}.")
        ranges.append(check_finite(label, item))
    lows, highs = zip(*ranges)
    return min(lows), max(highs)


def check_shape(name: str, shape: torch.Size, forms: list[str], expected: Expected) -> None:
    """`forms` are the dimensions that there may be, those of clips last."""
    (q, p), channels, numbers = expected.steps, expected.channels, tuple(shape)
    channel_dim, num_dims = forms[-1].count(",") - 3, [form.count(",") + 1 for form in forms]
    if len(shape) not in num_dims:
        hint = f": add the batch, `{name}.unsqueeze(0)`" if len(shape) == 3 and shape[0] == channels else ""
        raise ValueError(f"`{name}` must be {' or '.join(forms)}, but has shape {numbers}{hint}.")
    if shape[channel_dim] != channels:
        hint = ""
        if channels in numbers[channel_dim:]:  # as in arrays of pictures, or lists of frames
            found = numbers.index(channels, channel_dim)
            hint = f": move them there, `{name}.movedim({found}, {channel_dim})`"
        raise ValueError(
            f"`{name}` must have {expected.channels_of}{channels} channels in dimension {channel_dim}, but has shape "
            f"{numbers}{hint}."
        )
    has_time = len(shape) == num_dims[-1]
    if expected.needs_frames and not has_time:
        raise ValueError(
            f"`{name}` has shape {numbers}, but this model compresses several frames into one latent frame: pass a "
            f"video, {forms[-1]}."
        )
    if shape[-1] % p or shape[-2] % p:
        raise ValueError(
            f"Height and width of `{name}` must be multiples of patch_size={p}, but are {shape[-2]} x {shape[-1]}: "
            + ("choose another size, or a model with patch_size=1." if expected.axes == "cthw" else PAD_HINT)
        )
    if 0 in numbers:
        raise ValueError(f"`{name}` is empty: it has shape {numbers}.")
    if has_time:
        check_num_frames(f"The number of frames of `{name}`", shape[-3], q, expected.lead)


def check_num_frames(name: str, num_frames: int, q: int, lead: int) -> None:
    """Raises `ValueError` unless they and `lead` more are a multiple of q."""
    if beyond := (num_frames + lead) % q:
        near = " or ".join(str(fits) for fits in (num_frames - beyond, num_frames - beyond + q) if fits > 0)
        wanted = f"{'1 plus ' * (lead > 0)}a multiple of temporal_patch_size={q}"
        raise ValueError(f"{name} must be {wanted}, but is {num_frames}: make it {near}.")


def check_size_list(sizes: Any, lengths: tuple[int, ...] = (2,)) -> None:
    is_list = isinstance(sizes, (list, tuple))
    if not is_list or any(not isinstance(size, (list, tuple)) or len(size) not in lengths for size in sizes):
        refuse("sizes", "a list of (height, width)" + " or (frames, height, width)" * (3 in lengths), sizes)
    if not torch.compiler.is_compiling():
        for index, size in enumerate(sizes):
            for side in size:
                check_int(f"sizes[{index}]", side)


def check_sizes(sizes: Any, z: torch.Tensor | list[torch.Tensor], patch_size: int) -> None:
    """Raises `ValueError` unless they are the heights and widths of pictures with the latents `z`, a list."""
    check_size_list(sizes)
    if isinstance(z, torch.Tensor):
        raise ValueError(f"`sizes` {sizes} are for a list of latents, but `z` is a batch: leave them out, and crop.")
    grids = [tuple(item.shape[-2:]) for item in z]
    if [(-(-height // patch_size), -(-width // patch_size)) for height, width in sizes] != grids:
        raise ValueError(
            f"`sizes` {sizes} do not fit a list of latents of {grids} patches of {patch_size} x {patch_size} pixels."
        )


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def to_uint8(sample: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, clipped and rounded."""
    return ((sample.float() + 1.0) * 127.5).clamp(0.0, 255.0).round().to(torch.uint8)


def to_colours(images: torch.Tensor) -> torch.Tensor:
    """What networks of three channels see of (B, C, ...), uint8 or in [-1, 1]: (B, 3, ...) of the same type.

    Grey is repeated, RGB stays as it is, and RGBA, whose colours are premultiplied, is put on grey.

    Raises:
        ValueError: For other numbers of channels.
    """
    channels = images.shape[1]
    if channels not in COLOURS:
        raise ValueError(f"Pictures of {channels} channels have no colours: grey has 1, RGB 3 and RGBA 4.")
    if channels == 4 and images.dtype == torch.uint8:
        return to_uint8(to_colours(to_float(images)))
    if channels == 4:
        colours, alpha = images.split([3, 1], dim=1)
        return colours + (1.0 - alpha) / 2
    return images if channels == 3 else images.expand(-1, 3, *images.shape[2:])


def to_shown(images: torch.Tensor) -> torch.Tensor:
    """What is shown of (B, C, ...): that of `to_colours`, and where there are no colours the first three channels.

    Of two channels the first is shown, as grey.
    """
    channels = images.shape[1]
    return to_colours(images if channels in COLOURS else images[:, : 3 if channels > 3 else 1])


def to_picture(pixels: np.ndarray) -> Image.Image:
    """(H, W, C) uint8, grey, RGB or RGBA with premultiplied colours -> a picture whose colours are not premultiplied.

    Raises:
        ValueError: For other numbers of channels.
    """
    height, width, channels = pixels.shape
    if channels not in COLOURS:
        raise ValueError(f"There are no pictures of {channels} channels: grey has 1, RGB 3 and RGBA 4.")
    if channels == 4:
        return Image.frombytes("RGBa", (width, height), pixels.tobytes()).convert("RGBA")
    return Image.fromarray(pixels if channels == 3 else pixels[..., 0])


def pad_to_size(pixels: torch.Tensor, size: tuple[int, int, int]) -> torch.Tensor:
    """Repeats the last frame, row and column of (B, C, T, H, W) until (T, H, W) is `size`."""
    frames, height, width = (to - side for to, side in zip(size, pixels.shape[2:]))
    return F.pad(pixels, (0, width, 0, height, 0, frames), mode="replicate")


def fold_frames(images: torch.Tensor) -> torch.Tensor:
    """(B, C, T, H, W) -> (B * T, C, H, W); pictures stay as they are."""
    return images.transpose(1, 2).flatten(0, 1) if images.ndim == 5 else images


def unfold_frames(images: torch.Tensor, frames: int) -> torch.Tensor:
    """Inverse of `fold_frames` for clips: (B * T, C, H, W) -> (B, C, T, H, W)."""
    return images.unflatten(0, (-1, frames)).transpose(1, 2)


def sha256_each(images: torch.Tensor) -> torch.Tensor:
    """Checksums of the bytes of (N, ...) uint8 pictures, (N, 32) uint8."""
    return torch.tensor([list(hashlib.sha256(x.contiguous().numpy()).digest()) for x in images], dtype=torch.uint8)
