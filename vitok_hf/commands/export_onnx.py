"""Writes encoder.onnx and decoder.onnx, for batches and pictures of any size, and checks them with onnxruntime.

    vitok export-onnx --model vitok-tiny-f8x8 --output_dir onnx

The encoder takes `pixel_values`, (B, 3, H, W) in [-1, 1] or (B, 3, T, H, W) for a video model, and gives `latents`,
the mode of the posterior, and if the model is variational its `std`: latents + std * noise is a sample. The decoder
takes `latents` and gives `sample`. All are float32. Diffusion models see (latents - latents_mean) / latents_std *
scaling_factor: the metadata of both files has these, as JSON. Files that do not agree with PyTorch are not written.
"""

import argparse
from pathlib import Path

from . import make_parser


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="folder, Hub id or bundled name")
    parser.add_argument("--opset", type=int, default=23, help="lower ones have no attention operator")
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x384"], help="HEIGHTxWIDTH, for the check")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="for the check")
    parser.add_argument("--rounds", type=int, default=5, help="the median of so many timings counts")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch

    from ..data.views import parse_size
    from ..models import AutoencoderViTok
    from ..models.onnx import export_onnx

    sizes = [parse_size(size)[:2] for size in args.sizes]
    vae = AutoencoderViTok.from_pretrained(args.model, dtype=torch.float32)
    export_onnx(vae, args.output_dir, args.opset, sizes, args.batch_sizes, args.rounds)
