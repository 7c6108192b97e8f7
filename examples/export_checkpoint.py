r"""Turns a training checkpoint into a folder to publish: latent statistics in the config, weights in half precision.

    python examples/export_checkpoint.py --model output/checkpoint-7500/vae --train_data_dir data/train/film:0.5 \
        data/train/emoji:0.5 --output_dir my-vitok
"""

from pathlib import Path

import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from vitok_hf import AutoencoderViTok, compute_latent_statistics
from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.items import Clip
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.views import CropView


def main():
    parser = make_parser("export_checkpoint.py", __doc__)
    parser.add_argument("--model", required=True, help="what `from_pretrained` takes")
    parser.add_argument(
        "--train_data_dir", nargs="+", required=True, help="folders with optional weights, as in training"
    )
    parser.add_argument("--num_batches", type=int, default=64, help="batches of 2 ** 20 pixels for the statistics")
    parser.add_argument("--size", type=int, help="side of the crops in pixels; default: the model's sample_size")
    parser.add_argument("--fps", type=float, help="frames a second of clips, as in training; default: every frame")
    parser.add_argument(
        "--normalization",
        default="channels",
        choices=["channels", "factors"],
        help="latents_mean and latents_std, or scaling_factor and shift_factor (Stable Diffusion, SD3, FLUX, DiT)",
    )
    parser.add_argument("--dtype", default="float16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    vae = AutoencoderViTok.from_pretrained(args.model).to(PartialState().default_device)
    size = args.size or vae.config.sample_size
    clip = Clip(vae.config.sample_frames, args.fps, channels=vae.config.in_channels)
    view = CropView([(size, size, 1.0)], 2**20, clip, flip=False)
    batches = iterate_pixels(make_dataset(view, SourceSettings(args.train_data_dir)), args.num_batches)
    statistics = compute_latent_statistics(vae, tqdm(batches, desc="latent statistics", total=args.num_batches))
    config = statistics.to_config(args.normalization == "channels")
    vae.register_to_config(_name_or_path=args.output_dir.name, **config)  # not the path of the run
    vae.to(getattr(torch, args.dtype)).save_pretrained(args.output_dir)
    print(f"{config} from {statistics.num_items} crops, {statistics.num_latents} latents a channel")
    print(f"Saved {args.output_dir}")


if __name__ == "__main__":
    run_command(main)
