"""Draws samples of a class-conditional pipeline: one picture with a row for each class.

    python examples/generate.py
    python examples/generate.py --class_labels face flag --num_images_per_label 4 --guidance_scale 2 --seed 7

By default all classes of the bundled generator, which needs no network.
"""

import argparse
import time
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers.utils import make_image_grid

from vitok_hf import ViTokDiTPipeline


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vitok-dit-emoji", help="what `from_pretrained` takes")
    parser.add_argument("--class_labels", nargs="+", help="names of classes; default: all")
    parser.add_argument("--num_images_per_label", type=int, default=8)
    parser.add_argument("--num_inference_steps", type=int, default=50)
    parser.add_argument("--guidance_scale", type=float, default=4.0, help="1 is none")
    parser.add_argument("--seed", type=int, default=0, help="of the first sample; the next ones follow")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output", type=Path, default=Path("samples.png"))
    args = parser.parse_args()

    pipe = ViTokDiTPipeline.from_pretrained(args.model, torch_dtype=getattr(torch, args.dtype))
    pipe.to(PartialState().default_device)
    labels = args.class_labels or list(pipe.labels)
    count = args.num_images_per_label
    began, images = time.perf_counter(), []
    for row, label in enumerate(labels):
        seeds = range(args.seed + row * count, args.seed + (row + 1) * count)
        images += pipe(
            label,
            num_images_per_label=count,
            guidance_scale=args.guidance_scale,
            num_inference_steps=args.num_inference_steps,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
        ).images
    seconds = time.perf_counter() - began
    args.output.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=len(labels), cols=count).save(args.output)
    print(f"Rows: {', '.join(labels)}")
    print(f"{len(images)} pictures in {seconds:.1f} s, {args.num_inference_steps} steps each; saved {args.output}")


if __name__ == "__main__":
    main()
