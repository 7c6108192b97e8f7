"""Times encoding and decoding: one ViTok variant, eager and compiled, next to two yardsticks in the same process.

The floor is the model's own matrix products and attention calls, replayed with the same operands and nothing in
between. The peer is diffusers' `AutoencoderKL` in the configuration of Stable Diffusion, with random weights, eager.

    python examples/benchmark.py --variant S-B/16 --size 256 --batch_size 4 --dtype bfloat16
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from accelerate import PartialState
from studies.baselines import make_peer
from torch.utils._python_dispatch import TorchDispatchMode

from vitok_hf import AutoencoderViTok, list_bundled
from vitok_hf.commands import add_dtype, make_parser, run_command
from vitok_hf.evaluation.costs import count_macs
from vitok_hf.precision import choose_dtype
from vitok_hf.training.tracking import finished_time


class RecordProducts(TorchDispatchMode):
    """Keeps the matrix products and attention calls that run inside it, with their operands."""

    PREFIXES = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product")

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__.startswith(self.PREFIXES):
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def replay(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def timed(function: Callable[[], object]) -> float:
    began = finished_time()
    function()
    return finished_time() - began


def time_in_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, after three calls to warm up; in turns, so that a disturbance meets them all."""
    for function in runs.values():
        for _ in range(3):
            function()
    timings = {name: [] for name in runs}
    for _ in range(rounds):
        for name, function in runs.items():
            timings[name].append(timed(function))
    return {name: statistics.median(values) for name, values in timings.items()}


def make_model(args: argparse.Namespace, device: torch.device) -> AutoencoderViTok:
    if args.variant in list_bundled():
        vae = AutoencoderViTok.from_pretrained(args.variant)
    else:
        vae = AutoencoderViTok.from_variant(args.variant, sample_size=args.size)
    return vae.to(device).train() if args.train else vae.to(device, getattr(torch, args.dtype)).eval()


def main():
    parser = make_parser("benchmark.py", __doc__)
    parser.add_argument("--variant", default="S-B/16", help="variant or bundled name")
    parser.add_argument("--size", type=int, default=256, help="height and width in pixels")
    parser.add_argument("--batch_size", type=int, default=4)
    add_dtype(parser)
    parser.add_argument("--rounds", type=int, default=15, help="the median of so many timings counts")
    parser.add_argument("--peer_rounds", type=int, default=2, help="timings of the AutoencoderKL; 0 leaves it out")
    parser.add_argument("--no_compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--train", action="store_true", help="forward and backward, float32 weights under autocast")
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)
    with torch.inference_mode(not args.train):
        benchmark(args)


def benchmark(args: argparse.Namespace) -> None:
    device, dtype = PartialState().default_device, getattr(torch, args.dtype)
    vae = make_model(args, device)
    frames = () if vae.is_image_model else (vae.config.sample_frames,)
    x = torch.randn(args.batch_size, 3, *frames, args.size, args.size, device=device, dtype=vae.dtype)

    def run(model: torch.nn.Module) -> None:
        if not args.train:
            model(x)
            return
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            sample = model(x).sample
        torch.nn.functional.mse_loss(sample.float(), x).backward()

    with RecordProducts() as products:
        run(vae)
    runs = {"floor": products.replay, "eager": lambda: run(vae)}
    fused = make_model(args, device)
    fused.fuse_qkv_projections()
    runs["eager, fused qkv"] = lambda: run(fused)
    if not args.no_compile:
        compiled = torch.compile(vae, fullgraph=True)
        runs["compiled"] = lambda: run(compiled)
    medians = time_in_turns(runs, args.rounds)

    macs = count_macs(vae, x.shape) * (3 if args.train else 1)  # the backward pass has two products for each of one
    threads = torch.get_num_threads()
    print(f"{args.variant}, {tuple(x.shape)}, {args.dtype} on {device}, {threads} threads, {macs / 1e9:.1f} GMACs")
    for name, seconds in medians.items():
        ratio = seconds / medians["floor"]
        print(f"{name:18} {1e3 * seconds:8.1f} ms  {ratio:5.2f} x floor  {2e-12 * macs / seconds:5.2f} TFLOP/s")
    if args.peer_rounds and not args.train:
        peer, image = make_peer("SD-VAE").to(device, dtype).eval(), x if x.ndim == 4 else x[:, :, 0]
        peer(image)  # to warm up
        seconds = statistics.median(timed(lambda: peer(image)) for _ in range(args.peer_rounds))
        seconds *= frames[0] if frames else 1
        print(f"{'AutoencoderKL (SD)':18} {1e3 * seconds:8.1f} ms")
        for name in list(medians)[1:]:
            print(f"  {name} is {seconds / medians[name]:.1f} times faster")


if __name__ == "__main__":
    run_command(main)
