"""Training of the diffusion transformer."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange

from ..clips import to_float, to_shown
from ..data.batches import Batch, DrawnBatches
from ..data.classes import ClassSampler, LabelledFiles, read_classes
from ..data.held_out import EvaluationData, Protocol
from ..data.items import Clip
from ..data.latent_cache import LatentCache, fingerprint
from ..data.loader import iterate_pixels
from ..data.media import evenly_spaced
from ..data.views import LatentView, SquareView
from ..latents import NO_STATISTICS, compute_latent_statistics, normalize_latents, summarize_latents
from ..loading.strict import check_config_file, public_config, read_json, read_object
from ..models import AutoencoderViTok, ViTokDiTModel
from ..pipelines import ViTokDiTPipeline
from ..pipelines.model_card import ModelCard, usage
from .arguments import DiTArguments
from .diffusion import bucket_timesteps, diffusion_losses, drop_labels, make_scheduler, sample_timesteps
from .publishing import last_folder
from .trained_model import prepare_blocks
from .trainer import Trainer


logger = logging.getLogger(__name__)

MAX_FRAMES_SHOWN = 8  # of a sampled video


def load_autoencoder(args: DiTArguments) -> AutoencoderViTok:
    """Frozen, in float32. Its name in the config has no folder above the last."""
    vae = AutoencoderViTok.from_pretrained(args.vae_name_or_path, variant=args.vae_variant, dtype=torch.float32)
    vae.register_to_config(_name_or_path=last_folder(args.vae_name_or_path))
    return vae.eval().requires_grad_(False)


def make_transformer(args: DiTArguments, vae: AutoencoderViTok, resolution: int, num_classes: int) -> ViTokDiTModel:
    """With random weights. Raises `ValueError` if the model's config contradicts the data."""
    fixed = {
        "sample_size": resolution // vae.spatial_compression_ratio,
        "sample_frames": vae.config.num_latent_frames(vae.config.sample_frames),
        "in_channels": args.num_channels or vae.config.latent_channels,
        "num_classes": num_classes,
    }
    if args.variant is not None:
        return ViTokDiTModel.from_variant(args.variant, **fixed)
    assert args.model_config is not None  # one of both is given
    config = read_object(args.model_config)
    check_config_file(ViTokDiTModel, config, args.model_config, complete=False)
    for name, value in (fixed | {"out_channels": fixed["in_channels"]}).items():
        if config.get(name) not in (None, value):
            raise ValueError(
                f"`model_config` has {name} {config[name]}, but the autoencoder and the data have {value}: leave it "
                "out."
            )
    return ViTokDiTModel(**public_config(config) | fixed)


