"""The training loop of the autoencoder."""

import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, set_seed
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from ..evaluation.reconstruction import evaluate_reconstruction, save_comparison, to_float
from ..models import AutoencoderViTok
from .checkpointing import atomic_folder, find_checkpoint
from .cropping import Batch, CropSettings, parse_size
from .data import BatchLoader, CropBatches
from .losses import ReconstructionLoss
from .media import load_evaluation_images


logger = logging.getLogger(__name__)


def _list(help: str):
    return field(default_factory=list, metadata={"help": help, "nargs": "*"})


def _arg(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass
class TrainingArguments:
    """Settings of `AutoencoderTrainer`; the command line of `examples/train_vitok.py`."""

    output_dir: str = _arg("vitok-output", "Folder of checkpoints, samples and metrics.jsonl.")
    train_data: list[str] = _list("Folders or files of pictures and videos, each with an optional weight: DIR:0.5.")
    eval_data: list[str] = _list("Folders of held-out pictures (video models: videos) for PSNR and SSIM.")
    stage: int = _arg(1, "1: encoder and decoder, reconstruction and KL losses.")
    variant: str | None = _arg(None, 'Architecture by name, as "S-B/16", with random weights.')
    model_config: str | None = _arg(None, "Architecture by a diffusers config.json, with random weights.")
    pretrained_model_name_or_path: str | None = _arg(None, "Start from this model: folder, Hub id or bundled name.")
    latent_channels: int | None = _arg(None, "Latent channels, where the variant leaves them open.")
    sizes: list[str] = _list("Crop sizes, SIDE or HEIGHTxWIDTH with an optional share, as 128 64x256:0.5.")
    pixels_per_batch: int = _arg(2**18, "Pixels (times frames) of a batch on one process, whatever the crop size.")
    fps: float | None = _arg(None, "Frames a second of the training clips of a video model; default: all frames.")
    flip: bool = _arg(True, "Flip half of the crops left to right.")
    cache_gib: float = _arg(1.0, "Memory for decoded pictures in each worker, GiB.")
    num_workers: int = _arg(1, "Processes that cut crops.")
    max_steps: int = _arg(100_000, "Optimiser steps.")
    max_minutes: float | None = _arg(None, "Save a checkpoint and stop after this time, to be resumed.")
    learning_rate: float = _arg(1e-4, "Peak learning rate.")
    warmup_steps: int = _arg(1000, "Steps of linear warm-up; a cosine to 0 at max_steps follows.")
    adam_beta1: float = _arg(0.9, "AdamW beta 1.")
    adam_beta2: float = _arg(0.95, "AdamW beta 2.")
    weight_decay: float = _arg(1e-4, "AdamW weight decay.")
    max_grad_norm: float = _arg(1.0, "Gradients are clipped to this norm.")
    gradient_accumulation_steps: int = _arg(1, "Batches an optimiser step.")
    mse_weight: float = _arg(1.0, "Weight of the squared error.")
    l1_weight: float = _arg(0.0, "Weight of the absolute error.")
    lpips_weight: float = _arg(1.0, "Weight of LPIPS (needs the VGG weights; without them it is 0).")
    kl_weight: float = _arg(1e-3, "Weight of the KL divergence, a mean over latent elements.")
    patch_border_weight: float = _arg(1.0, "Weight of squared errors at the border of a patch; inside it is 1.")
    ema_decay: float | None = _arg(None, "Keep an exponential moving average of the weights, evaluated and saved too.")
    mixed_precision: str | None = _arg(None, "no, bf16 or fp16; default: accelerate's configuration.")
    compile: bool = _arg(False, "Compile the transformer blocks.")
    gradient_checkpointing: bool = _arg(False, "Recompute activations in the backward pass, for less memory.")
    seed: int = _arg(0, "Seed of weights, crops and posterior samples.")
    log_every: int = _arg(50, "Steps between lines of metrics.jsonl.")
    eval_every: int = _arg(1000, "Steps between evaluations.")
    eval_size: int = _arg(256, "Side in pixels of the held-out pictures (shorter side resized, centre crop).")
    eval_limit: int = _arg(32, "Held-out pictures a folder.")
    checkpoint_every: int = _arg(1000, "Steps between checkpoints.")
    resume_from_checkpoint: str | None = _arg(None, 'Folder of a checkpoint, or "latest".')

    def __post_init__(self):
        if self.stage != 1:
            raise ValueError(f"`stage` must be 1, but is {self.stage}.")
        sources = {
            "variant": self.variant,
            "model_config": self.model_config,
            "pretrained_model_name_or_path": self.pretrained_model_name_or_path,
        }
        if sum(value is not None for value in sources.values()) != 1:
            raise ValueError(f"Set exactly one of {', '.join(sources)}, but they are {sources}.")
        if self.latent_channels is not None and self.pretrained_model_name_or_path is not None:
            raise ValueError(f"`latent_channels` {self.latent_channels} cannot be changed in a pretrained model.")
        if not self.train_data:
            raise ValueError("`train_data` is empty: name at least one folder of pictures or videos.")
        for name in ("max_steps", "pixels_per_batch", "gradient_accumulation_steps", "log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}.")


def learning_rate_at(step: int, args: TrainingArguments) -> float:
    """Linear warm-up, then a cosine to 0; a function of the step alone, right for any number of processes."""
    if step < args.warmup_steps:
        return args.learning_rate * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))


