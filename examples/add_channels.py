r"""Adds latent channels to a trained image autoencoder, for nested channels: they say what the others do not.

    python examples/add_channels.py --model vitok-tiny-f8x8 --channel_counts 2 4 8 16 \
        --train_data_dir data/train/film:0.5 data/train/emoji:0.5 --output_dir nested-start
    vitok train --pretrained_model_name_or_path nested-start --kl_weight 1e-6 ...

The old channels are first put in order (`nest_channels.py`). The new ones are those directions of the encoder's last
hidden states, less what the old channels say of them, by which a straight line best predicts the errors of the
reconstruction; they have mean 0, variance 1 and narrow posteriors. The decoder has yet to learn what they mean: its
weights for them are small and random. Begin with next to no KL divergence, or the new channels give in to it.
"""

import torch
from nest_channels import least_squares, load, make_channels_parser, measure, nest, save

from vitok_hf import AutoencoderViTok
from vitok_hf.clips import to_float
from vitok_hf.commands import run_command
from vitok_hf.latents import NO_STATISTICS
from vitok_hf.loading.strict import public_config
from vitok_hf.models.layers import patchify


LOG_VARIANCE = -4.0  # of the new channels' posteriors
SHARE = 0.5  # of the new columns of the decoder's first layer in the length of the shortest old one


@torch.no_grad()
def new_rows(vae: AutoencoderViTok, count: int, batches: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights (count, hidden size) and biases (count,) of the encoder's last layer for the new channels, float64."""
    hidden, codes, errors = [], [], []
    hook = vae.encoder.proj_out.register_forward_pre_hook(lambda module, args: hidden.append(args[0].flatten(0, 1)))
    for batch in batches:
        x = to_float(batch.to(vae.device))
        latents = vae.encode(x[:, :, 0]).latent_dist.mode()
        error = x - vae.decode(latents).sample.unsqueeze(2)
        codes.append(latents.flatten(2).mT.flatten(0, 1))
        errors.append(patchify(error, 1, vae.config.patch_size, 1).flatten(0, 1))
    hook.remove()
    h, z, e = (torch.cat(parts).double() for parts in (hidden, codes, errors))
    mean = h.mean(dim=0)
    said = least_squares(z, h - mean)  # what the old channels, of mean 0, say of the hidden states
    rest = h - mean - z @ said
    fit = least_squares(rest, e - e.mean(dim=0))
    directions = torch.linalg.svd(rest @ fit, full_matrices=False).Vh[:count]
    maps = fit @ directions.mT
    maps = maps / (rest @ maps).std(dim=0)
    last, old = vae.encoder.proj_out, vae.config.latent_channels
    through = (said @ maps).mT  # codes = last.weight @ hidden + last.bias
    weight = maps.mT - through @ last.weight[:old].double()
    return weight, -(weight @ mean) - through @ (last.weight[:old].double() @ mean + last.bias[:old].double())


@torch.no_grad()
def grow(vae: AutoencoderViTok, counts: list[int], batches: list[torch.Tensor]) -> AutoencoderViTok:
    """`vae`, whose channels are in order, with new ones up to the last of `counts`."""
    old, number = vae.config.latent_channels, counts[-1] - vae.config.latent_channels
    weight, bias = new_rows(vae, number, batches)
    grown = AutoencoderViTok(**public_config(vae.config) | {"latent_channels": counts[-1], "channel_counts": counts})
    state, first = vae.state_dict(), grown.decoder.proj_in.weight
    own = grown.state_dict() | {name: x for name, x in state.items() if "encoder.proj_out" not in name}
    for name, new, added in (("weight", weight, 0.0), ("bias", bias, LOG_VARIANCE)):
        means, variances = state[f"encoder.proj_out.{name}"].split(old)
        new = new.to(means)
        own[f"encoder.proj_out.{name}"] = torch.cat([means, new, variances, torch.full_like(new, added)])
    columns = torch.randn(first.shape[0], number)
    shortest = state["decoder.proj_in.weight"].norm(dim=0).min()
    columns = (SHARE * shortest.cpu() * columns / columns.norm(dim=0)).to(state["decoder.proj_in.weight"])
    own["decoder.proj_in.weight"] = torch.cat([state["decoder.proj_in.weight"], columns], dim=1)
    own["decoder.proj_in.bias"] = state["decoder.proj_in.bias"] - columns.sum(dim=1)  # missing channels are 1
    grown.load_state_dict(own)
    return grown


def check_counts(vae: AutoencoderViTok, counts: list[int]) -> None:
    """Raises `ValueError` for numbers of channels that the model cannot grow to."""
    old, hidden, pixels = vae.config.latent_channels, vae.config.encoder_hidden_size, vae.decoder.proj_out.out_features
    if counts[-1] <= old or old not in counts:
        raise ValueError(f"--channel_counts must go beyond the model's {old} and name it, not {counts}.")
    if counts[-1] - old > (most := min(hidden - old, pixels)):  # directions that there are
        raise ValueError(f"--channel_counts must add at most {most} channels to the model's {old}, not {counts}.")
    vae.check_config(vae.config | NO_STATISTICS | {"latent_channels": counts[-1], "channel_counts": counts})


def main():
    parser = make_channels_parser("add_channels.py", __doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the decoder's new weights")
    parser.set_defaults(num_batches=6)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    vae, pixels = load(args)
    check_counts(vae, args.channel_counts)
    batches = list(pixels)
    nest(vae, [count for count in args.channel_counts if count <= vae.config.latent_channels], measure(vae, batches))
    save(grow(vae, args.channel_counts, batches), args.output_dir)


if __name__ == "__main__":
    run_command(main)
