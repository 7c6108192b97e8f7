"""Times a denoising step: `ViTokDiTModel`, eager and compiled, next to two yardsticks in the same process.

The floor is the model's own matrix products and attention calls, replayed with the same operands and nothing in
between. The peer is diffusers' `DiTTransformer2DModel` of the same width, depth, heads and number of tokens.

    python examples/benchmark_dit.py --variants B XL --batch_size 2

Batch size 2 is one guided sample. Weights are random: they cost the same. On a CPU, TORCHINDUCTOR_FREEZING=1 in the
environment lets compiled models keep their weights in the layout that the processor wants.
"""

import argparse
from functools import partial

import torch
from accelerate import PartialState
from benchmark import RecordProducts, time_in_turns
from diffusers import DiTTransformer2DModel

from vitok_hf import ViTokDiTModel
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.precision import choose_dtype


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    """Weights that are zero, as those of adaLN-Zero, get random values: a processor may be quicker with zeros."""
    for parameter in model.parameters():
        if not parameter.count_nonzero():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def make_peer(model: ViTokDiTModel) -> DiTTransformer2DModel:
    config = model.config
    return DiTTransformer2DModel(
        num_attention_heads=config.num_attention_heads,
        attention_head_dim=config.hidden_size // config.num_attention_heads,
        in_channels=config.in_channels,
        num_layers=config.num_layers,
        sample_size=config.sample_size,
        patch_size=config.patch_size,
        num_embeds_ada_norm=config.num_classes,
    )


@torch.inference_mode()
def benchmark(variant: str, args: argparse.Namespace) -> None:
    device, dtype = PartialState().default_device, getattr(torch, args.dtype)
    model = randomize(ViTokDiTModel.from_variant(variant, sample_size=args.sample_size)).to(device, dtype)
    peer = randomize(make_peer(model)).to(device, dtype)
    x = torch.randn(args.batch_size, model.config.in_channels, *[args.sample_size] * 2, device=device, dtype=dtype)
    timestep = torch.full((args.batch_size,), 500, device=device)
    class_labels = torch.arange(args.batch_size, device=device) % model.config.num_classes
    inputs = {"hidden_states": x, "timestep": timestep, "class_labels": class_labels}
    with RecordProducts() as products:
        model(**inputs)
    runs = {"floor": products.replay}
    runs |= {"ViTokDiT": partial(model, **inputs), "DiTTransformer2DModel": partial(peer, **inputs)}
    if not args.no_compile:
        for name, network in (("ViTokDiT", model), ("DiTTransformer2DModel", peer)):
            runs[f"{name}, compiled"] = partial(torch.compile(network), **inputs)
    medians = time_in_turns(runs, args.rounds)

    tokens = args.sample_size**2
    print(f"DiT-{variant}: batch {args.batch_size}, {tokens} tokens, {args.dtype} on {device}")
    for name, seconds in medians.items():
        ratio, speed = seconds / medians["floor"], medians["DiTTransformer2DModel"] / seconds
        print(f"  {name:31} {1e3 * seconds:8.1f} ms  {ratio:5.2f} x floor  {speed:5.2f} x as fast as the peer")


def main():
    parser = make_parser("benchmark_dit.py", __doc__)
    parser.add_argument("--variants", nargs="+", default=["B", "XL"], help="of S, B, L and XL")
    parser.add_argument("--sample_size", type=int, default=16, help="side of the latents; a token each")
    parser.add_argument("--batch_size", type=int, default=2, help="2 is one guided sample")
    add_dtype(parser)
    parser.add_argument("--rounds", type=int, default=15, help="the median of so many timings counts")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)
    for variant in args.variants:
        benchmark(variant, args)


if __name__ == "__main__":
    run_command(main)
