r"""Autoencoders next to PCA with as many numbers, and to JPEG and WebP with as many bytes.

    python examples/compare_codecs.py --models vitok-tiny-f8x8 --latent_bits 8 --data_dir data/test/film \
        --baselines pca jpeg webp --pca_data_dir data/train/film

Takes the arguments of `vitok evaluate` too, but for --teacher, and writes its tables, of pictures of one --resolution.
JPEG (4:4:4 or 4:2:0, whichever is closer) and lossy WebP have the highest quality within as many bytes, whole files,
as latents of 16 and of 8 bits; bytes of quantized latents count the ranges of the channels. With --num_channels or
--num_tokens, rates.png has a curve of each.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from studies.baselines import PatchPCA
from studies.codecs import ImageCodec, Quantizer

from vitok_hf.commands import run_command
from vitok_hf.commands.evaluate import check_data, cuts, load_models, make_evaluation_parser, run
from vitok_hf.data.held_out import EvaluationData
from vitok_hf.data.sources import FolderFiles
from vitok_hf.evaluation.autoencoders import spatial_ratio
from vitok_hf.evaluation.costs import mean_costs
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator, Row, autoencoder_row
from vitok_hf.evaluation.reconstruction import reconstruct


def make_rows(args: argparse.Namespace, evaluator: ReconstructionEvaluator) -> Iterator[Row]:
    """Of the models, then of the baselines that have as many numbers or bytes."""
    codes, resolution, channels = {}, args.resolution, evaluator.data.protocol.channels  # latents -> patch size
    if args.baselines and channels != 3:
        raise ValueError(f"The baselines are of RGB, but the models take {channels} channels: pass --baselines alone.")
    for name, vae in load_models(args):
        vae.to(evaluator.device)
        for cut, lengths in cuts(args):
            yield autoencoder_row(name + cut, vae, evaluator.shapes, lengths)
            costs = mean_costs(vae, evaluator.shapes, lengths)
            if args.latent_bits:
                quantizer = Quantizer(args.latent_bits)
                codec = partial(reconstruct, vae, change_latents=quantizer, lengths=lengths)
                quantized = partial(lambda costs, code: costs | {"bytes": code.num_bytes}, costs, quantizer)
                yield Row(f"{name}, {args.latent_bits}-bit latents{cut}", codec, quantized)
            patch_size = codes.setdefault(int(costs["E"]), spatial_ratio(vae))
            if "pca" in args.baselines and resolution % patch_size:
                raise ValueError(f"PCA needs a --resolution that is a multiple of {patch_size}, not {resolution}.")
    for num_latents, patch_size in codes.items():
        if "pca" in args.baselines:
            components = num_latents * patch_size**2 // resolution**2
            if components < 1:
                raise ValueError(f"{num_latents} numbers are less than one a patch of {patch_size} x {patch_size}.")
            data = EvaluationData(FolderFiles(args.pca_data_dir), evaluator.data.protocol, args.pca_limit)
            pca = PatchPCA(patch_size, components, data.batches(range(len(data)), args.batch_size))
            costs = {"E": num_latents, "compression": 3 * patch_size**2 / components, "bytes": 2 * num_latents}
            yield Row(f"PCA, {components} of {patch_size} x {patch_size} pixels", pca.reconstruct, costs.copy)
        for file_format in ("JPEG", "WEBP"):
            for bits in (16, 8):
                if file_format.lower() in args.baselines:
                    picture_codec = ImageCodec(file_format, num_latents * bits // 8)
                    yield Row(f"{file_format}, {num_latents} x {bits} bits", picture_codec, picture_codec.costs)


def main():
    parser = make_evaluation_parser("compare_codecs.py", __doc__)
    parser.add_argument("--latent_bits", type=int, help="adds a row of each model with latents quantized to so many")
    parser.add_argument("--baselines", nargs="*", default=["jpeg", "webp"], choices=["pca", "jpeg", "webp"])
    parser.add_argument("--pca_data_dir", help="training pictures for PCA")
    parser.add_argument("--pca_limit", type=int, default=1000, help="at most so many of them")
    args = check_data(parser, parser.parse_args(sys.argv[1:]))
    if args.num_frames > 1 or args.resolution == 0:
        parser.error("codecs are compared on pictures of one --resolution")
    if args.teacher is not None:
        parser.error("--teacher is of `vitok evaluate` alone: leave it out")
    if "pca" in args.baselines and not (args.pca_data_dir and args.pca_limit > 0):
        parser.error(f"--baselines pca needs --pca_data_dir, and --pca_limit from 1, not {args.pca_limit}")
    if args.latent_bits is not None and not 1 <= args.latent_bits <= 16:
        parser.error(f"--latent_bits must be from 1 to 16, but is {args.latent_bits}")
    run(args, make_rows)


if __name__ == "__main__":
    run_command(main)
