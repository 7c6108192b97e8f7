"""Settings of the training runs, the arguments of their commands, named as in diffusers."""

import math
import operator
import os
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints


def argument(default: Any, help: str, **limits: float) -> Any:
    """A setting; `limits` of a number are names of `LIMITS`. Infinity is allowed where it is the `maximum`."""
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help})
    return field(default=default, metadata={"help": help, "limits": limits})


KINDS: dict[Any, tuple[str, type | tuple[type, ...]]] = {
    bool: ("True or False", bool),
    int: ("a whole number", Integral),
    float: ("a finite number", Real),
    str: ("text", (str, os.PathLike)),
    list: ("a list of texts", (list, tuple)),
}
LIMITS = {
    "minimum": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("less than", operator.lt),
}


def check_fields(arguments: Any) -> None:
    """Raises `ValueError` for a setting that is not of the type of its annotation, or not within its limits."""
    types = get_type_hints(type(arguments))
    for setting in fields(arguments):
        value, hint = getattr(arguments, setting.name), types[setting.name]
        kind, *others = [get_origin(hint)] if get_origin(hint) is list else get_args(hint) or [hint]
        of_numbers = get_args(hint) == (int,)
        if value is None and NoneType in others:
            continue
        (words, classes), limits = KINDS[kind], setting.metadata.get("limits", {})
        fits = isinstance(value, classes) and (kind is bool or not isinstance(value, bool))
        if kind is list:
            words = "a list of whole numbers" if of_numbers else words
            classes = Integral if of_numbers else KINDS[str][1]
            fits = fits and all(isinstance(item, classes) and not isinstance(item, bool) for item in value)
        elif fits and kind in (int, float):
            fits = kind is int or math.isfinite(value) or limits.get("maximum") == math.inf
            fits = fits and all(LIMITS[name][1](value, limit) for name, limit in limits.items())
        if fits and kind in (str, list):  # paths may be given, and the rest takes texts
            convert = int if of_numbers else os.fspath
            text = [convert(item) for item in value] if kind is list else os.fspath(value)
            setattr(arguments, setting.name, text)
        if not fits:
            bounds = "".join(f", {LIMITS[name][0]} {limit}" for name, limit in limits.items())
            if limits.get("maximum") == math.inf:
                words, bounds = "a number or inf", bounds.removesuffix(", at most inf")
            optional = ", or None" if NoneType in others else ""
            raise ValueError(f"`{setting.name}` must be {words}{bounds}{optional}, but is {value!r}.")


def check_choice(arguments: Any, name: str, *choices: str) -> None:
    if getattr(arguments, name) not in choices:
        raise ValueError(f'`{name}` must be one of {", ".join(choices)}, but is "{getattr(arguments, name)}".')


