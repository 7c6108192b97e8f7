"""Sends pictures or videos through an autoencoder: reconstructions, comparisons side by side, PSNR and SSIM.

    python examples/reconstruct.py                                  # a bundled checkpoint on a shipped photograph
    python examples/reconstruct.py --input holiday.jpg film.mp4 folder/ --model MODEL --output_dir out

MODEL is whatever `AutoencoderViTok.from_pretrained` takes. Sizes that do not fit the patches are padded by repeating
the last rows and columns, and cropped back. Files that cannot be read are named at the end, and the exit code is 1.
"""

import argparse
import sys
import time
from contextlib import ExitStack
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image

from vitok_hf import AutoencoderViTok
from vitok_hf.clips import fold_frames
from vitok_hf.commands import run_command
from vitok_hf.data.files import VIDEO_SUFFIXES, list_files, printable, read_each, suffix_of
from vitok_hf.data.media import load_image
from vitok_hf.data.video import iterate_timed_frames, probe_rate
from vitok_hf.evaluation.metrics import SSIM_MIN_SIZE, psnr, ssim
from vitok_hf.evaluation.reconstruction import reconstruct, save_comparison, side_by_side
from vitok_hf.evaluation.visuals import VideoWriter
from vitok_hf.precision import DTYPES, choose_dtype


def timed_reconstruction(vae: AutoencoderViTok, images: torch.Tensor) -> tuple[torch.Tensor, float]:
    began = time.perf_counter()
    reconstructions = reconstruct(vae, images)  # on the CPU, hence complete
    return reconstructions, time.perf_counter() - began


def report(name: str, size: torch.Size, scores: list[tuple[torch.Tensor, ...]], seconds: float, p: int) -> None:
    height, width = size
    padded = " (padded)" if height % p or width % p else ""
    mean_psnr, mean_ssim = (torch.cat(values).mean() for values in zip(*scores))
    similarity = f"{mean_ssim:.4f}" if min(height, width) >= SSIM_MIN_SIZE else f"needs {SSIM_MIN_SIZE} pixels a side"
    print(f"{printable(name)}: {width}x{height}{padded}  PSNR {mean_psnr:.2f} dB  SSIM {similarity}  {seconds:.2f} s")


def measure(reconstructions: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PSNR and SSIM of each picture, (B,); no numbers for the SSIM of pictures that are too small for it."""
    psnrs = psnr(reconstructions, images)
    fits = min(images.shape[2:]) >= SSIM_MIN_SIZE
    return psnrs, ssim(reconstructions, images) if fits else torch.full_like(psnrs, torch.nan)


def reconstruct_image(vae: AutoencoderViTok, path: Path, target: str) -> None:
    image = torch.from_numpy(load_image(path).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
    reconstruction, seconds = timed_reconstruction(vae, image)
    Image.fromarray(reconstruction[0].permute(1, 2, 0).numpy()).save(f"{target}_reconstruction.png")
    save_comparison(f"{target}_comparison.png", image, reconstruction)
    scores = [measure(reconstruction, image)]
    report(path.name, image.shape[2:], scores, seconds, vae.spatial_compression_ratio)


def reconstruct_video(vae: AutoencoderViTok, path: Path, target: str) -> None:
    """Clip by clip, so that the memory does not grow with the length of the video."""
    clip_frames = 8 if vae.is_image_model else max(vae.config.sample_frames, vae.temporal_compression_ratio)
    scores, seconds = [], 0.0
    rate = Fraction(probe_rate(path)).limit_denominator(1001)  # which also tells what is no video
    with ExitStack() as stack:
        names = (f"{target}_{name}.mp4" for name in ("reconstruction", "comparison"))
        writers = [stack.enter_context(VideoWriter(name, rate)) for name in names]
        frames = iterate_timed_frames(path)
        while clip := list(islice(frames, clip_frames)):
            times, pictures = zip(*clip)
            video = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)[None]  # (1, 3, T, H, W)
            reconstruction, elapsed = timed_reconstruction(vae, video)
            seconds += elapsed
            pair = fold_frames(video), fold_frames(reconstruction)  # (T, 3, H, W)
            scores.append(measure(pair[1], pair[0]))
            writers[0].write(pair[1].permute(0, 2, 3, 1), times)
            writers[1].write(side_by_side(*pair), times)
        if not scores:
            raise ValueError(f'"{path}" holds no video frames: remove or replace it.')
    name = f"{path.name}, {sum(len(values) for values, _ in scores)} frames"
    report(name, video.shape[3:], scores, seconds, vae.spatial_compression_ratio)


def name_targets(inputs: list[Path], output_dir: Path) -> dict[str, Path]:
    """Beginnings of the names of results, and the files that they are made from.

    Results of an earlier run, in an output folder inside of an input folder, are left out.

    Raises:
        ValueError: If a result would have the name of another result, or of an input.
    """
    targets, results = {}, output_dir.resolve()
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
    for target in targets:
        for name in ("reconstruction.png", "comparison.png", "reconstruction.mp4", "comparison.mp4"):
            if (result := Path(f"{target}_{name}").resolve()) in files:
                raise ValueError(f'"{result}" is an input and may not be replaced: name another --output_dir.')
    return targets


def main():
    assets = Path(__file__).parent / "assets"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--input", nargs="+", type=Path, default=[assets / "astronaut.png"], help="pictures, videos, folders"
    )
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="folder, Hub id or bundled name")
    parser.add_argument("--subfolder", help="folder of the model inside --model")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--output_dir", type=Path, default=Path("reconstructions"))
    args = parser.parse_args()

    target_files = name_targets(args.input, args.output_dir)
    dtype = getattr(torch, choose_dtype(args.dtype))
    vae = AutoencoderViTok.from_pretrained(args.model, subfolder=args.subfolder, dtype=dtype)
    vae = vae.to(PartialState().default_device)
    config = vae.config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    parameters = sum(parameter.numel() for parameter in vae.parameters()) / 1e6
    ratio = values / config.latent_channels
    print(f"{args.model}: {parameters:.1f} M parameters; {values} values become {config.latent_channels}, {ratio:g}:1")

    def reconstruct_file(target: str) -> None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        is_video = suffix_of(target_files[target].name) in VIDEO_SUFFIXES
        (reconstruct_video if is_video else reconstruct_image)(vae, target_files[target], target)

    failures = read_each(target_files, reconstruct_file)
    print(f"Reconstructions and comparisons (original left) are in {args.output_dir}/")
    if failures:
        sys.exit("\n".join([f"{len(failures)} of {len(target_files)} files failed:", *failures]))


if __name__ == "__main__":
    run_command(main)
