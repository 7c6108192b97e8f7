"""Writes encoder.onnx and decoder.onnx, for batches and pictures of any size, and checks them with onnxruntime.

    vitok export-onnx --model vitok-tiny-f8x8 --output_dir onnx
    vitok export-onnx --pipeline vitok-dit-emoji --half --output_dir onnx

The encoder takes `pixel_values`, (B, C, H, W) in [-1, 1] or (B, C, T, H, W) for a video model, and gives `latents`,
the mode of the posterior, and if the model is variational its `std`: latents + std * noise is a sample. The decoder
takes `latents` and gives `sample`. All are float32. Diffusion models see (latents - latents_mean) / latents_std *
scaling_factor: the metadata of all files, and model.json beside them, have these. A code of k of `channel_counts` is
the first k channels of the latents; the decoder takes all, and `fill` in place of those that are missing.

Of a pipeline there is transformer.onnx, too: it takes `hidden_states`, normalised latents, `timestep`, (B,) float32,
and `class_labels`, (B,) int64, of which `num_classes` is no class, and gives `sample`. Its labels, guidance and
scheduler are the entry "generator" of the metadata. Files that do not agree with PyTorch are not written.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import make_parser


if TYPE_CHECKING:
    from ..pipelines import ViTokDiTPipeline


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="vitok-tiny-f8x8", help="autoencoder: folder, Hub id or bundled name")
    source.add_argument("--pipeline", help="instead, all of a generator: folder, Hub id or bundled name")
    parser.add_argument("--half", action="store_true", help="store weights in float16; what is computed is float32")
    parser.add_argument(
        "--opset", type=int, default=23, choices=range(18, 24), help="lower ones have no attention operator"
    )
    parser.add_argument("--sizes", nargs="+", default=["256x256", "512x384"], help="HEIGHTxWIDTH, for the check")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 4], help="for the check")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many timings counts")
    parser.add_argument("--output_dir", type=Path, default=Path("onnx"))
    return parser.parse_args(argv)


def describe_generator(pipe: "ViTokDiTPipeline") -> dict[str, Any]:
    """What a sampler has to know besides the autoencoder."""
    config, saved = pipe.transformer.config, pipe.config
    names = ("in_channels", "sample_size", "sample_frames", "patch_size", "num_classes")
    return {name: config[name] for name in names} | {
        "id2label": saved.id2label,
        "guidance_scale": pipe._default("guidance_scale"),
        "guidance_rescale": pipe._default("guidance_rescale"),
        "scheduler": {name: value for name, value in pipe.scheduler.config.items() if name != "_use_default_values"},
    }


def run(args: argparse.Namespace) -> None:
    import torch

    from ..data.views import parse_size
    from ..models import AutoencoderViTok
    from ..models.onnx import autoencoder_graphs, denoiser_graph, describe, export_onnx
    from ..pipelines import ViTokDiTPipeline

    sizes = [parse_size(size)[:2] for size in args.sizes]
    if args.pipeline is None:
        vae = AutoencoderViTok.from_pretrained(args.model, dtype=torch.float32)
        graphs, description = autoencoder_graphs(vae, sizes), describe(vae)
    else:
        pipe = ViTokDiTPipeline.from_pretrained(args.pipeline, dtype=torch.float32)
        graphs = autoencoder_graphs(pipe.vae, sizes)
        graphs["transformer"] = denoiser_graph(pipe.transformer, graphs["decoder"].shapes)
        description = describe(pipe.vae) | {"generator": describe_generator(pipe)}
    export_onnx(graphs, description, args.output_dir, args.opset, args.batch_sizes, args.rounds, args.half)
