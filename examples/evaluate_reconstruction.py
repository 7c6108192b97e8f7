"""How well autoencoders reconstruct: any that diffusers can load, on pictures or videos, next to PCA, JPEG and WebP.

    python examples/evaluate_reconstruction.py --models vitok-tiny-f8x8 stabilityai/sd-vae-ft-mse \
        --data_dir data/test/film --resolution 256 --baselines pca jpeg webp --pca_data_dir data/train/film

Prints a table and writes it to `output_dir`/<data>/ as table.md, table.csv and results.json, which holds the protocol
(crop, filter, rounding, feature networks and the checksums of their weights); saves of each row some pictures and the
worst ten beside their reconstructions and error maps, clips as mp4. Metrics: PSNR (dB), SSIM, MS-SSIM and LPIPS with
95 % confidence intervals, rFID, rIS, rFDD (DINOv2) and, of clips, rFVD. The weights of the feature networks are
downloaded, or read from the paths given; a metric whose weights cannot be had is left out, and the table says why.
Costs, of pictures of several sizes means: GMACs, E (numbers in the code), compression (values a number), bytes (of
latents at 16 bits, or as --latent_bits says; of JPEG and WebP whole files), seconds a picture with the given batch
size, and by how much memory rises at most.
`accelerate launch` shares the pictures among processes.
"""

import argparse
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import Accelerator

