"""Training of the autoencoder, both stages."""

import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..clips import Runs, item_sizes, to_float
from ..data.batches import Batch, DrawnBatches, StreamBatches
from ..data.files import VIDEO_SUFFIXES, iterate_files, suffix_of
from ..data.held_out import load_evaluation_images
from ..data.items import Clip
from ..data.loader import SourceSettings, make_dataset
from ..data.views import CropView, NativeView, parse_size
from ..evaluation.reconstruction import comparison, evaluate_reconstruction
from ..latents import NO_STATISTICS
from ..loading.strict import check_config_file, public_config, read_object
from ..models import AutoencoderViTok
from ..models.posterior import ViTokOutput
from ..pipelines.model_card import ModelCard
from .adversary import Adversary
from .arguments import AutoencoderArguments
from .checkpointing import atomic_folder
from .diffusability import Alignment, Change, check_diffusability, draw_change
from .losses import ReconstructionLoss
from .publishing import usage_of_lengths
from .teacher import Lesson, Teacher
from .trained_model import prepare_blocks
from .trainer import Trainer


logger = logging.getLogger(__name__)

Lengths = dict[str, list[int]]  # arguments of the model: a number for each picture

LORA_TARGETS = r".*\.(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2)"


@dataclass
class Part:
    """A batch of a step: its pixels, what its latents, changed and cut, are to be decoded to, its share of frames."""

    pixels: Runs
    wanted: Runs
    change: Change
    seeds: list[int]
    lengths: Lengths
    share: torch.Tensor
    lesson: Lesson | None


def load_model(args: AutoencoderArguments) -> AutoencoderViTok:
    """The model to start from, with float32 weights."""
    vae = _load_or_make(args)
    if args.causal and vae.config.temporal_patch_size == vae.config.sample_frames == 1:
        name = args.pretrained_model_name_or_path or args.model_config or args.variant
        raise ValueError(
            f'`causal` is True, but "{name}" is a model of pictures, in which no frame follows another: leave it out, '
            'or name a model of videos, as "S-B/4x8".'
        )
    return vae


def _load_or_make(args: AutoencoderArguments) -> AutoencoderViTok:
    counts = {name: getattr(args, name) for name in ("channel_counts", "token_counts") if getattr(args, name)}
    if args.pretrained_model_name_or_path is not None:
        vae = AutoencoderViTok.from_pretrained(
            args.pretrained_model_name_or_path, variant=args.variant, dtype=torch.float32
        )
        if args.causal and not vae.config.causal:
            remedy = "`AutoencoderViTok.from_pretrained(..., causal=True, sample_frames=17).save_pretrained(...)`"
            raise ValueError(
                f'`causal` is True, but "{args.pretrained_model_name_or_path}" is not causal: its encoder was trained '
                f"to see all frames. Leave it out, or start from its weights in a causal model, {remedy}."
            )
        if args.lora_rank is not None and any(vae.config[name] != value for name, value in counts.items()):
            raise ValueError(
                f"`lora_rank` {args.lora_rank} saves an adapter alone, without {', '.join(counts)}: leave one out, or "
                "start from a model that was saved after `set_counts`."
            )
        vae.set_counts(**counts)
        return vae
    overrides = {name: getattr(args, name) for name in ("in_channels", "latent_channels", "num_latent_tokens")}
    overrides = counts | {name: value for name, value in overrides.items() if value is not None}
    if args.causal:
        overrides["causal"] = True
    if args.variant is not None:
        return AutoencoderViTok.from_variant(args.variant, **overrides)
    assert args.model_config is not None  # one of the three is given
    config = read_object(args.model_config) | overrides
    check_config_file(AutoencoderViTok, config, args.model_config, complete=False)
    return AutoencoderViTok(**public_config(config))


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


