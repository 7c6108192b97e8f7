"""Draws samples of a class-conditional pipeline: one picture with a row for each class, or a file of all of them.

    vitok generate
    vitok generate --class_labels face flag --num_images_per_label 4 --guidance_scale 2 --seed 7
    vitok generate --num_images_per_label 50 --save_npz samples.npz

By default all classes of the bundled generator, which needs no network. --save_npz writes what the evaluation suite of
ADM reads: `arr_0`, (N, H, W, 3) uint8, and the class ids, `arr_1`.
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
    parser.add_argument("--save_npz", type=Path, help="file of all samples and their class ids, ending in .npz")
    parser.add_argument("--output", type=Path, help="default: samples.png, or no picture with --save_npz")
    args = parser.parse_args(argv)
    if args.output is None and args.save_npz is None:
        args.output = Path("samples.png")
    return args


def run(args: argparse.Namespace) -> None:
    import numpy as np
    import torch
    from accelerate import PartialState
    from einops import rearrange
    from PIL import Image

    from ..clips import COLOURS, to_picture, to_shown
    from ..data.samples_file import write_samples_file
    from ..evaluation.generation import generate_samples
    from ..pipelines import ViTokDiTPipeline
    from ..precision import choose_dtype

    if args.save_npz and args.save_npz.suffix.lower() != ".npz":
        raise ValueError(f"--save_npz {args.save_npz} must end in .npz.")
    if args.output and Image.registered_extensions().get(args.output.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--output {args.output} must end as a picture does, for example in .png.")

    pipe = ViTokDiTPipeline.from_pretrained(args.model, dtype=getattr(torch, choose_dtype(args.dtype)))
    pipe.to(PartialState().default_device)
    names, count = pipe.config.id2label, args.num_images_per_label
    given = args.class_labels or ()
    chosen = [int(label) if label.isdecimal() and label not in pipe.labels else label for label in given]
    ids = pipe.get_label_ids(chosen) or sorted(names, key=names.get)
    if not ids or pipe.is_video or count < 1:
        raise ValueError(
            f"{args.model} is to draw {count} pictures of {len(ids)} classes: it must make pictures, no videos, and "
            "at least one; give ids as --class_labels if its classes have no names."
        )
    channels = pipe.vae.config.in_channels
    if args.save_npz and channels != 3:
        raise ValueError(
            f"--save_npz holds RGB, but {args.model} makes pictures of {channels} channels: leave it out."
        )
    began = time.perf_counter()
    options = {name: getattr(args, name) for name in ("guidance_scale", "guidance_rescale", "num_inference_steps")}
    class_ids = [index for index in ids for _ in range(count)]
    images = generate_samples(pipe, class_ids, count, args.seed, **options)
    seconds = time.perf_counter() - began
    if args.save_npz:
        args.save_npz.parent.mkdir(parents=True, exist_ok=True)
        write_samples_file(args.save_npz, images.permute(0, 2, 3, 1).numpy(), np.array(class_ids))
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        shown = images if channels in COLOURS else to_shown(images)
        grid = rearrange(shown, "(rows cols) c h w -> (rows h) (cols w) c", cols=count)
        to_picture(grid.numpy()).save(args.output)
    print(f"Rows: {', '.join(names.get(index, str(index)) for index in ids)}")
    saved = " and ".join(str(path) for path in (args.save_npz, args.output) if path)
    print(f"{len(images)} pictures in {seconds:.1f} s, {args.num_inference_steps} steps each; saved {saved}")
