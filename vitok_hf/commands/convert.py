"""Converts the author's ViTok-v2 weights to diffusers' layout, and back, bit for bit.

vitok convert philippehansen/ViTok-v2-350M-f16x64 ViTok-v2-350M-f16x64
vitok convert philippehansen/ViTok-v2-350M-f16x64 --dry_run
vitok convert --to_vitok_v2 ViTok-v2-350M-f16x64 original
"""

import argparse
from pathlib import Path

from . import make_parser


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    parser.add_argument("source", help="folder or Hub id")
    parser.add_argument("output_dir", type=Path, nargs="?", help="a folder that does not exist yet")
    parser.add_argument("--variant", help="the architecture, if the name of the source does not tell")
    parser.add_argument("--subfolder")
    parser.add_argument("--revision")
    parser.add_argument("--token")
    parser.add_argument("--cache_dir")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--license", help="for the model card, if the source does not state it")
    parser.add_argument("--push_to_hub", metavar="REPO_ID", help="upload the result to this repository as well")
    parser.add_argument("--dry_run", action="store_true", help="print the plan, check the shapes, read no weights")
    parser.add_argument("--to_vitok_v2", action="store_true", help="diffusers' layout -> the author's two files")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState
    from huggingface_hub import HfApi

    from ..loading.conversion import plan_conversion, write_diffusers, write_vitok_v2
    from ..models import AutoencoderViTok
    from ..training.checkpointing import atomic_folder

    hub = {key: getattr(args, key) for key in ("subfolder", "revision", "token", "cache_dir")}
    if args.dry_run:
        print(*plan_conversion(AutoencoderViTok, args.source, args.variant, **hub), sep="\n")
        return
    if args.output_dir is None:
        raise ValueError("Give the folder to write to, or --dry_run.")
    if args.output_dir.exists():
        raise ValueError(f"{args.output_dir} exists already: name a folder that does not.")
    dtype = None if args.dtype == "auto" else getattr(torch, args.dtype)
    with atomic_folder(args.output_dir, PartialState()) as folder:
        if args.to_vitok_v2:
            write_vitok_v2(AutoencoderViTok, args.source, folder, dtype, **hub)
        else:
            title, options = args.push_to_hub or args.output_dir.name, (args.max_shard_size, args.license)
            write_diffusers(AutoencoderViTok, args.source, folder, title, args.variant, dtype, *options, **hub)
    print(f"Saved {args.output_dir}")
    if args.push_to_hub:
        api = HfApi(token=args.token)
        api.create_repo(args.push_to_hub, exist_ok=True)
        print(api.upload_folder(repo_id=args.push_to_hub, folder_path=args.output_dir))
