"""How well autoencoders reconstruct: any that diffusers can load, on pictures or videos.

    vitok evaluate --models vitok-tiny-f8x8 stabilityai/sd-vae-ft-mse --data_dir data/test/film --resolution 256

Prints a table and writes it to `output_dir`/<data>/ as table.md, table.csv and results.json, which holds the protocol
(crop, filter, rounding, feature networks and the checksums of their weights); saves of each row some pictures and the
worst ten beside their reconstructions and error maps, clips as mp4. Metrics: PSNR (dB), SSIM, MS-SSIM and LPIPS with
95 % confidence intervals, rFID, rIS, rFDD (DINOv2) and, of clips, rFVD. The weights of the feature networks are
downloaded, or read from the paths given; a metric whose weights cannot be had is left out, and the table says why.
Costs, of pictures of several sizes means: GMACs, E (numbers in the code), compression (values a number), bytes (of
latents at 16 bits), seconds a picture with the given batch size, and by how much memory rises at most.
--test_set coco-val2017, imagenet-val (for accounts that have access) and div8k (46 GB) are downloaded from the Hub.
`accelerate launch -m vitok_hf.commands evaluate ...` shares the pictures among processes.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import add_dtype, make_parser


if TYPE_CHECKING:
    import torch
    from diffusers.models.modeling_utils import ModelMixin

    from ..data.held_out import Protocol
    from ..data.items import Indexed
    from ..evaluation.evaluator import ReconstructionEvaluator, Row


TEST_SETS = ["coco-val2017", "imagenet-val", "div8k"]  # of vitok_hf.data.test_sets, which --help does not wait for
NETWORKS = ["inception", "dino", "i3d", "lpips"]


def make_evaluation_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    parser = make_parser(program, description)
    parser.add_argument("--models", nargs="+", required=True, help="folders, Hub ids or bundled names")
    parser.add_argument("--subfolder", help="folder inside each model, as vae")
    parser.add_argument(
        "--variant", help="of the weights (fp16), or the architecture of the author's ViTok-v2 weights"
    )
    add_dtype(parser)
    parser.add_argument(
        "--teacher", help="an autoencoder whose latents the models have learnt: rows of both, and of each half of both"
    )
    parser.add_argument("--teacher_subfolder", help="folder inside it, as vae")
    parser.add_argument(
        "--pipeline", help="ViTokDiTPipeline, of which 16 pictures are compared, with each model for its autoencoder"
    )
    rates = "codes that are cut, a row for each number, and a curve in rates.png"
    parser.add_argument("--num_channels", nargs="+", type=int, default=[], help=rates)
    parser.add_argument("--num_tokens", nargs="+", type=int, default=[], help="likewise")
    parser.add_argument(
        "--data_dir", nargs="*", default=[], help="folders or files, a table each; also a .npz of `vitok generate`"
    )
    parser.add_argument("--test_set", choices=TEST_SETS, help="by name, downloaded from the Hub")
    parser.add_argument("--dataset_name", help="data set of the Hub")
    parser.add_argument("--dataset_config_name")
    parser.add_argument("--dataset_split", default="validation")
    parser.add_argument("--data_column", help="default: image, or video for clips")
    parser.add_argument("--limit", type=int, help="at most so many pictures of each, evenly spaced")
    text = "vitok-v2: crop and filter of its evaluation script, and of a --test_set the first 5,000 pictures"
    parser.add_argument("--protocol", default="default", choices=["default", "vitok-v2"], help=text)
    parser.add_argument("--resolution", type=int, default=256, help="side of the central square; 0: whole pictures")
    parser.add_argument("--num_frames", type=int, default=1, help="more than 1: the first clip of each video")
    parser.add_argument("--fps", type=float, help="of clips; default: every frame")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--networks", nargs="*", choices=NETWORKS, help="default: all that fit the data")
    parser.add_argument("--inception_weights", help="weights-inception-2015-12-05-6726825d.pth of torch-fidelity")
    parser.add_argument("--dino", help="folder or Hub id of a DINOv2; default: facebook/dinov2-large")
    parser.add_argument("--i3d_weights", help="i3d_torchscript.pt of StyleGAN-V")
    parser.add_argument("--lpips_weights", help="torchvision's weights of AlexNet")
    parser.add_argument("--num_examples", type=int, default=8, help="pictures saved for each row")
    parser.add_argument(
        "--add_results", nargs="*", default=[], help="results.json whose rows go into the table as well"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("evaluation"))
    return parser


def check_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> argparse.Namespace:
    if sum(map(bool, (args.data_dir, args.dataset_name, args.test_set))) != 1:
        parser.error("give either --data_dir or --dataset_name or --test_set")
    if args.test_set and args.num_frames > 1:
        parser.error("a --test_set has pictures, and no clips of --num_frames")
    if args.protocol == "vitok-v2" and (args.num_frames > 1 or args.resolution == 0):
        parser.error("--protocol vitok-v2 is of pictures of one --resolution")
    if args.teacher is not None and (args.num_channels or args.num_tokens):
        parser.error("--teacher is of whole codes: leave --num_channels and --num_tokens out")
    return args


def parse(argv: list[str], program: str) -> argparse.Namespace:
    parser = make_evaluation_parser(program, __doc__)
    return check_data(parser, parser.parse_args(argv))


def load_models(args: argparse.Namespace) -> "Iterator[tuple[str, ModelMixin]]":
    """Names of rows, and models."""
    import torch

    from ..evaluation.autoencoders import load_autoencoder

    options = {"subfolder": args.subfolder, "dtype": getattr(torch, args.dtype)}
    options |= {"variant": args.variant} if args.variant else {}
    for name in args.models:
        title = name if args.dtype == "float32" else f"{name}, {args.dtype}"
        yield title, load_autoencoder(name, **options)


def common_channels(args: argparse.Namespace) -> int:
    """Channels of the pictures that models and teacher take; raises `ValueError` if these are not the same."""
    from ..evaluation.autoencoders import read_channels

    channels = {name: read_channels(name, args.subfolder) for name in args.models}
    if args.teacher is not None:
        channels[args.teacher] = read_channels(args.teacher, args.teacher_subfolder)
    if len(set(channels.values())) > 1:
        listed = ", ".join(f"{name} has {count}" for name, count in channels.items())
        raise ValueError(f"The models take pictures of different numbers of channels, {listed}: measure them apart.")
    return channels[args.models[0]]


def cuts(args: argparse.Namespace) -> list[tuple[str, dict[str, int]]]:
    """What names of rows end with, and arguments of `encode`, for each length of codes that was asked for."""
    rates = [(f", {count} channels", {"num_channels": count}) for count in args.num_channels]
    return rates + [(f", {count} tokens", {"num_tokens": count}) for count in args.num_tokens] or [("", {})]


def model_rows(args: argparse.Namespace, evaluator: "ReconstructionEvaluator") -> "Iterator[Row]":
    import torch

    from ..evaluation.autoencoders import load_autoencoder
    from ..evaluation.drift import drift_rows
    from ..evaluation.evaluator import autoencoder_row

    if args.teacher is not None:
        teacher = load_autoencoder(args.teacher, args.teacher_subfolder, dtype=getattr(torch, args.dtype))
        yield from drift_rows(args.teacher, teacher, load_models(args), evaluator.device)
        return
    for name, vae in load_models(args):
        for cut, lengths in cuts(args):
            yield autoencoder_row(name + cut, vae.to(evaluator.device), evaluator.shapes, lengths)


def open_sources(args: argparse.Namespace, protocol: "Protocol") -> "dict[str, Indexed]":
    """Data by the names of their tables."""
    from ..data.files import short_names
    from ..data.samples_file import SamplesFile
    from ..data.sources import FolderFiles, HubRows
    from ..data.test_sets import open_test_set

    if args.test_set:
        first = 5000 if args.protocol == "vitok-v2" else None
        return {args.test_set: open_test_set(args.test_set, protocol.clip, first)}
    if args.dataset_name:
        hub = (args.dataset_name, args.dataset_config_name, args.dataset_split, args.data_column)
        return {f"{args.dataset_name} {args.dataset_split}": HubRows(*hub, protocol.clip)}
    sources: dict[str, Indexed] = {}
    for folder, name in zip(args.data_dir, short_names(args.data_dir)):
        are_samples = folder.lower().endswith(".npz") and (protocol.channels, protocol.num_frames) == (3, 1)
        sources[name] = SamplesFile(folder) if are_samples else FolderFiles(folder, protocol.clip)
    return sources


def run(
    args: argparse.Namespace,
    make_rows: "Callable[[argparse.Namespace, ReconstructionEvaluator], Iterable[Row]]" = model_rows,
) -> None:
    """A table for each data set, with the rows that `make_rows` gives for it."""
    from accelerate import Accelerator

    from ..checks import check_int
    from ..clips import COLOURS
    from ..data.held_out import EvaluationData, Protocol
    from ..evaluation.evaluator import ReconstructionEvaluator
    from ..evaluation.networks import load_networks
    from ..evaluation.results import load_results
    from ..evaluation.tables import write_table
    from ..precision import choose_dtype

    for name, least in (("batch_size", 1), ("num_examples", 0), ("limit", 1)):  # before networks are fetched
        if (value := getattr(args, name)) is not None:
            check_int(name, value, least)
    args.dtype = choose_dtype(args.dtype)
    accelerator = Accelerator()
    protocol = Protocol(args.resolution or None, args.num_frames, args.fps, common_channels(args))
    if args.protocol == "vitok-v2":
        protocol = Protocol.vitok_v2(args.resolution, protocol.channels)
    fitting = [name for name in NETWORKS if name != "i3d" or args.num_frames > 1]
    chosen = fitting if args.networks is None else args.networks
    chosen = chosen if protocol.channels in COLOURS else []  # the evaluator says why
    paths = {"inception": args.inception_weights, "dino": args.dino, "i3d": args.i3d_weights}
    earlier = [result for path in args.add_results for result in load_results(path)]
    with accelerator.main_process_first():  # which downloads for all
        sources = open_sources(args, protocol)
        networks, unavailable = load_networks(chosen, paths | {"lpips": args.lpips_weights}, accelerator.device)
    unavailable |= {name: "left out" for name in fitting if name not in chosen}
    for name, source in sources.items():
        data = EvaluationData(source, protocol, args.limit)
        evaluator = ReconstructionEvaluator(data, name, networks, unavailable, args.batch_size, accelerator.device)
        is_curve = bool(args.num_channels or args.num_tokens)
        table = write_table(
            make_rows(args, evaluator), evaluator, args.output_dir, args.num_examples, earlier, is_curve
        )
        if accelerator.is_main_process:
            print(f"{name}, {len(data)} {'clips' if args.num_frames > 1 else 'pictures'}\n\n{table}", flush=True)
    if args.pipeline is not None and accelerator.is_main_process:
        print_pipeline_drift(args, accelerator.device)


def print_pipeline_drift(args: argparse.Namespace, device: "torch.device") -> None:
    import torch

    from ..evaluation.drift import pipeline_drift
    from ..pipelines.pipeline_vitok_dit import ViTokDiTPipeline

    pipe = ViTokDiTPipeline.from_pretrained(args.pipeline, dtype=getattr(torch, args.dtype)).to(device)
    pipe.set_progress_bar_config(disable=True)
    for name, vae in load_models(args):
        difference = pipeline_drift(pipe, vae.to(device))
        print(f"{args.pipeline}: {difference:.2f} dB between its pictures and those decoded by {name}, of 16 seeds")
