import os
from collections.abc import Callable
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import AttentionMixin
from diffusers.models.autoencoders.vae import AutoencoderMixin, DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..checks import check_bool, check_generator, show
from ..clips import Expected, check_clips, check_sizes, sizes_of, to_batches, to_runs
from ..loading import check_place, load_strictly, resolve_bundled
from ..loading.vitok_v2 import HUB_ARGUMENTS, is_vitok_v2, load_vitok_v2
from ..presets import V2_PATTERN, variant_to_config
from .causal import add_lead, drop_lead
from .codes import CodesMixin
from .compat import CompatMixin, ViTokConfig, is_derived
from .configuration import check_config, check_fits, warn_of_range
from .layers import TowerSettings, ViTokTower
from .posterior import PosteriorList, ViTokOutput, ViTokPosterior
from .rotary import Grid
from .saving import SavingMixin
from .tiling import MemoryMixin, MemorySettings, Tiling, make_tiling


class AutoencoderViTok(
    CompatMixin, SavingMixin, ModelMixin, CodesMixin, MemoryMixin, AutoencoderMixin, AttentionMixin, ConfigMixin
):
    r"""
    Vision-transformer autoencoder for images and videos (ViTok, arXiv 2501.09755).

    Tubelets of q x p x p pixels become tokens; a ViT encoder maps each to the mean and log-variance of c latent
    channels, a ViT decoder maps them back (section 2 of the paper). The options from `parallel_blocks` to
    `latent_norm` select the architecture of the ViTok-v2 weights; their defaults are the paper's. Sizes need not be
    those of training: any multiple of p by any multiple of p, and any number of frames that is a multiple of q.

    A model with `temporal_patch_size=1` and `sample_frames=1` is an image model: it takes videos too, and treats each
    frame alone. Every other model attends over all frames of a clip; with q > 1 it takes no pictures.

    With `causal=True`, latent frame 0 holds picture 0 alone and each later one q frames, T = 1 + q (t - 1), and a
    token sees its own latent frame and those before it. A picture is a clip of one frame: its latents are latent frame
    0 of every clip that starts with it. The model sees the first frame q times, and drops as many less one again.

    Several threads may call one model, and switch slicing, tiling and the sliding window meanwhile: a call, and a
    stream, keeps the settings with which it started. What changes modules or weights is not to be used while another
    thread is in a call: moving, casting, offloading, fusing, adapters, attention processors, `train`.

    Args:
        in_channels: Channels of pictures: grey, RGB, RGBA (premultiplied) or others.
        latent_channels: Channels c of a latent.
        patch_size: Side p of a patch in pixels.
        temporal_patch_size: Frames q of a tubelet.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: Encoder, by default the paper's size S.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: Decoder, by default the paper's size B.
        mlp_ratio: Inner width of the SwiGLU over the hidden size, rounded to 16 channels.
        sample_size: Pixels of the training resolution.
        sample_frames: Frames of a training clip; 1 for an image model.
        scaling_factor, shift_factor, latents_mean, latents_std: Statistics with which pipelines normalise latents, as
            in diffusers; not applied by `encode` and `decode`.
        variational: `False`: one set of latents per picture, no log-variance.
        parallel_blocks: Attention and MLP side by side on one norm (v2).
        qk_norm: RMSNorm on the queries and keys of each head (v2).
        layer_scale_init: Initial LayerScale of the residual branches; `None`: no LayerScale.
        use_bias: Biases in the linear layers of attention and MLP.
        final_norm: RMSNorm after the last block of each tower (v1).
        latent_norm: LayerNorm without weights on the latents of a token (v2).
        channel_counts: Increasing, up to `latent_channels`: so many of the first channels are a code, too (nested
            channels).
        token_counts: Increasing: so many of the first tokens are a code, too (the appendix's Masked ViTok); the
            decoder has a learned mask token for the rest.
        num_latent_tokens: Codes are sequences of so many tokens, (B, c, l), for pictures of any size (the appendix's
            Latent ViTok); `None`: tokens on a grid.
        causal: No latent frame sees those after it, and the first is of one picture.
        component: `"encoder"` or `"decoder"`: that half alone; the other cannot be used.

    Raises:
        ValueError: If a hidden size is not divisible by its number of heads, the head size cannot hold the rotary
            axes, a number is not finite or out of range (sizes are positive, and at most 65,536), an argument is of
            another type, `latents_mean` or `latents_std` do not have `latent_channels` entries, `latent_norm` and
            `variational` are both set, there is no such `component`, or a causal model has `num_latent_tokens` or
            `sample_frames` that are not 1 + q (t - 1).
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["ViTokBlock"]
    _repeated_blocks = ["ViTokBlock"]
    _group_offload_block_modules = ["encoder", "decoder"]
    _skip_layerwise_casting_patterns = ["proj_in", "proj_out", "norm"]
    _keys_to_ignore_on_load_unexpected = [r"\.attn\.to_qkv\."]  # of `fuse_qkv_projections`, a copy of the others

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
        scaling_factor: float | None = 1.0,
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
        channel_counts: list[int] | None = None,
        token_counts: list[int] | None = None,
        num_latent_tokens: int | None = None,
        component: str | None = None,
        causal: bool = False,
    ):
        super().__init__()
        self.check_config(self.config)
        self.is_image_model = self.config.is_image_model
        pixels = in_channels * temporal_patch_size * patch_size**2
        parameters = latent_channels * (2 if variational else 1)
        blocks = mlp_ratio, parallel_blocks, qk_norm, layer_scale_init, use_bias, final_norm, num_latent_tokens or 0
        encoder = TowerSettings(encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads, *blocks)
        decoder = TowerSettings(decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, *blocks)
        self.encoder = ViTokTower(pixels, parameters, encoder) if component != "decoder" else None
        self.decoder = ViTokTower(latent_channels, pixels, decoder, True) if component != "encoder" else None
        self.set_counts()
        self.use_slicing = self.use_tiling = self._has_seen_pixels = False
        self.tiling: Tiling = make_tiling(self.config)
        self.disable_sliding_window()
        self._init_weights()

    @classmethod
    def check_config(cls, config: dict[str, Any]) -> None:
        """Raises `ValueError` for what the constructor does not allow."""
        check_config(ViTokConfig(config), cls.__init__)

    @classmethod
    def has_entry(cls, name: str) -> bool:
        return super().has_entry(name) or is_derived(name)

    def _init_weights(self):
        for tower in self.children():
            tower.init_weights()
        if self.config.channel_counts and self.config.variational and self.encoder is not None:
            # Narrow at first: the last channels would give in to the divergence before the decoder makes use of them.
            nn.init.constant_(self.encoder.proj_out.bias[self.config.latent_channels :], -4.0)  # log-variances

    @classmethod
    def from_variant(cls, variant: str, **kwargs: Any) -> "AutoencoderViTok":
        """A model with random weights by its published name.

        Args:
            variant: `"S-B/16"` or `"S-B/4x8"` (the paper: ENC-DEC/p, ENC-DEC/qxp), or `"Ld4-Ld24/1x16x64"` or
                `"B/1x16x64"` (ViTok-v2: ENC-DEC/qxpxc, or one size for both towers).
            kwargs: Constructor arguments, which take precedence. A `causal` model of the paper has `sample_frames` 17.

        Raises:
            ValueError: If the name is unknown.
        """
        return cls(**variant_to_config(variant, kwargs.get("causal", False)) | kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "AutoencoderViTok":
        """As in diffusers, and also for bundled checkpoints and for the author's ViTok-v2 weights.

        Args:
            pretrained_model_name_or_path: A folder or Hub id in diffusers' layout; the name of a bundled checkpoint
                (`vitok_hf.list_bundled()`), which needs no network; or a folder or Hub id with the author's
                `encoder.safetensors` and `decoder.safetensors`.
            component: `"encoder"` or `"decoder"`: only that half is held in memory, and of the author's weights only
                that half is downloaded.
            variant: As in diffusers (`"fp16"`). For the author's weights the architecture (`"Ld4-Ld24/1x16x64"`),
                needed if the name of the repository or folder does not tell.
            dtype: Also by name (`"bfloat16"`).
            check_finite: Look at all weights for values that are not finite.
            kwargs: As in diffusers. Those that the author's weights can be loaded with are in `load_vitok_v2`.

        Raises:
            ValueError: If a tensor is missing, unexpected, misshapen, of no float dtype or not finite, a file is
                damaged, the config has unknown entries or wrong values, the architecture is unknown, or a folder has
                no such `subfolder`.
            OSError: If a file cannot be found or fetched.
        """
        name_or_path = resolve_bundled(pretrained_model_name_or_path)
        check_place(name_or_path, kwargs.get("subfolder"))
        hub_kwargs = {key: kwargs[key] for key in HUB_ARGUMENTS if key in kwargs}
        if is_vitok_v2(name_or_path, **hub_kwargs):
            return load_vitok_v2(cls, name_or_path, **kwargs)
        if V2_PATTERN.fullmatch(kwargs.get("variant") or ""):
            cls.load_config(name_or_path, **hub_kwargs)  # says so if there is no such checkpoint
            raise ValueError(
                f'"{name_or_path}" has a config.json, which tells its architecture: leave out '
                f'variant="{kwargs["variant"]}".'
            )
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)

    def _tower(self, needed: str) -> ViTokTower:
        tower = self.encoder if needed == "encoder" else self.decoder
        if tower is None:
            raise ValueError(
                f"This model holds only its {self.config.component}: load it without `component`, or with "
                f'component="{needed}", to use the {needed}.'
            )
        return tower

    def encode(
        self,
        x: torch.Tensor | list[torch.Tensor],
        return_dict: bool = True,
        num_tokens: int | list[int] | None = None,
        num_channels: int | list[int] | None = None,
        min_psnr: float | None = None,
    ) -> AutoencoderKLOutput | tuple[ViTokPosterior]:
        """Encodes a batch of images or videos, or a list of images or videos of any sizes.

        Args:
            x: (B, C, H, W) or (B, C, T, H, W) in [-1, 1]. Or a list of (C, H, W) or (C, T, H, W), each of its own
                size, which are padded with grey (zeros) at the bottom and on the right to multiples of the patch size
                and encoded together; no item depends on the others.
            return_dict: `False`: a tuple.
            num_tokens: The first tokens alone, (B, c, num_tokens), row by row: one of `token_counts`, or a list with
                any number for each item.
            num_channels: The first channels alone: one of `channel_counts`, or a list with one for each item.
            min_psnr: The shortest code of each item whose decoded mode is so near to it, in decibels (clipped to
                [-1, 1], peak 2), else the longest: of `token_counts` or, where these or `num_tokens` are given, of
                `channel_counts`. Found by bisection, as PSNR rises with the length, in log2 of their number of
                decoding passes.

        Returns:
            `AutoencoderKLOutput` whose `latent_dist` has `mode()` and `sample(generator)` of shape (B, c, H/p, W/p) or
            (B, c, t, H/p, W/p), where t = T/q, of a causal model 1 + (T - 1)/q, and `kl()`, (B,), summed over all
            latents of an item. For a list, `mode` and `sample` give a list of (c, ceil(H/p), ceil(W/p)) or
            (c, t, ceil(H/p), ceil(W/p)); so they do for a batch whose items have numbers of their own, or `min_psnr`.
            1-D codes are (B, c, l), in a list (c, l).

        Raises:
            ValueError: If a size, a number of frames, tokens or channels, the dtype or the device does not fit, or, on
                a CPU, a value is not finite.
        """
        check_bool(return_dict=return_dict)
        posterior = self._posterior(self._encode("x", x, self._memory_settings()))
        if self._has_codes or not num_tokens is num_channels is min_psnr is None:
            num_tokens, num_channels = self._choose(x, posterior, num_tokens, num_channels, min_psnr)
            posterior = self._cut(x, posterior, num_tokens, num_channels)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def _encode(self, name: str, x: Any, settings: MemorySettings) -> torch.Tensor | list[torch.Tensor]:
        """The parameters of the posteriors."""
        tower, (q, p, _) = self._tower("encoder"), self._pixel_steps
        takes_runs, lead = name == "sample", self._lead_frames(settings)  # runs in `forward` alone
        config = self.config
        expected = Expected(config.in_channels, (q, p), config.needs_frames, True, takes_runs, lead)
        extremes = check_clips(name, x, expected)
        runs, form = to_runs(x, p)
        check_fits(form.label(name), runs[0], self, tower, tower.proj_in)
        warn_of_range(self, runs[0], *extremes)
        runs = [add_lead(run, lead) for run in runs]
        return form.give_back(self._run_batches(tower, runs, settings, self._pixel_steps, (1, 1, 1)))

    def _posterior(self, parameters: torch.Tensor | list[torch.Tensor]) -> ViTokPosterior | PosteriorList:
        """Of a batch, (B, 2 c, ...), or (B, c, ...) if it is deterministic; or of a list, of items or of runs."""
        if isinstance(parameters, list):
            batches, give_back = to_batches(parameters)
            return PosteriorList([self._batch_posterior(batch) for batch in batches], give_back)
        return self._batch_posterior(parameters)

    def _batch_posterior(self, parameters: torch.Tensor) -> ViTokPosterior:
        if self.config.latent_norm:  # here and not in the tower: blends of normalised codes are not normalised
            normalized = F.layer_norm(parameters.movedim(1, -1).float(), (self.config.latent_channels,), eps=1e-6)
            parameters = normalized.movedim(-1, 1).to(parameters.dtype)
        return ViTokPosterior(parameters, deterministic=not self.config.variational)

    def decode(
        self,
        z: torch.Tensor | list[torch.Tensor],
        timestep: Any = None,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sizes: list[tuple[int, int]] | None = None,
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Decodes a batch of latents, or a list of latents of any sizes.

        Args:
            z: (B, c, h, w) or (B, c, t, h, w), as `encode` gives them (not normalised); or a list of (c, h, w) or
                (c, t, h, w).
            timestep: `None`, which LTX's pipelines pass in this place; a `bool` in it is `return_dict`.
            return_dict: `False`: a tuple.
            generator: Stable Diffusion's pipelines pass one to all decoders; this one draws nothing.
            sizes: For a list, the height and width of each picture before padding, to which it is cropped.

        Returns:
            `DecoderOutput` whose `sample` is (B, C, h * p, w * p) or (B, C, T, h * p, w * p), where T = t * q, of a
            causal model 1 + (t - 1) * q, in about [-1, 1], not clipped; for a list, a list without the dimension B.

        Raises:
            ValueError: If dimensions, dtype or device do not fit the model, `sizes` do not fit `z`, there is a
                `timestep`, or, on a CPU, a value is not finite.
        """
        if isinstance(timestep, bool):
            timestep, return_dict = None, timestep
        if timestep is not None:
            raise ValueError(
                f"`timestep` must be None, but is {show(timestep)}: the decoder is not conditioned on it."
            )
        check_bool(return_dict=return_dict)
        check_generator(generator)
        grids = None
        if self._has_codes:
            self._tower("decoder")  # or says that there is none
            z, grids, sizes = self._make_whole(z, sizes)
        sample = self._decode("z", z, self._memory_settings(), sizes, grids)
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def _decode(
        self,
        name: str | None,
        z: Any,
        settings: MemorySettings,
        sizes: list[tuple[int, int]] | None = None,
        grids: list[Grid] | None = None,
    ) -> torch.Tensor | list[torch.Tensor]:
        """`name` is that of the argument `z`; `None`: our own latents, which are not checked.

        `grids` are those of the pixels of 1-D codes, one for each item of a list, run, or for the batch.
        """
        tower, p = self._tower("decoder"), self.config.patch_size
        if name is not None:
            config, takes_runs = self.config, name == "latents"  # runs in `forward` alone
            expected = Expected(config.latent_channels, (1, 1), config.needs_frames, False, takes_runs, axes="cthw")
            check_clips(name, z, expected)
        if sizes is not None and not self._has_codes:
            check_sizes(sizes, z, p)
        runs, form = to_runs(z, kinds=grids or ())
        grids = form.of_runs(grids) if grids else None
        if name is not None:
            check_fits(form.label(name), runs[0], self, tower, tower.proj_in)
        runs = self._run_batches(tower, runs, settings, (1, 1, 1), self._pixel_steps, grids)
        runs = [drop_lead(run, self._lead_frames(settings)) for run in runs]
        if sizes is not None and form.is_batch:
            return form.give_back([runs[0][..., : sizes[0][-2], : sizes[0][-1]]])
        sample = form.give_back(runs)
        if sizes is not None:
            sample = [item[..., : size[-2], : size[-1]] for item, size in zip(sample, sizes)]
        return sample

    def forward(
        self,
        sample: torch.Tensor | list[torch.Tensor],
        sample_posterior: bool = False,
        return_dict: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_tokens: int | list[int] | None = None,
        num_channels: int | list[int] | None = None,
        latents: torch.Tensor | list[torch.Tensor] | None = None,
        encode: bool = True,
        decode: bool = True,
        transform: Callable[[Any], Any] | None = None,
    ) -> ViTokOutput | tuple[Any]:
        """Encodes and decodes `sample`, (B, C, H, W) or (B, C, T, H, W) in [-1, 1], or a list; see `encode`, `decode`.

        Args:
            sample: As for `encode`; or runs, as training passes them: a list of batches of one size each,
                (n, C, T, H, W), T = 1 for pictures. Then `sample` of the output is such a list, and `kl` is (N,).
            sample_posterior: Decode a sample of the posterior, drawn with `generator`, not its mode.
            generator: One, or a list of one for each item, of all runs.
            num_tokens, num_channels: What is kept of codes: one number, or a list of one for each item of all runs.
            latents: Another model's, of the same form, which are decoded.
            encode, decode: `False`: `sample` only says how large `latents` are decoded; the output has no `sample`.
            transform: What becomes of the latents before they are decoded, as noise. They may get another size.
        """
        check_bool(sample_posterior=sample_posterior, return_dict=return_dict, encode=encode, decode=decode)
        if not encode and latents is None:
            raise ValueError("`encode` is False and `latents` None: pass the latents to decode.")
        settings, given = self._memory_settings(), None if latents is None else "latents"
        posterior = self._posterior(self._encode("sample", sample, settings)) if encode else None
        kl, parameters = (None, None) if posterior is None else (posterior.kl(), posterior.parameters)
        if posterior is not None and kl is not None and latents is None:
            check_generator(generator, len(kl))
            latents = posterior.sample(generator) if sample_posterior else posterior.mode()
        latents = latents if transform is None else transform(latents)
        if num_tokens is not None or num_channels is not None:
            latents = self._fill(sample, latents, num_tokens, num_channels)
        sizes = sizes_of(sample) if transform is None else None
        decoded = self._decode(given, latents, settings, sizes, self._grids(sample)) if decode else None
        return ViTokOutput(sample=decoded, kl=kl, parameters=parameters) if return_dict else (decoded,)
