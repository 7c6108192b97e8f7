"""Work shared by the processes of a run."""

import torch
from accelerate import PartialState
from accelerate.utils import gather_object


def share_of(count: int) -> range:
    """The part of `range(count)` that is this process's; parts follow each other and differ in size by at most one.

    Raises:
        ValueError: If there are more processes than items.
    """
    state = PartialState()
    if count < state.num_processes:
        raise ValueError(f"{count} pictures cannot be shared by {state.num_processes} processes: take fewer.")
    each, more = divmod(count, state.num_processes)
    start = state.process_index * each + min(state.process_index, more)
    return range(start, start + each + (state.process_index < more))


def gather_rows(rows: torch.Tensor) -> torch.Tensor:
    """(N, ...) of every process, one after the other, on the CPU; N may differ. All processes must call it."""
    return torch.cat(gather_object([rows.cpu()]))
