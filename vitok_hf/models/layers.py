"""Layers shared by the autoencoder and the diffusion transformer.

Token sequences are (B, L, D), row-major over the grid (t, h, w); attention heads are (B, L, heads, head_dim).
Runs of equal sequences (n, L, D) that differ in length are packed into one, (1, sum of n * L, D); `packing` says which
tokens belong together.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin, FeedForward
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from einops import rearrange
from torch import nn
from torch.nn import functional as F

from .causal import Causal, causal_attention
from .rotary import Grid, Tables, apply_rotary_embedding, rotary_embedding, sincos_embedding


VARLEN_DEVICES = ("cuda",)
varlen_attn: Callable | None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # PyTorch before 2.10
    varlen_attn = None


def patchify(video: torch.Tensor, temporal_patch_size: int, patch_size: int, frames_per_item: int) -> torch.Tensor:
    """(B, C, T, H, W) -> (B * items, L, C * q * p * p): clips of `frames_per_item` frames are cut apart along T."""
    pattern = "b c (n t q) (h p) (w r) -> (b n) (t h w) (c q p r)"
    q, p = temporal_patch_size, patch_size
    return rearrange(video, pattern, n=video.shape[2] // frames_per_item, q=q, p=p, r=p)


def unpatchify(
    tokens: torch.Tensor, grid: Grid, temporal_patch_size: int, patch_size: int, num_items: int
) -> torch.Tensor:
    """Inverse of `patchify`: `grid` is the (t, h, w) of one item, `num_items` the number of items per video."""
    pattern = "(b n) (t h w) (c q p r) -> b c (n t q) (h p) (w r)"
    t, h, w = grid
    q, p = temporal_patch_size, patch_size
    return rearrange(tokens, pattern, n=num_items, t=t, h=h, w=w, q=q, p=p, r=p)


@dataclass(frozen=True)
class Packing:
    """Which tokens of a packed sequence belong together.

    Args:
        counts, grids: Number and grid of the equal sequences of each run; one entry for an ordinary batch.
        num_latent_tokens: Tokens of each sequence that come before those of its grid.
        window_radius: How far attention sees; `None`: everything.
        boundaries: (sequences + 1,) int32, where each begins and the last ends, if one kernel may take all of them.
        causal: What a token sees of the latent frames, which are the first axis of the grids; `None`: all.
    """

    counts: list[int]
    grids: list[Grid]
    window_radius: int | None = None
    num_latent_tokens: int = 0
    boundaries: torch.Tensor | None = None
    causal: Causal | None = None

    @property
    def lengths(self) -> list[int]:
        return [self.num_latent_tokens + math.prod(grid) for grid in self.grids]


def make_packing(
    sequences: list[torch.Tensor],
    grids: list[Grid],
    window_radius: int | None = None,
    num_latent_tokens: int = 0,
    causal: Causal | None = None,
) -> Packing:
    packing = Packing([run.shape[0] for run in sequences], grids, window_radius, num_latent_tokens, causal=causal)
    device, sees_all = sequences[0].device, window_radius is None and causal is None
    if len(sequences) > 1 and sees_all and device.type in VARLEN_DEVICES and varlen_attn is not None:
        lengths = [length for count, length in zip(packing.counts, packing.lengths) for _ in range(count)]
        boundaries = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)
        return replace(packing, boundaries=boundaries)
    return packing


def pack(sequences: list[torch.Tensor]) -> torch.Tensor:
    """Runs of equal sequences, (n, L, D) each -> (1, sum of n * L, D); a single run stays as it is."""
    return sequences[0] if len(sequences) == 1 else torch.cat([x.flatten(0, 1) for x in sequences]).unsqueeze(0)


def unpack(tokens: torch.Tensor, packing: Packing) -> list[torch.Tensor]:
    """Inverse of `pack`."""
    if len(packing.counts) == 1:
        return [tokens]
    runs = tokens.squeeze(0).split([count * length for count, length in zip(packing.counts, packing.lengths)])
    return [run.unflatten(0, (count, -1)) for run, count in zip(runs, packing.counts)]


def windowed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: Grid, radius: int, attend: Callable
) -> torch.Tensor:
    """Attention that is local on every axis of the grid, in blocks, so that it needs no mask and suits any backend.

    The grid is cut into blocks of `radius` tokens a side. The queries of a block see the keys of the block and all
    that are at most `radius` away from it: every token sees at least `radius` tokens in each direction. There may be
    several grids of keys, one after the other, of which a query sees the same places.
    """
    query, key, value = (x.unflatten(1, (-1, *grid)) for x in (query, key, value))  # (B, n, *grid, heads, head_dim)
    axes, whole = slice(1, 2 + len(grid)), (slice(None), slice(None))
    output = torch.empty_like(query)
    for corner in itertools.product(*(range(0, length, radius) for length in grid)):
        block = (*whole, *(slice(start, start + radius) for start in corner))
        around = (*whole, *(slice(max(start - radius, 0), start + 2 * radius) for start in corner))
        queries, keys, values = (x.flatten(1, 1 + len(grid)) for x in (query[block], key[around], value[around]))
        output[block] = attend(queries, keys, values).unflatten(1, query[block].shape[axes])
    return output.flatten(1, 1 + len(grid))


def is_for_varlen(query: torch.Tensor, backend: AttentionBackendName | None) -> bool:
    """Whether PyTorch's kernel for sequences of all lengths takes (1, L, heads, head_dim) in place of `backend`."""
    is_native = (backend or _AttentionBackendRegistry.get_active_backend()[0]) == AttentionBackendName.NATIVE
    return is_native and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0


