"""Training of the autoencoder, both stages."""

import logging
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch

from ..clips import fold_frames, to_float
from ..data.batches import Batch
from ..data.files import short_names
from ..data.held_out import load_evaluation_images
from ..data.items import Clip
from ..data.loader import BatchLoader, SourceSettings, make_dataset
from ..data.views import CropView, NativeView, parse_size
from ..evaluation.reconstruction import comparison, evaluate_reconstruction
from ..latents import NO_STATISTICS
from ..loading.strict import check_config_file, read_object
from ..models import AutoencoderViTok
from .adversary import Adversary
from .arguments import AutoencoderArguments
from .checkpointing import atomic_folder
from .ema import WeightAverage
from .losses import ReconstructionLoss
from .publishing import changed_settings, push, write_model_card
from .trainer import TrainedModel, Trainer, compile_blocks


logger = logging.getLogger(__name__)

LORA_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


def load_model(args: AutoencoderArguments) -> AutoencoderViTok:
    """The model to start from, with float32 weights."""
    overrides = {} if args.latent_channels is None else {"latent_channels": args.latent_channels}
    if args.pretrained_model_name_or_path is not None:
        return AutoencoderViTok.from_pretrained(
            args.pretrained_model_name_or_path, variant=args.variant, dtype=torch.float32
        )
    if args.variant is not None:
        return AutoencoderViTok.from_variant(args.variant, **overrides)
    config = read_object(args.model_config) | overrides
    check_config_file(AutoencoderViTok, config, args.model_config, complete=False)
    return AutoencoderViTok(**public_config(config))


def public_config(config: dict[str, object]) -> dict[str, object]:
    """The constructor's arguments, without what diffusers notes besides, as the folder a model came from."""
    return {name: value for name, value in config.items() if not name.startswith("_")}


def forget_statistics(vae: AutoencoderViTok) -> None:
    """Those of the latents, which another encoder does not have."""
    stale = {name: value for name, value in NO_STATISTICS.items() if vae.config[name] not in (None, value)}
    if stale:
        logger.warning(
            "The encoder is trained: %s leave its config; `compute_latent_statistics` measures new ones.", [*stale]
        )
        vae.register_to_config(**stale)


def add_lora(vae: AutoencoderViTok, args: AutoencoderArguments) -> None:
    from peft import LoraConfig

    targets = rf"decoder\.{LORA_TARGETS}" if args.freeze_encoder else LORA_TARGETS
    alpha = args.lora_rank if args.lora_alpha is None else args.lora_alpha
    vae.requires_grad_(False)
    vae.add_adapter(LoraConfig(r=args.lora_rank, lora_alpha=alpha, target_modules=targets))


