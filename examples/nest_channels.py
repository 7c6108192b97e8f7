r"""Prepares a trained image autoencoder for nested channels: its first channels then say most.

    python examples/nest_channels.py --model vitok-tiny-f8x8 --channel_counts 2 4 8 \
        --train_data_dir data/train/film:0.5 data/train/emoji:0.5 --output_dir nested-start
    vitok train --pretrained_model_name_or_path nested-start ...

The channels of a token are turned, scaled and shifted by one matrix, which the encoder's last layer takes up, and its
inverse the decoder's first: they become uncorrelated, of mean 0 and variance 1, in the order in which the best linear
decoder needs them, and reconstructions stay as they are.
"""

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from accelerate import PartialState

from vitok_hf import AutoencoderViTok
from vitok_hf.checks import check_int
from vitok_hf.clips import to_float
from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.items import Clip
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.views import CropView
from vitok_hf.latents import NO_STATISTICS
from vitok_hf.models.layers import patchify


def least_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(features, outputs) of the straight line without a bias through (N, features) and (N, outputs)."""
    return torch.linalg.lstsq(x, y, driver="gelsd").solution


@torch.no_grad()
def measure(vae: AutoencoderViTok, batches: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Of all tokens, (N, ...) in float64: codes, their variances, and pixels."""
    rows = []
    for batch in batches:
        x = to_float(batch.to(vae.device))
        posterior = vae.encode(x[:, :, 0]).latent_dist
        codes = [code.flatten(2).mT for code in (posterior.mode(), posterior.var)]
        rows.append([part.flatten(0, 1).double() for part in (*codes, patchify(x, 1, vae.config.patch_size, 1))])
    return [torch.cat(column) for column in zip(*rows)]


@torch.no_grad()
def nest(vae: AutoencoderViTok, counts: list[int], tokens: list[torch.Tensor]) -> None:
    """Turns the channels of `vae`, by what `measure` gives."""
    codes, variances, patches = tokens
    number, mean = vae.config.latent_channels, codes.mean(dim=0)
    constant = (codes.std(dim=0) <= 1e-5 * codes.abs().max()).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"Channels {constant} of the codes are constant in these pictures: name others.")
    scale = torch.linalg.cholesky(torch.cov(codes.mT))  # white codes: its inverse on the codes
    white = torch.linalg.solve_triangular(scale, (codes - mean).mT, upper=False).mT
    order = torch.linalg.svd(least_squares(white, patches - patches.mean(dim=0))).U  # most important directions first
    back = scale @ order  # codes = back @ new codes + mean

    vae.set_counts(channel_counts=counts)
    vae.register_to_config(**NO_STATISTICS)
    last, first = vae.encoder.proj_out, vae.decoder.proj_in
    first.bias += (first.weight.double() @ mean).to(first.bias)
    first.weight.copy_(first.weight.double() @ back)
    last.weight[:number] = torch.linalg.solve(back, last.weight[:number].double()).to(last.weight)
    last.bias[:number] = torch.linalg.solve(back, last.bias[:number].double() - mean).to(last.bias)
    last.weight[number:] = 0.0  # log-variances, which do not turn: those of the mean
    last.bias[number:] = (torch.linalg.inv(back).square() @ variances.mean(dim=0)).log().to(last.bias)


def make_channels_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = make_parser(program, description)
    parser.add_argument("--model", required=True, help="what `from_pretrained` takes: variational, of pictures")
    parser.add_argument("--channel_counts", nargs="+", type=int, required=True, help="increasing, to the last channel")
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders with optional weights")
    parser.add_argument("--num_batches", type=int, default=8, help="batches of 2 ** 20 pixels to measure on")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def load(args: argparse.Namespace) -> tuple[AutoencoderViTok, Iterator[torch.Tensor]]:
    """The model, and batches of crops, (B, C, 1, H, W) uint8."""
    check_int("num_batches", args.num_batches)
    vae = AutoencoderViTok.from_pretrained(args.model, dtype=torch.float32).to(PartialState().default_device)
    config = vae.config
    if not config.variational or config.num_latent_tokens or config.token_counts or not vae.is_image_model:
        raise ValueError(f"{args.model} must be a variational autoencoder of pictures, without token counts.")
    side = max(128 // config.patch_size, 1) * config.patch_size
    view = CropView([(side, side, 1.0)], 2**20, Clip(channels=config.in_channels), flip=False)
    return vae, iterate_pixels(make_dataset(view, SourceSettings(args.train_data_dir)), args.num_batches)


def save(vae: AutoencoderViTok, folder: Path) -> None:
    vae.register_to_config(_name_or_path=folder.name)
    vae.save_pretrained(folder)
    print(f"Saved {folder}")


def main():
    args = make_channels_parser("nest_channels.py", __doc__).parse_args()
    vae, batches = load(args)
    vae.check_config(vae.config | {"channel_counts": args.channel_counts})  # before the measurement
    nest(vae, args.channel_counts, measure(vae, batches))
    save(vae, args.output_dir)


if __name__ == "__main__":
    run_command(main)
