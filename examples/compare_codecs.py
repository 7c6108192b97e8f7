"""Autoencoders next to PCA with as many numbers, and to JPEG and WebP with as many bytes.

    python examples/compare_codecs.py --models vitok-tiny-f8x8 --latent_bits 8 --data_dir data/test/film \
        --baselines pca jpeg webp --pca_data_dir data/train/film

Takes the arguments of `vitok evaluate` too, and writes its tables, of pictures of one --resolution. JPEG (4:4:4 or
4:2:0, whichever is closer) and lossy WebP have the highest quality within as many bytes, whole files, as latents of 16
and of 8 bits; bytes of quantized latents count the ranges of the channels.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image
from studies.baselines import PatchPCA

from vitok_hf.commands import run_command
from vitok_hf.commands.evaluate import check_data, load_models, make_evaluation_parser, run
from vitok_hf.data.held_out import EvaluationData
from vitok_hf.data.sources import FolderFiles
from vitok_hf.evaluation.autoencoders import spatial_ratio
from vitok_hf.evaluation.costs import mean_costs
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator, Row, autoencoder_row
from vitok_hf.evaluation.processes import gather_rows
from vitok_hf.evaluation.reconstruction import reconstruct


class Quantizer:
    """Latents (B, c, ...) rounded to 2 ** `bits` levels, evenly from the least to the largest of each channel.

    `num_bytes` are those of an item seen last, with two float32 for each channel.
    """

    def __init__(self, bits: int):
        self.bits, self.num_bytes = bits, 0

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.num_bytes = -(-latents[0].numel() * self.bits // 8) + 8 * latents.shape[1]
        flat = latents.flatten(2).float()
        low, high = flat.aminmax(dim=2, keepdim=True)
        step = ((high - low) / (2**self.bits - 1)).clamp(min=torch.finfo(flat.dtype).tiny)
        return (((flat - low) / step).round() * step + low).view_as(latents).to(latents.dtype)


def decode(data: bytes) -> np.ndarray:
    """A picture file -> (H, W, 3) uint8."""
    with Image.open(BytesIO(data)) as picture:
        return np.array(picture.convert("RGB"))


class ImageCodec:
    """A lossy picture codec of Pillow at the highest quality that keeps each picture within a number of bytes.

    The whole file counts, headers included. Where even the lowest quality takes more, that is used, and counted in
    "above_budget": the row then has an advantage. JPEG is tried with colours at the full resolution (4:4:4) and at
    half of it (4:2:0); the file with the lower squared error counts.
    """

    SETTINGS: dict[str, list[dict[str, Any]]] = {
        "JPEG": [{"subsampling": "4:2:0"}, {"subsampling": "4:4:4"}],
        "WEBP": [{}],
    }

    def __init__(self, file_format: str, max_bytes: int):
        self.file_format, self.max_bytes = file_format, max_bytes
        self.sizes: list[int] = []  # of the files of all pictures so far

    def _fill_budget(self, picture: Image.Image, **settings: Any) -> bytes:
        """Sizes are taken to grow with the quality: bisection."""

        def encode(quality: int) -> bytes:
            file = BytesIO()
            picture.save(file, self.file_format, quality=quality, optimize=True, **settings)
            return file.getvalue()

        low, high = 1, 100
        best = encode(low)
        while low < high:
            middle = (low + high + 1) // 2
            if len(data := encode(middle)) <= self.max_bytes:
                low, best = middle, data
            else:
                high = middle - 1
        return best

    def compress(self, image: torch.Tensor) -> bytes:
        """The file for one picture, (3, 1, H, W) uint8."""
        pixels = image[:, 0].permute(1, 2, 0).contiguous().cpu().numpy()
        picture = Image.fromarray(pixels)

        def rank(data: bytes) -> tuple[int, float]:
            return max(len(data), self.max_bytes), np.square(decode(data) - pixels.astype(np.float32)).mean()

        files = (self._fill_budget(picture, **settings) for settings in self.SETTINGS[self.file_format])
        best = min(files, key=rank)
        self.sizes.append(len(best))
        return best

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (B, 3, 1, H, W) -> what the files hold, the same shape."""
        decoded = [torch.from_numpy(decode(self.compress(image))).permute(2, 0, 1)[:, None] for image in images]
        return torch.stack(decoded).to(images.device)

    def costs(self) -> dict[str, float]:
        """Mean bytes a picture, and pictures above the budget, over all processes, which must all call it."""
        sizes = gather_rows(torch.tensor(self.sizes))
        above = float((sizes > self.max_bytes).sum())
        return {"bytes": sizes.double().mean().item()} | ({"above_budget": above} if above else {})


