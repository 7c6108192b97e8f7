"""One call on several processes: each computes a share of its tiles or items, and all get the whole."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ..checks import refuse


def check_group(process_group: Any) -> Any:
    """The group, by default that of all processes; raises `ValueError` where there are none."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "There is one process alone: start several, and call `torch.distributed.init_process_group()`."
        )
    if process_group is None:
        return dist.group.WORLD
    if not isinstance(process_group, dist.ProcessGroup):
        refuse("process_group", "None or a process group of torch.distributed that this process is in", process_group)
    return process_group


def spread(function: Callable[[Any], torch.Tensor], units: Sequence[Any], like: torch.Tensor, group: Any) -> list:
    """`function` of each of the units, which all processes have; process i of n computes units i, i + n, ...

    Results are on the device of `like`.

    Raises:
        ValueError: If gradients are recorded, which would end at the border of a process.
    """
    if torch.is_grad_enabled():
        raise ValueError("Gradients do not pass from one process to another: call under `torch.no_grad()`.")
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    own = {index: function(units[index]).contiguous() for index in range(rank, len(units), count)}
    forms: list[Any] = [None] * count
    dist.all_gather_object(forms, {i: {"size": x.shape, "dtype": x.dtype} for i, x in own.items()}, group)
    results = []
    for index in range(len(units)):
        source = index % count
        result = own[index] if source == rank else like.new_empty(**forms[source][index])
        dist.broadcast(result, group_src=source, group=group)
        results.append(result)
    return results
