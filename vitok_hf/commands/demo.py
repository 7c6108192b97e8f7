"""Shows an autoencoder and a generator in the browser: reconstruct pictures and videos, compare two models, draw.

    vitok demo                                                      # the bundled models
    vitok demo --model output/vae --compare stabilityai/sd-vae-ft-mse --pipeline output-dit/pipeline
    vitok demo --model output/vae --pipeline none --space_dir space   # a folder to upload as a Space of the Hub

The address is printed. The page asks no other server and tells none anything, unless `--share` is given.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from . import add_dtype, make_parser


if TYPE_CHECKING:
    from ..demo.app import Models


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="a ViTok: folder, Hub id or bundled name")
    parser.add_argument("--subfolder", help="folder of the model inside --model")
    text = "any autoencoder of diffusers, or none; default: another bundled one, if there is one"
    parser.add_argument("--compare", help=text)
    parser.add_argument("--compare_subfolder", help="folder of the model inside --compare")
    parser.add_argument("--pipeline", default="vitok-dit-emoji", help="what draws: folder, Hub id or bundled, or none")
    add_dtype(parser)
    parser.add_argument("--server_name", help="address to listen at; default: this machine's own; 0.0.0.0: all")
    parser.add_argument("--server_port", type=int, help="default: the first that is free from 7860 on")
    parser.add_argument("--share", action="store_true", help="a public address, through Gradio's servers")
    text = "write a Space of the Hub with this demo to a new folder, and start nothing"
    parser.add_argument("--space_dir", type=Path, help=text)
    return parser.parse_args(argv)


def shown_name(model: str) -> str:
    """Of a folder, the last two parts: visitors need not know the others."""
    return "/".join(Path(model).absolute().parts[-2:]) if Path(model).is_dir() else model


def load_models(args: argparse.Namespace) -> "Models":
    import torch
    from accelerate import PartialState

    from ..demo.app import Models
    from ..evaluation.autoencoders import load_autoencoder
    from ..loading import BUNDLED, list_bundled
    from ..models import AutoencoderViTok
    from ..pipelines import ViTokDiTPipeline
    from ..precision import choose_dtype

    device, options = PartialState().default_device, {"dtype": getattr(torch, choose_dtype(args.dtype))}
    vae = AutoencoderViTok.from_pretrained(args.model, subfolder=args.subfolder, **options).to(device)
    bundled = [name for name in list_bundled() if (BUNDLED / name / "config.json").is_file() and name != args.model]
    other_name, other, pipe = args.compare or next(iter(bundled), "none"), None, None
    if other_name != "none":
        other = load_autoencoder(other_name, args.compare_subfolder, **options).to(device)
    if args.pipeline != "none":
        pipe = ViTokDiTPipeline.from_pretrained(args.pipeline, **options).to(device)
        if pipe.is_video:
            raise ValueError(f"{args.pipeline} makes videos, but the demo draws pictures: name another, or none.")
    return Models(shown_name(args.model), vae, shown_name(other_name), other, pipe)


def run(args: argparse.Namespace) -> None:
    import gradio as gr

    from ..demo.app import launch_options, make_app
    from ..demo.space import write_space

    models = load_models(args)
    app = make_app(models)
    if args.space_dir is None:
        address = {"server_name": args.server_name, "server_port": args.server_port, "share": args.share}
        app.launch(**launch_options(), **address)
        return
    names = ("model", "subfolder", "compare", "compare_subfolder", "pipeline", "dtype")
    write_space(args.space_dir, {name: getattr(args, name) for name in names})
    print(
        f"{args.space_dir}/ is a Space of Gradio {gr.__version__}: hf upload --repo-type space NAME {args.space_dir}"
    )