@dataclass
class TrainerArguments:
    """What every training run has: data, optimiser, schedule, precision, checkpoints and logs."""

    train_data_dir: list[str] = argument([], "Folders of pictures (video models: videos); their folders are classes.")
    resolution: int | None = argument(
        None, "Side of the pictures in pixels; default: the model's sample_size.", minimum=1
    )
    random_flip: bool = argument(True, "Flip half of the pictures left to right.")
    train_batch_size: int = argument(32, "Pictures in a batch of one process.", minimum=1)
    dataloader_num_workers: int = argument(1, "Processes that read data, for each training process.", minimum=0)
    validation_data_dir: list[str] = argument([], "Folders of held-out pictures (video models: videos).")
    num_validation_images: int = argument(64, "Held-out pictures a folder.", minimum=1)
    output_dir: str = argument("output", "Folder of checkpoints, samples, logs and the final model.")
    seed: int = argument(0, "Seed of weights, data and noise.", minimum=0, maximum=2**31)
    max_train_steps: int = argument(100_000, "Optimiser steps.", minimum=1)
    max_minutes: float | None = argument(
        None, "After this time, save a checkpoint and stop, at the next log.", minimum=0
    )
    gradient_accumulation_steps: int = argument(1, "Batches an optimiser step.", minimum=1)
    learning_rate: float = argument(1e-4, "Peak learning rate.", minimum=0)
    lr_scheduler: str = argument("cosine", "Schedule of `diffusers.optimization.get_scheduler`.")
    lr_warmup_steps: int = argument(1000, "Steps of linear warm-up, if the schedule has any.", minimum=0)
    adam_beta1: float = argument(0.9, "AdamW beta 1.", minimum=0, below=1)
    adam_beta2: float = argument(0.95, "AdamW beta 2.", minimum=0, below=1)
    adam_weight_decay: float = argument(1e-4, "AdamW weight decay.", minimum=0)
    max_grad_norm: float = argument(1.0, "Gradients are clipped to this norm.", above=0, maximum=math.inf)
    use_ema: bool = argument(False, "Keep an exponential moving average of the weights, evaluated and saved too.")
    ema_decay: float = argument(0.9999, "Its decay, after a warm-up, (1 + step) / (10 + step).", minimum=0, below=1)
    mixed_precision: str = argument(
        "auto", "no, bf16, fp16, or auto: accelerate's configuration, else bf16 where the hardware has it."
    )
    logging_steps: int = argument(50, "Steps between lines of metrics.jsonl.", minimum=1)
    validation_steps: int = argument(1000, "Steps between evaluations.", minimum=1)
    report_to: str = argument("tensorboard", "Tracker of accelerate: tensorboard, wandb, ..., all, or none.")
    tracker_project_name: str = argument("vitok", "Project name for the trackers.")
    checkpointing_steps: int = argument(1000, "Steps between checkpoints.", minimum=1)
    checkpoints_total_limit: int | None = argument(None, "Checkpoints to keep, the newest.", minimum=1)
    resume_from_checkpoint: str | None = argument(None, 'Folder of a checkpoint, or "latest".')
    push_to_hub: bool = argument(False, "Upload the final model.")
    hub_model_id: str | None = argument(None, "Repository to push to; default: the name of output_dir.")
    hub_token: str | None = argument(None, "Token for the Hub; default: that of `hf auth login`.")

    def __post_init__(self):
        from accelerate.tracking import get_available_trackers  # not for the defaults, which --help prints at once
        from diffusers.optimization import SchedulerType

        from ..precision import MIXED_PRECISIONS

        check_fields(self)
        check_choice(self, "mixed_precision", *MIXED_PRECISIONS)
        schedules = [kind.value for kind in SchedulerType if kind != SchedulerType.PIECEWISE_CONSTANT]
        check_choice(self, "lr_scheduler", *schedules)
        trackers = [tracker.value for tracker in get_available_trackers()]
        if self.report_to not in ("none", "all", *trackers):
            raise ValueError(
                f'`report_to` is "{self.report_to}", but of the trackers {trackers or "none"} is installed: install '
                'it (pip install "vitok-hf[train]" brings tensorboard), or pass "none"; metrics.jsonl comes anyway.'
            )


@dataclass
class TransformerArguments(TrainerArguments):
    """What the runs of transformers have besides."""

    fps: float | None = argument(None, "Frames a second of the clips of a video model; default: all frames.", above=0)
    compile: bool = argument(False, "Compile the transformer blocks.")
    gradient_checkpointing: bool = argument(False, "Recompute activations in the backward pass, for less memory.")


@dataclass
class LossSettings:
    """The weights of `ReconstructionLoss`."""

    mse_weight: float = argument(1.0, "Weight of the squared error.", minimum=0)
    l1_weight: float = argument(0.0, "Weight of the absolute error.", minimum=0)
    charbonnier_weight: float = argument(0.0, "Weight of sqrt(error^2 + 1e-6) (ViTok-v2: 1).", minimum=0)
    ssim_weight: float = argument(0.0, "Weight of 1 - SSIM (ViTok-v2: 0.1).", minimum=0)
    lpips_weight: float = argument(1.0, "Weight of LPIPS (needs the VGG weights; without them it is 0).", minimum=0)
    dino_weight: float = argument(0.0, "Weight of the distance of DINO features (ViTok-v2: 500).", minimum=0)
    dino_model_name_or_path: str = argument("facebook/dinov3-vitb16-pretrain-lvd1689m", "Network of these features.")
    kl_weight: float = argument(1e-3, "Weight of the KL divergence, a mean over latent elements.", minimum=0)
    patch_border_weight: float = argument(1.0, "Of squared errors at a patch's border; inside: 1.", minimum=0)


