"""Files sent through an autoencoder: reconstructions, comparisons side by side, a line with PSNR and SSIM of each."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.modeling_utils import ModelMixin
from tqdm.auto import tqdm

from ..clips import COLOURS
from ..data.files import ARRAY_SUFFIXES, VIDEO_SUFFIXES, list_files, printable, suffix_of
from ..data.held_out import Codec
from ..data.items import Clip
from ..data.media import load_image, to_channels
from ..data.video import iterate_timed_frames, probe_rate, probe_video
from ..disk import atomic_file
from ..models import AutoencoderViTok
from .autoencoders import padded_frames, spatial_ratio
from .metrics import SSIM_MIN_SIZE, frame_values, psnr, ssim
from .reconstruction import StreamCodec, reconstruct, save_comparison, save_picture, side_by_side
from .visuals import ContactSheet, VideoWriter


MAX_TOKENS = 2**16  # of a frame; with more, all attending to all takes many minutes on a processor
WINDOW_RADIUS = 16
IMAGE_BATCH = 8  # frames of a video that an image model sees at a time, each alone
ENDINGS = (
    *("reconstruction.png", "comparison.png", "reconstruction.npy"),
    *("reconstruction.mp4", "comparison.mp4", "frames.png"),
)


@dataclass(frozen=True)
class CodecSettings:
    """How files go through an autoencoder.

    Args:
        window_radius: Attention is local, if it is not 0; by default, of frames of more than `MAX_TOKENS`.
        max_cached_frames: Latent frames that a causal model sees at most; by default, as many as in a clip of
            `sample_frames`, for which it is trained, so that memory and time do not grow with the video; 0: all.
        lengths: How short the codes of a ViTok are, arguments of its `encode`. A video then goes clip by clip.
    """

    window_radius: int | None = None
    max_cached_frames: int | None = None
    lengths: dict[str, Any] = field(default_factory=dict)

    def check(self, vae: AutoencoderViTok) -> None:
        """Raises `ValueError` for lengths and `max_cached_frames` that the model cannot have."""
        frames = self.max_cached_frames
        if frames is not None and frames < 0:
            raise ValueError(f"`max_cached_frames` must be at least 1, or 0 for all, but is {frames}.")
        if frames is not None and (not vae.config.causal or self.lengths):
            reason = f"with {', '.join(self.lengths)} go" if vae.config.causal else "through models not causal go"
            raise ValueError(
                f"`max_cached_frames` is {frames}, but videos {reason} clip by clip, without a cache: leave it out."
            )
        vae.check_lengths(**self.lengths)


class MeasuredFile:
    """Sends the frames of a file through an autoencoder, clip by clip, and notes PSNR, SSIM and seconds.

    A causal model has seen the clips before, as if they were one. Pictures go through any autoencoder of diffusers.
    """

    def __init__(self, vae: ModelMixin, settings: CodecSettings = CodecSettings()):
        if isinstance(vae, AutoencoderViTok):
            settings.check(vae)
        self.vae, self.settings = vae, settings
        self.codec: Codec | None = None
        self.seconds, self.size, self.num_latents = 0.0, (0, 0), 0
        self.num_frames, self.psnr, self.ssim = 0, 0.0, 0.0  # sums over the frames

    def _note(self, codes: Any) -> Any:
        self.num_latents += sum(code.numel() for code in codes)
        return codes

    @property
    def is_stream(self) -> bool:
        return self.vae.config.causal and not self.settings.lengths

    @property
    def clip_frames(self) -> int:
        """Those of the next clip, if the video has so many."""
        vae = self.vae
        if vae.is_image_model:
            return IMAGE_BATCH
        first = padded_frames(vae, max(vae.config.sample_frames, vae.temporal_compression_ratio))
        return first + vae.config.lead_frames * (self.is_stream and self.num_frames > 0)

    def _make_codec(self, num_tokens: int) -> Codec:
        """For frames of so many tokens."""
        vae, settings, radius = self.vae, self.settings, self.settings.window_radius
        if not isinstance(vae, AutoencoderViTok):
            return lambda clip: reconstruct(vae, clip, self._note, settings.lengths)
        if radius is None:
            is_large = num_tokens > MAX_TOKENS and vae.config.num_latent_tokens is None
            radius = WINDOW_RADIUS if is_large else 0
        if radius:
            vae.enable_sliding_window(radius)
        else:
            vae.disable_sliding_window()
        if not self.is_stream:
            return lambda clip: reconstruct(vae, clip, self._note, settings.lengths)
        seen = settings.max_cached_frames
        seen = vae.config.num_latent_frames(vae.config.sample_frames) if seen is None else seen
        return StreamCodec(vae, self._note, seen or None)

    def reconstruct(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (H, W, C) uint8 -> the clip, (1, C, T, H, W), and its reconstruction."""
        clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
        if self.codec is None:
            self.codec = self._make_codec(clip[0, 0, 0].numel() // spatial_ratio(self.vae) ** 2)
        began = time.perf_counter()
        reconstruction = self.codec(clip)  # on the CPU, hence complete
        self.seconds += time.perf_counter() - began
        self.size = (clip.shape[3], clip.shape[4])
        self.num_frames += len(frames)
        self.psnr += frame_values(psnr, reconstruction, clip).sum().item()
        if min(self.size) >= SSIM_MIN_SIZE:
            self.ssim += frame_values(ssim, reconstruction, clip).sum().item()
        return clip, reconstruction

    def report(self, name: str) -> str:
        (height, width), p = self.size, self.vae.spatial_compression_ratio
        padded = " (padded)" if height % p or width % p else ""
        padded += f" (window of radius {self.vae.window_radius})" if self.vae.window_radius else ""
        similarity = f"needs {SSIM_MIN_SIZE} pixels a side"
        if min(self.size) >= SSIM_MIN_SIZE:
            similarity = f"{self.ssim / self.num_frames:.4f}"
        values = f"PSNR {self.psnr / self.num_frames:.2f} dB  SSIM {similarity}"
        return (
            f"{printable(name)}: {width}x{height}{padded}  {values}  {self.num_latents} numbers  {self.seconds:.2f} s"
        )


def reconstruct_image(file: MeasuredFile, path: Path, target: str) -> str:
    channels = file.vae.config.in_channels
    image, reconstruction = file.reconstruct([load_image(path, channels=channels)])
    pixels = reconstruction[0, :, 0]  # (C, H, W)
    if channels in COLOURS and suffix_of(path.name) not in ARRAY_SUFFIXES:
        save_picture(f"{target}_reconstruction.png", pixels.permute(1, 2, 0).numpy())
    else:
        with atomic_file(f"{target}_reconstruction.npy") as temporary, open(temporary, "wb") as opened:
            np.save(opened, pixels.numpy())
    save_comparison(f"{target}_comparison.png", image, reconstruction)
    return file.report(path.name)


def reconstruct_video(file: MeasuredFile, path: Path, target: str) -> str:
    """Clip by clip, so that the memory does not grow with the length of the video."""
    rate = Fraction(probe_rate(path)).limit_denominator(1001)  # which also tells what is no video
    length = probe_video(path)[0]
    sheet = ContactSheet()
    with ExitStack() as stack:
        names = (f"{target}_{name}.mp4" for name in ("reconstruction", "comparison"))
        writers = [stack.enter_context(VideoWriter(name, rate, path)) for name in names]
        total = round(length * rate)
        progress = tqdm(desc=printable(path.name), total=total, unit="frame", leave=False, disable=None)  # in no log
        bar = stack.enter_context(progress)
        frames = iterate_timed_frames(path)
        while part := list(islice(frames, file.clip_frames)):
            times, pictures = zip(*part)
            channels = file.vae.config.in_channels
            clip, reconstruction = file.reconstruct([to_channels(picture, channels) for picture in pictures])
            writers[0].write(side_by_side(reconstruction), times)
            writers[1].write(side_by_side(clip, reconstruction), times)
            sheet.add(clip, reconstruction)
            bar.update(len(part))
        if not file.num_frames:
            raise ValueError(f'"{path}" holds no video frames: remove or replace it.')
    sheet.save(f"{target}_frames.png")
    return file.report(f"{path.name}, {file.num_frames} frames")


def name_targets(inputs: list[Path], output_dir: Path, channels: int = 3) -> dict[str, Path]:
    """Beginnings of the names of results, and the files that they are made from, those that have these channels.

    Results of an earlier run, in an output folder inside of an input folder, are left out.

    Raises:
        ValueError: If a result would have the name of another result, or of an input.
    """
    targets: dict[str, Path] = {}
    results = output_dir.resolve()
    for path in inputs:
        for file in list_files(path, Clip(channels=channels).suffixes):
            if path.resolve() in results.parents and results in file.resolve().parents:
                continue
            relative = file.relative_to(path) if path.is_dir() else Path(file.name)
            target = output_dir / relative.with_suffix("")
            if str(target) in targets:  # another format, or another folder's
                target = output_dir / relative
            if str(target) in targets:
                raise ValueError(f'"{file}" has the name of another input: name another --output_dir for it.')
            targets[str(target)] = file
    if not targets:
        raise ValueError(f'There is nothing in {", ".join(map(str, inputs))} but results in "{output_dir}".')
    files = {file.resolve() for file in targets.values()}
    for name in targets:
        for ending in ENDINGS:
            if (result := Path(f"{name}_{ending}").resolve()) in files:
                raise ValueError(f'"{result}" is an input and may not be replaced: name another --output_dir.')
    return targets


def reconstruct_file(vae: AutoencoderViTok, path: Path, target: str, settings: CodecSettings = CodecSettings()) -> str:
    """Writes the files whose names begin with `target`; returns a line of numbers.

    Of a picture, its reconstruction and both side by side as PNG; of an array or a stack of channels, the
    reconstruction as .npy, (C, H, W) uint8, and what can be shown of both as PNG; of a video, mp4 files, with its
    times and its sound, and a sheet of frames as PNG. Each is there when it is complete.

    Raises:
        ValueError, OSError: If the file cannot be read, or the settings do not suit the model.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    is_video = suffix_of(path.name) in VIDEO_SUFFIXES
    return (reconstruct_video if is_video else reconstruct_image)(MeasuredFile(vae, settings), path, target)