class DiTTrainer(Trainer[DiTArguments, ViTokDiTModel]):
    """A `ViTokDiTModel` on the latents of a frozen ViTok, as in the paper (section 4.4), or with flow matching.

    The latents are encoded on the fly or come from a cache. Checkpoints hold `pipeline/` and, with EMA,
    `pipeline_ema/`, folders for `ViTokDiTPipeline.from_pretrained`; the result, averaged if there is an average, is in
    `output_dir`/pipeline.
    """

    result = "pipeline"

    def __init__(self, args: DiTArguments):
        super().__init__(args)
        self.vae = load_autoencoder(args).to(self.accelerator.device)
        self.scheduler = make_scheduler(args.prediction_type)
        self.cache = None
        if args.latents_dir is not None:
            self.cache = LatentCache(args.latents_dir, verify=self.accelerator.is_local_main_process)
        self.resolution = self._choose("resolution") or self.vae.config.sample_size
        self.fps = self._choose("fps")
        self._check_fit()
        dataset, self.classes = self._make_dataset()
        self._normalise(dataset)
        model = make_transformer(args, self.vae, self.resolution, len(self.classes))
        prepare_blocks(model, args)
        self.add_model("transformer", model)
        self.start(dataset)

    @property
    def clip(self) -> Clip:
        """What the autoencoder is shown of a picture or video."""
        return Clip(self.vae.config.sample_frames, self.fps, channels=self.vae.config.in_channels)

    @property
    def transformer(self) -> ViTokDiTModel:
        return self.trained.unwrapped

    def _choose(self, name: str) -> Any:
        """The setting, or what it was when the latents were cached."""
        value = getattr(self.args, name)
        if self.cache is None or (
            name == "fps" and self.vae.config.sample_frames == 1
        ):  # of pictures, it means nothing
            return value
        cached = self.cache.index[name]
        if value not in (None, cached):
            raise ValueError(
                f"`{name}` is {value}, but the cached latents have {cached or 'all frames'}: leave it out."
            )
        return cached

    def _check_fit(self) -> None:
        p = self.vae.spatial_compression_ratio
        if self.cache is not None and self.cache.index["vae_sha256"] != fingerprint(self.vae):
            raise ValueError(
                f'The latents in "{self.args.latents_dir}" are of "{self.cache.index["vae"]}", which is not the '
                f'autoencoder "{self.args.vae_name_or_path}": name that one, or write them anew.'
            )
        count, counts = self.args.num_channels, self.vae.config.channel_counts
        if count is not None and count not in (counts or ()):
            raise ValueError(f"`num_channels` {count} is none of the autoencoder's `channel_counts`, {counts}.")
        if self.resolution % p:
            raise ValueError(f"`resolution` {self.resolution} must be a multiple of the autoencoder's patch_size {p}.")

    def _make_dataset(self) -> tuple[DrawnBatches, list[str]]:
        args = self.args
        classes = None if args.class_file is None else read_classes(args.class_file)
        data: LabelledFiles | LatentCache
        view: SquareView | LatentView
        if self.cache is None:
            data = LabelledFiles(args.train_data_dir, classes, self.clip)
            view = SquareView(self.resolution, args.train_batch_size, self.clip)
        else:
            data, view = self.cache, LatentView(args.train_batch_size)
            if classes not in (None, data.classes):
                raise ValueError(f'The classes of "{args.latents_dir}" are {data.classes}: leave out `class_file`.')
        sampler = ClassSampler(data.labels, data.classes, args.random_flip, args.no_flip_classes, args.class_balanced)
        return DrawnBatches(data, sampler, view, args.seed), data.classes

    def _normalise(self, dataset: DrawnBatches) -> None:
        """Sees to it that the autoencoder's config has the statistics of the latents: when resumed, those it had."""
        args = self.args
        if self.checkpoint:
            config = read_json(self.checkpoint / "pipeline" / "vae" / "config.json")
            self.vae.register_to_config(**{name: config[name] for name in NO_STATISTICS})
        elif all(self.vae.config[name] in (None, neutral) for name, neutral in NO_STATISTICS.items()):
            if self.cache is None:
                batches = iterate_pixels(dataset, -(-args.num_statistics_images // args.train_batch_size))
                statistics = compute_latent_statistics(self.vae, batches)
            else:
                statistics = summarize_latents(self.cache.iterate_moments(args.num_statistics_images))
            self.vae.register_to_config(**statistics.to_config())
            logger.warning("Latent statistics of %d pictures: %s", statistics.num_items, statistics.to_config())

    def inputs(self) -> tuple[dict[str, object], list[str | Path]]:
        settings, files = super().inputs()
        if self.cache is not None:
            files.append(self.cache.folder / "index.json")  # which has the shards' checksums
        return settings | {"autoencoder_sha256": fingerprint(self.vae)}, files

    @torch.no_grad()
    def load_held_out(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Normalised latents, modes of the posteriors, and classes of pictures evenly spaced in their sorted list."""
        args, clip, latents = self.args, self.clip, []
        files = LabelledFiles([path], self.classes, clip)
        protocol = Protocol(self.resolution, clip.num_frames, clip.fps, clip.channels)
        data = EvaluationData(files, protocol, args.num_validation_images, random_clips=True)
        for pixels in data.batches(range(len(data)), 1):
            latents.append(self.vae.encode(to_float(pixels.to(self.vae.device))).latent_dist.mode())
        modes = torch.cat(latents)[:, : self.args.num_channels]
        return normalize_latents(modes, self.vae), torch.from_numpy(files.labels[data.indices])

    @torch.no_grad()
    def latents_of(self, *batches: Batch) -> torch.Tensor:
        """Normalised samples of the posteriors of all batches, (B, c, t, h, w) or, of 1-D codes, (B, c, l) float32."""
        moments = torch.cat([self._moments(batch) for batch in batches])
        mean, std = moments[:, :, : self.args.num_channels].unbind(dim=1)
        return normalize_latents(mean + std * torch.randn(mean.shape, device=mean.device), self.vae)

    def _moments(self, batch: Batch) -> torch.Tensor:
        """(B, 2, c, t, h, w) or (B, 2, c, l)"""
        if batch.moments is not None:
            return batch.moments.to(self.accelerator.device, non_blocking=True)
        (run,) = batch.pixels
        with self.accelerator.autocast():
            posterior = self.vae.encode(to_float(run.to(self.accelerator.device, non_blocking=True))).latent_dist
        return torch.stack([posterior.mean, posterior.std], dim=1)

    def count_pixels(self, batch: Batch) -> int:
        return batch.num_items * self.resolution**2 * self.vae.config.sample_frames

    def training_step(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        """One optimiser step. What is random is drawn for all batches at once, so as not to depend on their sizes."""
        args, device, logs, trained = self.args, self.accelerator.device, [], self.trained
        latents = self.latents_of(*batches)
        classes = torch.cat([batch.labels for batch in batches if batch.labels is not None]).to(device)
        labels = drop_labels(classes, len(self.classes), args.class_dropout)
        timesteps = sample_timesteps(self.scheduler, len(labels), args.weighting_scheme, device=device)
        noise = torch.randn(latents.shape, device=device)  # not `randn_like`, which depends on the strides
        counts = [batch.num_items for batch in batches]
        parts = zip(latents.split(counts), labels.split(counts), noise.split(counts), timesteps.split(counts))
        for part in parts:
            with trained.accumulate():
                losses = diffusion_losses(trained.model, self.scheduler, *part, args.snr_gamma)
                loss = losses.sum() * (len(batches) / len(labels))
                self.accelerator.backward(loss)
                logs.append({"loss": loss.detach()} | trained.update(self.step))
        return logs

    def measure(self, held_out: tuple[torch.Tensor, torch.Tensor]) -> tuple[dict[str, float], None]:
        """Unweighted losses, for each part of the schedule and their mean, with the same noise every time."""
        args, device, (latents, class_labels) = self.args, self.accelerator.device, held_out
        generator, means = torch.Generator().manual_seed(args.seed), {}
        buckets = bucket_timesteps(self.scheduler, args.num_timestep_buckets, len(latents), generator)
        for bucket, timesteps in buckets.items():
            noise = torch.randn(latents.shape, generator=generator)
            tensors = (latents, class_labels, noise, timesteps)
            parts = zip(*(tensor.to(device).split(args.train_batch_size) for tensor in tensors))
            losses = [diffusion_losses(self.transformer, self.scheduler, *part) for part in parts]
            means[f"loss_{bucket}"] = torch.cat(losses).mean().item()
        return {"loss": sum(means.values()) / len(means)} | means, None

    def _make_pipeline(self, transformer: ViTokDiTModel) -> ViTokDiTPipeline:
        return ViTokDiTPipeline(
            transformer, self.vae, make_scheduler(self.args.prediction_type), dict(enumerate(self.classes))
        )

    def samples(self) -> dict[str, np.ndarray]:
        """A row for each class, or, of a video model, for each sample with its frames."""
        args, pipe = self.args, self._make_pipeline(self.transformer)
        pipe.set_progress_bar_config(disable=True)
        count = min(args.num_sample_classes, len(self.classes))
        classes: list[str | int] = [*evenly_spaced(len(self.classes), count)]
        seeds = range(args.seed, args.seed + count * args.num_samples_per_class)
        (samples,) = pipe(
            classes,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            num_images_per_label=args.num_samples_per_class,
            output_type="pt",
            return_dict=False,
        )  # (B, C, H, W) or (B, T, C, H, W)
        samples = (samples.float().cpu() * 255).round().to(torch.uint8)
        if pipe.is_video:
            shown = evenly_spaced(samples.shape[1], MAX_FRAMES_SHOWN)
            grid = rearrange(to_shown(samples[:, shown].transpose(1, 2)), "b c t h w -> (b h) (t w) c")
        else:
            grid = rearrange(to_shown(samples), "(k n) c h w -> (k h) (n w) c", k=count)
        return {"samples": grid.numpy()}

    def write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        with torch.device("meta"):
            twin = ViTokDiTModel(**public_config(self.transformer.config))
        twin.load_state_dict(state_dict, assign=True)
        self._make_pipeline(twin).save_pretrained(folder)

    def model_card(self, name: str) -> ModelCard:
        description = "A class-conditional diffusion transformer on the latents of a ViTok (arXiv 2501.09755)"
        code = usage(name, self.classes[:1], self.vae.config.sample_frames > 1)
        task = "unconditional-image-generation"  # the Hub has none for classes
        return ModelCard(name, "diffusion", description, code, task, self.args.vae_name_or_path)