@dataclass
class AdversarySettings:
    """The GAN loss of `Adversary`, and its discriminator."""

    gan_loss: str = argument("hinge", "hinge or non_saturating.")
    gan_weight: float = argument(0.05, "Weight of the decoder's GAN loss.", minimum=0)
    gan_start_step: int = argument(0, "First step with a GAN loss; the discriminator's is 0.", minimum=0)
    gan_ramp_steps: int = argument(0, "Steps in which the GAN loss grows linearly to its weight.", minimum=0)
    adaptive_gan_weight: float | None = argument(
        None, "Scale the GAN loss by the ratio of gradients, reconstruction over GAN, of at most this.", minimum=0
    )
    discriminator_name_or_path: str | None = argument(
        None, "Start from this discriminator: `discriminator` of an earlier output_dir, or a Hub id. Default: random."
    )
    discriminator_channels: int = argument(64, "Of the first block; doubled down to 4 x 4.", minimum=1)
    discriminator_minibatch_stddev: bool = argument(True, "It sees the variation in groups of 4 frames.")
    discriminator_learning_rate: float = argument(2e-5, "Peak learning rate of the discriminator.", minimum=0)
    discriminator_warmup_steps: int = argument(25_000, "Steps of linear warm-up of the discriminator.", minimum=0)
    r1_weight: float = argument(0.0, "Weight of the gradient penalty on real pictures.", minimum=0)
    r1_every: int = argument(16, "Steps between gradient penalties, which then count as often.", minimum=1)
    lecam_weight: float = argument(0.0, "Weight of the LeCam regularisation.", minimum=0)


@dataclass
class TeacherSettings:
    """An autoencoder whose latents a `Teacher` has another one learn."""

    teacher_model_name_or_path: str | None = argument(
        None, "Learn the latents of this autoencoder, of any class of diffusers: folder, Hub id or bundled name."
    )
    teacher_subfolder: str | None = argument(None, "Folder inside it, as vae for a pipeline.")
    distill: str | None = argument(
        None,
        "encoder: give the teacher's latents; decoder: pictures from the teacher's latents; both. Default: both, in "
        "stage 2 decoder.",
    )
    latent_weight: float = argument(1.0, "Weight of the squared error of latents, in spreads of the teacher.", above=0)


@dataclass
class DiffusabilitySettings:
    """What makes latents easier to learn for a diffusion model; see `training.diffusability`."""

    equivariance: float = argument(
        0.0,
        "EQ-VAE: share of batches whose latents are scaled and flipped, and decoded to such pictures.",
        minimum=0,
        maximum=1,
    )
    latent_noise: float = argument(
        0.0, "RAE: decoded latents have noise of |N(0, this)| of their standard deviation (RAE: 0.8).", minimum=0
    )
    alignment_model_name_or_path: str | None = argument(
        None, "VA-VAE: latents are like the features of this vision transformer: folder or Hub id."
    )
    alignment_weight: float = argument(0.01, "Weight of what they differ.", above=0)


