"""Judges by rules whether the clips that a pipeline generates show the motion that they were asked for.

    python examples/evaluate_motion.py --pipeline output-dit/pipeline --data_dir clips/test --output_dir motion

The pipeline was trained on the clips of prepare_moving_clips.py. The judge looks only at what is not white: where its
centre moves, whether it grows, and, if neither, whether the last frame is the first one turned. It is tried on
held-out clips and on their reconstructions before the generated ones. Prints the share of clips in which each motion
was seen, and saves pictures: frames.png, for each class the first held-out clip and the first sample, and samples.mp4
with all samples.
"""

import argparse
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from demo_data.motion import judge
from einops import rearrange
from PIL import Image
from prepare_moving_clips import FPS, MOTIONS
from torch.nn import functional as F

from vitok_hf import ViTokDiTPipeline
from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction
from vitok_hf.evaluation.visuals import VideoWriter


LINES = 208  # grey, around the frames of a picture


def generate(pipe: ViTokDiTPipeline, motion: str, args: argparse.Namespace) -> torch.Tensor:
    """(N, 3, T, H, W) uint8; sample i of a class has the seed args.seed + i."""
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(args.num_samples)]
    frames = pipe(
        motion,
        guidance_scale=args.guidance_scale,
        num_inference_steps=args.num_inference_steps,
        num_images_per_label=args.num_samples,
        generator=generators,
        output_type="pt",
    ).frames  # (N, T, 3, H, W) in [0, 1]
    return (frames.transpose(1, 2).float() * 255).round().to("cpu", torch.uint8)


def save_pictures(real: dict[str, torch.Tensor], samples: dict[str, torch.Tensor], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    strips = []
    for clips in (real, samples):
        firsts = F.pad(torch.stack([clips[name][0] for name in samples]), (1, 1, 1, 1), value=LINES)
        strips.append(rearrange(firsts, "k c t h w -> (k h) (t w) c"))
    gap = torch.full((len(strips[0]), 8, 3), 255, dtype=torch.uint8)
    grid = torch.cat([strips[0], gap, strips[1]], dim=1)
    Image.fromarray(grid.numpy()).save(folder / "frames.png", optimize=True)
    with VideoWriter(folder / "samples.mp4", Fraction(FPS)) as video:
        video.write(rearrange(list(samples.values()), "k n c t h w -> t (k h) (n w) c"))


def main():
    parser = make_parser("evaluate_motion.py", __doc__)
    parser.add_argument("--pipeline", required=True, help="folder that train_dit.py wrote")
    parser.add_argument("--data_dir", type=Path, required=True, help="held-out clips, a folder for each class")
    parser.add_argument("--limit", type=int, default=20, help="held-out clips a class")
    parser.add_argument("--num_samples", type=int, default=16, help="samples a class")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("motion"))
    args = parser.parse_args()

    pipe = ViTokDiTPipeline.from_pretrained(args.pipeline).to(PartialState().default_device)
    if unknown := set(pipe.labels) - set(MOTIONS):
        raise ValueError(f'"{args.pipeline}" has classes {sorted(unknown)}, but the judge knows {", ".join(MOTIONS)}.')
    pipe.set_progress_bar_config(disable=True)
    size, frames = (getattr(pipe.vae.config, name) for name in ("sample_size", "sample_frames"))
    real, samples, shares, psnrs = {}, {}, [], []
    print("| asked for | held-out | reconstructed | generated | seen in generated clips |\n|---|---|---|---|---|")
    for motion in pipe.labels:
        real[motion] = load_evaluation_images(args.data_dir / motion, size, args.limit, frames)
        metrics, reconstructions = evaluate_reconstruction(pipe.vae, real[motion])
        samples[motion] = generate(pipe, motion, args)
        seen = [[judge(clip) for clip in clips] for clips in (real[motion], reconstructions, samples[motion])]
        shares.append([names.count(motion) / len(names) for names in seen])
        psnrs.append(metrics["psnr"])
        counts = ", ".join(f"{name} {seen[2].count(name)}" for name in (*MOTIONS, "none") if name in seen[2])
        print(f"| {motion} | " + " | ".join(f"{share:.2f}" for share in shares[-1]) + f" | {counts} |", flush=True)
    print("| mean | " + " | ".join(f"{share:.2f}" for share in np.mean(shares, axis=0)) + " | |")
    psnr = np.average(psnrs, weights=[len(clips) for clips in real.values()])
    print(f"\nPSNR of the reconstructions: {psnr:.2f} dB")
    save_pictures(real, samples, args.output_dir)


if __name__ == "__main__":
    run_command(main)
