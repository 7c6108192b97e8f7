r"""Videos of growing length through autoencoders that keep no more than they need: seconds and memory.

    python examples/benchmark_streams.py --variant S-B/4x8 --size 64 --frames 1 64 512

A row for a causal ViTok as a stream, with a cache of `--max_cached_frames` latent frames and with one of all; for a
ViTok that is not causal, in overlapping windows; and for diffusers' Wan 2.1 VAE, which is causal and keeps a cache of
its own. Weights are random. A number of frames is rounded up to one that the model takes; pieces of 16 frames come one
at a time, but Wan takes the whole. Seconds until the first frame is decoded, and in all, of encoding and decoding;
memory is the peak of the process above what it has before the row: of one alone (`--rows causal`), what is needed.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Iterator

import torch
from accelerate import PartialState
from diffusers import ModelMixin
from studies.baselines import make_peer

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import make_parser, run_command
from vitok_hf.evaluation.costs import peak_memory, reset_peak_memory


PIECE = 16  # frames
ROWS = ["causal", "unbounded", "windows", "wan"]


def pieces(vae: ModelMixin, num_frames: int, size: int) -> Iterator[torch.Tensor]:
    """(1, 3, T, size, size)."""
    for start in range(0, num_frames, PIECE):
        yield torch.rand(1, 3, min(PIECE, num_frames - start), size, size, device=vae.device) * 2 - 1


def stream(vae: AutoencoderViTok, clips: Iterator[torch.Tensor], **options: int) -> Iterator[torch.Tensor]:
    return vae.decode_stream(vae.encode_stream(clips, **options), **options)


def whole(vae: ModelMixin, clips: Iterator[torch.Tensor]) -> Iterator[torch.Tensor]:
    yield vae.decode(vae.encode(torch.cat(list(clips), dim=2)).latent_dist.mode()).sample


@torch.no_grad()
def measure(vae: ModelMixin, frames: Iterator[torch.Tensor]) -> tuple[int, float, float, int]:
    """How many frames come out, the seconds until the first and the last of them, and the peak of memory."""
    gc.collect()
    reset_peak_memory(vae.device)
    began, first, count = time.perf_counter(), math.nan, 0
    for part in frames:
        first = time.perf_counter() - began if count == 0 else first
        count += part.shape[2]
        del part
    return count, first, time.perf_counter() - began, peak_memory(vae.device)


def run(args: argparse.Namespace) -> None:
    device, options = PartialState().default_device, {"latent_channels": 16, "sample_size": args.size}
    bound = {"max_cached_frames": args.max_cached_frames}
    rows: dict[str, tuple[str, bool, Callable[..., Iterator[torch.Tensor]], dict[str, int]]] = {
        "causal": (f"ViTok, causal, {args.max_cached_frames} latent frames", True, stream, bound),
        "unbounded": ("ViTok, causal, all latent frames", True, stream, {}),
        "windows": ("ViTok, windows", False, stream, {}),
        "wan": ("Wan 2.1", True, whole, {}),
    }
    print("| | frames | first, s | all, s | memory, MB |\n|---|---|---|---|---|")
    for row in args.rows:
        name, causal, function, arguments = rows[row]
        vae = (
            make_peer(name) if row == "wan" else AutoencoderViTok.from_variant(args.variant, causal=causal, **options)
        )
        vae, before = vae.to(device).eval(), reset_peak_memory(device)
        step = 4 if row == "wan" else vae.temporal_compression_ratio
        counts = [frames + -(frames + (step - 1) * causal) % step for frames in args.frames]
        for number, count in enumerate((min(counts), *counts)):  # the first one sets up
            frames, first, seconds, peak = measure(vae, function(vae, pieces(vae, count, args.size), **arguments))
            if number:
                print(f"| {name} | {frames} | {first:.2f} | {seconds:.2f} | {(peak - before) / 1e6:.0f} |", flush=True)


def main():
    parser = make_parser("benchmark_streams.py", __doc__)
    parser.add_argument("--variant", default="S-B/4x8", help="of ViTok, by name")
    parser.add_argument("--size", type=int, default=64, help="height and width in pixels")
    parser.add_argument("--frames", type=int, nargs="+", default=[1, 64, 512])
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, help="one a run, if memory is to be right")
    parser.add_argument("--max_cached_frames", type=int, default=5)
    run(parser.parse_args())


if __name__ == "__main__":
    run_command(main)