@dataclass
class AutoencoderArguments(
    DiffusabilitySettings, TeacherSettings, AdversarySettings, LossSettings, TransformerArguments
):
    """Settings of `AutoencoderTrainer`, the arguments of `vitok train`."""

    stage: int = argument(
        1, "1: reconstruction losses; 2: reconstruction and GAN losses, by default decoder only.", minimum=1, maximum=2
    )
    variant: str | None = argument(None, 'Architecture by name, as "S-B/16", with random weights.')
    model_config: str | None = argument(None, "Architecture by a diffusers config.json, with random weights.")
    pretrained_model_name_or_path: str | None = argument(
        None, "Start from this model: folder, Hub id or bundled name; also the author's ViTok-v2 weights."
    )
    causal: bool = argument(
        False, "No latent frame sees those after it, the first is of one frame; pictures are mixed with clips."
    )
    in_channels: int | None = argument(
        None,
        "Channels of pictures: 1 (grey), 3 (RGB, the default), 4 (RGBA), others (arrays, stacks).",
        minimum=1,
    )
    latent_channels: int | None = argument(None, "Latent channels, where the variant leaves them open.", minimum=1)
    channel_counts: list[int] = argument([], "Numbers of the first channels that are codes, too, as 2 4 8 16.")
    token_counts: list[int] = argument([], "Numbers of the first tokens that are codes, too, as 32 64 128 256.")
    num_latent_tokens: int | None = argument(None, "Codes are sequences of so many tokens, not grids.", minimum=1)
    freeze_encoder: bool | None = argument(None, "Train the decoder only; default: in stage 2.")
    lora_rank: int | None = argument(None, "Train LoRA adapters of this rank, not the weights.", minimum=1)
    lora_alpha: float | None = argument(None, "Scale of the adapters times their rank; default: lora_rank.", above=0)
    train_data_dir: list[str] = argument(
        [],
        "Folders or files, each with an optional weight: DIR (1) or DIR:0.5 (where there is no folder of that whole "
        "name); without any, all files alike.",
    )
    dataset_name: str | None = argument(None, "Data set of the Hub, or what else `datasets.load_dataset` takes.")
    dataset_config_name: str | None = argument(None, "Configuration of the data set.")
    dataset_split: str = argument("train", "Split of the data set.")
    data_column: str | None = argument(None, 'Column with the data; default: "image", or "video" for video models.')
    streaming: bool = argument(False, "Read the data set while it is downloaded.")
    train_shards: list[str] = argument([], "WebDataset shards, files or URLs, as shards/{000..127}.tar.")
    shuffle_buffer: int = argument(1000, "Samples of a stream that are shuffled together.", minimum=1)
    crop_sizes: list[str] = argument([], "Several sizes, SIDE or HEIGHTxWIDTH, perhaps with a share: 128 64x256:0.5.")
    max_tokens: int | None = argument(
        None, "Native aspect ratios: pictures of at most resolution^2 pixels, so many tokens a batch.", minimum=1
    )
    train_batch_size: int = argument(
        16, "Crops of `resolution` in a batch of one process; other sizes: as many pixels.", minimum=1
    )
    cache_gib: float = argument(1.0, "Memory for decoded pictures in each worker, GiB.", minimum=0)
    validation_resolution: int | None = argument(None, "Side of held-out pictures; default: sample_size.", minimum=1)
    num_validation_images: int = argument(32, "Held-out pictures a folder.", minimum=1)

    def __post_init__(self):
        from ..presets import V1_PATTERN

        super().__post_init__()
        for name in ("crop_sizes", "compile"):
            if self.max_tokens is not None and getattr(self, name):
                reason = "pictures are not cropped" if name == "crop_sizes" else "every batch has other sizes"
                raise ValueError(f"`{name}` does not go with `max_tokens` {self.max_tokens}: {reason}; leave one out.")
        check_choice(self, "gan_loss", "hinge", "non_saturating")
        self._check_teacher()
        if self.freeze_encoder is None:
            self.freeze_encoder = self.stage == 2 if self.distill is None else self.distill == "decoder"
        pretrained = self.pretrained_model_name_or_path is not None
        if (self.model_config is not None) + (pretrained or self.variant is not None) != 1:
            raise ValueError(
                "Name the model by `variant`, by `model_config`, or by `pretrained_model_name_or_path` (the author's "
                f'ViTok-v2 weights under another name: with their `variant`), but variant is "{self.variant}", '
                f'model_config "{self.model_config}", and pretrained_model_name_or_path '
                f'"{self.pretrained_model_name_or_path}".'
            )
        for name in ("freeze_encoder",) * (self.distill is None) + ("lora_rank",):
            if getattr(self, name) and not pretrained:
                raise ValueError(f"`{name}` {getattr(self, name)} needs `pretrained_model_name_or_path`.")
        if pretrained and V1_PATTERN.fullmatch(self.variant or ""):
            raise ValueError(
                f'`variant` "{self.variant}" is an architecture with random weights, but '
                f'`pretrained_model_name_or_path` "{self.pretrained_model_name_or_path}" has its own: leave one out.'
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            raise ValueError(f"`lora_alpha` {self.lora_alpha} scales adapters, but there are none: set `lora_rank`.")
        for name in ("in_channels", "latent_channels", "num_latent_tokens"):
            if pretrained and getattr(self, name) is not None:
                raise ValueError(f"`{name}` {getattr(self, name)} cannot be changed in a pretrained model.")

    def _check_teacher(self) -> None:
        if self.teacher_model_name_or_path is None:
            if self.distill is not None or self.teacher_subfolder is not None:
                given = f'distill "{self.distill}" and teacher_subfolder "{self.teacher_subfolder}"'
                raise ValueError(f"There is no `teacher_model_name_or_path`, but {given}: name the teacher.")
            return
        if self.distill is None:
            self.distill = "decoder" if self.stage == 2 else "both"
        check_choice(self, "distill", "encoder", "decoder", "both")
        if self.stage == 2 and self.distill == "encoder":
            raise ValueError('`distill` "encoder" trains no decoder, which stage 2 is for: take stage 1.')
        if self.freeze_encoder is not None and self.freeze_encoder != (self.distill == "decoder"):
            remedy = "leave it out"
            raise ValueError(f'`freeze_encoder` is {self.freeze_encoder}, but `distill` "{self.distill}": {remedy}.')
        for name in ("channel_counts", "token_counts", "num_latent_tokens"):
            if getattr(self, name):
                raise ValueError(
                    f"`{name}` {getattr(self, name)} cuts codes, but those of a teacher are whole: leave it out."
                )


@dataclass
class DiTArguments(TransformerArguments):
    """Settings of `DiTTrainer`, the arguments of `vitok train-dit`."""

    lr_scheduler: str = argument("constant", "Schedule of `diffusers.optimization.get_scheduler`.")
    lr_warmup_steps: int = argument(0, "Steps of linear warm-up, if the schedule has any.", minimum=0)
    adam_beta2: float = argument(0.999, "AdamW beta 2.", minimum=0, below=1)
    adam_weight_decay: float = argument(0.0, "AdamW weight decay.", minimum=0)
    use_ema: bool = argument(True, "Keep an exponential moving average of the weights, evaluated and saved too.")
    tracker_project_name: str = argument("vitok-dit", "Project name for the trackers.")
    vae_name_or_path: str | None = argument(None, "The autoencoder: folder, Hub id or bundled name.")
    vae_variant: str | None = argument(None, "Its variant: author's ViTok-v2 weights under another name.")
    num_channels: int | None = argument(
        None, "Train on so many of the first channels, one of the autoencoder's channel_counts.", minimum=1
    )
    variant: str | None = argument(None, "Size of the transformer: S, B, L or XL.")
    model_config: str | None = argument(None, "Architecture by a JSON file; sizes and classes are those of the data.")
    latents_dir: str | None = argument(None, "Instead of `train_data_dir`, what `vitok cache-latents` wrote.")
    class_file: str | None = argument(None, "Classes in the order of their ids, one a line; default: sorted.")
    no_flip_classes: list[str] = argument([], "Classes that are never flipped.")
    class_balanced: bool = argument(False, "Draw every class as often, however many pictures it has.")
    num_statistics_images: int = argument(2048, "Pictures for statistics that the model lacks.", minimum=1)
    prediction_type: str = argument("epsilon", "epsilon, v_prediction or flow_prediction (flow matching).")
    snr_gamma: float | None = argument(None, "Min-SNR weighting (the authors': 5), not for flows.", above=0)
    weighting_scheme: str = argument("logit_normal", "Timesteps of flow matching: logit_normal, or none: uniform.")
    class_dropout: float = argument(0.1, "Share of classes replaced by none, for guidance.", minimum=0, maximum=1)
    validation_data_dir: list[str] = argument([], "Folders of held-out pictures (or videos), with the same classes.")
    num_timestep_buckets: int = argument(10, "Parts of the schedule whose held-out loss is logged apart.", minimum=1)
    num_sample_classes: int = argument(8, "Classes to sample from while training, evenly spaced.", minimum=1)
    num_samples_per_class: int = argument(4, "Samples of each.", minimum=1)
    num_inference_steps: int = argument(25, "Steps of these samples.", minimum=1)
    guidance_scale: float = argument(4.0, "Guidance of these samples.", minimum=1)

    def __post_init__(self):
        super().__post_init__()
        if self.vae_name_or_path is None:
            raise ValueError("Name the autoencoder by `vae_name_or_path`: a folder, Hub id or bundled name.")
        for names in (("variant", "model_config"), ("train_data_dir", "latents_dir")):
            given = {name: getattr(self, name) for name in names}
            if sum(bool(value) for value in given.values()) != 1:
                raise ValueError(f"Set exactly one of {' and '.join(names)}, but they are {given}.")
        check_choice(self, "prediction_type", "epsilon", "v_prediction", "flow_prediction")
        check_choice(self, "weighting_scheme", "logit_normal", "none")
        if self.snr_gamma is not None and self.prediction_type == "flow_prediction":
            raise ValueError(
                f"`snr_gamma` {self.snr_gamma}, but flow matching has none: leave it out, and choose a "
                "`weighting_scheme`."
            )


@dataclass
class ClassifierArguments(TrainerArguments):
    """Settings of `ClassifierTrainer`."""

    output_dir: str = argument("output-classifier", "Folder of checkpoints, logs and the classifier.")
    max_train_steps: int = argument(600, "Optimiser steps.", minimum=1)
    learning_rate: float = argument(2e-3, "Peak learning rate.", minimum=0)
    lr_warmup_steps: int = argument(0, "Steps of linear warm-up, if the schedule has any.", minimum=0)
    adam_beta2: float = argument(0.999, "AdamW beta 2.", minimum=0, below=1)
    adam_weight_decay: float = argument(0.05, "AdamW weight decay.", minimum=0)
    max_grad_norm: float = argument(math.inf, "Gradients are clipped to this norm.", above=0, maximum=math.inf)
    tracker_project_name: str = argument("vitok-classifier", "Project name for the trackers.")
    resolution: int = argument(64, "Side of the pictures in pixels.", minimum=1)
    random_flip: bool = argument(False, "Flip half of the pictures left to right.")
    train_batch_size: int = argument(64, "Pictures in a batch of one process.", minimum=1)
    num_validation_images: int = argument(2048, "Held-out pictures a folder.", minimum=1)
    max_files_per_class: int | None = argument(None, "So many of larger classes, chosen at random.", minimum=1)
