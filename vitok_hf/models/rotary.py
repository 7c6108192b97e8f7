"""Positions of tokens on a grid: axial rotary embeddings."""

import torch


Grid = tuple[int, ...]
Tables = tuple[torch.Tensor, torch.Tensor]  # cos and sin


def split_rotary_pairs(head_dim: int, num_axes: int) -> list[int]:
    """Rotary pairs per axis, as equal as possible; the last axes (rows, columns) get what does not divide."""
    pairs = head_dim // 2
    if head_dim % 2 or pairs < num_axes:
        raise ValueError(
            f"A head size of {head_dim} cannot hold rotary pairs for {num_axes} axes: "
            f"choose an even hidden_size / num_attention_heads of at least {2 * num_axes}."
        )
    return [(pairs + axis) // num_axes for axis in range(num_axes)]


def rotary_embedding(
    grid: tuple[int, ...],
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype,
    theta: float = 10000.0,
    start: int = 0,
) -> Tables:
    """Axial rotary tables (cos, sin), each (L, 1, head_dim), for positions on `grid`.

    The pair (i, i + head_dim / 2) turns by position / theta ** (2 j / axis_dim): the first pairs follow the first
    axis, and so on; on it, positions count from `start`. `sin` carries the sign of each member, so that
    `apply_rotary_embedding` needs no negation.
    Computed in float32 from one short table for each axis, hence so quick that a cache would not pay.
    """
    angles = []
    for axis, (length, pairs) in enumerate(zip(grid, split_rotary_pairs(head_dim, len(grid)))):
        frequencies = theta ** -(torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
        first = 0 if axis else start
        positions = torch.arange(first, first + length, dtype=torch.float32, device=device)
        shape = [1] * len(grid) + [pairs]
        shape[axis] = length
        angles.append(torch.outer(positions, frequencies).view(shape))
    cos = torch.cat([angle.cos().to(dtype).expand(*grid, -1) for angle in angles], dim=-1)  # (t, h, w, head_dim / 2)
    sin = torch.cat([angle.sin().to(dtype).expand(*grid, -1) for angle in angles], dim=-1)
    cos, sin = cos.view(-1, 1, head_dim // 2), sin.view(-1, 1, head_dim // 2)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def sincos_embedding(grid: Grid, dim: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """(L, dim): sines and cosines of the positions on `grid`, for tokens that have nothing else."""
    cos, sin = (table.squeeze(1).chunk(2, dim=-1)[1] for table in rotary_embedding(grid, dim, device, dtype))
    return torch.cat([cos, sin], dim=-1)


def apply_rotary_embedding(hidden_states: torch.Tensor, rotary_emb: Tables) -> torch.Tensor:
    """Rotates the pairs (i, i + head_dim / 2) of (B, L, heads, head_dim) by the tables of `rotary_embedding`."""
    cos, sin = rotary_emb
    first, second = hidden_states.chunk(2, dim=-1)
    swapped = torch.cat([second, first], dim=-1)  # as quick as `roll`, and quicker when compiled
    return torch.addcmul(hidden_states * cos, swapped, sin)
