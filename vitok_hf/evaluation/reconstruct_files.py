"""Files sent through an autoencoder: reconstructions, comparisons side by side, a line with PSNR and SSIM of each."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.files import VIDEO_SUFFIXES, list_files, printable, suffix_of
from ..data.media import load_image
from ..data.video import iterate_timed_frames, probe_rate
from ..models import AutoencoderViTok
from .autoencoders import padded_frames
from .metrics import SSIM_MIN_SIZE, frame_values, psnr, ssim
from .reconstruction import reconstruct, save_comparison, side_by_side
from .visuals import VideoWriter


MAX_TOKENS = 2**16  # of a frame; with more, all attending to all takes many minutes on a processor
WINDOW_RADIUS = 16


class MeasuredFile:
    """Sends the frames of a file through an autoencoder, clip by clip, and notes PSNR, SSIM and seconds."""

    def __init__(self, vae: AutoencoderViTok, window_radius: int | None = None, lengths: dict[str, Any] | None = None):
        self.vae, self.window_radius, self.lengths = vae, window_radius, lengths
        self.seconds, self.size, self.num_latents = 0.0, (0, 0), 0
        self.psnrs: list[torch.Tensor] = []  # (T,) each
        self.ssims: list[torch.Tensor] = []

    def _note(self, codes: Any) -> Any:
        self.num_latents += sum(code.numel() for code in codes)
        return codes

    def reconstruct(self, frames: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Frames (H, W, 3) uint8 -> the clip, (1, 3, T, H, W), and its reconstruction."""
        clip = torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None]
        num_tokens = clip[0, 0, 0].numel() // self.vae.spatial_compression_ratio**2
        radius = self.window_radius
        if radius is None:
            is_large = num_tokens > MAX_TOKENS and self.vae.config.num_latent_tokens is None
            radius = WINDOW_RADIUS if is_large else 0
        if radius:
            self.vae.enable_sliding_window(radius)
        else:
            self.vae.disable_sliding_window()
        began = time.perf_counter()
        reconstruction = reconstruct(self.vae, clip, self._note, self.lengths)  # on the CPU, hence complete
        self.seconds += time.perf_counter() - began
        self.size = (clip.shape[3], clip.shape[4])
        self.psnrs += frame_values(psnr, reconstruction, clip)
        if min(self.size) >= SSIM_MIN_SIZE:
            self.ssims += frame_values(ssim, reconstruction, clip)
        return clip, reconstruction

    def report(self, name: str) -> str:
        (height, width), p = self.size, self.vae.spatial_compression_ratio
        padded = " (padded)" if height % p or width % p else ""
        padded += f" (window of radius {self.vae.window_radius})" if self.vae.window_radius else ""
        similarity = f"{torch.cat(self.ssims).mean():.4f}" if self.ssims else f"needs {SSIM_MIN_SIZE} pixels a side"
        values = f"PSNR {torch.cat(self.psnrs).mean():.2f} dB  SSIM {similarity}"
        return (
            f"{printable(name)}: {width}x{height}{padded}  {values}  {self.num_latents} numbers  {self.seconds:.2f} s"
        )


def reconstruct_image(file: MeasuredFile, path: Path, target: str) -> str:
    image, reconstruction = file.reconstruct([load_image(path)])
    Image.fromarray(side_by_side(reconstruction)[0].numpy()).save(f"{target}_reconstruction.png")
    save_comparison(f"{target}_comparison.png", image, reconstruction)
    return file.report(path.name)


def reconstruct_video(file: MeasuredFile, path: Path, target: str) -> str:
    """Clip by clip, so that the memory does not grow with the length of the video."""
    vae = file.vae
    least = max(vae.config.sample_frames, vae.temporal_compression_ratio)
    clip_frames = 8 if vae.is_image_model else padded_frames(vae, least)
    rate = Fraction(probe_rate(path)).limit_denominator(1001)  # which also tells what is no video
    with ExitStack() as stack:
        names = (f"{target}_{name}.mp4" for name in ("reconstruction", "comparison"))
        writers = [stack.enter_context(VideoWriter(name, rate)) for name in names]
        frames = iterate_timed_frames(path)
        while part := list(islice(frames, clip_frames)):
            times, pictures = zip(*part)
            clip, reconstruction = file.reconstruct(pictures)
            writers[0].write(side_by_side(reconstruction), times)
            writers[1].write(side_by_side(clip, reconstruction), times)
        if not file.psnrs:
            raise ValueError(f'"{path}" holds no video frames: remove or replace it.')
    return file.report(f"{path.name}, {sum(map(len, file.psnrs))} frames")


def name_targets(inputs: list[Path], output_dir: Path) -> dict[str, Path]:
    """Beginnings of the names of results, and the files that they are made from.

    Results of an earlier run, in an output folder inside of an input folder, are left out.

    Raises:
        ValueError: If a result would have the name of another result, or of an input.
    """
    targets: dict[str, Path] = {}
    results = output_dir.resolve()
    for path in inputs:
        for file in list_files(path):
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
        for ending in ("reconstruction.png", "comparison.png", "reconstruction.mp4", "comparison.mp4"):
            if (result := Path(f"{name}_{ending}").resolve()) in files:
                raise ValueError(f'"{result}" is an input and may not be replaced: name another --output_dir.')
    return targets


def reconstruct_file(
    vae: AutoencoderViTok,
    path: Path,
    target: str,
    window_radius: int | None = None,
    lengths: dict[str, Any] | None = None,
) -> str:
    """Writes the files whose names begin with `target`; returns a line of numbers. `lengths`: see `reconstruct`.

    Attention is local with a `window_radius` that is not 0; by default of frames of more than `MAX_TOKENS`.

    Raises:
        ValueError, OSError: If the file cannot be read.
    """
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    is_video = suffix_of(path.name) in VIDEO_SUFFIXES
    file = MeasuredFile(vae, window_radius, lengths)
    return (reconstruct_video if is_video else reconstruct_image)(file, path, target)
