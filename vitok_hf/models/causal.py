"""Causal video: latent frames that see none after them, of whole clips and of clips that arrive in pieces.

A causal model sees q - 1 copies of the first frame before it, so that latent frame 0 holds picture 0 alone, and each
later one q frames.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch


@dataclass
class FrameCache:
    """Keys and values of the latent frames that a stream has seen, of every attention layer.

    The layers of all tiles and slices are called in the same order for each piece of a stream: the cache of the first
    is the next to be called for. No gradients flow through it.

    Args:
        max_frames: Latent frames that a token sees at most, its own included; `None`: all.
        start: Latent frames that the stream has seen.
    """

    max_frames: int | None = None
    start: int = 0
    layers: deque[tuple[torch.Tensor, ...]] = field(default_factory=deque)

    def extend(self, *new: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Keys and values of a layer, (B, t, h * w, heads, head_dim) each, after those of earlier latent frames."""
        if self.start:
            new = tuple(torch.cat(pair, dim=1) for pair in zip(self.layers.popleft(), new))
        kept = new[0].shape[1] if self.max_frames is None else min(self.max_frames - 1, new[0].shape[1])
        # A copy, because a view would keep all of them.
        self.layers.append(tuple(x[:, x.shape[1] - kept :].detach().clone() for x in new))
        return new


@dataclass(frozen=True)
class Causal:
    """What a token of a causal model sees: its own latent frame and those before it, `frames` in all, or all of them.

    `cache` has the earlier ones of a stream.
    """

    frames: int | None = None
    cache: FrameCache | None = None

    @property
    def start(self) -> int:
        """Latent frames that were before those of the call."""
        return 0 if self.cache is None else self.cache.start


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, num_frames: int, causal: Causal, attend: Callable
) -> torch.Tensor:
    """Attention of one latent frame after the other, so that it needs no mask and suits any backend.

    `attend` is called with the queries of one of the `num_frames` and the keys and values of all that it sees.
    """
    query = query.unflatten(1, (num_frames, -1))  # (B, t, h * w, heads, head_dim)
    key, value = (x.unflatten(1, (num_frames, -1)) for x in (key, value))
    if causal.cache is not None:
        key, value = causal.cache.extend(key, value)
    num_before, outputs = key.shape[1] - num_frames, []
    for frame in range(num_frames):
        end = num_before + frame + 1
        seen = slice(0 if causal.frames is None else max(end - causal.frames, 0), end)
        outputs.append(attend(query[:, frame], key[:, seen].flatten(1, 2), value[:, seen].flatten(1, 2)))
    return torch.cat(outputs, dim=1)


def add_lead(video: torch.Tensor, lead: int) -> torch.Tensor:
    """(B, C, T, H, W) -> (B, C, lead + T, H, W): the first frame, repeated, comes first."""
    return torch.cat([video[:, :, :1].expand(-1, -1, lead, -1, -1), video], dim=2) if lead else video


def drop_lead(video: torch.Tensor, lead: int) -> torch.Tensor:
    """Inverse of `add_lead`."""
    return video[:, :, lead:] if lead else video


def causal_stream(
    function: Callable[[torch.Tensor], torch.Tensor],
    pieces: Iterable[torch.Tensor],
    cache: FrameCache,
    step: int,
    lead: int,
    size: int,
) -> Iterator[torch.Tensor]:
    """Applies `function` to parts of what the pieces make, joined in time, of up to `size` latent frames each.

    The first latent frame is of `step - lead` frames, all others of `step`. Nothing is read ahead.

    Yields:
        The results.

    Raises:
        ValueError: If the last latent frame lacks frames.
    """
    rest: torch.Tensor | None = None
    for piece in pieces:
        rest = piece if rest is None else torch.cat([rest, piece], dim=2)
        while count := min((rest.shape[2] + lead) // step, size):
            part, rest = rest.tensor_split([count * step - lead], dim=2)
            result, lead = function(part), 0
            cache.start += count
            yield result
    if rest is not None and rest.shape[2]:
        missing = step - (rest.shape[2] + lead) % step
        raise ValueError(
            f"The stream ends within a latent frame, of which {missing} of {step} frames are missing: pass 1 + a "
            f"multiple of {step} frames in all, repeating the last one, or cutting {rest.shape[2]}."
        )
