"""Sizes and operations of our models next to the paper's figures (arXiv 2501.09755), and of diffusers' autoencoders.

    python examples/paper_tables.py          # Table 1, and the columns of parameters and operations of Tables 3 to 5
    python examples/paper_tables.py --time   # and seconds a picture or clip, with random weights, on this machine

"GMACs" are 1e9 multiply-accumulates of encoding and decoding one picture or clip, counted without computing it; the
paper calls them GFLOPs. Cells of the paper that are not known here are empty. The peers have their published
configurations; those for pictures see the 16 frames one by one, those whose first latent frame holds one frame see
them padded to 17. E is the number of latents, 16 a token for ours.
"""

import argparse
import statistics
import time

import torch
from accelerate import PartialState
from diffusers import ModelMixin
from studies.baselines import PEERS, make_peer

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.evaluation.costs import count_macs, mean_costs
from vitok_hf.evaluation.reconstruction import reconstruct
from vitok_hf.precision import choose_dtype
from vitok_hf.presets import V1_SIZES


# Table 1: size -> millions of parameters, GMACs for 256 tokens
PAPER_TOWERS = {"S": (43.3, 11.6), "B": (85.8, 23.1), "L": (383.7, 101.8)}

# Tables 3 to 5: heading -> shape of a picture or clip, (C, T, H, W); variant -> millions of parameters, GMACs
PAPER_MODELS = {
    "256 x 256 pictures": ((3, 1, 256, 256), {"S-B/16": (129.0, 34.8), "S-L/16": (426.8, 113.4)}),
    "512 x 512 pictures": ((3, 1, 512, 512), {"S-B/16": (129.0, 160.8)}),
    "16 x 128 x 128 clips": (
        (3, 16, 128, 128),
        {"S-B/4x8": (None, 160.8), "S-B/8x8": (None, 73.2), "S-B/4x16": (None, 34.8)},
    ),
}


def cell(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def make_model(name: str) -> ModelMixin:
    return make_peer(name) if name in PEERS else AutoencoderViTok.from_variant(name).eval()


def print_table_1() -> None:
    print("Table 1: encoders or decoders alone, 256 tokens\n")
    print("| size | width | blocks | heads | parameters (M) | paper | GMACs | paper |")
    print("|---|---|---|---|---|---|---|---|")
    for size, (width, blocks, heads) in V1_SIZES.items():
        with torch.device("meta"):
            vae = make_model(f"{size}-B/16")
        parameters = sum(parameter.numel() for parameter in vae.encoder.parameters()) / 1e6
        macs = count_macs(vae, (1, 3, 256, 256), "encoder") / 1e9
        paper = map(cell, PAPER_TOWERS[size])
        columns = [size, width, blocks, heads, cell(parameters), next(paper), cell(macs), next(paper)]
        print("| " + " | ".join(map(str, columns)) + " |")


@torch.inference_mode()
def seconds(name: str, shape: tuple[int, ...], dtype: torch.dtype, rounds: int) -> float:
    """Median of `rounds` timings of one reconstruction, after one that does not count."""
    vae = make_model(name).to(PartialState().default_device, dtype)
    images = torch.randint(0, 256, (1, *shape), dtype=torch.uint8)
    timings = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        reconstruct(vae, images)  # on the CPU in the end, hence complete
        timings.append(time.perf_counter() - began)
    return statistics.median(timings[1:])


def timed_cell(name: str, shape: tuple[int, ...], args: argparse.Namespace) -> str:
    try:
        return f"{seconds(name, shape, getattr(torch, args.dtype), args.rounds):.2f}"
    except NotImplementedError as error:  # of PyTorch, for this type on this device
        return f"none: {error}"


def print_models(args: argparse.Namespace) -> None:
    for heading, (shape, variants) in PAPER_MODELS.items():
        timed = f" | s, {args.dtype}" if args.time else ""
        print(f"\nTables 3 to 5: {heading}\n\n| model | parameters (M) | paper | GMACs | paper | E{timed} |")
        print("|---" * (7 if args.time else 6) + "|")
        for name in [*variants, *PEERS]:
            if args.models is not None and name not in args.models:
                continue
            with torch.device("meta"):
                costs = mean_costs(make_model(name), {shape: 1})
            parameters, macs = variants.get(name, (None, None))
            columns = [name, cell(costs["parameters_M"]), cell(parameters), cell(costs["GMACs"]), cell(macs)]
            columns.append(f"{costs['E']:.0f}")
            if args.time:
                columns.append(timed_cell(name, shape, args))
            print("| " + " | ".join(columns) + " |", flush=True)


def main():
    parser = make_parser("paper_tables.py", __doc__)
    known = dict.fromkeys([*(name for _, variants in PAPER_MODELS.values() for name in variants), *PEERS])
    parser.add_argument("--models", nargs="+", choices=known, help="rows of Tables 3 to 5; default: all")
    parser.add_argument("--time", action="store_true", help="also measure; minutes on a CPU")
    add_dtype(parser)
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many timings counts")
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)
    print_table_1()
    print_models(args)


if __name__ == "__main__":
    run_command(main)