def load_model(args: TrainingArguments) -> AutoencoderViTok:
    overrides = {} if args.latent_channels is None else {"latent_channels": args.latent_channels}
    if args.pretrained_model_name_or_path is not None:
        return AutoencoderViTok.from_pretrained(args.pretrained_model_name_or_path)
    if args.variant is not None:
        return AutoencoderViTok.from_variant(args.variant, **overrides)
    config = json.loads(Path(args.model_config).read_text()) | overrides
    return AutoencoderViTok(**{name: value for name, value in config.items() if not name.startswith("_")})


class Window:
    """Logs and throughput since the last line of metrics.jsonl."""

    def __init__(self):
        self.began, self.pixels, self.logs = time.monotonic(), 0, {}

    def add(self, logs: dict[str, torch.Tensor], pixels: int) -> None:
        self.pixels += pixels
        for name, value in logs.items():
            self.logs.setdefault(name, []).append(value)

    def means(self, accelerator: Accelerator) -> dict[str, float]:
        rate = self.pixels * accelerator.num_processes / (time.monotonic() - self.began) / 1e6
        means = {name: accelerator.reduce(torch.stack(values).mean(), "mean") for name, values in self.logs.items()}
        return {name: mean.item() for name, mean in means.items()} | {"megapixels_per_second": rate}


