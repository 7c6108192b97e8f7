"""Sends pictures or videos through an autoencoder: reconstructions, comparisons side by side, PSNR and SSIM.

Videos, of any length, keep their size, times and sound, and get a sheet of frames, originals above reconstructions.

    vitok reconstruct                                               # a bundled checkpoint on a shipped photograph
    vitok reconstruct --input holiday.jpg film.mp4 folder/ --model MODEL --output_dir out

The channels are those of the model: 1 is grey, 3 RGB, 4 RGBA (saved as such; measured with premultiplied colours), and
any number comes from .npy or .npz files, (C, H, W) of uint8, of uint16, or of floats in [0, 1], or a TIFF file with a
grey page for each; reconstructions of these are saved as .npy.

MODEL is whatever `AutoencoderViTok.from_pretrained` takes. Sizes that do not fit the patches are padded by repeating
the last rows and columns, and cropped back. Files that cannot be read are named at the end, and the exit code is 1.
"""

import argparse
import sys
from pathlib import Path

from . import add_dtype, make_parser


PHOTOGRAPH = Path(__file__).parents[1] / "assets" / "astronaut.png"


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_parser(program, __doc__)
    text = "pictures, videos, folders; default: a photograph of the package"
    parser.add_argument("--input", nargs="+", type=Path, default=[PHOTOGRAPH], help=text)
    parser.add_argument("--model", default="vitok-tiny-f8x8", help="folder, Hub id or bundled name")
    parser.add_argument("--subfolder", help="folder of the model inside --model")
    add_dtype(parser)
    parser.add_argument("--num_channels", type=int, help="cut the codes to so many channels")
    parser.add_argument("--num_tokens", type=int, help="cut the codes to so many tokens")
    parser.add_argument(
        "--min_psnr",
        type=float,
        help="take of each picture, or clip of a video, the shortest code that reaches it, in dB, else the longest",
    )
    text = (
        "attend to blocks of so many tokens a side and those around; 0: to all; default: 16 if there are over 65,536"
    )
    parser.add_argument("--window_radius", type=int, help=text)
    text = "of a video, latent frames that a causal model sees at most; 0: all; default: those of its sample_frames"
    parser.add_argument("--max_cached_frames", type=int, help=text)
    parser.add_argument("--output_dir", type=Path, default=Path("reconstructions"))
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    import torch
    from accelerate import PartialState

    from ..data.files import read_each
    from ..evaluation.autoencoders import read_channels
    from ..evaluation.reconstruct_files import CodecSettings, name_targets, reconstruct_file
    from ..models import AutoencoderViTok
    from ..precision import choose_dtype

    files = name_targets(args.input, args.output_dir, read_channels(args.model, args.subfolder))
    dtype = getattr(torch, choose_dtype(args.dtype))
    vae = AutoencoderViTok.from_pretrained(args.model, subfolder=args.subfolder, dtype=dtype)
    vae = vae.to(PartialState().default_device)
    config = vae.config
    values = config.in_channels * config.temporal_patch_size * config.patch_size**2
    parameters = sum(parameter.numel() for parameter in vae.parameters()) / 1e6
    channels = args.num_channels or config.latent_channels
    ratio = (
        f"{values} values become {channels}, {values / channels:g}:1"
        if config.num_latent_tokens is None
        else "1-D codes"
    )
    print(f"{args.model}: {parameters:.1f} M parameters; {ratio}")
    lengths = {name: getattr(args, name) for name in ("num_channels", "num_tokens", "min_psnr")}
    lengths = {name: value for name, value in lengths.items() if value is not None}
    settings = CodecSettings(args.window_radius, args.max_cached_frames, lengths)
    settings.check(vae)

    def reconstruct(target: str) -> None:
        try:
            print(reconstruct_file(vae, files[target], target, settings))
        except ValueError as error:
            name = str(files[target])
            raise ValueError(str(error) if name in str(error) else f"{name}: {error}") from error

    failures = read_each(files, reconstruct)
    if len(failures) < len(files):
        print(f"Reconstructions and comparisons (original left) are in {args.output_dir}/")
    if failures:
        sys.exit("\n".join([f"{len(failures)} of {len(files)} files failed:", *failures]))
