import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, FasterCacheConfig, ImagePipelineOutput, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.configuration_utils import FrozenDict
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ..checkpoints import resolve_bundled
from ..checkpoints.strict import finite_checked, to_dtype
from ..latents import denormalize_latents
from ..models import AutoencoderViTok, ViTokDiTModel
from .checks import (
    check_counts,
    check_folder,
    check_guidance,
    check_scheduler,
    check_scheduler_works,
    check_timesteps,
    takes_variance,
    warn_of_clipping,
)
from .labels import check_labels, label_table, to_label_ids
from .model_card import add_usage


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def rescale_guidance(guided: torch.Tensor, conditional: torch.Tensor, rescale: float) -> torch.Tensor:
    """Brings the spread of each guided prediction back to that of the conditional one; constant ones stay."""
    axes = tuple(range(1, guided.ndim))
    ours, theirs = (tensor.std(dim=axes, keepdim=True) for tensor in (guided, conditional))
    return torch.lerp(guided, guided * torch.where(ours > 0, theirs / ours, 1.0), rescale)


@dataclass
class ViTokVideoPipelineOutput(BaseOutput):
    """Videos: a list of lists of pictures, or (B, T, H, W, C) as an array, or (B, T, C, H, W) as a tensor, in [0, 1].

    With `output_type="latent"`, normalised latents, (B, c, t, h, w).
    """

    frames: list[list[Image.Image]] | np.ndarray | torch.Tensor