def make_rows(args: argparse.Namespace, evaluator: ReconstructionEvaluator) -> Iterator[Row]:
    """Of the models, then of the baselines that have as many numbers or bytes."""
    codes, resolution = {}, args.resolution  # latents -> patch size
    for name, vae in load_models(args):
        vae.to(evaluator.device)
        yield autoencoder_row(name, vae, evaluator.shapes)
        costs = mean_costs(vae, evaluator.shapes)
        if args.latent_bits:
            quantizer = Quantizer(args.latent_bits)
            codec = partial(reconstruct, vae, change_latents=quantizer)
            quantized = partial(lambda costs, code: costs | {"bytes": code.num_bytes}, costs, quantizer)
            yield Row(f"{name}, {args.latent_bits}-bit latents", codec, quantized)
        patch_size = codes.setdefault(int(costs["E"]), spatial_ratio(vae))
        if "pca" in args.baselines and resolution % patch_size:
            raise ValueError(f"PCA needs a --resolution that is a multiple of {patch_size}, not {resolution}.")
    for num_latents, patch_size in codes.items():
        if "pca" in args.baselines:
            components = num_latents * patch_size**2 // resolution**2
            if components < 1:
                raise ValueError(f"{num_latents} numbers are less than one a patch of {patch_size} x {patch_size}.")
            data = EvaluationData(FolderFiles(args.pca_data_dir), evaluator.data.protocol, args.pca_limit)
            pca = PatchPCA(patch_size, components, data.batches(range(len(data)), args.batch_size))
            costs = {"E": num_latents, "compression": 3 * patch_size**2 / components, "bytes": 2 * num_latents}
            yield Row(f"PCA, {components} of {patch_size} x {patch_size} pixels", pca.reconstruct, costs.copy)
        for file_format in ("JPEG", "WEBP"):
            for bits in (16, 8):
                if file_format.lower() in args.baselines:
                    picture_codec = ImageCodec(file_format, num_latents * bits // 8)
                    yield Row(f"{file_format}, {num_latents} x {bits} bits", picture_codec, picture_codec.costs)


def main():
    parser = make_evaluation_parser("compare_codecs.py", __doc__)
    parser.add_argument("--latent_bits", type=int, help="adds a row of each model with latents quantized to so many")
    parser.add_argument("--baselines", nargs="*", default=["jpeg", "webp"], choices=["pca", "jpeg", "webp"])
    parser.add_argument("--pca_data_dir", help="training pictures for PCA")
    parser.add_argument("--pca_limit", type=int, default=1000, help="at most so many of them")
    args = check_data(parser, parser.parse_args(sys.argv[1:]))
    if args.num_frames > 1 or args.resolution == 0:
        parser.error("codecs are compared on pictures of one --resolution")
    if "pca" in args.baselines and not args.pca_data_dir:
        parser.error("--baselines pca needs --pca_data_dir")
    if args.latent_bits is not None and not 1 <= args.latent_bits <= 16:
        parser.error(f"--latent_bits must be from 1 to 16, but is {args.latent_bits}")
    run(args, make_rows)


if __name__ == "__main__":
    run_command(main)
