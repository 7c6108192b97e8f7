import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ..checks import check_bool, check_finite, check_generator, check_int, check_tensor, plain, refuse
from ..clips import to_picture
from ..latents import denormalize_latents
from ..loading import resolve_bundled
from ..loading.strict import DTYPE_NAMES, reading, to_dtype
from ..models import AutoencoderViTok, ViTokDiTModel
from .calls import Call, CallsMixin
from .checks import (
    check_cache,
    check_callback,
    check_changes,
    check_components,
    check_guidance,
    check_models,
    check_output_type,
    check_size,
)
from .labels import check_id2label, label_table, to_label_ids
from .loading import check_folder
from .model_card import add_usage
from .schedulers import check_scheduler, max_steps, takes_variance, warn_of_clipping


GUIDANCE = {"guidance_scale": 4.0, "guidance_rescale": 0.0}  # of calls, where the pipeline has none of its own


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


class ViTokDiTPipeline(CallsMixin, DiffusionPipeline):
    r"""
    Class-conditional generation of images and videos by a `ViTokDiTModel` on the latents of an `AutoencoderViTok`.

    Any scheduler of diffusers can be set whose `step` takes a prediction, a timestep and a sample (not those of
    discrete tokens and a few others, which are refused by name); what the model predicts (`prediction_type`, or flow
    matching) is read by it from its own config. Latents are unbounded, so schedulers need `clip_sample=False`.

    Several threads may call one pipeline, and callbacks may call it again: guidance, timesteps and interruption belong
    to a call, and so does the scheduler, a copy while another call uses that of the pipeline. `_guidance_scale` and
    `_interrupt` that are set in a thread without a call are set for all that run. Caches, offloading and whatever else
    changes the models are not to be used while another thread is in a call.

    Args:
        transformer: The denoiser. If it has twice as many channels out as in, the second half is the variance that
            DDPM uses (`variance_type="learned_range"`), as in DiT; others leave it out.
        vae: Decodes the latents; its config has the statistics that they were normalised with.
        scheduler: Of diffusers, DDIM in the paper.
        id2label: Names of the classes, several with commas in between; saved along.
        guidance_scale, guidance_rescale: What calls take by default; saved along.

    Raises:
        ValueError: If the latents of the two models do not fit, `id2label` has an id that is no class, or guidance is
            out of its range.
    """

    transformer: ViTokDiTModel
    vae: AutoencoderViTok
    model_cpu_offload_seq = "transformer->vae"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ViTokDiTModel,
        vae: AutoencoderViTok,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,
        guidance_scale: float | None = None,
        guidance_rescale: float | None = None,
    ):
        super().__init__()
        check_components(transformer, vae, scheduler)
        guidance = {"guidance_scale": plain(guidance_scale), "guidance_rescale": plain(guidance_rescale)}
        check_guidance(**guidance)
        id2label = check_id2label(id2label)
        if transformer is not None:
            check_models(transformer.config, vae, id2label)
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(id2label=id2label, **guidance)
        self.labels = label_table(id2label)
        self.processor = VideoProcessor(do_resize=False)

    def __setattr__(self, name: str, value: Any):
        super().__setattr__(name, value)
        if name == "scheduler" and value is not None:
            warn_of_clipping(value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any) -> "ViTokDiTPipeline":
        """As in diffusers, and also the name of a bundled pipeline (`vitok_hf.list_bundled()`), without network.

        `dtype` may be a name, as `"bfloat16"`; `check_finite=False` leaves out the look at all weights.

        Raises:
            ValueError: If a file is damaged, or does not fit the others.
            OSError: If a file cannot be found or fetched.
        """
        for name in {*DTYPE_NAMES} & set(kwargs):
            dtype = kwargs.pop(name)
            parts = {part: to_dtype(value) for part, value in dtype.items()} if isinstance(dtype, dict) else {}
            kwargs[DTYPE_NAMES[name]] = parts or to_dtype(dtype)
        with reading(kwargs.pop("check_finite", None)):
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

    def _default(self, name: str, given: float | None = None) -> float:
        """What a call was given, else what the pipeline was made with, else the default."""
        return next(value for value in (given, self.config.get(name), GUIDANCE[name]) if value is not None)

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
        """Shape of the noise for outputs of this size, in pixels and frames: (B, c, [t,] h, w) or (B, c, l).

        Sizes default to those of the transformer's config.

        Raises:
            ValueError: If a size is not a multiple of what a token measures, or an image model is to make frames.
        """
        config = self.transformer.config
        if num_frames is not None and not self.is_video:
            raise ValueError(f"`num_frames` is {num_frames}, but this model makes images: leave it out.")
        check_int("batch_size", batch_size)
        given, grid = {"num_frames": num_frames, "height": height, "width": width}, []
        for name, (unit, lead) in self._latent_units().items():
            is_time = name == "num_frames"
            step = unit if is_time else unit * config.patch_size
            size = unit * (config.sample_frames if is_time else config.sample_size) - lead
            if given[name] is not None:
                wanted = f"1 plus a multiple of {step}" if lead else f"a positive multiple of {step}"
                size = check_int(name, given[name], wanted=wanted)
                if (size + lead) % step:
                    refuse(name, wanted, given[name])
            grid.append((size + lead) // unit)
        num_tokens = batch_size * math.prod(grid) // config.patch_size**2
        check_size(num_tokens, **given, num_images_per_label=batch_size)
        length = self.vae.config.get("num_latent_tokens")
        return (batch_size, config.in_channels, *(grid if length is None else (length,)))

    def _latent_units(self) -> dict[str, tuple[int, int]]:
        """What a latent measures in each dimension after the channels, in frames or pixels, and the first one less."""
        lead = getattr(self.vae.config, "lead_frames", 0)  # of a causal autoencoder
        frames = {"num_frames": (self.vae.temporal_compression_ratio, lead)} if self.is_video else {}
        return frames | dict.fromkeys(("height", "width"), (self.vae.spatial_compression_ratio, 0))

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
        check_generator(generator, batch_size, "samples")
        if latents is None:
            shape = self.get_latent_shape(batch_size, height, width, num_frames)
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        check_tensor("latents", latents)
        check_finite("latents", latents)
        # The size is theirs unless there is another, which then does not fit.
        on_grid = self.vae.config.get("num_latent_tokens") is None
        sides = zip(self._latent_units().items(), latents.shape[2:]) if on_grid else ()
        sizes = {name: unit * side - lead for (name, (unit, lead)), side in sides}
        given = {"num_frames": num_frames, "height": height, "width": width}
        sizes |= {name: size for name, size in given.items() if size is not None}
        expected = self.get_latent_shape(batch_size, **sizes)
        if latents.shape != expected:
            raise ValueError(f"`latents` must have shape {expected}, but have {tuple(latents.shape)}.")
        return latents.to(device=device, dtype=torch.float32)

    def _predict(
        self, call: Call, latents: torch.Tensor, timestep: torch.Tensor, class_ids: torch.Tensor, guided: bool
    ) -> torch.Tensor:
        """The model's prediction, guided by a second half of the batch without classes, (B, c, ...)."""
        inputs, scheduler = latents, call.scheduler
        if hasattr(scheduler, "scale_model_input"):
            inputs = scheduler.scale_model_input(latents, timestep)
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
            guidance = call.guidance_scale * (prediction - without)
            prediction, conditional = without + guidance, prediction
            if call.guidance_rescale > 0:
                prediction = rescale_guidance(prediction, conditional, call.guidance_rescale)
            variance = variance.chunk(2)[1]
        if takes_variance(scheduler):
            return torch.cat([prediction, variance], dim=1)
        return prediction

    def _decode(self, latents: torch.Tensor, output_type: str, sizes: dict[str, int | None] | None = None) -> Any:
        """`sizes` are those that the call was given, which 1-D codes do not tell; by default those of training."""
        latents = denormalize_latents(latents, self.vae).to(self.vae.dtype)
        options: dict[str, Any] = {}
        if self.vae.config.get("num_latent_tokens") is not None:
            defaults = {
                name: unit * self.transformer.config.sample_size for name, (unit, _) in self._latent_units().items()
            }
            if self.is_video:
                defaults["num_frames"] = self.vae.temporal_compression_ratio * self.transformer.config.sample_frames
            options["sizes"] = [tuple((sizes or {}).get(name) or default for name, default in defaults.items())] * len(
                latents
            )
        sample = self.vae.decode(latents, return_dict=False, **options)[0]
        postprocess = self.processor.postprocess_video if self.is_video else self.processor.postprocess
        if output_type == "pil" and self.vae.config.in_channels == 4:
            pixels = (postprocess(sample, "np") * 255).round().astype(np.uint8)  # (B, H, W, 4), premultiplied
            return [to_picture(picture) for picture in pixels]
        return postprocess(sample, output_type)

    def _denoise(
        self, call: Call, latents: torch.Tensor, class_ids: torch.Tensor, callback: Callable | None, names: list[str]
    ) -> torch.Tensor:
        """Noise -> normalised latents, or those of the step in which the call is interrupted."""
        call.num_timesteps, was_guided = len(call.timesteps), None
        always_guided = call.guidance_scale > 1 and len(call.guided_steps) == len(call.timesteps)
        check_cache(self.transformer._cache_config, always_guided, self.is_video)
        with self.progress_bar(total=len(call.timesteps)) as progress_bar:
            for step, timestep in enumerate(call.timesteps):
                if call.interrupt:
                    break
                call.current_timestep = timestep
                guided = call.guidance_scale > 1 and step in call.guided_steps
                if guided != was_guided:  # a batch of another size: what caches hold is of no use
                    self.transformer._reset_stateful_cache()
                was_guided = guided
                prediction = self._predict(call, latents, timestep, class_ids, guided)
                options = call.step_options
                latents = call.scheduler.step(prediction, timestep, latents, **options, return_dict=False)[0]
                if callback is not None:
                    changes = callback(self, step, timestep, {"latents": latents} if names else {})
                    latents = check_changes(changes, latents)
                progress_bar.update()
        call.current_timestep = None
        return latents

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | list[str | int] | torch.Tensor | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int = 50,
        generator: torch.Generator | list[torch.Generator] | None = None,
        num_images_per_label: int = 1,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006, as in diffusers; never changed
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        eta: float | None = None,
    ) -> Any:
        """Generates images or videos.

        Args:
            class_labels: Names (`labels`) or ids of classes, one or a list. `None`: no class, and one sample times
                `num_images_per_label`; there is nothing to guide then.
            guidance_scale: Classifier-free guidance; up to 1 there is none, which takes half the time. By default that
                of the pipeline, else 4.
            num_inference_steps: Steps of the scheduler.
            generator: One for all, or a list with one for each sample, which is then the same in any batch.
            num_images_per_label: Samples of each label, next to each other.
            guidance_interval: Fractions of the schedule between which guidance is on: the steps from
                `round(start * n)` up to, not including, `round(stop * n)`. (0.1, 0.9) avoids over-saturation.
            guidance_rescale: From 0 to 1, how far the spread of a guided prediction is brought back to that of the
                unguided one (arXiv 2305.08891, section 3.4); by default that of the pipeline, else 0.
            latents: The noise to start from, standard normal, of `get_latent_shape`.
            output_type: `"pil"`, `"np"` or `"pt"`, in [0, 1], or `"latent"`: normalised, not decoded. Of RGBA, the
                colours of arrays and tensors are multiplied by alpha, those of pictures are not.
            return_dict: `False`: a tuple.
            callback_on_step_end: Called as `callback(pipe, step, timestep, {"latents": ...})` after each step; the
                latents in the dict that it returns go on. It may set `pipe._interrupt = True`.
            callback_on_step_end_tensor_inputs: What the dict has, of `_callback_tensor_inputs`.
            height, width: In pixels, multiples of what a token measures; by default as in training.
            num_frames: Likewise, for video models; of a causal autoencoder, 1 plus a multiple of q.
            eta: Share of fresh noise, from 0 to 1; by default that of the scheduler, 0 for DDIM and 0.3 for TCD.

        Returns:
            `ImagePipelineOutput` with `images`, or `ViTokVideoPipelineOutput` with `frames`.

        Raises:
            ValueError: If a class is unknown, or an argument is out of its range or does not fit the others.
        """
        if missing := [name for name, component in self.components.items() if component is None]:
            raise ValueError(f"The pipeline was loaded without {' and '.join(missing)}: load it whole to call it.")
        check_guidance(guidance_scale, guidance_rescale, guidance_interval)
        scale = self._default("guidance_scale", guidance_scale)
        rescale = self._default("guidance_rescale", guidance_rescale)
        check_int("num_images_per_label", num_images_per_label)
        check_output_type(output_type, self.vae.config, self.is_video)
        check_bool(return_dict=return_dict)
        names = check_callback(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        null_class = self.transformer.config.num_classes
        ids = [null_class] if class_labels is None else self.get_label_ids(class_labels)
        if not ids:
            raise ValueError("`class_labels` is empty: pass `None` for samples without a class.")

        with self._begin_call(guidance_scale=scale, guidance_rescale=rescale) as call:
            scheduler, device = call.scheduler, self._execution_device
            sizes = {"num_frames": num_frames, "height": height, "width": width}
            check_scheduler(scheduler, eta, self.transformer.out_channels == 2 * self.transformer.config.in_channels)
            num_inference_steps = check_int("num_inference_steps", num_inference_steps, high=max_steps(scheduler))
            count = len(ids) * num_images_per_label
            latents = self.prepare_latents(count, height, width, num_frames, generator, device, latents)
            class_ids = torch.tensor(ids, device=device).repeat_interleave(num_images_per_label)
            num_tokens = latents[0, 0].numel() // self.transformer.config.patch_size**2
            call.set_timesteps(num_inference_steps, num_tokens, device)
            call.set_step_options(generator=generator, eta=eta)
            if set(ids) != {null_class}:
                call.set_guided_steps(guidance_interval)
            latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)  # which depends on the timesteps
            latents = self._denoise(call, latents, class_ids, callback_on_step_end, names)
            output = latents if output_type == "latent" else self._decode(latents, output_type, sizes)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (output,)
        return ViTokVideoPipelineOutput(frames=output) if self.is_video else ImagePipelineOutput(images=output)