class AutoencoderTrainer:
    """Stage 1 of the paper: encoder and decoder from a reconstruction loss, on one or many processes.

    Every process draws its own batches, so that `pixels_per_batch * num_processes * gradient_accumulation_steps`
    pixels make a step. Checkpoints (`checkpoint-<step>/`) hold `vae/` and, with EMA, `vae_ema/` for `from_pretrained`,
    and the state of accelerate; they are written under a temporary name and renamed when complete.
    """

    def __init__(self, args: TrainingArguments):
        self.args = args
        self.output_dir = Path(args.output_dir)
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            project_config=ProjectConfiguration(project_dir=args.output_dir),
        )
        set_seed(args.seed)
        vae = load_model(args).train()
        if args.gradient_checkpointing:
            vae.enable_gradient_checkpointing()
        if args.compile:
            vae.compile_repeated_blocks(fullgraph=True, dynamic=True)
        self.ema = None
        if args.ema_decay is not None:
            self.ema = EMAModel(vae.parameters(), decay=args.ema_decay)
            self.ema.to(self.accelerator.device)
        optimizer = torch.optim.AdamW(
            vae.parameters(),
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            weight_decay=args.weight_decay,
            fused=True,
        )
        self.model, self.optimizer = self.accelerator.prepare(vae, optimizer)
        self.loss = ReconstructionLoss(
            args.mse_weight,
            args.l1_weight,
            args.lpips_weight,
            args.kl_weight,
            args.patch_border_weight,
            vae.config.patch_size,
        ).to(self.accelerator.device)
        settings = CropSettings(
            sizes=[parse_size(size) for size in args.sizes or [str(vae.config.sample_size)]],
            pixels_per_batch=args.pixels_per_batch,
            num_frames=vae.config.sample_frames,
            fps=args.fps,
            flip=args.flip,
            seed=args.seed,
        )
        self.dataset = CropBatches(args.train_data, settings, int(args.cache_gib * 2**30))
        self.eval_images = {
            Path(path).name: load_evaluation_images(
                path, args.eval_size, args.eval_limit, vae.config.sample_frames, args.fps
            )
            for path in args.eval_data
        }
        set_seed(args.seed, device_specific=True)  # posterior samples differ between processes
        self.step = self._resume() if args.resume_from_checkpoint else 0

    @property
    def vae(self) -> AutoencoderViTok:
        return self.accelerator.unwrap_model(self.model, keep_torch_compile=False)

    def _batches(self) -> Iterator[Batch]:
        accumulation, processes = self.args.gradient_accumulation_steps, self.accelerator.num_processes
        loader = BatchLoader(self.dataset, self.args.num_workers, self.accelerator.process_index, processes)
        loader.load_state_dict({"batches": self.step * accumulation * processes})
        return itertools.islice(loader, (self.args.max_steps - self.step) * accumulation)

    def training_step(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Forward, backward and, at the end of an accumulation, the optimiser's step on a batch of uint8 pixels."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(self.step, self.args)
        with self.accelerator.accumulate(self.model):
            target = to_float(pixels.to(self.accelerator.device, non_blocking=True))
            output = self.model(target, sample_posterior=True)
            loss, logs = self.loss(output.sample, target, output.kl, self._latents_per_item(target))
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                logs["grad_norm"] = self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.step += 1
            if self.ema is not None:
                self.ema.step(self.vae.parameters())
        return logs

    def _latents_per_item(self, pixels: torch.Tensor) -> int:
        config = self.vae.config
        return pixels[0, 0].numel() // (config.temporal_patch_size * config.patch_size**2) * config.latent_channels

    def train(self) -> None:
        """Trains from the current step to `max_steps`, or for `max_minutes`; ends with a checkpoint."""
        args, began, saved_at = self.args, time.monotonic(), None
        window = Window()
        bar = tqdm(total=args.max_steps, initial=self.step, disable=not self.accelerator.is_local_main_process)
        for batch in self._batches():
            for reason in batch.skipped:
                logger.warning("Skipped %s", reason)
            window.add(self.training_step(batch.pixels), batch.pixels[:, 0].numel())
            if not self.accelerator.sync_gradients:
                continue
            bar.update()
            finished = stop = self.step == args.max_steps
            if self.step % args.log_every == 0:
                stop = stop or self._out_of_time(began)
                logs = window.means(self.accelerator) | {"learning_rate": learning_rate_at(self.step - 1, args)}
                bar.set_postfix(
                    loss=f"{logs['loss']:.5f}", megapixels_per_second=f"{logs['megapixels_per_second']:.2f}"
                )
                self._log(logs)
                window = Window()
            if self.step % args.checkpoint_every == 0 or stop:
                self.save()
                saved_at = self.step
            if self.step % args.eval_every == 0 or finished:
                self._log(self.evaluate())
            if stop:
                break
        bar.close()
        if saved_at is None:
            logger.warning("Nothing to train: the checkpoint is at step %d of %d.", self.step, args.max_steps)

    def _out_of_time(self, began: float) -> bool:
        """The same answer on every process, for clocks differ."""
        if self.args.max_minutes is None:
            return False
        out_of_time = time.monotonic() - began > 60 * self.args.max_minutes
        return bool(self.accelerator.reduce(torch.tensor(out_of_time, device=self.accelerator.device).int()) > 0)

    def _log(self, values: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": self.step} | values) + "\n")

    @contextmanager
    def _ema_weights(self):
        parameters = list(self.vae.parameters())
        self.ema.store(parameters)
        self.ema.copy_to(parameters)
        try:
            yield
        finally:
            self.ema.restore(parameters)

    def evaluate(self) -> dict[str, float]:
        """PSNR and SSIM of the held-out pictures, of the weights and of their average; saves reconstructions."""
        results = {}
        if not self.accelerator.is_main_process:
            return results
        vae = self.vae.eval()
        for label, weights in {"": nullcontext, "_ema": self._ema_weights if self.ema else None}.items():
            if weights is None:
                continue
            with weights():
                for name, images in self.eval_images.items():
                    metrics, reconstructions = evaluate_reconstruction(vae, images)
                    results |= {f"{name}{label}_{metric}": value for metric, value in metrics.items()}
                    path = self.output_dir / "samples" / f"{name}{label}_{self.step:07d}.png"
                    save_comparison(path, images[:8], reconstructions[:8])
        vae.train()
        return results

    def save(self) -> None:
        """Writes `checkpoint-<step>/`."""
        with atomic_folder(self.output_dir / f"checkpoint-{self.step}", self.accelerator) as folder:
            self.accelerator.save_state(str(folder / "state"))
            if self.accelerator.is_main_process:
                self.vae.save_pretrained(folder / "vae")
                if self.ema is not None:
                    with self._ema_weights():
                        self.vae.save_pretrained(folder / "vae_ema")
                    torch.save(self.ema.state_dict(), folder / "ema.pt")

    def _resume(self) -> int:
        path = find_checkpoint(self.output_dir, self.args.resume_from_checkpoint)
        self.accelerator.load_state(str(path / "state"))
        if self.ema is not None:
            self.ema.load_state_dict(torch.load(path / "ema.pt", map_location=self.accelerator.device))
        return int(path.name.rpartition("-")[2])
