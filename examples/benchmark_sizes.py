"""Times and memory of large pictures: ViTok with full and with local attention, and diffusers' tiled `AutoencoderKL`.

Each measurement has a process of its own, encodes and decodes one random picture, and prints seconds and how far the
largest resident set (Linux) rose above that of the model after a small picture, which does not count. Weights are
random: they cost the same.

    python examples/benchmark_sizes.py --variant S-B/16 --sizes 1024 2048 4096 --radius 16
"""

import subprocess
import sys

import torch
from accelerate import PartialState
from studies.baselines import make_peer

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.evaluation.costs import peak_memory, reset_peak_memory
from vitok_hf.precision import choose_dtype
from vitok_hf.training.tracking import finished_time


MODES = ("full attention", "sliding window", "tiled AutoencoderKL")


def make_model(mode: str, variant: str, radius: int) -> torch.nn.Module:
    if mode == "tiled AutoencoderKL":
        vae = make_peer("SD-VAE")
        vae.enable_tiling()
    else:
        vae = AutoencoderViTok.from_variant(variant)
        if mode == "sliding window":
            vae.enable_sliding_window(radius)
    return vae


@torch.inference_mode()
def measure(mode: str, variant: str, radius: int, size: int, dtype: torch.dtype) -> None:
    device = PartialState().default_device
    vae = make_model(mode, variant, radius).to(device, dtype).eval()
    x = torch.rand(1, 3, size, size, device=device, dtype=dtype) * 2 - 1
    vae(x[..., :64, :64])  # to warm up
    before, began = reset_peak_memory(device), finished_time()
    latents = vae.encode(x).latent_dist.mode()
    encoded = finished_time()
    sample = vae.decode(latents).sample
    ended = finished_time()
    print(
        f"{size:5} {mode:20} encode {encoded - began:7.1f} s, decode {ended - encoded:7.1f} s, "
        f"memory +{(peak_memory(device) - before) / 1e9:5.2f} GB, finite: {bool(sample.isfinite().all())}",
        flush=True,
    )


def main():
    parser = make_parser("benchmark_sizes.py", __doc__)
    parser.add_argument("--variant", default="S-B/16")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096], help="height and width in pixels")
    parser.add_argument("--radius", type=int, default=16, help="of the window, in tokens")
    add_dtype(parser)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    args = parser.parse_args()
    dtype = choose_dtype(args.dtype)
    if len(args.sizes) == len(args.modes) == 1:
        measure(args.modes[0], args.variant, args.radius, args.sizes[0], getattr(torch, dtype))
        return
    for size in args.sizes:
        for mode in args.modes:
            options = ["--variant", args.variant, "--radius", str(args.radius), "--dtype", dtype]
            options += ["--sizes", str(size), "--modes", mode]
            subprocess.run([sys.executable, __file__, *options], check=True)


if __name__ == "__main__":
    run_command(main)
