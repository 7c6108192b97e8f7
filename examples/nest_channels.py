r"""Prepares a trained image autoencoder for nested channels: its first channels then say most, and it may have more.

    python examples/nest_channels.py --model vitok-tiny-f8x8 --channel_counts 2 4 8 16 \
        --train_data_dir data/train/film:0.5 data/train/emoji:0.5 --output_dir nested-start
    vitok train --pretrained_model_name_or_path nested-start ...

The channels of a token are turned, scaled and shifted by one matrix, which the encoder's last layer takes up, and its
inverse the decoder's first: they become uncorrelated, of mean 0 and variance 1, in the order in which the best linear
decoder needs them, and reconstructions stay as they are. Channels that are added have the principal components of
what the model leaves out, as far as the encoder's last layer can tell; of these the decoder begins to make use, a step
down the gradient of the squared error, so that training does not give them up for the KL divergence.
"""

import argparse
from pathlib import Path

import torch
from accelerate import PartialState
from torch.nn import functional as F

from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_float
from vitok_hf.commands import run_command
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.views import CropView
from vitok_hf.latents import NO_STATISTICS
from vitok_hf.loading.strict import public_config
from vitok_hf.models.layers import patchify


STEP = 0.3


def least_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """(features, outputs) of the straight line without a bias through (N, features) and (N, outputs)."""
    return torch.linalg.lstsq(x, y, driver="gelsd").solution


@torch.no_grad()
def measure(vae: AutoencoderViTok, batches) -> list[torch.Tensor]:
    """All tokens', (N, ...) in float64: the encoder's last features, codes, their variances, pixels, and errors."""
    features: list[torch.Tensor] = []
    hook = vae.encoder.proj_out.register_forward_pre_hook(lambda module, args: features.append(args[0].flatten(0, -2)))
    rows = []
    for batch in batches:
        x = to_float(batch.to(vae.device))[:, :, 0]
        posterior = vae.encode(x).latent_dist
        residual = x - vae.decode(posterior.mode()).sample
        pixels = [patchify(pixels.unsqueeze(2), 1, vae.config.patch_size, 1) for pixels in (x, residual)]
        codes = [code.flatten(2).mT.flatten(0, 1) for code in (posterior.mode(), posterior.var)]
        tokens = [features.pop(), *codes, *(pixel.flatten(0, 1) for pixel in pixels)]
        rows.append([token.double() for token in tokens])
    hook.remove()
    return [torch.cat(column) for column in zip(*rows)]


@torch.no_grad()
def nest(vae: AutoencoderViTok, counts: list[int], tokens: list[torch.Tensor]) -> AutoencoderViTok:
    features, codes, variances, patches, residuals = tokens
    number, mean = vae.config.latent_channels, codes.mean(dim=0)
    if counts[-1] < number:
        raise ValueError(f"`channel_counts` must end with {number} channels, those of the model, or more: {counts}.")
    scale = torch.linalg.cholesky(torch.cov(codes.mT))  # white codes: its inverse on the codes
    white = torch.linalg.solve_triangular(scale, (codes - mean).mT, upper=False).mT
    order = torch.linalg.svd(least_squares(white, patches - patches.mean(dim=0))).U  # most important directions first
    back = scale @ order  # codes = back @ new codes + mean

    changed = NO_STATISTICS | {"latent_channels": counts[-1], "channel_counts": counts}
    nested = AutoencoderViTok(**public_config(vae.config) | changed)
    weights = vae.state_dict()
    into, out = nested.encoder.proj_out, nested.decoder.proj_in
    last, first = (layer.state_dict() for layer in (vae.encoder.proj_out, vae.decoder.proj_in))
    turned = {name: torch.linalg.solve(back, last[name][:number].double()) for name in ("weight", "bias")}
    turned["bias"] -= torch.linalg.solve(back, mean)

    into.weight.zero_()
    turned_variances = torch.linalg.inv(back).square() @ variances.mean(dim=0)
    into.bias.fill_(turned_variances.mean().log())  # of all log-variances, also of channels that are added
    into.bias[counts[-1] : counts[-1] + number] = turned_variances.log()
    into.weight[:number], into.bias[:number] = turned["weight"], turned["bias"]
    if more := counts[-1] - number:
        centre, kept = residuals - residuals.mean(dim=0), slice(number, counts[-1])
        components = torch.linalg.eigh(torch.cov(centre.mT)).eigenvectors.flip(1)[:, :more]
        added = least_squares(features - features.mean(dim=0), centre @ components)
        added = added / ((features - features.mean(dim=0)) @ added).std(dim=0)
        into.weight[kept], into.bias[kept] = added.mT, -features.mean(dim=0) @ added
    out.weight.copy_(F.pad(first["weight"].double() @ back, (0, more)))
    out.bias.copy_(first["bias"] + first["weight"].double() @ mean)
    ours = nested.state_dict()
    own = {name: ours[name] for name in ours if name.startswith(("encoder.proj_out.", "decoder.proj_in."))}
    nested.load_state_dict(weights | own)
    return nested


def begin_to_use(nested: AutoencoderViTok, number: int, pictures: torch.Tensor) -> None:
    """Gives all channels but the first `number` decoder weights of norm `STEP`, down the gradient of the error."""
    x, weight = to_float(pictures.to(nested.device))[:, :, 0], nested.decoder.proj_in.weight
    F.mse_loss(nested(x).sample, x).backward()
    with torch.no_grad():
        weight[:, number:] = -STEP * F.normalize(weight.grad[:, number:], dim=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="what `from_pretrained` takes: variational, of pictures")
    parser.add_argument("--channel_counts", nargs="+", type=int, required=True, help="increasing")
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders with optional weights")
    parser.add_argument("--num_batches", type=int, default=8, help="batches of 2 ** 20 pixels to measure on")
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    vae = AutoencoderViTok.from_pretrained(args.model, dtype=torch.float32).to(PartialState().default_device)
    if not vae.config.variational or vae.config.num_latent_tokens or not vae.is_image_model:
        parser.error(f"{args.model} must be a variational autoencoder of pictures, with codes on grids")
    dataset = make_dataset(CropView([(128, 128, 1.0)], 2**20, flip=False), SourceSettings(args.train_data_dir))
    batches = list(iterate_pixels(dataset, args.num_batches))
    nested = nest(vae, args.channel_counts, measure(vae, batches))
    begin_to_use(nested, vae.config.latent_channels, batches[0][:32])
    nested.register_to_config(_name_or_path=args.output_dir.name)
    nested.save_pretrained(args.output_dir)
    print(f"Saved {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