class ViTokDiTPipeline(DiffusionPipeline):
    r"""
    Class-conditional generation of images and videos by a `ViTokDiTModel` on the latents of an `AutoencoderViTok`.

    Any scheduler of diffusers can be set whose `step` takes a prediction, a timestep and a sample (not those of
    discrete tokens and a few others, which are refused by name); what the model predicts (`prediction_type`, or flow
    matching) is read by it from its own config. Latents are unbounded, so schedulers need `clip_sample=False`.

    Args:
        transformer (`ViTokDiTModel`): The denoiser. If it has twice as many channels out as in, the second half is
            the variance that DDPM uses (`variance_type="learned_range"`), as in DiT; others leave it out.
        vae (`AutoencoderViTok`): Decodes the latents; its config has the statistics that they were normalised with.
        scheduler (`SchedulerMixin`): Of diffusers, DDIM in the paper.
        id2label (`dict[int, str]`, *optional*): Names of the classes, several with commas in between; saved along.

    Raises:
        ValueError: If the latents of the two models do not fit, or `id2label` has an id that is no class.
    """

    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ViTokDiTModel,
        vae: AutoencoderViTok,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
    ):
        super().__init__()
        id2label = check_labels(id2label or {})
        if transformer is not None:
            self._check_models(transformer.config, vae, id2label)
        if scheduler is not None:
            check_scheduler_works(scheduler)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label)
        self.labels = label_table(id2label)
        self.processor = VideoProcessor(do_resize=False)
        self._interrupt = False

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        if name == "scheduler" and value is not None:
            warn_of_clipping(value)

    @staticmethod
    def _check_models(config: FrozenDict, vae: AutoencoderViTok | None, id2label: dict[int, str]) -> None:
        channels = config.in_channels if vae is None else vae.config.latent_channels
        out_channels = config.in_channels if config.out_channels is None else config.out_channels
        if config.in_channels != channels or out_channels not in (channels, 2 * channels):
            raise ValueError(
                f"The autoencoder has latent_channels={channels}, but the transformer in_channels="
                f"{config.in_channels} and out_channels={out_channels}: these must be {channels}, and {channels} or "
                f"{2 * channels}."
            )
        if unknown := [index for index in id2label if not 0 <= index < config.num_classes]:
            raise ValueError(f"`id2label` has ids {unknown}, but the transformer num_classes={config.num_classes}.")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ViTokDiTPipeline":
        """As in diffusers, and also the name of a bundled pipeline (`vitok_hf.list_bundled()`), without network.

        `dtype` may be a name, as `"bfloat16"`; `check_finite=False` leaves out the look at all weights.

        Raises:
            ValueError: If a file is damaged, or does not fit the others.
            OSError: If a file cannot be found or fetched.
        """
        for name in {"dtype", "torch_dtype"} & set(kwargs):
            dtype = kwargs[name]
            parts = {part: to_dtype(value) for part, value in dtype.items()} if isinstance(dtype, dict) else {}
            kwargs[name] = parts or to_dtype(dtype)
        with finite_checked(kwargs.pop("check_finite", None)):
            return super().from_pretrained(resolve_bundled(pretrained_model_name_or_path), **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> Any:
        check_folder(pretrained_model_name_or_path, cls.__init__)
        return super().load_config(pretrained_model_name_or_path, **kwargs)

    def _upload_folder(self, working_dir: str | os.PathLike, repo_id: str, **kwargs: Any) -> Any:
        """Both ways to push end here: the model card is there, and says how to use the pipeline when it leaves."""
        path = Path(working_dir, "README.md")
        if path.is_file():
            add_usage(path, repo_id, list(self.labels)[:1] or None, self.is_video)
        return super()._upload_folder(working_dir, repo_id, **kwargs)

    @property
    def is_video(self) -> bool:
        """Whether the output is `frames`: the model was trained on clips, or a latent stands for several frames."""
        return self.transformer.config.sample_frames > 1 or self.vae.temporal_compression_ratio > 1

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Read at every step, so that a callback may set `_guidance_scale`."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Of the step that is being computed, which diffusers' caches ask for."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback that sets `_interrupt = True` ends the call with the latents of its step."""
        return self._interrupt

    def get_label_ids(self, labels: str | int | list[str | int] | torch.Tensor) -> list[int]:
        """Ids of classes given by name, by one of several names, or by id, one or a list.

        Raises:
            ValueError: If a name is unknown (with those that are close) or belongs to several classes, or an id is
                no class.
        """
        return to_label_ids(labels, self.config.id2label, self.transformer.config.num_classes)

    def get_latent_shape(
        self, batch_size: int, height: int | None = None, width: int | None = None, num_frames: int | None = None
    ) -> tuple[int, ...]:
        """Shape of the noise for outputs of this size, in pixels and frames: (B, c, h, w), or (B, c, t, h, w).

        Sizes default to those of the transformer's config.

        Raises:
            ValueError: If a size is not a multiple of what a token measures, or an image model is to make frames.
        """
        config, p, q = self.transformer.config, self.vae.spatial_compression_ratio, self.vae.temporal_compression_ratio
        if num_frames is not None and not self.is_video:
            raise ValueError(f"`num_frames` is {num_frames}, but this model makes images: leave it out.")
        sizes = {"num_frames": (num_frames, q, q * config.sample_frames)}
        sizes |= {
            name: (side, p * config.patch_size, p * config.sample_size)
            for name, side in (("height", height), ("width", width))
        }
        for name, (size, step, _) in sizes.items():
            if size is not None and (size < 1 or size % step):
                raise ValueError(f"`{name}` must be a positive multiple of {step}, but is {size}.")
        frames, height, width = (default if size is None else size for size, _, default in sizes.values())
        return (batch_size, config.in_channels, *((frames // q,) if self.is_video else ()), height // p, width // p)

    def _check_cache(self, guided: bool, is_image: bool):
        """FasterCache guesses one half of every batch from the other."""
        cache = self.transformer._cache_config
        if not isinstance(cache, FasterCacheConfig):
            return
        if is_image != (cache.tensor_format == "BCHW"):
            raise ValueError(
                f'FasterCache has tensor_format="{cache.tensor_format}", but these latents are '
                f'{"pictures" if is_image else "clips"}: make it with "{"BCHW" if is_image else "BCFHW"}".'
            )
        if not cache.is_guidance_distilled and not guided:
            raise ValueError(
                "FasterCache needs guidance in every step: set guidance_scale > 1, class_labels and no "
                "guidance_interval, or make it with is_guidance_distilled=True."
            )

    def prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        num_frames: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        device: torch.device,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Standard normal noise, or `latents`. In float32, whatever the models are."""
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` has {len(generator)} entries for {batch_size} samples: pass one for each.")
        if latents is None:
            shape = self.get_latent_shape(batch_size, height, width, num_frames)
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            # The size is theirs unless there is another, which then does not fit.
            steps = {"num_frames": self.vae.temporal_compression_ratio} if self.is_video else {}
            steps |= dict.fromkeys(("height", "width"), self.vae.spatial_compression_ratio)
            given = {"num_frames": num_frames, "height": height, "width": width}
            sizes = {name: size * step for (name, step), size in zip(steps.items(), latents.shape[2:])}
            sizes |= {name: size for name, size in given.items() if size is not None}
            expected = self.get_latent_shape(batch_size, **sizes)
            if latents.shape != expected:
                raise ValueError(f"`latents` must have shape {expected}, but have {tuple(latents.shape)}.")
            latents = latents.to(device=device, dtype=torch.float32)
        return latents

    def _set_timesteps(self, num_inference_steps: int, num_tokens: int, device: torch.device) -> torch.Tensor:
        config, options = self.scheduler.config, {}
        takes_shift = "mu" in inspect.signature(self.scheduler.set_timesteps).parameters
        if takes_shift and config.get("use_dynamic_shifting"):  # more noise for more tokens, as in FLUX
            shortest, longest = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
            low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
            options["mu"] = low + (high - low) * (num_tokens - shortest) / (longest - shortest)
        try:
            self.scheduler.set_timesteps(num_inference_steps, device=device, **options)
        except Exception as error:  # of diffusers or numpy, of any type
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot make {num_inference_steps} steps ({error}): change "
                "`num_inference_steps`, or the config of the scheduler."
            ) from error
        check_timesteps(self.scheduler)
        return self.scheduler.timesteps

    def _step_options(
        self, generator: torch.Generator | list[torch.Generator] | None, eta: float | None
    ) -> dict[str, Any]:
        """Those that the scheduler's `step` takes."""
        parameters = inspect.signature(self.scheduler.step).parameters
        options = {"generator": generator} | ({} if eta is None else {"eta": eta})
        return {name: value for name, value in options.items() if name in parameters}

    def _predict(
        self, latents: torch.Tensor, timestep: torch.Tensor, class_ids: torch.Tensor, guided: bool
    ) -> torch.Tensor:
        """The model's prediction, guided by a second half of the batch without classes, (B, c, ...)."""
        inputs = latents
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(latents, timestep)
        if guided:  # without classes first, as FasterCache has it
            inputs = torch.cat([inputs, inputs])
            class_ids = torch.cat([torch.full_like(class_ids, self.transformer.config.num_classes), class_ids])
        with self.transformer.cache_context("guided" if guided else "unguided"):
            output = self.transformer(
                hidden_states=inputs.to(self.transformer.dtype),
                timestep=timestep.to(inputs.device).expand(len(inputs)),
                class_labels=class_ids,
                return_dict=False,
            )[0].to(latents.dtype)
        channels = latents.shape[1]
        prediction, variance = output[:, :channels], output[:, channels:]
        if guided:
            without, prediction = prediction.chunk(2)
            guidance = self._guidance_scale * (prediction - without)
            prediction, conditional = without + guidance, prediction
            if self._guidance_rescale > 0:
                prediction = rescale_guidance(prediction, conditional, self._guidance_rescale)
            variance = variance.chunk(2)[1]
        if takes_variance(self.scheduler):
            return torch.cat([prediction, variance], dim=1)
        return prediction

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        latents = denormalize_latents(latents, self.vae).to(self.vae.dtype)
        sample = self.vae.decode(latents, return_dict=False)[0]
        postprocess = self.processor.postprocess_video if self.is_video else self.processor.postprocess
        return postprocess(sample, output_type)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list[str | int] | torch.Tensor | None = None,
        guidance_scale: float = 4.0,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_label: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, as in diffusers; never changed
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        eta: float | None = None,
    ) -> ImagePipelineOutput | ViTokVideoPipelineOutput | tuple:
        """Generates images or videos.

        Args:
            class_labels: Names (`labels`) or ids of classes, one or a list. `None`: no class, and one sample times
                `num_images_per_label`; there is nothing to guide then.
            guidance_scale: Classifier-free guidance; up to 1 there is none, which takes half the time.
            num_inference_steps: Steps of the scheduler.
            generator: One for all, or a list with one for each sample, which is then the same in any batch.
            num_images_per_label: Samples of each label, next to each other.
            guidance_interval: Fractions of the schedule between which guidance is on: the steps from
                `round(start * n)` up to, not including, `round(stop * n)`. (0.1, 0.9) avoids over-saturation.
            guidance_rescale: From 0 to 1, how far the spread of a guided prediction is brought back to that of the
                unguided one (arXiv 2305.08891, section 3.4).
            latents: The noise to start from, standard normal, of `get_latent_shape`.
            output_type: `"pil"`, `"np"` or `"pt"`, in [0, 1], or `"latent"`: normalised, not decoded.
            return_dict: `False`: a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": ...})` after each step; the
                latents in the dict that it returns go on. It may set `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: What the dict has, of `_callback_tensor_inputs`.
            height, width: In pixels, multiples of what a token measures; by default as in training.
            num_frames: Likewise, for video models.
            eta: Share of fresh noise, from 0 to 1; by default that of the scheduler, 0 for DDIM and 0.3 for TCD.

        Returns:
            `ImagePipelineOutput` with `images`, or `ViTokVideoPipelineOutput` with `frames`.

        Raises:
            ValueError: If a class is unknown, or an argument is out of its range or does not fit the others.
        """
        if missing := [name for name, component in self.components.items() if component is None]:
            raise ValueError(f"The pipeline was loaded without {' and '.join(missing)}: load it whole to call it.")
        check_counts(num_inference_steps=num_inference_steps, num_images_per_label=num_images_per_label)
        check_guidance(guidance_scale, guidance_interval, guidance_rescale)
        check_scheduler(self.scheduler, eta, self.transformer.out_channels == 2 * self.transformer.config.in_channels)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
        if output_type != "latent" and self.vae.config.get("component") == "encoder":
            raise ValueError(f'`output_type` is {output_type!r}, but the autoencoder has no decoder: take "latent".')
        callback_on_step_end_tensor_inputs = callback_on_step_end_tensor_inputs or []
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if unknown := set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"`callback_on_step_end_tensor_inputs` has {sorted(unknown)}, not of {self._callback_tensor_inputs}."
            )
        null_class = self.transformer.config.num_classes
        ids = [null_class] if class_labels is None else self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("`class_labels` is empty: pass `None` for samples without a class.")
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._interrupt, self._current_timestep = False, None

        device = self._execution_device
        class_ids = torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
        step_options = self._step_options(generator, eta)
        latents = self.prepare_latents(len(class_ids), height, width, num_frames, generator, device, latents)
        num_tokens = latents[0, 0].numel() // self.transformer.config.patch_size**2
        timesteps = self._set_timesteps(num_inference_steps, num_tokens, device)
        latents = latents * getattr(self.scheduler, "init_noise_sigma", 1.0)  # which depends on the timesteps
        self._num_timesteps = len(timesteps)
        first, last = (round(fraction * len(timesteps)) for fraction in guidance_interval)
        has_classes, was_guided = set(ids) != {null_class}, None
        always_guided = self.do_classifier_free_guidance and has_classes and last - first == len(timesteps)
        self._check_cache(always_guided, latents.ndim == 4)

        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                guided = self.do_classifier_free_guidance and has_classes and first <= step < last
                if guided != was_guided:  # a batch of another size: what caches hold is of no use
                    self.transformer._reset_stateful_cache()
                was_guided = guided
                prediction = self._predict(latents, timestep, class_ids, guided)
                latents = self.scheduler.step(prediction, timestep, latents, **step_options, return_dict=False)[0]
                if callback_on_step_end is not None:
                    tensors = {"latents": latents} if callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, step, timestep, tensors) or {}).pop("latents", latents)
                progress_bar.update()
        self._current_timestep = None

        output = latents if output_type == "latent" else self._decode(latents, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (output,)
        return ViTokVideoPipelineOutput(frames=output) if self.is_video else ImagePipelineOutput(images=output)
