"""Held-out quality of an image autoencoder next to PCA, the best linear code of as many numbers a patch.

    python examples/evaluate_demo.py --model vitok-tiny-f8x8 --data_dir data --output_dir evaluation

`data` is what prepare_demo_data.py builds: PCA is fitted on `train`, both are measured on `test`. Prints PSNR and SSIM
of film, photos and emoji, the visibility of the patch grid, and the dependence on the size of the picture; saves
comparisons (original, ViTok, PCA).
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import run_command
from vitok_hf.data.files import IMAGE_SUFFIXES, list_files
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.media import evenly_spaced, load_image
from vitok_hf.data.views import CropView
from vitok_hf.evaluation.metrics import psnr, ssim
from vitok_hf.evaluation.pca import PatchPCA
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction, patch_border_ratio, reconstruct_in_tiles
from vitok_hf.precision import DTYPES, choose_dtype


TEST_SETS = [
    ("film", 256),
    ("photos", 256),
    ("emoji", 256),
    ("emoji", 128),
    ("emoji", 64),
    ("film", 512),
    ("photos", 512),
]
TILES = [(64, 64), (128, 128), (256, 256), (512, 512), (128, 512), (512, 128)]
TRAIN_WEIGHTS = {"film": 0.45, "photos": 0.2, "clip": 0.05, "emoji": 0.3}


def full_resolution_crops(folder: Path, side: int, limit: int) -> torch.Tensor:
    """Central crops without any resizing, (N, 3, side, side) uint8; smaller pictures are left out."""
    files = list_files(folder, IMAGE_SUFFIXES)
    files = [files[index] for index in evenly_spaced(len(files), limit)]
    crops = []
    for picture in map(load_image, files):
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        if min(top, left) >= 0:
            crops.append(picture[top : top + side, left : left + side])
    if not crops:
        raise ValueError(f'"{folder}" has no picture of {side} x {side} pixels or more: add some.')
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()


def print_row(name: str, images: torch.Tensor, vae: AutoencoderViTok, pca: PatchPCA) -> tuple[torch.Tensor, ...]:
    metrics, ours = evaluate_reconstruction(vae, images)
    linear = pca.reconstruct(images)
    linear_psnr, linear_ssim = psnr(linear, images).mean().item(), ssim(linear, images).mean().item()
    print(
        f"| {name} | {len(images)} | {metrics['psnr']:.2f} | {linear_psnr:.2f} | {metrics['psnr'] - linear_psnr:+.2f} "
        f"| {metrics['ssim']:.3f} | {linear_ssim:.3f} | {patch_border_ratio(images, ours, pca.patch_size):.3f} |",
        flush=True,
    )
    return images, ours, linear


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="what `from_pretrained` takes")
    parser.add_argument("--data_dir", type=Path, required=True, help="output of prepare_demo_data.py")
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--limit", type=int, default=200, help="pictures a set")
    parser.add_argument("--pca_batches", type=int, default=40, help="batches of 2 ** 20 training pixels for PCA")
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    args = parser.parse_args()

    vae = AutoencoderViTok.from_pretrained(args.model, dtype=getattr(torch, choose_dtype(args.dtype)))
    vae = vae.to(PartialState().default_device)
    p = vae.config.patch_size
    sources = [f"{args.data_dir}/train/{name}:{weight}" for name, weight in TRAIN_WEIGHTS.items()]
    crops = make_dataset(CropView([(128, 128, 1.0)], 2**20), SourceSettings(sources), seed=1)
    pca = PatchPCA(p, vae.config.latent_channels, iterate_pixels(crops, args.pca_batches))

    args.output_dir.mkdir(parents=True, exist_ok=True)
    print("| test set | pictures | PSNR | PCA | gain | SSIM | PCA | border/inner error |")
    print("|---|---|---|---|---|---|---|---|")
    for name, size in TEST_SETS:
        images = load_evaluation_images(args.data_dir / "test" / name, size, args.limit if size < 512 else 15)
        rows = [x[:: max(1, len(images) // 6)][:6] for x in print_row(f"{name}, {size} px", images, vae, pca)]
        grid = rearrange(rows, "columns b c h w -> (b h) (columns w) c").numpy()
        Image.fromarray(grid).save(args.output_dir / f"{name}_{size}.png")

    print("\n| full-resolution crops | " + " | ".join(f"{height}x{width}" for height, width in TILES) + " |")
    print("|---|" + "---|" * len(TILES))
    for name in ("film", "photos"):
        images = full_resolution_crops(args.data_dir / "test" / name, 512, 8)
        cells = []
        for height, width in TILES:
            tiles = reconstruct_in_tiles(vae, images, height, width, batch_size=max(1, 2**18 // (height * width)))
            cells.append(f"{psnr(tiles, images).mean():.2f} ({patch_border_ratio(images, tiles, p):.3f})")
        print(f"| {name}, {len(images)} crops of 512 px | " + " | ".join(cells) + " |", flush=True)
    print("\nPSNR in dB when every tile of that size goes through alone; in brackets border/inner error.")


if __name__ == "__main__":
    run_command(main)
