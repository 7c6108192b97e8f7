"""What the demo computes: of files and numbers, pictures and numbers. Nothing here knows how they are shown."""

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.models.modeling_utils import ModelMixin

from ..data.files import VIDEO_SUFFIXES, suffix_of
from ..data.media import load_image
from ..evaluation.generation import generate_samples
from ..evaluation.metrics import SSIM_MIN_SIZE
from ..evaluation.reconstruct_files import CodecSettings, MeasuredFile, reconstruct_video
from ..evaluation.visuals import error_map
from ..models import AutoencoderViTok
from ..pipelines import ViTokDiTPipeline
from ..pipelines.pipeline_vitok_dit import GUIDANCE


ALL = 0  # in place of a length of codes

Lengths = dict[str, int]


@dataclass(frozen=True)
class Picture:
    """A picture that went through an autoencoder.

    Args:
        original, reconstruction: (H, W, 3) uint8.
        errors: Where they differ, (H, W, 3) uint8, four times as bright.
        file: PSNR, size of the code and seconds.
    """

    original: np.ndarray
    reconstruction: np.ndarray
    errors: np.ndarray
    file: MeasuredFile


def code_lengths(vae: ModelMixin) -> dict[str, list[int]]:
    """Arguments of `encode` that cut its codes, with the numbers that may be chosen; `ALL` leaves codes whole."""
    if not isinstance(vae, AutoencoderViTok):
        return {}
    config, lengths = vae.config, {}
    if config.channel_counts is not None:
        lengths["num_channels"] = [*config.channel_counts[:-1], ALL]
    if config.token_counts is not None:
        counts = config.token_counts if config.num_latent_tokens is None else config.token_counts[:-1]
        lengths["num_tokens"] = [*counts, ALL]
    return lengths


def is_video(path: str) -> bool:
    return suffix_of(path) in VIDEO_SUFFIXES


def _settings(lengths: Lengths) -> CodecSettings:
    return CodecSettings(lengths={name: count for name, count in lengths.items() if count != ALL})


def send_picture(vae: ModelMixin, path: str, lengths: Lengths) -> Picture:
    """A picture through any autoencoder of diffusers.

    Raises:
        ValueError: If the file is no picture, or the model has no such lengths.
    """
    file = MeasuredFile(vae, _settings(lengths))
    original, reconstruction = file.reconstruct([load_image(path, Path(path).name)])
    errors = error_map(reconstruction, original)
    original, reconstruction, errors = (x[0, :, 0].permute(1, 2, 0) for x in (original, reconstruction, errors))
    return Picture(original.numpy(), reconstruction.numpy(), errors.numpy(), file)


def send_video(vae: AutoencoderViTok, path: str, lengths: Lengths) -> tuple[str, str, MeasuredFile]:
    """A video through a ViTok: files with the original left of its reconstruction, and with some frames of both.

    They are in a new folder beside the video. Raises `ValueError` without the folder's name if that cannot be read.
    """
    folder = Path(path).parent
    target = str(Path(tempfile.mkdtemp(dir=folder), "video"))
    file = MeasuredFile(vae, _settings(lengths))
    try:
        reconstruct_video(file, Path(path), target)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{folder}/", "")) from error
    return f"{target}_comparison.mp4", f"{target}_frames.png", file


def describe(name: str, file: MeasuredFile) -> str:
    """A line in Markdown; in a video, PSNR and SSIM are means over its frames."""
    (height, width), frames = file.size, file.num_frames
    size = f"{width} x {height}" + (f", {frames} frames" if frames > 1 else "")
    similarity = f"{file.ssim / frames:.3f}" if min(file.size) >= SSIM_MIN_SIZE else f"needs {SSIM_MIN_SIZE} pixels"
    ratio = 3 * height * width * frames / file.num_latents
    return (
        f"**{name}** ({size}): PSNR **{file.psnr / frames:.2f} dB**, SSIM {similarity}; its code is "
        f"**{2 * file.num_latents:,} bytes** at 16 bits a number, one number for {ratio:.1f} of the picture; "
        f"{file.seconds:.2f} seconds."
    )


def generation_defaults(pipe: ViTokDiTPipeline) -> dict[str, Any]:
    """Steps and guidance that a call takes by itself."""
    steps = inspect.signature(type(pipe).__call__).parameters["num_inference_steps"].default
    return {"num_inference_steps": steps} | {name: pipe._default(name) for name in GUIDANCE}


def classes_of(pipe: ViTokDiTPipeline) -> list[tuple[str, int]]:
    """Names and ids of the classes, "no class" last; of those without a name, the id is the name."""
    names, count = pipe.config.id2label, pipe.transformer.config.num_classes
    return [*((names.get(index, str(index)), index) for index in range(count)), ("no class", count)]


def draw(
    pipe: ViTokDiTPipeline,
    class_id: int,
    count: int,
    seed: int,
    options: dict[str, Any],
    on_step: Callable[[int], object] = lambda step: None,
) -> Sequence[np.ndarray]:
    """`count` pictures of a class, (H, W, 3) uint8 each, as `vitok generate` draws them.

    Args:
        pipe: Makes pictures, no videos.
        class_id: Class of all of them.
        count: How many.
        seed: Of the first; the next ones follow.
        options: Further arguments of the pipeline's call.
        on_step: Called after each step with the number of those that are done.

    Raises:
        ValueError: If an option is out of its range.
    """

    def callback(pipe: Any, step: int, timestep: Any, tensors: Any) -> dict[str, Any]:
        on_step(step + 1)
        return {}

    images = generate_samples(pipe, [class_id] * count, count, seed, **options, callback_on_step_end=callback)
    return [*images.permute(0, 2, 3, 1).numpy()]