class AutoencoderTrainer(Trainer[AutoencoderArguments, AutoencoderViTok]):
    """Both stages of the paper (section 3).

    Stage 1 trains encoder and decoder with reconstruction losses and the KL divergence; stage 2 the decoder, with a
    GAN loss besides. With a teacher, the encoder learns its latents, and the decoder to decode these. Parts that are
    not trained need no gradients, and the optimiser does not see them. In `vae/` and, with EMA, `vae_ema/`,
    checkpoints hold models for `from_pretrained`, or LoRA adapters for `load_lora_adapter`; the result, averaged if
    there is an average, is in `output_dir`/vae.
    """

    result = "vae"

    def __init__(self, args: AutoencoderArguments):
        super().__init__(args)
        vae = load_model(args)
        self.teacher = None if args.teacher_model_name_or_path is None else Teacher(args, vae)
        check_diffusability(args, vae)
        if args.distill == "encoder":
            vae.get_submodule("decoder").requires_grad_(False)
        if args.freeze_encoder:
            vae.get_submodule("encoder").requires_grad_(False)
        else:
            forget_statistics(vae)
        if self.teacher is not None:
            self.teacher.to(self.accelerator.device)
            vae.register_to_config(**self.teacher.statistics)
        self.config = vae.config
        if args.lora_rank is not None:
            add_lora(vae, args)
        prepare_blocks(vae, args)
        resolution = args.resolution or self.config.sample_size
        dataset = self._make_dataset(resolution)  # before anything is downloaded
        with self.accelerator.local_main_process_first():  # which downloads networks for all
            with_kl = not args.freeze_encoder and self.teacher is None
            loss = ReconstructionLoss(args, self.config.patch_size, with_kl, self.config.in_channels)
            self.alignment = None if args.alignment_model_name_or_path is None else Alignment(args, vae)
        self.loss = loss.to(self.accelerator.device)
        if self.alignment is not None:
            self.alignment.to(self.accelerator.device)
        self.add_model("vae", vae)
        self.adversary = None
        if args.stage == 2:
            self.adversary = Adversary(args, self.accelerator, resolution, self.config.in_channels)
            self.models["discriminator"] = self.adversary.trained
        self.start(dataset)

    @property
    def vae(self) -> AutoencoderViTok:
        return self.trained.unwrapped

    def fixed_settings(self) -> dict[str, object]:
        args = self.args
        settings = {name: getattr(args, name) for name in ("stage", "freeze_encoder", "lora_rank", "distill")}
        # The weights of a model fit others that differ in these.
        settings |= {name: self.config[name] for name in ("causal", "channel_counts", "token_counts")}
        return super().fixed_settings() | settings | {"lecam_weight": "positive" if args.lecam_weight > 0.0 else 0.0}

    def objects(self) -> dict[str, Any]:
        lecam = self.adversary and self.adversary.lecam
        return super().objects() | ({"lecam": lecam} if lecam is not None else {})

    def set_training(self, training: bool) -> None:
        super().set_training(training)
        if self.args.freeze_encoder:
            self.vae.get_submodule("encoder").eval()

    def _make_dataset(self, resolution: int) -> DrawnBatches | StreamBatches:
        args, config = self.args, self.config
        clip = Clip(config.sample_frames, args.fps, config.causal, config.in_channels)
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
        return make_dataset(view, sources, args.seed)

    def training_step(self, batches: list[Batch]) -> list[dict[str, torch.Tensor]]:
        """One optimiser step of every model, the autoencoder's first; both learn from the same reconstructions.

        However the pictures of a step are divided into batches and processes, each counts alike, and has noise of its
        own. Only what the discriminator sees of the variation in a batch depends on it, unless the batches have
        multiples of 4 frames, the size of its groups.
        """
        parts, totals = self._prepare(batches)
        logs, adversary, trained, squares, pairs = [], self.adversary, self.trained, None, []
        if len(parts) > 1 and adversary is not None and adversary.is_adaptive(self.step):
            squares = torch.stack([self._gradient_squares(adversary, part, totals) for part in parts]).sum(dim=0)
        for part in parts:
            with trained.accumulate():
                output = self._reconstruct(part)
                loss, log = self._losses(output, part, totals)
                if adversary is not None:
                    gan_loss, gan_log = adversary.generator_loss(output.sample, loss, self.step, part.share, squares)
                    loss, log = loss + gan_loss, log | gan_log
                    pairs.append(([run.detach() for run in output.sample], part.wanted))
                self.accelerator.backward(loss)
                logs.append(log | {"loss": loss.detach()} | trained.update(self.step))
        if adversary is not None:
            for log, pair, part in zip(logs, pairs, parts):
                log |= adversary.discriminator_step(*pair, self.step, part.share)
            adversary.end_step(logs)
        return logs

    def _prepare(self, batches: list[Batch]) -> tuple[list[Part], list[torch.Tensor]]:
        """The batches of a step with all that is random, and the latent elements and values of an average one."""
        pixels = [self._to_device(batch.pixels) for batch in batches]
        changes = [draw_change(self.args) for _ in batches]
        wanted = [change.pixels(runs, self.config.patch_size) for change, runs in zip(changes, pixels)]
        numbers = [self._count(*runs) for runs in zip(pixels, wanted)]
        counts = torch.tensor(numbers, dtype=torch.float32).to(self.accelerator.device)
        *totals, num_frames = self.accelerator.reduce(counts.mean(dim=0), "mean")
        items = [batch.num_items for batch in batches]
        seeds = [part.tolist() for part in torch.randint(2**62, (sum(items),)).split(items)]
        shares, lengths, lessons = counts[:, -1] / num_frames, self._draw_lengths(pixels), map(self._teach, pixels)
        return [*map(Part, pixels, wanted, changes, seeds, lengths, shares, lessons)], totals

    def _gradient_squares(self, adversary: Adversary, part: Part, totals: list[torch.Tensor]) -> torch.Tensor:
        """What the adaptive weight of a step needs of each batch beforehand: all graphs take too much memory."""
        with torch.no_grad():
            sample = self._reconstruct(part).sample
        fakes = [run.requires_grad_() for run in sample]
        loss, _ = self.loss(fakes, part.wanted, None, *totals)
        return adversary.gradient_squares(fakes, loss, part.share)

    def _teach(self, pixels: Runs) -> Lesson | None:
        return None if self.teacher is None else self.teacher.teach(pixels)

    def _reconstruct(self, part: Part) -> ViTokOutput:
        """From a sample of the posterior, or the teacher's, changed and cut; it has one seed for each picture."""
        generators = [torch.Generator(self.accelerator.device).manual_seed(seed) for seed in part.seeds]
        options: dict[str, Any] = {"transform": part.change.bind(generators)}
        if self.teacher is not None and part.lesson is not None:
            options |= self.teacher.options(part.lesson, generators)
        else:
            options |= {"sample_posterior": True, "generator": generators} | part.lengths
        output = self.trained.model(part.pixels, **options)
        if output.sample is not None:  # of changed latents with the padding
            output.sample = [run[..., : x.shape[-2], : x.shape[-1]] for run, x in zip(output.sample, part.wanted)]
        return output

    def _losses(
        self, output: ViTokOutput, part: Part, totals: list[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Of the reconstructions, if there are, and of the latents, if these are to be like others: (loss, logs)."""
        parts = [] if output.sample is None else [self.loss(output.sample, part.wanted, output.kl, *totals)]
        if self.teacher is not None and part.lesson is not None and isinstance(output.parameters, list):
            parts.append(self.teacher.loss(output.parameters, part.lesson, totals[0]))
        if self.alignment is not None and isinstance(output.parameters, list):
            parts.append(self.alignment.loss(output.parameters, part.pixels, totals[0]))
        losses, logs = zip(*parts)
        return torch.stack(losses).sum(), {name: value for log in logs for name, value in log.items()}

    def _draw_lengths(self, targets: list[Runs]) -> list[Lengths]:
        """For each batch, how many tokens and channels its pictures keep, of models whose codes can be cut.

        Drawn for all batches at once: half of the pictures have the longest length of the list, the others each other
        one as often. Pictures with fewer tokens keep all.
        """
        lengths: list[Lengths] = [{} for _ in targets]
        if self.config.token_counts is None and self.config.channel_counts is None:
            return lengths
        longest = [[self.vae.count_tokens(size) for size in item_sizes(runs)] for runs in targets]
        for name, counts in (("num_tokens", self.config.token_counts), ("num_channels", self.config.channel_counts)):
            if counts is not None:
                weights = torch.tensor([1.0] * (len(counts) - 1) + [max(1.0, len(counts) - 1.0)])
                places = torch.multinomial(weights, sum(map(len, longest)), replacement=True)
                drawn = torch.tensor(counts)[places]
                for batch, part, limits in zip(lengths, drawn.split([*map(len, longest)]), longest):
                    batch[name] = part.tolist() if name == "num_channels" else [*map(min, part.tolist(), limits)]
        return lengths

    def _to_device(self, pixels: Runs) -> Runs:
        return [to_float(run.to(self.accelerator.device, non_blocking=True)) for run in pixels]

    def _count(self, pixels: Runs, wanted: Runs) -> tuple[int, int, int]:
        """Latent elements of a batch, and values and frames of what it is to become."""
        latents = self.config.latent_channels * sum(map(self.vae.count_tokens, item_sizes(pixels)))
        return latents, sum(run.numel() for run in wanted), sum(run[:, 0, :, 0, 0].numel() for run in wanted)

    def load_held_out(self, path: str) -> torch.Tensor:
        """(N, C, T, H, W) uint8; of a folder without videos, for a causal model, clips of one frame."""
        args, config = self.args, self.config
        resolution, limit = args.validation_resolution or config.sample_size, args.num_validation_images
        num_frames = config.sample_frames
        if config.causal and not any(suffix_of(file) in VIDEO_SUFFIXES for file in iterate_files(path)):
            num_frames = 1
        return load_evaluation_images(path, resolution, limit, num_frames, args.fps, config.in_channels)

    def measure(self, held_out: torch.Tensor) -> tuple[dict[str, float], np.ndarray]:
        """PSNR and SSIM, of codes of every length."""
        metrics, reconstructions = evaluate_reconstruction(self.vae, held_out)
        if self.teacher is not None:
            pairs = {"from_teacher": (self.teacher.vae, self.vae), "to_teacher": (self.vae, self.teacher.vae)}
            for name, (encoder, decoder) in pairs.items():
                values, _ = evaluate_reconstruction(encoder, held_out, decoder=decoder)
                metrics |= {f"{metric}_{name}": value for metric, value in values.items()}
        for name, counts in (("num_tokens", self.config.token_counts), ("num_channels", self.config.channel_counts)):
            for count in counts or ():
                if name == "num_channels" or count <= self.vae.count_tokens(held_out.shape[2:]):
                    values, _ = evaluate_reconstruction(self.vae, held_out, lengths={name: count})
                    metrics |= {f"{metric}_{name}_{count}": value for metric, value in values.items()}
        return metrics, comparison(held_out[:8], reconstructions[:8])

    def write_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """The model, or its LoRA adapter if it has one."""
        adapters = getattr(self.vae, "peft_config", {})
        with torch.device("meta"):
            twin = AutoencoderViTok(**public_config(self.vae.config))
            for name, config in adapters.items():
                twin.add_adapter(config, adapter_name=name)
        twin.load_state_dict(state_dict, assign=True)
        if adapters:
            twin.save_lora_adapter(folder)
        else:
            twin.save_pretrained(folder)

    def finish(self) -> None:
        """Writes `output_dir`/discriminator, too, for those who go on training."""
        if self.adversary is not None:
            with atomic_folder(self.output_dir / "discriminator", self.accelerator) as temporary:
                if self.accelerator.is_main_process:
                    self.adversary.trained.unwrapped.save_pretrained(temporary)
        super().finish()

    def model_card(self, name: str) -> ModelCard:
        base, adapter = self.args.pretrained_model_name_or_path, self.args.lora_rank is not None
        lines = ["from vitok_hf import AutoencoderViTok", ""]
        lines.append(f'vae = AutoencoderViTok.from_pretrained("{base if adapter else name}")')
        if adapter:
            lines.append(f'vae.load_lora_adapter("{name}", prefix=None, use_safetensors=True)')
        lines += usage_of_lengths(self.config)
        description = "ViTok, a vision-transformer autoencoder (arXiv 2501.09755)"
        task = "image-to-image" if self.vae.is_image_model else "video-to-video"
        return ModelCard(name, "autoencoder", description, "\n".join(lines), task, base, self.args.dataset_name)
