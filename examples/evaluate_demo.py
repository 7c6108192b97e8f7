"""Held-out quality of an image autoencoder next to PCA, the best linear code of as many numbers a patch.

    python examples/evaluate_demo.py --model vitok-tiny-f8x8 --data_dir data --output_dir evaluation

`data` is what prepare_demo_data.py builds: PCA is fitted on `train`, both are measured on `test`. Prints PSNR and SSIM
of film, photos and emoji, the visibility of the patch grid, and the dependence on the size of the picture; saves
comparisons (original, ViTok, PCA).
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from studies.baselines import PatchPCA

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.data.files import IMAGE_SUFFIXES, list_files
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.media import evenly_spaced, load_image
from vitok_hf.data.views import CropView
from vitok_hf.evaluation.metrics import ROUNDING_ERROR, frame_values, psnr, ssim
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction, reconstruct, side_by_side
from vitok_hf.precision import choose_dtype


TEST_SETS = [("film", 256), ("photos", 256), ("emoji", 256), ("emoji", 128), ("emoji", 64)]
TEST_SETS += [("film", 512), ("photos", 512)]
TILES = [(64, 64), (128, 128), (256, 256), (512, 512), (128, 512), (512, 128)]
TRAIN_WEIGHTS = {"film": 0.45, "photos": 0.2, "clip": 0.05, "emoji": 0.3}


def patch_border_ratio(images: torch.Tensor, reconstructions: torch.Tensor, patch_size: int) -> float:
    """Mean squared error in the outermost columns and rows of the patches over that in the inner ones.

    1 means no patch grid. `images` and `reconstructions`: (B, 3, T, H, W) uint8, with H and W multiples of
    `patch_size`, of 3 pixels or more. Errors below those of rounding count as these, as for PSNR: of equal pictures it
    is 1.
    """
    error = (images.double() - reconstructions.double()).square()
    error = rearrange(error, "b c t (h p) (w r) -> p r (b c t h w)", p=patch_size, r=patch_size).mean(dim=-1)
    columns, rows = error.mean(dim=0), error.mean(dim=1)
    outer = columns[[0, -1]].mean() + rows[[0, -1]].mean()
    inner = columns[1:-1].mean() + rows[1:-1].mean()
    return (outer.clamp(min=2 * ROUNDING_ERROR) / inner.clamp(min=2 * ROUNDING_ERROR)).item()


def reconstruct_in_tiles(vae: AutoencoderViTok, images: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Reconstructs every tile of `height` x `width` pixels alone: how much does quality depend on the size?"""
    sizes = {"i": images.shape[3] // height, "j": images.shape[4] // width}
    tiles = rearrange(images, "b c t (i h) (j w) -> (b i j) c t h w", **sizes)
    batches = tiles.split(max(1, 2**18 // (height * width)))
    tiles = torch.cat([reconstruct(vae, batch) for batch in batches])
    return rearrange(tiles, "(b i j) c t h w -> b c t (i h) (j w)", **sizes)


def full_resolution_crops(folder: Path, side: int, limit: int) -> torch.Tensor:
    """Central crops without any resizing, (N, 3, 1, side, side) uint8; smaller pictures are left out."""
    files = list_files(folder, IMAGE_SUFFIXES)
    crops = []
    for picture in (load_image(files[index]) for index in evenly_spaced(len(files), limit)):
        top, left = ((length - side) // 2 for length in picture.shape[:2])
        if min(top, left) >= 0:
            crops.append(torch.tensor(picture[top : top + side, left : left + side]))
    if not crops:
        raise ValueError(f'"{folder}" has no picture of {side} x {side} pixels or more: add some.')
    return rearrange(crops, "n h w c -> n c 1 h w")


def print_row(name: str, images: torch.Tensor, vae: AutoencoderViTok, pca: PatchPCA) -> tuple[torch.Tensor, ...]:
    ours, reconstructions = evaluate_reconstruction(vae, images)
    linear = pca.reconstruct(images)
    of_pca = {metric.__name__: frame_values(metric, linear, images).mean().item() for metric in (psnr, ssim)}
    print(
        f"| {name} | {len(images)} | {ours['psnr']:.2f} | {of_pca['psnr']:.2f} | {ours['psnr'] - of_pca['psnr']:+.2f} "
        f"| {ours['ssim']:.3f} | {of_pca['ssim']:.3f} "
        f"| {patch_border_ratio(images, reconstructions, pca.patch_size):.3f} |",
        flush=True,
    )
    return images, reconstructions, linear


def main():
    parser = make_parser("evaluate_demo.py", __doc__)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="what `from_pretrained` takes")
    parser.add_argument("--data_dir", type=Path, required=True, help="output of prepare_demo_data.py")
    add_dtype(parser)
    parser.add_argument("--limit", type=int, default=200, help="pictures a set")
    parser.add_argument("--pca_batches", type=int, default=40, help="batches of 2 ** 20 training pixels for PCA")
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    evaluate(parser.parse_args())


def evaluate(args: argparse.Namespace) -> None:
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
        Image.fromarray(side_by_side(*rows).flatten(0, 1).numpy()).save(args.output_dir / f"{name}_{size}.png")

    print("\n| full-resolution crops | " + " | ".join(f"{height}x{width}" for height, width in TILES) + " |")
    print("|---|" + "---|" * len(TILES))
    for name in ("film", "photos"):
        images = full_resolution_crops(args.data_dir / "test" / name, 512, 8)
        cells = []
        for height, width in TILES:
            tiles = reconstruct_in_tiles(vae, images, height, width)
            cells.append(f"{psnr(tiles, images).mean():.2f} ({patch_border_ratio(images, tiles, p):.3f})")
        print(f"| {name}, {len(images)} crops of 512 px | " + " | ".join(cells) + " |", flush=True)
    print("\nPSNR in dB when every tile of that size goes through alone; in brackets border/inner error.")


if __name__ == "__main__":
    run_command(main)