def save_model(vae: AutoencoderViTok, state_dict: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes the model, or its LoRA adapter if it has one, with weights that were gathered from all processes."""
    with torch.device("meta"):
        twin = AutoencoderViTok(**public_config(vae.config))
        for name, config in getattr(vae, "peft_config", {}).items():
            twin.add_adapter(config, adapter_name=name)
    twin.load_state_dict(state_dict, assign=True)
    if getattr(vae, "peft_config", None):
        twin.save_lora_adapter(folder)
    else:
        twin.save_pretrained(folder)


def by_size(pictures: torch.Tensor | list[torch.Tensor]) -> list[torch.Tensor]:
    """A batch, or a list of pictures or clips -> frames, (B, C, H, W) for each of them."""
    batches = [pictures] if isinstance(pictures, torch.Tensor) else [item.unsqueeze(0) for item in pictures]
    return [fold_frames(batch) for batch in batches]


class AutoencoderTrainer(Trainer):
    """Both stages of the paper (section 3).

    Stage 1 trains encoder and decoder with reconstruction losses and the KL divergence; stage 2 the decoder, with a
    GAN loss besides. Parts that are not trained need no gradients, and the optimiser does not see them. In `vae/` and,
    with EMA, `vae_ema/`, checkpoints hold models for `from_pretrained`, or LoRA adapters for `load_lora_adapter`; the
    result, averaged if there is an average, is in `output_dir`/vae.
    """

    result = "vae"

    def __init__(self, args: AutoencoderArguments):
        super().__init__(args)
        vae = load_model(args)
        if args.freeze_encoder:
            vae.encoder.requires_grad_(False)
        else:
            forget_statistics(vae)
        self.config = vae.config
        if args.lora_rank is not None:
            add_lora(vae, args)
        if args.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if args.compile:
            compile_blocks(vae)
        resolution = args.resolution or self.config.sample_size
        with self.accelerator.local_main_process_first():  # which downloads networks for all
            self.loss = ReconstructionLoss(
                self.config.patch_size,
                args.mse_weight,
                args.l1_weight,
                args.charbonnier_weight,
                args.ssim_weight,
                args.lpips_weight,
                args.dino_weight,
                0.0 if args.freeze_encoder else args.kl_weight,
                args.patch_border_weight,
                args.dino_model_name_or_path,
            ).to(self.accelerator.device)
        trained = TrainedModel(vae, self.accelerator, args, args.learning_rate, args.lr_warmup_steps)
        self.models = {"vae": trained}
        self.adversary = None
        if args.stage == 2:
            self.adversary = Adversary(args, self.accelerator, resolution, self.config.in_channels)
            self.models["discriminator"] = self.adversary.trained
        if args.use_ema:
            self.average = WeightAverage(trained.model, args.ema_decay)
        self._train_mode()
        self.loader = self._make_loader(resolution)
        self.validation_images = {
            name: load_evaluation_images(
                path,
                args.validation_resolution or self.config.sample_size,
                args.num_validation_images,
                self.config.sample_frames,
                args.fps,
            )
            for name, path in zip(short_names(args.validation_data_dir), args.validation_data_dir)
        }
        self.start()

    @property
    def vae(self) -> AutoencoderViTok:
        return self.models["vae"].unwrapped

    def fixed_settings(self) -> dict[str, object]:
        args = self.args
        settings = {name: getattr(args, name) for name in ("stage", "freeze_encoder", "lora_rank")}
        return super().fixed_settings() | settings | {"lecam_weight": "positive" if args.lecam_weight > 0.0 else 0.0}

    def objects(self) -> dict[str, object]:
        lecam = self.adversary and self.adversary.lecam
        return super().objects() | ({"lecam": lecam} if lecam is not None else {})

    def _train_mode(self) -> None:
        self.models["vae"].model.train()
        if self.args.freeze_encoder:
            self.vae.encoder.eval()

    def _make_loader(self, resolution: int) -> BatchLoader:
        args, config = self.args, self.config
        clip = Clip(config.sample_frames, args.fps)
        if args.max_tokens is None:
            sizes = [parse_size(size) for size in args.crop_sizes or [str(resolution)]]
            for side in {side for size in sizes for side in size[:2]}:
                if side % config.patch_size:
                    name = "crop_sizes" if args.crop_sizes else "resolution"
                    raise ValueError(f"`{name}` has {side}, no multiple of patch_size {config.patch_size}.")
            pixels = args.train_batch_size * resolution**2 * config.sample_frames
            view: CropView | NativeView = CropView(sizes, pixels, clip, args.random_flip)
        else:
            token_size = config.temporal_patch_size, config.patch_size
            view = NativeView(args.max_tokens, resolution**2, token_size, clip, args.random_flip)
        sources = SourceSettings(**{field.name: getattr(args, field.name) for field in fields(SourceSettings)})
        dataset = make_dataset(view, sources, args.seed)
        processes = self.accelerator.process_index, self.accelerator.num_processes
        return BatchLoader(dataset, args.dataloader_num_workers, *processes)

    def training_step(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        """One optimiser step of every model, the autoencoder's first; both learn from the same reconstructions.

        However the pictures of a step are divided into batches and processes, each counts alike, and has noise of its
        own. Only what the discriminator sees of the variation in a batch depends on it, unless the batches have
        multiples of 4 frames, the size of its groups.
        """
        targets = [self._to_device(batch.pixels) for batch in batches]
        counts = torch.tensor(list(map(self._count, targets)), dtype=torch.float32).to(self.accelerator.device)
        *totals, num_frames = self.accelerator.reduce(counts.mean(dim=0), "mean")
        shares = counts[:, -1] / num_frames
        items = [len(target) for target in targets]
        seeds = [part.tolist() for part in torch.randint(2**62, (sum(items),)).split(items)]
        logs, pairs, squares, trained = [], [], None, self.models["vae"]
        if len(batches) > 1 and self.adversary is not None and self.adversary.is_adaptive(self.step):
            squares = sum(self._gradient_squares(*part, totals) for part in zip(targets, seeds, shares))
        for target, batch_seeds, share in zip(targets, seeds, shares):
            with trained.accumulate():
                output = self._reconstruct(target, batch_seeds)
                fakes, reals = by_size(output.sample), by_size(target)
                loss, log = self.loss(fakes, reals, output.kl, *totals)
                if self.adversary is not None:
                    gan_loss, gan_log = self.adversary.generator_loss(fakes, loss, self.step, share, squares)
                    loss, log = loss + gan_loss, log | gan_log
                    pairs.append(([pictures.detach() for pictures in fakes], reals))
                self.accelerator.backward(loss)
                logs.append(log | {"loss": loss.detach()} | trained.update(self.step))
        for log, (fakes, reals), share in zip(logs, pairs, shares):
            log |= self.adversary.discriminator_step(fakes, reals, self.step, share)
        if self.adversary is not None:
            self.adversary.end_step(logs)
        return logs

    def _gradient_squares(self, target, seeds: list[int], share: torch.Tensor, totals) -> torch.Tensor:
        """What the adaptive weight of a step needs of each batch beforehand: all graphs take too much memory."""
        with torch.no_grad():
            sample = self._reconstruct(target, seeds).sample
        fakes = [pictures.requires_grad_() for pictures in by_size(sample)]
        loss, _ = self.loss(fakes, by_size(target), None, *totals)
        return self.adversary.gradient_squares(fakes, loss, share)

    def _reconstruct(self, target: torch.Tensor | list[torch.Tensor], seeds: list[int]):
        """From a sample of the posterior; its noise has one seed for each picture."""
        generators = [torch.Generator(self.accelerator.device).manual_seed(seed) for seed in seeds]
        return self.models["vae"].model(target, sample_posterior=True, generator=generators)

    def _to_device(self, pixels: torch.Tensor | list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
        if isinstance(pixels, torch.Tensor):
            return to_float(pixels.to(self.accelerator.device, non_blocking=True))
        return [self._to_device(item) for item in pixels]

    def _count(self, pixels: torch.Tensor | list[torch.Tensor]) -> tuple[int, int, int]:
        """Latent elements, values and frames of a batch."""
        config, values, latents, all_frames = self.config, 0, 0, 0
        for item in pixels:  # (C, [T,] H, W)
            height, width = (-(-side // config.patch_size) for side in item.shape[-2:])
            frames = item.shape[1] if item.ndim == 4 else 1
            values, all_frames = values + item.numel(), all_frames + frames
            latents += frames // config.temporal_patch_size * height * width * config.latent_channels
        return latents, values, all_frames

    def evaluate(self) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """PSNR and SSIM of the held-out pictures, of the weights and of their average."""
        metrics, pictures = {}, {}
        vae = self.vae.eval()
        for label, weights in self.averages().items():
            with weights:
                for name, images in self.validation_images.items():
                    values, reconstructions = evaluate_reconstruction(vae, images)
                    metrics |= {f"{name}{label}_{metric}": value for metric, value in values.items()}
                    pictures[f"{name}{label}"] = comparison(images[:8], reconstructions[:8])
        self._train_mode()
        self.metrics = metrics
        return metrics, pictures

    def save_models(self, folder: Path) -> None:
        for name in ("vae", "vae_ema") if self.average is not None else ("vae",):
            state_dict = self.gather_weights("vae", average=name == "vae_ema")
            if self.accelerator.is_main_process:
                save_model(self.vae, state_dict, folder / name)

    def finish(self) -> None:
        """Writes the final model and its card, and uploads them if asked to."""
        args = self.args
        state_dict = self.gather_weights("vae", average=self.average is not None)
        name = args.hub_model_id or self.output_dir.resolve().name
        with atomic_folder(self.output_dir / self.result, self.accelerator) as folder:
            if self.accelerator.is_main_process:
                save_model(self.vae, state_dict, folder)
                write_model_card(
                    folder,
                    name,
                    "autoencoder",
                    "ViTok, a vision-transformer autoencoder",
                    args.pretrained_model_name_or_path,
                    self._usage(name),
                    {metric: value for metric, value in self.metrics.items() if "_ema_" in metric or not args.use_ema},
                    changed_settings(args),
                )
        if args.push_to_hub and self.accelerator.is_main_process:
            logger.warning("Uploaded to %s.", push(self.output_dir / self.result, name, args.hub_token))

    def _usage(self, name: str) -> str:
        source = name if self.args.lora_rank is None else self.args.pretrained_model_name_or_path
        lines = ["from vitok_hf import AutoencoderViTok", "", f'vae = AutoencoderViTok.from_pretrained("{source}")']
        if self.args.lora_rank is not None:
            lines.append(f'vae.load_lora_adapter("{name}", prefix=None, use_safetensors=True)')
        return "\n".join(lines)