def packed_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packing: Packing, backend: Any, parallel_config: Any
) -> torch.Tensor:
    """Every sequence attends to itself alone: all in one launch where a kernel does that, else run by run."""
    if varlen_attn is not None and packing.boundaries is not None and is_for_varlen(query, backend):
        query, key, value = (x.squeeze(0) for x in (query, key, value))  # (L, heads, head_dim)
        bounds, longest = packing.boundaries, max(packing.lengths)
        return varlen_attn(query, key, value, bounds, bounds, longest, longest).unsqueeze(0)
    attend, outputs = partial(dispatch_attention_fn, backend=backend, parallel_config=parallel_config), []
    causal, radius = packing.causal, packing.window_radius
    for q, k, v, grid in zip(*(unpack(x, packing) for x in (query, key, value)), packing.grids):
        look: Callable = attend
        if radius is not None:
            axes = grid if causal is None else grid[1:]
            look = partial(windowed_attention, grid=axes, radius=radius, attend=attend)
        outputs.append(look(q, k, v) if causal is None else causal_attention(q, k, v, grid[0], causal, look))
    return pack(outputs)


def inverse_rms(hidden_states: torch.Tensor, eps: float) -> torch.Tensor:
    """One over the root mean square of the last dimension, accumulated in float32 without a float32 copy."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    norm = torch.linalg.vector_norm(hidden_states, dim=-1, keepdim=True, dtype=dtype)
    return torch.rsqrt(norm.square() / hidden_states.shape[-1] + eps).to(hidden_states.dtype)


class RMSNorm(nn.Module):
    """Equal to `torch.nn.RMSNorm` up to rounding, and several times faster on a CPU in bfloat16."""

    def __init__(self, dim: int, eps: float = 1e-6, elementwise_affine: bool = True):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = hidden_states * inverse_rms(hidden_states, self.eps)
        return normed if self.weight is None else normed * self.weight.to(hidden_states.dtype)


class RotaryRMSNorm(nn.Module):
    """RMSNorm of each head, then its rotation; the weight goes into the tables, which saves a pass over the data."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, hidden_states: torch.Tensor, rotary_emb: Tables) -> torch.Tensor:
        (cos, sin), weight = rotary_emb, self.weight.to(hidden_states.dtype)
        weighted = cos * weight, sin * weight.roll(len(weight) // 2)
        return apply_rotary_embedding(hidden_states, weighted) * inverse_rms(hidden_states, self.eps)


class Rotary(nn.Module):
    def forward(self, hidden_states: torch.Tensor, rotary_emb: Tables) -> torch.Tensor:
        return apply_rotary_embedding(hidden_states, rotary_emb)


class ViTokAttnProcessor:
    """Self-attention with rotary positions through diffusers' attention backends; each sequence sees itself alone."""

    _attention_backend = None
    _parallel_config = None

    def __call__(
        self,
        attn: "ViTokAttention",
        hidden_states: torch.Tensor,
        rotary_emb: Tables,
        packing: Packing,
    ) -> torch.Tensor:
        projections = (attn.to_q, attn.to_k, attn.to_v)
        if attn.fused_projections and all(isinstance(x, nn.Linear) for x in projections):  # PEFT has put no LoRA there
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            query, key, value = (projection(hidden_states) for projection in projections)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))  # (B, L, heads, head_dim)
        query, key = attn.norm_q(query, rotary_emb), attn.norm_k(key, rotary_emb)
        output = packed_attention(query, key, value, packing, self._attention_backend, self._parallel_config)
        return attn.to_out[0](output.flatten(2))  # (B, L, D)


