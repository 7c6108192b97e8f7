"""The names under which diffusers' pipelines read sizes and statistics off other VAEs."""

from operator import itemgetter
from types import SimpleNamespace

import torch
from diffusers.configuration_utils import ConfigMixin, FrozenDict


class ViTokConfig(FrozenDict):
    """The constructor's arguments, also under the names by which diffusers' pipelines read them off other VAEs."""

    force_upcast = False  # bfloat16 and float16 are safe
    timestep_conditioning = False  # the decoder takes no timestep
    invert_scale_latents = False  # latents are multiplied by `scaling_factor`, unlike CogVideoX 1.5's
    batch_norm_eps = 0.0  # `AutoencoderViTok.bn` has exact variances

    def __missing__(self, name: str):
        """`vae.force_upcast`, which diffusers reads as `vae.config["force_upcast"]`."""
        if name.startswith("_") or not hasattr(self, name):
            raise KeyError(name)
        return getattr(self, name)

    z_dim = property(itemgetter("latent_channels"))
    spatial_compression_ratio = scale_factor_spatial = property(itemgetter("patch_size"))
    temporal_compression_ratio = scale_factor_temporal = property(itemgetter("temporal_patch_size"))

    @property
    def is_image_model(self) -> bool:
        """Without a time axis in the rotary embedding, frames must not attend to each other."""
        return self.temporal_patch_size == 1 and self.sample_frames == 1 and not self.causal

    @property
    def lead_frames(self) -> int:
        """Copies of the first frame that the model sees before it; T frames and these are a multiple of q."""
        return self.temporal_patch_size - 1 if self.causal else 0

    @property
    def needs_frames(self) -> bool:
        """Whether a picture is no clip."""
        return self.num_frames(1) > 1

    def num_latent_frames(self, num_frames: int) -> int:
        """t of a clip of T frames: T / q, and of a causal model 1 + (T - 1) / q."""
        return (num_frames + self.lead_frames) // self.temporal_patch_size

    def num_frames(self, num_latent_frames: int) -> int:
        """Inverse of `num_latent_frames`."""
        return num_latent_frames * self.temporal_patch_size - self.lead_frames

    def _halvings(self, name: str) -> int:
        if self[name] & (self[name] - 1):
            raise AttributeError(f"{name}={self[name]} is no power of 2, which pipelines that count halvings need.")
        return self[name].bit_length() - 1

    @property
    def block_out_channels(self) -> tuple[int, ...]:
        """One entry more than there would be halvings of the picture: pipelines take p as 2 ** (length - 1)."""
        return (self.encoder_hidden_size,) * (self._halvings("patch_size") + 1)

    encoder_block_out_channels = block_out_channels

    @property
    def temperal_downsample(self) -> tuple[bool, ...]:
        """An entry for each halving of the picture, true if of the frames too: p is 2 ** length, q is 2 ** sum."""
        spatial, temporal = self._halvings("patch_size"), self._halvings("temporal_patch_size")
        if temporal > spatial:
            raise AttributeError(f"temporal_patch_size={2**temporal} exceeds patch_size={2**spatial}.")
        return (False,) * (spatial - temporal) + (True,) * temporal


def is_derived(name: str) -> bool:
    """Whether an entry of configs, as other VAEs have it, follows from others in this one."""
    return isinstance(getattr(ViTokConfig, name, None), property)


class CompatMixin(ConfigMixin):
    """The same as attributes of the model; its config is a `ViTokConfig`."""

    config: ViTokConfig
    _internal_dict: FrozenDict

    def register_to_config(self, **kwargs):
        """As in diffusers; ignores entries that the config derives from others."""
        super().register_to_config(**{name: value for name, value in kwargs.items() if not is_derived(name)})
        self._internal_dict = ViTokConfig(self._internal_dict)

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def temporal_compression_ratio(self) -> int:
        return self.config.temporal_patch_size

    @property
    def temperal_downsample(self) -> tuple[bool, ...]:
        return self.config.temperal_downsample

    @property
    def latents_mean(self) -> torch.Tensor:
        """(c,), the mean of the config, or 0 if it has none."""
        return torch.tensor(self.config.latents_mean or [0.0] * self.config.latent_channels)

    @property
    def latents_std(self) -> torch.Tensor:
        """(c,), the standard deviation of the config, or 1 if it has none."""
        return torch.tensor(self.config.latents_std or [1.0] * self.config.latent_channels)

    @property
    def bn(self) -> SimpleNamespace:
        """The same statistics as FLUX.2's pipelines read them: buffers of a batch norm over 2 x 2 latents, (4c,)."""
        mean, std = (values.repeat_interleave(4) for values in (self.latents_mean, self.latents_std))
        return SimpleNamespace(running_mean=mean, running_var=std.square())
