r"""Writes the latents of pictures by class, for `vitok train-dit --latents_dir`; goes on where it was interrupted.

Files and settings must then be the same; data that were moved as a whole are. What could not be read is tried again.

    vitok cache-latents --vae_name_or_path vitok-tiny-f8x8 --train_data_dir pictures --resolution 64 \
        --output_dir latents

The class of a picture is the name of the folder that holds it. Both flips are written, as means and standard
deviations of the posteriors. A caption in `picture.txt`, or any object in `picture.json`, beside `picture.png` goes
along: `vitok_hf.data.latent_cache.LatentCache(folder).metadata(index)` has it.
"""

import argparse
from pathlib import Path

from . import make_parser


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    parser.add_argument("--vae_name_or_path", required=True, help="what `from_pretrained` takes")
    parser.add_argument("--vae_variant", help="of the author's ViTok-v2 weights under another name")
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders of pictures, or of videos")
    parser.add_argument("--class_file", help="classes in the order of their ids, one a line; default: sorted")
    parser.add_argument("--max_files_per_class", type=int, help="of larger classes, a fixed random choice of so many")
    parser.add_argument("--resolution", type=int, help="side of the central squares; default: the model's sample_size")
    parser.add_argument("--fps", type=float, help="frames a second of the clips of a video model; default: all")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--shard_size", type=int, default=4096, help="files of a shard")
    parser.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--bits", type=int, choices=[8, 4], help="store whole numbers of so many bits, not --dtype")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that read files")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch
    from accelerate import Accelerator

    from ..data.classes import LabelledFiles, read_classes
    from ..data.items import Clip
    from ..data.latent_cache import write_latents
    from ..models import AutoencoderViTok

    accelerator = Accelerator()
    if accelerator.num_processes > 1:
        raise ValueError("Latents are cached by one process: start the command without `accelerate launch`.")

    vae = AutoencoderViTok.from_pretrained(args.vae_name_or_path, variant=args.vae_variant, dtype=torch.float32)
    vae.to(accelerator.device).eval()
    classes = None if args.class_file is None else read_classes(args.class_file)
    clip = Clip(vae.config.sample_frames, args.fps, channels=vae.config.in_channels)
    files = LabelledFiles(args.train_data_dir, classes, clip, args.max_files_per_class)
    index = write_latents(
        vae,
        Path(args.vae_name_or_path).name,
        files,
        args.output_dir,
        vae.config.sample_size if args.resolution is None else args.resolution,
        fps=args.fps,
        batch_size=args.batch_size,
        shard_size=args.shard_size,
        dtype=getattr(torch, args.dtype),
        bits=args.bits,
        num_workers=args.num_workers,
    )
    shards = index["shards"].values()
    items, skipped = sum(shard["num_items"] for shard in shards), sum(len(shard["skipped"]) for shard in shards)
    print(f"{items} latents of {len(files.classes)} classes in {args.output_dir}; {skipped} files could not be read")