from vitok_hf.commands import run_command
from vitok_hf.data.files import short_names
from vitok_hf.data.held_out import Codec, EvaluationData
from vitok_hf.data.protocol import Protocol
from vitok_hf.data.sources import FolderFiles, HubRows
from vitok_hf.evaluation.autoencoders import load_autoencoder, spatial_ratio
from vitok_hf.evaluation.codecs import ImageCodec, autoencoder_codec
from vitok_hf.evaluation.evaluator import ReconstructionEvaluator
from vitok_hf.evaluation.networks import LOADERS, load_networks
from vitok_hf.evaluation.pca import PatchPCA
from vitok_hf.evaluation.results import Result, check_comparable, load_results, markdown_table, save_results, write_csv
from vitok_hf.evaluation.visuals import save_examples
from vitok_hf.precision import DTYPES, choose_dtype


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", required=True, help="folders, Hub ids or bundled names")
    parser.add_argument("--subfolder", help="folder inside each model, as vae")
    parser.add_argument(
        "--variant", help="of the weights (fp16), or the architecture of the author's ViTok-v2 weights"
    )
    parser.add_argument("--dtype", default="auto", choices=DTYPES)
    parser.add_argument("--latent_bits", type=int, help="adds a row of each model with latents quantized to so many")
    parser.add_argument("--data_dir", nargs="*", default=[], help="folders or files, a table each")
    parser.add_argument("--dataset_name", help="data set of the Hub")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split", default="validation")
    parser.add_argument("--data_column", help="default: image, or video for clips")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each, evenly spaced")
    parser.add_argument("--resolution", type=int, default=256, help="side of the central square; 0: whole pictures")
    parser.add_argument("--num_frames", type=int, default=1, help="more than 1: the first clip of each video")
    parser.add_argument("--fps", type=float, help="of clips; default: every frame")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--baselines", nargs="*", default=[], choices=["pca", "jpeg", "webp"], help="of pictures")
    parser.add_argument("--pca_data_dir", help="training pictures for PCA")
    parser.add_argument("--pca_limit", type=int, default=1000, help="at most so many of them")
    parser.add_argument("--networks", nargs="*", choices=LOADERS, help="default: all that fit the data")
    parser.add_argument("--inception_weights", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    parser.add_argument("--dino", help="folder or Hub id of a DINOv2; default: facebook/dinov2-large")
    parser.add_argument("--i3d_weights", help="i3d_torchscript.pt of StyleGAN-V")
    parser.add_argument("--lpips_weights", help="torchvision's weights of AlexNet")
    parser.add_argument("--num_examples", type=int, default=8, help="pictures saved for each row")
    parser.add_argument(
        "--add_results", nargs="*", default=[], help="results.json whose rows go into the table as well"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    args = parser.parse_args()
    args.dtype = choose_dtype(args.dtype)
    if bool(args.data_dir) == bool(args.dataset_name):
        parser.error("give either --data_dir or --dataset_name")
    if args.baselines and (args.num_frames > 1 or args.resolution == 0):
        parser.error("--baselines are for pictures of one --resolution")
    if "pca" in args.baselines and not args.pca_data_dir:
        parser.error("--baselines pca needs --pca_data_dir")
    if args.latent_bits is not None and not 1 <= args.latent_bits <= 16:
        parser.error(f"--latent_bits must be from 1 to 16, but is {args.latent_bits}")
    if args.networks is None:
        args.networks = [name for name in LOADERS if name != "i3d" or args.num_frames > 1]
    return args


def data_sets(args: argparse.Namespace, protocol: Protocol) -> Iterator[tuple[str, EvaluationData]]:
    for folder, name in zip(args.data_dir, short_names(args.data_dir)):
        yield name, EvaluationData(FolderFiles(folder, args.num_frames), protocol, args.limit)
    if args.dataset_name:
        source = (args.dataset_name, args.dataset_config_name, args.dataset_split, args.data_column, args.num_frames)
        yield f"{args.dataset_name} {args.dataset_split}", EvaluationData(HubRows(*source), protocol, args.limit)


def fit_pca(args: argparse.Namespace, patch_size: int, num_components: int, protocol: Protocol) -> PatchPCA:
    data = EvaluationData(FolderFiles(args.pca_data_dir), protocol, args.pca_limit)
    return PatchPCA(patch_size, num_components, data.batches(range(len(data)), args.batch_size))


def rows(
    args: argparse.Namespace, data: EvaluationData, shapes: Counter, device: torch.device
) -> Iterator[tuple[str, Codec, dict[str, float]]]:
    """Name, codec and known costs: of the models, then of the baselines that have as many numbers or bytes."""
    codes = {}  # latents -> patch size
    for name in args.models:
        title = name if args.dtype == "float32" else f"{name}, {args.dtype}"
        options = {"subfolder": args.subfolder, "dtype": getattr(torch, args.dtype)}
        vae = load_autoencoder(name, **options | ({"variant": args.variant} if args.variant else {}))
        for bits in (None, args.latent_bits) if args.latent_bits else (None,):
            codec, costs = autoencoder_codec(vae.to(device), shapes, bits)
            yield title if bits is None else f"{title}, {bits}-bit latents", codec, costs
        patch_size = codes.setdefault(int(costs["E"]), spatial_ratio(vae))
        if "pca" in args.baselines and args.resolution % patch_size:
            raise ValueError(f"PCA needs a --resolution that is a multiple of {patch_size}, not {args.resolution}.")
    for num_latents, patch_size in codes.items():
        if "pca" in args.baselines:
            components = num_latents * patch_size**2 // args.resolution**2
            if components < 1:
                raise ValueError(
                    f"{num_latents} numbers are less than one for each {patch_size} x {patch_size} pixels."
                )
            pca = fit_pca(args, patch_size, components, data.protocol)
            costs = {"E": num_latents, "compression": 3 * patch_size**2 / components, "bytes": 2 * num_latents}
            yield f"PCA, {components} of {patch_size} x {patch_size} pixels", pca.reconstruct, costs
        for file_format in ("jpeg", "webp"):
            for bits in (16, 8):
                if file_format in args.baselines:
                    codec = ImageCodec(file_format.upper(), num_latents * bits // 8)
                    yield f"{file_format.upper()}, {num_latents} x {bits} bits", codec, {}


def main():
    args = parse_args()
    accelerator = Accelerator()
    device = accelerator.device
    protocol = Protocol(args.resolution or None, args.num_frames, args.fps)
    paths = {"inception": args.inception_weights, "dino": args.dino, "i3d": args.i3d_weights}
    with accelerator.main_process_first():  # which downloads for all
        networks, unavailable = load_networks(args.networks, paths | {"lpips": args.lpips_weights}, device)
    earlier = [result for path in args.add_results for result in load_results(path)]
    unavailable |= {name: "left out" for name in LOADERS if name not in args.networks and name != "i3d"}
    for data_name, data in data_sets(args, protocol):
        evaluator = ReconstructionEvaluator(data, data_name, networks, unavailable, args.batch_size, device)
        folder = args.output_dir / re.sub(r"[^\w.-]+", "_", data_name)
        results: list[Result] = []
        for name, codec, costs in rows(args, data, evaluator.shapes, device):
            result, values = evaluator.evaluate(name, codec, costs)
            if isinstance(codec, ImageCodec):
                result.costs |= codec.costs()
            results.append(result)
            if accelerator.is_main_process:
                row_folder = folder / re.sub(r"[^\w.-]+", "_", name).strip("_")
                folder.mkdir(parents=True, exist_ok=True)
                save_results(folder / "results.json", results)
                save_examples(row_folder, data, codec, values["psnr"], args.num_examples)
            check_comparable([result, *earlier])
        if accelerator.is_main_process:
            table = markdown_table(results + earlier)
            (folder / "table.md").write_text(table)
            write_csv(folder / "table.csv", results + earlier)
            print(f"{data_name}, {len(data)} {'clips' if args.num_frames > 1 else 'pictures'}\n\n{table}", flush=True)


if __name__ == "__main__":
    run_command(main)