class ViTokAttention(nn.Module, AttentionModuleMixin):
    to_qkv: nn.Linear
    fused_projections: bool
    processor: ViTokAttnProcessor
    set_processor: Callable
    unfuse_projections: Callable
    _default_processor_cls = ViTokAttnProcessor
    _available_processors = [ViTokAttnProcessor]

    def __init__(self, hidden_size: int, num_heads: int, qk_norm: bool, bias: bool):
        super().__init__()
        self.heads = num_heads
        self.use_bias = bias
        self.to_q = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_k = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.to_v = nn.Linear(hidden_size, hidden_size, bias=bias)
        self.norm_q = RotaryRMSNorm(hidden_size // num_heads) if qk_norm else Rotary()
        self.norm_k = RotaryRMSNorm(hidden_size // num_heads) if qk_norm else Rotary()
        self.to_out = nn.ModuleList([nn.Linear(hidden_size, hidden_size, bias=bias)])
        self.set_processor(ViTokAttnProcessor())

    def fuse_projections(self):
        """For inference without gradients: the fused projection is a copy, which would keep them from the projections.

        Training, and a call that records gradients for them, unfuse. Not fused where one has a LoRA.
        """
        if all(isinstance(projection, nn.Linear) for projection in (self.to_q, self.to_k, self.to_v)):
            super().fuse_projections()
            self.to_qkv.requires_grad_(False)

    def train(self, mode: bool = True) -> "ViTokAttention":
        """Training unfuses the projections, for they are trained and saved apart."""
        if mode:
            self.unfuse_projections()
        return super().train(mode)

    def forward(self, hidden_states: torch.Tensor, rotary_emb: Tables, packing: Packing) -> torch.Tensor:
        if self.fused_projections and torch.is_grad_enabled():
            if any(projection.weight.requires_grad for projection in (self.to_q, self.to_k, self.to_v)):
                self.unfuse_projections()
        return self.processor(self, hidden_states, rotary_emb, packing)


def feed_forward(hidden_size: int, mlp_ratio: float, bias: bool) -> FeedForward:
    """SwiGLU whose inner width is `mlp_ratio` hidden sizes, rounded to 16 channels."""
    inner_dim = (int(mlp_ratio * hidden_size) + 8) // 16 * 16
    return FeedForward(hidden_size, inner_dim=inner_dim, activation_fn="swiglu", bias=bias)


class Residual(nn.Module):
    """Adds a branch to the residual stream, scaled per channel (LayerScale) if there is an initial scale."""

    def __init__(self, dim: int, init: float | None):
        super().__init__()
        self.gamma = None if init is None else nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, hidden_states: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
        return hidden_states + branch if self.gamma is None else torch.addcmul(hidden_states, branch, self.gamma)


@dataclass(frozen=True)
class TowerSettings:
    """Architecture of a tower; see `AutoencoderViTok`."""

    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_ratio: float
    parallel: bool
    qk_norm: bool
    layer_scale_init: float | None
    bias: bool
    final_norm: bool
    num_latent_tokens: int = 0


class ViTokBlock(nn.Module):
    """Pre-norm block: attention, then SwiGLU (v1), or both on the same normed input, summed (v2, `parallel`)."""

    def __init__(self, settings: TowerSettings):
        super().__init__()
        dim, scale = settings.hidden_size, settings.layer_scale_init
        self.parallel = settings.parallel
        self.norm1 = RMSNorm(dim)
        self.attn = ViTokAttention(dim, settings.num_heads, settings.qk_norm, settings.bias)
        self.residual1 = Residual(dim, scale)
        self.ff = feed_forward(dim, settings.mlp_ratio, settings.bias)
        if not settings.parallel:
            self.norm2 = RMSNorm(dim)
            self.residual2 = Residual(dim, scale)

    def forward(self, hidden_states: torch.Tensor, rotary_emb: Tables, packing: Packing) -> torch.Tensor:
        normed = self.norm1(hidden_states)
        attended = self.attn(normed, rotary_emb, packing)
        if self.parallel:
            return self.residual1(hidden_states, attended + self.ff(normed))
        hidden_states = self.residual1(hidden_states, attended)
        return self.residual2(hidden_states, self.ff(self.norm2(hidden_states)))


class ViTokTower(nn.Module):
    """Encoder or decoder: linear in, transformer blocks with rotary positions, linear out."""

    _gradient_checkpointing_func: Callable

    def __init__(self, in_features: int, out_features: int, settings: TowerSettings, is_decoder: bool = False):
        super().__init__()
        self.num_latent_tokens, self.is_decoder = settings.num_latent_tokens, is_decoder
        self.mask_token: nn.Parameter | None = None
        self.head_dim = settings.hidden_size // settings.num_heads
        self.proj_in = nn.Linear(in_features, settings.hidden_size)
        self.transformer_blocks = nn.ModuleList([ViTokBlock(settings) for _ in range(settings.num_layers)])
        self.norm_out = RMSNorm(settings.hidden_size) if settings.final_norm else nn.Identity()
        self.proj_out = nn.Linear(settings.hidden_size, out_features)
        self.gradient_checkpointing = False

    def init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                # Every block adds two branches to the residual stream: keep its variance independent of depth.
                ends_branch = name.endswith(("to_out.0.weight", "ff.net.2.weight"))
                nn.init.xavier_uniform_(parameter, (2 * len(self.transformer_blocks)) ** -0.5 if ends_branch else 1.0)

    def _embed(self, sequences: list[torch.Tensor], grids: list[Grid]) -> torch.Tensor:
        """The packed hidden states. With latent tokens, these come first, and what has no input has its position."""
        if not self.num_latent_tokens:
            # A copy, because dynamo would compile the first block apart for a view: the others do not get one.
            return self.proj_in(pack(sequences)).clone()  # (B, L, D), or (1, sum of n * L, D)
        embedded = []
        for sequence, grid in zip(sequences, grids):
            tokens = self.proj_in(sequence)  # (n, L, D), of latent tokens in a decoder, else of patches
            size = self.num_latent_tokens, tokens.shape[-1]
            latents = sincos_embedding(size[:1], size[1], tokens.device, tokens.dtype)
            patches = sincos_embedding(grid, size[1], tokens.device, tokens.dtype)
            parts = (tokens + latents, patches) if self.is_decoder else (latents, tokens)
            embedded.append(torch.cat([part.expand(tokens.shape[0], -1, -1) for part in parts], dim=1))
        return pack(embedded)

    def rotary_embedding(self, hidden_states: torch.Tensor, packing: Packing) -> Tables:
        """Tables (L, 1, head_dim), for all sequences of a batch or for those that are packed into one."""
        device, dtype = hidden_states.device, hidden_states.dtype
        start = 0 if packing.causal is None else packing.causal.start
        tables = [rotary_embedding(grid, self.head_dim, device, dtype, start=start) for grid in packing.grids]
        if self.num_latent_tokens:  # which do not turn
            added = (0, 0, 0, 0, self.num_latent_tokens, 0)
            tables = [(F.pad(cos, added, value=1.0), F.pad(sin, added)) for cos, sin in tables]
        if len(tables) == 1:
            return tables[0]
        cos, sin = (torch.cat([x.repeat(n, 1, 1) for n, x in zip(packing.counts, part)]) for part in zip(*tables))
        return cos, sin

    def forward(
        self,
        sequences: list[torch.Tensor],
        grids: list[Grid],
        window_radius: int | None = None,
        causal: Causal | None = None,
    ) -> list[torch.Tensor]:
        """Runs of equal sequences, (n, L, in_features), and the grid of each run -> (n, L, out_features)."""
        packing = make_packing(sequences, grids, window_radius, self.num_latent_tokens, causal)
        # A block that runs twice would fill the cache twice, and compiled ones are compiled anew for each layer of it.
        is_stream = causal is not None and causal.cache is not None
        hidden_states = self._embed(sequences, grids)
        rotary_emb = self.rotary_embedding(hidden_states, packing)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled() and not is_stream:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, rotary_emb, packing)
            else:
                call = block._call_impl if is_stream else block
                hidden_states = call(hidden_states, rotary_emb, packing)
        hidden_states = self.norm_out(hidden_states)
        if not self.num_latent_tokens:
            return unpack(self.proj_out(hidden_states), packing)
        kept = slice(self.num_latent_tokens, None) if self.is_decoder else slice(self.num_latent_tokens)
        return [self.proj_out(sequences[:, kept]) for sequences in unpack(hidden_states, packing)]
