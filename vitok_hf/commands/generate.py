"""Draws samples of a class-conditional pipeline: one picture with a row for each class.

    vitok generate
    vitok generate --class_labels face flag --num_images_per_label 4 --guidance_scale 2 --seed 7

By default all classes of the bundled generator, which needs no network.
"""

import argparse
import time
from pathlib import Path

from . import add_dtype, make_parser


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    parser.add_argument("--model", default="vitok-dit-emoji", help="what `from_pretrained` takes")
    parser.add_argument("--class_labels", nargs="+", help="names or ids of classes; default: all")
    parser.add_argument("--num_images_per_label", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, help="1 is none; default: the pipeline's own")
    parser.add_argument("--guidance_rescale", type=float, help="0 is none; default: the pipeline's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next ones follow")
    add_dtype(parser)
    parser.add_argument("--output", type=Path, default=Path("samples.png"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState
    from einops import rearrange
    from PIL import Image

    from ..evaluation.generation import generate_samples
    from ..pipelines import ViTokDiTPipeline
    from ..precision import choose_dtype

    if Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output {args.output} must end as a picture does, for example in .png.")

    pipe = ViTokDiTPipeline.from_pretrained(args.model, dtype=getattr(torch, choose_dtype(args.dtype)))
    pipe.to(PartialState().default_device)
    names, count = pipe.config.id2label, args.num_images_per_label
    given = args.class_labels or ()
    chosen = [int(label) if label.isdigit() and label not in pipe.labels else label for label in given]
    ids = pipe.get_label_ids(chosen) or sorted(names, key=names.get)
    if not ids or pipe.is_video or count < 1:
        raise ValueError(
            f"{args.model} is to draw {count} pictures of {len(ids)} classes: it must make pictures, no videos, and "
            "at least one; give ids as --class_labels if its classes have no names."
        )
    began = time.perf_counter()
    options = {name: getattr(args, name) for name in ("guidance_scale", "guidance_rescale", "num_inference_steps")}
    images = generate_samples(pipe, [index for index in ids for _ in range(count)], count, args.seed, **options)
    seconds = time.perf_counter() - began
    args.output.parent.mkdir(parents=True, exist_ok=True)
    grid = rearrange(images, "(rows cols) c h w -> (rows h) (cols w) c", cols=count)
    Image.fromarray(grid.numpy()).save(args.output)
    print(f"Rows: {', '.join(names.get(index, str(index)) for index in ids)}")
    print(f"{len(images)} pictures in {seconds:.1f} s, {args.num_inference_steps} steps each; saved {args.output}")
