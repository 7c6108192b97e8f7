"""Loads ViTok-v2 weights in the author's layout in a process of its own: seconds and peak memory against file size.

Random weights in bfloat16 are written to the folder unless it exists. Memory is the largest resident set,
mapped files included, as Linux counts it.

    python examples/benchmark_loading.py --variant Ld4-Ld24/1x16x64 --folder random-350M
    python examples/benchmark_loading.py --variant Td4-T/1x16x64 --folder random-5B --dtype bfloat16
"""

import json
import subprocess
import sys
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import make_parser, run_command
from vitok_hf.loading.vitok_v2 import expected_headers


LOAD = """
import json, sys, time
import torch
from vitok_hf import AutoencoderViTok
from vitok_hf.loading.strict import check_values
from vitok_hf.evaluation.costs import peak_memory, reset_peak_memory

folder, variant, dtype, component = sys.argv[1:]
before, began = reset_peak_memory(), time.perf_counter()
vae = AutoencoderViTok.from_pretrained(
    folder, variant=variant, dtype=getattr(torch, dtype), component=component or None
)
weights = sum(parameter.nbytes for parameter in vae.parameters())
seconds, began = time.perf_counter() - began, time.perf_counter()
check_values(vae, folder)  # once more, to measure it
checks = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "checks": checks, "before": before, "peak": peak_memory(), "weights": weights}))
"""


def measure_loading(folder: Path, variant: str, dtype: str, component: str | None = None) -> dict[str, float]:
    """Seconds, and bytes: of the process before and at its peak, and of the weights that it holds in the end."""
    command = [sys.executable, "-c", LOAD, str(folder), variant, dtype, component or ""]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def write_random_weights(folder: Path, variant: str, dtype: torch.dtype = torch.bfloat16) -> None:
    folder.mkdir(parents=True)
    with init_empty_weights():
        headers = expected_headers(AutoencoderViTok.from_variant(variant))
    for tower, header in headers.items():
        tensors = {key: torch.empty(shape, dtype=dtype).uniform_(-0.02, 0.02) for key, shape in header.items()}
        save_file(tensors, folder / f"{tower}.safetensors")
        del tensors


def main():
    parser = make_parser("benchmark_loading.py", __doc__)
    parser.add_argument("--variant", default="Ld4-Ld24/1x16x64")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"], help="to load as")
    args = parser.parse_args()
    if not args.folder.exists():
        write_random_weights(args.folder, args.variant)
    for component in (None, "encoder", "decoder"):
        files = args.folder.glob(f"{component or '*coder'}.safetensors")
        size = sum(file.stat().st_size for file in files)
        run = measure_loading(args.folder, args.variant, args.dtype, component)
        added = run["peak"] - run["before"]
        print(
            f"{component or 'both':8} files {size / 1e9:6.2f} GB, weights {run['weights'] / 1e9:6.2f} GB, "
            f"loaded in {run['seconds']:5.1f} s (a look at all values takes {run['checks']:.2f} s); "
            f"peak memory +{added / 1e9:6.2f} GB = "
            f"{added / run['weights']:.2f} x the weights, {added / size:.2f} x the files"
        )


if __name__ == "__main__":
    run_command(main)
