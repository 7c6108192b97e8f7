r"""Compares reconstructions by several models: what a GAN loss gains, and what it costs.

    python examples/evaluate_sharpness.py --models vitok-tiny-f8x8 output/vae --data_dir data/test/film \
        --classifier output-classifier/classifier/classifier.safetensors --output_dir sharpness

Prints PSNR and SSIM; the energy of high frequencies, of a picture minus its binomial blur, over that of the originals
(1: as sharp, less: blurred); and the Frechet distance to the originals of the features of a classifier that
train_classifier.py trained, over tiles of `--crop` pixels. Saves enlarged details: original, then each model.
"""

from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange
from PIL import Image
from torch.nn import functional as F

from vitok_hf import AutoencoderViTok
from vitok_hf.clips import fold_frames
from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.files import short_names
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.evaluation.features import Classifier
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction


def high_frequency_energy(images: torch.Tensor) -> float:
    """Mean square of uint8 pictures (B, C, T, H, W), in units of 255, minus their blur by (1, 2, 1) / 4 on both axes.

    The ratio to that of the originals tells how sharp reconstructions are: 1 is as sharp, less is blurred.
    """
    pixels = fold_frames(images).float() / 255.0
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4.0
    kernel = torch.outer(kernel, kernel).expand(pixels.shape[1], 1, 3, 3)
    blurred = F.conv2d(pixels, kernel, groups=pixels.shape[1])
    return (pixels[..., 1:-1, 1:-1] - blurred).square().mean().item()


def cut(images: torch.Tensor, side: int) -> torch.Tensor:
    """(N, 3, 1, H, W) -> all its tiles of `side` pixels."""
    height, width = (length // side * side for length in images.shape[3:])
    return rearrange(images[..., :height, :width], "n c t (i h) (j w) -> (n i j) c t h w", h=side, w=side)


def save_details(path: Path, columns: list[torch.Tensor], side: int, scale: int = 4) -> None:
    """Of each of the first pictures, the crop with the highest energy, enlarged."""
    rows = []
    for index in range(min(6, len(columns[0]))):
        tiles = [cut(images[index : index + 1], side) for images in columns]
        best = int(np.argmax([high_frequency_energy(tile[None]) for tile in tiles[0]]))
        rows.append(torch.cat([tile[best, :, 0] for tile in tiles], dim=2))  # (3, side, columns * side)
    grid = torch.cat(rows, dim=1).permute(1, 2, 0).numpy()
    size = (grid.shape[1] * scale, grid.shape[0] * scale)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).resize(size, Image.Resampling.NEAREST).save(path)


def main():
    parser = make_parser("evaluate_sharpness.py", __doc__)
    parser.add_argument("--models", nargs="+", required=True, help="what `from_pretrained` takes")
    parser.add_argument("--data_dir", nargs="+", type=Path, required=True, help="folders of held-out pictures")
    parser.add_argument(
        "--classifier", type=Path, help="output of train_classifier.py; without it, no Frechet distance"
    )
    parser.add_argument("--resolution", type=int, default=256, help="shorter side in pixels; the centre is cropped")
    parser.add_argument(
        "--crop", type=int, default=64, help="side of the crops for the Frechet distance and the details"
    )
    parser.add_argument("--limit", type=int, default=100, help="pictures a folder")
    parser.add_argument("--output_dir", type=Path, default=Path("sharpness"))
    args = parser.parse_args()
    if not 0 < args.crop <= args.resolution:
        raise ValueError(f"--crop must be from 1 to --resolution {args.resolution}, but is {args.crop}.")

    device = PartialState().default_device
    models = {name: AutoencoderViTok.from_pretrained(name).to(device).eval() for name in args.models}
    classifier = Classifier.load(args.classifier).to(device) if args.classifier else None
    print("| pictures | model | PSNR | SSIM | high frequencies | Frechet distance |\n|---|---|---|---|---|---|")
    for folder, folder_name in zip(args.data_dir, short_names(args.data_dir)):
        images = load_evaluation_images(folder, args.resolution, args.limit)
        originals, columns = cut(images, args.crop), [images]
        for name, vae in models.items():
            metrics, reconstructions = evaluate_reconstruction(vae, images)
            columns.append(reconstructions)
            energies = high_frequency_energy(reconstructions), high_frequency_energy(images)
            energy = f"{energies[0] / energies[1]:.3f}" if energies[1] else ""  # flat pictures have none
            distance = ""
            if classifier is not None:
                tiles = cut(reconstructions, args.crop)
                distance = f"{classifier.distance(tiles.to(device), originals.to(device)):.3f}"
            values = f"{metrics['psnr']:.2f} | {metrics['ssim']:.3f} | {energy} | {distance}"
            print(f"| {folder_name}, {len(images)} | {name} | {values} |", flush=True)
        save_details(args.output_dir / f"{folder_name}.png", columns, args.crop)


if __name__ == "__main__":
    run_command(main)
