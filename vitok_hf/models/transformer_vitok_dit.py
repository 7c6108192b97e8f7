import dataclasses
import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers import FasterCacheConfig
from diffusers.configuration_utils import ConfigMixin, FrozenDict, register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from ..checks import check_bool, check_number, check_tensor, is_readable, refuse, show
from ..clips import Expected, add_row, check_clips, to_runs
from ..loading import load_strictly
from ..presets import dit_variant_to_config
from .configuration import check_fits, check_numbers
from .layers import Packing, RMSNorm, ViTokAttention, feed_forward, patchify, unpatchify
from .rotary import rotary_embedding, split_rotary_pairs
from .saving import SavingMixin


TIMESTEP_CHANNELS = 256  # sines and cosines of the timestep, as in DiT
MAX_TIMESTEP = 1e6  # some schedulers count noise in logarithms, below zero


def check_dit_config(config: FrozenDict, constructor: Callable) -> None:
    """Raises `ValueError` for what the constructor of `ViTokDiTModel` does not allow."""
    check_numbers(config, constructor)
    size, heads = config.hidden_size, config.num_attention_heads
    if size % heads:
        raise ValueError(f"`hidden_size` {size} must be divisible by `num_attention_heads` {heads}.")
    split_rotary_pairs(size // heads, 2 if config.sample_frames == 1 else 3)
    if config.sample_size % config.patch_size:
        raise ValueError(f"`sample_size` {config.sample_size} must be a multiple of `patch_size` {config.patch_size}.")


def modulate(hidden_states: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(B, L, D) times 1 + `scale`, plus `shift`, which are (B, 1, D)."""
    return torch.addcmul(shift, hidden_states, 1 + scale)


class ViTokDiTBlock(nn.Module):
    """Pre-norm block, attention and then SwiGLU; the conditioning shifts, scales and gates both branches."""

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.norm1 = RMSNorm(hidden_size, elementwise_affine=False)
        self.attn = ViTokAttention(hidden_size, num_heads, qk_norm, bias=False)
        self.norm2 = RMSNorm(hidden_size, elementwise_affine=False)
        self.ff = feed_forward(hidden_size, mlp_ratio, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
    ) -> torch.Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(temb).unsqueeze(1).chunk(6, dim=-1)  # (B, 1, D)
        attended = self.attn(modulate(self.norm1(hidden_states), shift1, scale1), rotary_emb, packing)
        hidden_states = torch.addcmul(hidden_states, gate1, attended)
        return torch.addcmul(hidden_states, gate2, self.ff(modulate(self.norm2(hidden_states), shift2, scale2)))


# The caches of diffusers, whose table this is, skip only blocks that they know.
TransformerBlockRegistry.register(ViTokDiTBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class ViTokDiTModel(SavingMixin, ModelMixin, AttentionMixin, CacheMixin, ConfigMixin):
    r"""
    Class-conditional diffusion transformer on the latents of a ViTok (arXiv 2501.09755, section 4.4).

    The blocks of the autoencoder (RMSNorm, rotary positions, SwiGLU, no biases) with the adaLN-Zero conditioning of
    DiT (arXiv 2212.09748): a projection for each block. Every latent is a token, or every patch of p x p latents. What
    the output means (noise, velocity, flow, clean latents) is up to the training and named by the scheduler.

    Latents need not be of the size of training: any multiple of p by any multiple of p, and any number of frames.

    A model with `sample_frames=1` is an image model, and treats the frames of a video apart. Every other model attends
    over all latent frames, and takes a picture as a video of one.

    The timestep and the class have a vector each, which are summed; class `num_classes` stands for "no class", which
    classifier-free guidance needs. Training teaches it by replacing labels; the model itself never drops any.

    Several threads may call one model. Caches (`enable_cache`) keep what one call leaves for the next, and are for one
    thread alone; moving, casting, offloading, fusing, adapters and `train` are for when no other thread is in a call.

    Args:
        sample_size: Side of the latents of training, in latents.
        sample_frames: Latent frames of a training clip; 1 for an image model.
        in_channels: Channels c of a latent.
        out_channels: By default `in_channels`; twice as many for a model that learns variances.
        patch_size: Side p of a token, in latents.
        hidden_size, num_layers, num_attention_heads: By default those of DiT-XL.
        mlp_ratio: Inner width of the SwiGLU over the hidden size, rounded to 16 channels.
        num_classes: 0 makes an unconditional model, which knows "no class" alone.
        qk_norm: RMSNorm on the queries and keys of each head.

    Raises:
        ValueError: If `hidden_size` is not divisible by `num_attention_heads`, the head size cannot hold the rotary
            axes, a number is not finite or out of range, an argument is of another type, or `sample_size` is no
            multiple of `patch_size`.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTokDiTBlock"]
    _repeated_blocks = ["ViTokDiTBlock"]
    _skip_layerwise_casting_patterns = ["patch_embed", "embedder", "modulation", "norm", "proj_out"]
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.to_qkv\."]  # of `fuse_qkv_projections`, a copy of the others

    @register_to_config
    def __init__(
        self,
        sample_size: int = 16,
        sample_frames: int = 1,
        in_channels: int = 16,
        out_channels: int | None = None,
        patch_size: int = 1,
        hidden_size: int = 1152,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        mlp_ratio: float = 8 / 3,
        num_classes: int = 1000,
        qk_norm: bool = False,
    ):
        super().__init__()
        self.check_config(self.config)
        self.is_image_model = sample_frames == 1
        self.out_channels = in_channels if out_channels is None else out_channels
        self.time_proj = Timesteps(TIMESTEP_CHANNELS, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.timestep_embedder = TimestepEmbedding(TIMESTEP_CHANNELS, hidden_size)
        self.class_embedder = nn.Embedding(num_classes + 1, hidden_size)
        self.patch_embed = nn.Linear(in_channels * patch_size**2, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            [ViTokDiTBlock(hidden_size, num_attention_heads, mlp_ratio, qk_norm) for _ in range(num_layers)]
        )
        self.norm_out = RMSNorm(hidden_size, elementwise_affine=False)
        self.modulation_out = nn.Linear(hidden_size, 2 * hidden_size)
        self.proj_out = nn.Linear(hidden_size, self.out_channels * patch_size**2)
        self.gradient_checkpointing = False
        self._init_weights()

    @classmethod
    def check_config(cls, config: dict[str, Any]) -> None:
        """Raises `ValueError` for what the constructor does not allow."""
        check_dit_config(FrozenDict(config), cls.__init__)

    def _init_weights(self):
        for name, parameter in self.named_parameters():
            if name.endswith("bias") or "modulation" in name or name == "proj_out.weight":
                nn.init.zeros_(parameter)  # every block starts as the identity, and the model as zero
            elif "embedder" in name:
                nn.init.normal_(parameter, std=0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)

    @classmethod
    def from_variant(cls, variant: str, **kwargs: Any) -> "ViTokDiTModel":
        """A model with random weights of a size of the DiT paper.

        Args:
            variant: `"S"`, `"B"`, `"L"` or `"XL"`.
            kwargs: Constructor arguments, which take precedence.

        Raises:
            ValueError: If there is no such size.
        """
        return cls(**dit_variant_to_config(variant) | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ViTokDiTModel":
        """As in diffusers; also from a bundled pipeline (`vitok_hf.list_bundled()`), with `subfolder="transformer"`.

        `dtype` may be a name, as `"bfloat16"`; `check_finite=False` leaves out the look at all weights.

        Raises:
            ValueError: If a tensor is missing, unexpected, misshapen, of no float dtype or not finite, a file is
                damaged, or the config has unknown entries or wrong values.
            OSError: If a file cannot be found or fetched.
        """
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def enable_cache(self, config: Any) -> None:
        """Turns on one of diffusers' caches, as there. FasterCache learns that labels are split like latents.

        `FirstBlockCacheConfig`, `MagCacheConfig` and `TaylorSeerCacheConfig` keep their state by the name that
        `cache_context` sets, which `ViTokDiTPipeline` does; FasterCache and PyramidAttentionBroadcast need
        `current_timestep_callback=lambda: pipe.current_timestep`.
        """
        if isinstance(config, FasterCacheConfig):
            field = "_unconditional_conditional_input_kwargs_identifiers"
            config = dataclasses.replace(config, **{field: [*getattr(config, field), "class_labels"]})
        super().enable_cache(config)

    def _embed_timestep(self, timestep: torch.Tensor | float, hidden_states: torch.Tensor) -> torch.Tensor:
        """A number, (1,) or (B,) -> (B, D)."""
        batch_size = hidden_states.shape[0]
        if not isinstance(timestep, torch.Tensor):
            check_number("timestep", timestep, -MAX_TIMESTEP, MAX_TIMESTEP)
        timestep = torch.as_tensor(timestep, device=hidden_states.device)
        if timestep.dtype == torch.bool or timestep.is_complex():
            refuse("timestep", "a number, or a tensor of integers or floats", timestep)
        if timestep.ndim > 1 or timestep.numel() not in (1, batch_size):
            raise ValueError(
                f"`timestep` must be a number or ({batch_size},), one for each item of the batch, but has shape "
                f"{tuple(timestep.shape)}."
            )
        if is_readable(timestep) and not (timestep.abs() <= MAX_TIMESTEP).all():
            raise ValueError(
                f"`timestep` must be finite, at most {MAX_TIMESTEP:g}, but is {timestep.tolist()}: diffusers' "
                "schedulers count from 0 to 1000."
            )
        features = self.time_proj(timestep.expand(batch_size))  # (B, 256), float32
        return self.timestep_embedder(features.to(hidden_states.dtype))

    def _embed_class(self, class_labels: torch.Tensor | None, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B,) or `None` -> (B, D)."""
        batch_size, null_class = hidden_states.shape[0], self.config.num_classes
        if class_labels is None:
            class_labels = torch.full((batch_size,), null_class, device=hidden_states.device)
        is_tensor = isinstance(class_labels, torch.Tensor)
        if (
            not is_tensor
            or class_labels.shape != (batch_size,)
            or class_labels.dtype not in (torch.int64, torch.int32)
        ):
            raise ValueError(
                f"`class_labels` must be ({batch_size},), one for each item of the batch, and int64, but is "
                f"{show(class_labels)}."
            )
        # Elsewhere the check would make the host wait for the device, which reports such labels itself.
        if is_readable(class_labels):
            if class_labels.min() < 0 or class_labels.max() > null_class:
                raise ValueError(
                    f"`class_labels` must be from 0 to {null_class - 1}, or {null_class} for no class, but are "
                    f"{class_labels.tolist()}."
                )
        return self.class_embedder(class_labels)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predicts the noise, velocity, flow or clean latents, whichever it was trained for.

        Args:
            hidden_states: Noisy latents, normalised by `vitok_hf.normalize_latents`, (B, c, h, w) or (B, c, t, h, w);
                or 1-D codes, (B, c, l), of which each latent is a token.
            timestep: A number, or (B,), int or float, on the scale of the scheduler (0 to 1000 for diffusers').
            class_labels: (B,) int64 from 0 to `num_classes`, which stands for no class; `None`: no class for all.
            return_dict: `False`: a tuple.

        Returns:
            `Transformer2DModelOutput` whose `sample` has the shape of `hidden_states`, with `out_channels` channels.

        Raises:
            ValueError: If the channels, sizes, timesteps or labels do not fit. Labels out of range raise on a CPU.
        """
        p = self.config.patch_size
        check_tensor("hidden_states", hidden_states)
        latents = add_row(hidden_states) if p == 1 else hidden_states
        expected = Expected(self.config.in_channels, (1, p), axes="cthw", channels_of="in_channels=")
        check_clips("hidden_states", latents, expected)
        check_fits("hidden_states", hidden_states, self, self.patch_embed)
        check_bool(return_dict=return_dict)
        (video,), _ = to_runs(latents)  # (B, c, t, h, w)
        frames = 1 if self.is_image_model else video.shape[2]
        items = video.shape[2] // frames
        grid = (frames, video.shape[3] // p, video.shape[4] // p)
        tokens = self.patch_embed(patchify(video, 1, p, frames))  # (B * items, L, D)

        temb = self._embed_timestep(timestep, video) + self._embed_class(class_labels, video)
        temb = F.silu(temb.to(tokens.dtype)).repeat_interleave(items, dim=0)  # (B * items, D)
        axes = grid[1:] if self.is_image_model else grid
        rotary_emb = rotary_embedding(
            axes, self.config.hidden_size // self.config.num_attention_heads, tokens.device, tokens.dtype
        )
        packing = Packing([tokens.shape[0]], [axes])
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = self._gradient_checkpointing_func(block, tokens, temb, rotary_emb, packing)
            else:
                tokens = block(tokens, temb, rotary_emb, packing)

        shift, scale = self.modulation_out(temb).unsqueeze(1).chunk(2, dim=-1)  # (B * items, 1, D)
        tokens = self.proj_out(modulate(self.norm_out(tokens), shift, scale))  # (B * items, L, out_channels * p * p)
        sample = unpatchify(tokens, grid, 1, p, items)  # (B, out_channels, t, h, w)
        output = sample.reshape(hidden_states.shape[0], -1, *hidden_states.shape[2:])
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)
