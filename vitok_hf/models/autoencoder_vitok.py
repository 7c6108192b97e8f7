import os
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import FrozenDict, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..checkpoints import resolve_bundled
from ..presets import variant_to_config
from .layers import RMSNorm, ViTokBlock, patchify, rotary_embedding, split_rotary_pairs, unpatchify
from .posterior import ViTokPosterior


@dataclass
class ViTokOutput(DecoderOutput):
    """The reconstruction `sample`, and `kl`, (B,): the posterior's divergence, summed over all latents of an item."""

    kl: torch.Tensor | None = None


class ViTokTower(nn.Module):
    """Encoder or decoder: linear in, transformer blocks with rotary positions, linear out."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        hidden_size: int,
        num_layers: int,
        num_heads: int,
        mlp_ratio: float,
        final_norm: bool,
        **block_kwargs: Any,
    ):
        super().__init__()
        self.head_dim = hidden_size // num_heads
        ff_inner_dim = (int(mlp_ratio * hidden_size) + 8) // 16 * 16
        self.proj_in = nn.Linear(in_features, hidden_size)
        self.transformer_blocks = nn.ModuleList(
            [ViTokBlock(hidden_size, num_heads, ff_inner_dim, **block_kwargs) for _ in range(num_layers)]
        )
        self.norm_out = RMSNorm(hidden_size) if final_norm else nn.Identity()
        self.proj_out = nn.Linear(hidden_size, out_features)
        self.gradient_checkpointing = False

    def forward(self, tokens: torch.Tensor, grid: tuple[int, ...]) -> torch.Tensor:
        hidden_states = self.proj_in(tokens)  # (B, L, D)
        rotary_emb = rotary_embedding(grid, self.head_dim, hidden_states.device, hidden_states.dtype)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, rotary_emb)
            else:
                hidden_states = block(hidden_states, rotary_emb)
        return self.proj_out(self.norm_out(hidden_states))  # (B, L, out_features)


class ViTokConfig(FrozenDict):
    """The constructor's arguments, and what diffusers' pipelines read off the config of a convolutional VAE."""

    force_upcast = False  # bfloat16 and float16 are safe

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """One entry more than there would be halvings of the picture: pipelines take p as 2 ** (length - 1)."""
        if self.patch_size & (self.patch_size - 1):
            raise AttributeError(f"patch_size={self.patch_size} is no power of 2, so there are no block_out_channels.")
        return (self.encoder_hidden_size,) * self.patch_size.bit_length()


class AutoencoderViTok(ModelMixin, AutoencoderMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    r"""
    Vision-transformer autoencoder for images and videos (ViTok, arXiv 2501.09755).

    Tubelets of q x p x p pixels become tokens; a ViT encoder maps each to the mean and log-variance of c latent
    channels, a ViT decoder maps them back (section 2 of the paper). The options from `parallel_blocks` to
    `latent_norm` select the architecture of the ViTok-v2 weights; their defaults are the paper's. Sizes need not be
    those of training: any multiple of p by any multiple of p, and any number of frames that is a multiple of q.

    A model with `temporal_patch_size=1` and `sample_frames=1` is an image model: it takes videos too, and treats each
    frame alone. Every other model attends over all frames of a clip and takes videos only if q > 1.

    Args:
        in_channels (`int`, defaults to 3): Colour channels.
        latent_channels (`int`, defaults to 16): Channels c of a latent.
        patch_size (`int`, defaults to 16): Side p of a patch in pixels.
        temporal_patch_size (`int`, defaults to 1): Frames q of a tubelet.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: Encoder, by default the paper's size S.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: Decoder, by default the paper's size B.
        mlp_ratio (`float`, defaults to 8/3): Inner width of the SwiGLU over the hidden size, rounded to 16 channels.
        sample_size (`int`, defaults to 256): Pixels of the training resolution.
        sample_frames (`int`, defaults to 1): Frames of a training clip; 1 for an image model.
        scaling_factor, shift_factor (`float`, default to 1.0 and 0.0), latents_mean, latents_std (`list[float]`):
            Statistics with which pipelines normalise latents, as in diffusers; not applied by `encode` and `decode`.
        variational (`bool`, defaults to `True`): `False`: one set of latents per picture, no log-variance.
        parallel_blocks (`bool`, defaults to `False`): Attention and MLP side by side on one norm (v2).
        qk_norm (`bool`, defaults to `False`): RMSNorm on the queries and keys of each head (v2).
        layer_scale_init (`float`, *optional*): Initial LayerScale of the residual branches; `None`: no LayerScale.
        use_bias (`bool`, defaults to `False`): Biases in the linear layers of attention and MLP.
        final_norm (`bool`, defaults to `True`): RMSNorm after the last block of each tower (v1).
        latent_norm (`bool`, defaults to `False`): LayerNorm without weights on the latents of a token (v2).

    Raises:
        ValueError: If a hidden size is not divisible by its number of heads, the head size cannot hold the rotary
            axes, a size is not positive, `latents_mean` or `latents_std` do not have `latent_channels` entries, or
            `latent_norm` and `variational` are both set.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTokBlock"]
    _repeated_blocks = ["ViTokBlock"]
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "norm"]

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        latent_channels: int = 16,
        patch_size: int = 16,
        temporal_patch_size: int = 1,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 6,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        mlp_ratio: float = 8 / 3,
        sample_size: int = 256,
        sample_frames: int = 1,
        scaling_factor: float = 1.0,
        shift_factor: float | None = 0.0,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        variational: bool = True,
        parallel_blocks: bool = False,
        qk_norm: bool = False,
        layer_scale_init: float | None = None,
        use_bias: bool = False,
        final_norm: bool = True,
        latent_norm: bool = False,
    ):
        super().__init__()
        # Without a time axis in the rotary embedding, frames must not attend to each other.
        self.is_image_model = temporal_patch_size == 1 and sample_frames == 1
        self._check_config()
        pixels = in_channels * temporal_patch_size * patch_size**2
        block_kwargs = {
            "parallel": parallel_blocks,
            "qk_norm": qk_norm,
            "layer_scale_init": layer_scale_init,
            "bias": use_bias,
        }
        self.encoder = ViTokTower(
            pixels,
            latent_channels * (2 if variational else 1),
            encoder_hidden_size,
            encoder_num_layers,
            encoder_num_attention_heads,
            mlp_ratio,
            final_norm,
            **block_kwargs,
        )
        self.decoder = ViTokTower(
            latent_channels,
            pixels,
            decoder_hidden_size,
            decoder_num_layers,
            decoder_num_attention_heads,
            mlp_ratio,
            final_norm,
            **block_kwargs,
        )
        self.use_slicing = False
        self._init_weights()

    def _check_config(self):
        config = self.config
        for name, value in config.items():
            if name.endswith(("_size", "_channels", "_layers", "_heads", "_frames")) and value < 1:
                raise ValueError(f"`{name}` must be positive, but is {value}.")
        for tower in ("encoder", "decoder"):
            size, heads = config[f"{tower}_hidden_size"], config[f"{tower}_num_attention_heads"]
            if size % heads:
                raise ValueError(
                    f"`{tower}_hidden_size` {size} must be divisible by `{tower}_num_attention_heads` {heads}."
                )
            split_rotary_pairs(size // heads, 2 if self.is_image_model else 3)
        for name in ("latents_mean", "latents_std"):
            if config[name] is not None and len(config[name]) != config.latent_channels:
                raise ValueError(
                    f"`{name}` has {len(config[name])} entries, but `latent_channels` is {config.latent_channels}."
                )
        if config.latent_norm and config.variational:
            raise ValueError("`latent_norm=True` normalises the latents themselves: set `variational=False` with it.")

    def _init_weights(self):
        for tower in (self.encoder, self.decoder):
            for name, parameter in tower.named_parameters():
                if name.endswith("bias"):
                    nn.init.zeros_(parameter)
                elif parameter.ndim == 2:
                    # Every block adds two branches to the residual stream: keep its variance independent of depth.
                    ends_branch = name.endswith(("to_out.0.weight", "ff.net.2.weight"))
                    nn.init.xavier_uniform_(
                        parameter, (2 * len(tower.transformer_blocks)) ** -0.5 if ends_branch else 1.0
                    )

    @property
    def config(self) -> ViTokConfig:
        return ViTokConfig(self._internal_dict)

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def temporal_compression_ratio(self) -> int:
        return self.config.temporal_patch_size

    @classmethod
    def from_variant(cls, variant: str, **kwargs: Any) -> "AutoencoderViTok":
        """A model with random weights by its published name.

        Args:
            variant: `"S-B/16"` or `"S-B/4x8"` (the paper: ENC-DEC/p, ENC-DEC/qxp), or `"Ld4-Ld24/1x16x64"`
                (ViTok-v2: ENC-DEC/qxpxc).
            kwargs: Constructor arguments, which take precedence.

        Raises:
            ValueError: If the name is unknown.
        """
        return cls(**variant_to_config(variant) | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "AutoencoderViTok":
        """As in diffusers, and for names of bundled checkpoints (`vitok_hf.list_bundled()`), without a network."""
        return super().from_pretrained(resolve_bundled(pretrained_model_name_or_path), **kwargs)

    def _frames_per_item(self, num_frames: int) -> int:
        return 1 if self.is_image_model else num_frames

    def _grid(self, frames: int, height: int, width: int) -> tuple[int, ...]:
        """The axes of the rotary embedding."""
        return (height, width) if self.is_image_model else (frames, height, width)

    def _check_input(self, name: str, shape: torch.Size, channels: int, steps: tuple[int, int]):
        q, p = steps
        if len(shape) not in (4, 5):
            raise ValueError(f"`{name}` must be (B, C, H, W) or (B, C, T, H, W), but has shape {tuple(shape)}.")
        if shape[1] != channels:
            raise ValueError(f"`{name}` must have {channels} channels in dimension 1, but has shape {tuple(shape)}.")
        if len(shape) == 4 and self.temporal_compression_ratio > 1:
            raise ValueError(
                f"`{name}` has shape {tuple(shape)}, but this model compresses {self.temporal_compression_ratio} "
                "frames into one latent frame: pass a video, (B, C, T, H, W)."
            )
        if shape[-1] % p or shape[-2] % p:
            raise ValueError(
                f"Height and width must be multiples of patch_size={p}, but are {shape[-2]} x {shape[-1]}: "
                "pad, crop or resize the input."
            )
        if len(shape) == 5 and shape[2] % q:
            raise ValueError(
                f"The number of frames must be a multiple of temporal_patch_size={q}, but is {shape[2]}: "
                "pad or cut the video."
            )
        if 0 in shape:
            raise ValueError(f"`{name}` is empty: it has shape {tuple(shape)}.")

    def _encode(self, video: torch.Tensor) -> torch.Tensor:
        """(B, C, T, H, W) -> parameters of the posterior, (B, c or 2c, t, h, w)."""
        q, p = self.temporal_compression_ratio, self.spatial_compression_ratio
        frames, h, w = self._frames_per_item(video.shape[2]), video.shape[3] // p, video.shape[4] // p
        tokens = patchify(video, q, p, frames)  # (B * items, L, C * q * p * p)
        code = self.encoder(tokens, self._grid(frames // q, h, w))  # (B * items, L, c or 2c)
        if self.config.latent_norm:
            code = F.layer_norm(code.float(), code.shape[-1:], eps=1e-6).to(code.dtype)
        return unpatchify(code, (frames // q, h, w), 1, 1, video.shape[2] // frames)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, c, t, h, w) -> (B, C, T, H, W)."""
        q, p = self.temporal_compression_ratio, self.spatial_compression_ratio
        frames, h, w = self._frames_per_item(latents.shape[2]), latents.shape[3], latents.shape[4]
        code = patchify(latents, 1, 1, frames)  # (B * items, L, c)
        tokens = self.decoder(code, self._grid(frames, h, w))  # (B * items, L, C * q * p * p)
        return unpatchify(tokens, (frames, h, w), q, p, latents.shape[2] // frames)

    def _run(self, function, x: torch.Tensor) -> torch.Tensor:
        """Applies `function`, which takes 5-D input, to images or videos, in slices if these are on."""
        video = x.unsqueeze(2) if x.ndim == 4 else x
        out = torch.cat([function(item) for item in video.split(1)]) if self.use_slicing else function(video)
        return out.squeeze(2) if x.ndim == 4 else out

    @apply_forward_hook
    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[ViTokPosterior]:
        """Encodes a batch of images or videos.

        Args:
            x: (B, C, H, W) or (B, C, T, H, W) in [-1, 1].
            return_dict: `False`: a tuple.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` has `mode()` and `sample(generator)` of shape (B, c, H/p, W/p) or
            (B, c, T/q, H/p, W/p), and `kl()`, (B,), summed over all latents of an item.

        Raises:
            ValueError: If the number of channels, the height, the width or the number of frames does not fit.
        """
        config = self.config
        self._check_input("x", x.shape, config.in_channels, (config.temporal_patch_size, config.patch_size))
        posterior = ViTokPosterior(self._run(self._encode, x), deterministic=not config.variational)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(self, z: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes a batch of latents.

        Args:
            z: (B, c, h, w) or (B, c, t, h, w), as `encode` gives them (not normalised).
            return_dict: `False`: a tuple.

        Returns:
            `DecoderOutput` whose `sample` is (B, C, h * p, w * p) or (B, C, t * q, h * p, w * p), in about [-1, 1],
            not clipped.

        Raises:
            ValueError: If the number of dimensions or of channels does not fit the model.
        """
        self._check_input("z", z.shape, self.config.latent_channels, (1, 1))
        sample = self._run(self._decode, z)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    def forward(
        self,
        sample: torch.Tensor,
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | None = None,
    ) -> ViTokOutput | tuple[torch.Tensor]:
        """Encodes and decodes `sample`, (B, C, H, W) or (B, C, T, H, W) in [-1, 1]; see `encode` and `decode`.

        Args:
            sample_posterior: Decode a sample of the posterior, drawn with `generator`, not its mode.
        """
        posterior = self.encode(sample).latent_dist
        latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        decoded = self.decode(latents).sample
        return ViTokOutput(sample=decoded, kl=posterior.kl()) if return_dict else (decoded,)
