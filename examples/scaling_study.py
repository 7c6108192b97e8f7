r"""The paper's scaling study (arXiv 2501.09755, figures 2, 6, 7, 19, 20, table 2) at small scale, on own pictures.

    python examples/scaling_study.py --train_data_dir data/train/film:0.4 data/train/photos:0.3 data/train/emoji:0.3 \
        --test_data_dir data/test/film data/test/photos data/test/emoji \
        --classifier output-classifier/classifier/classifier.safetensors --output_dir study

Trains small autoencoders of pictures of 64 x 64 with `vitok train`, all on the same crops, which are cut first, and
for as many steps: patch sizes and channels that give 2^5 to 2^11 floats a picture (E), then depths of the encoder and
of the decoder at E = 512, and one of these points in float32 (the others have bfloat16 autocast). Then, in float32,
codes that can be cut, against a model for each length (figures 19 and 20): trained for as many steps as one of these,
and for as many as all together. A finished run is not repeated: the same command goes on where it was interrupted. On
a machine of few cores or of several GPUs, run a process for each seed (`--seeds 0`, `--seeds 1`) with one
`output_dir`, which has results.csv, plots, and report.md with coefficients of determination (R2) of straight lines,
quality against the logarithm of E, or of the parameters of the tower, and tables of the codes that can be cut.
"""

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from studies.scaling import SIZE, STUDIES, Point, report

from vitok_hf import AutoencoderViTok
from vitok_hf.commands import make_parser, run_command
from vitok_hf.data.claims import claim_folder
from vitok_hf.data.files import list_files
from vitok_hf.data.held_out import load_evaluation_images
from vitok_hf.data.loader import SourceSettings, iterate_pixels, make_dataset
from vitok_hf.data.sources import parse_source
from vitok_hf.data.views import CropView
from vitok_hf.disk import replace_durably, write_json
from vitok_hf.evaluation.features import Classifier
from vitok_hf.evaluation.reconstruction import evaluate_reconstruction
from vitok_hf.training.checkpointing import list_checkpoints


TRAINING = {
    "resolution": SIZE,
    "train_batch_size": 32,
    "learning_rate": 1e-3,
    "lpips_weight": 0,
    "compile": True,
    "cache_gib": 4.0,
    "checkpoints_total_limit": 1,
    "report_to": "none",
}
LIMIT = 200  # test pictures of a folder


def claim(args: argparse.Namespace) -> None:
    """Raises `ValueError` if the output folder has runs of other settings or pictures."""
    sources = [parse_source(source) for source in args.train_data_dir]
    places = [folder for folder, _ in sources] + args.test_data_dir
    files = [file for place in places for file in list_files(place)]
    settings = {name: getattr(args, name) for name in ("num_crops", "max_train_steps")}
    settings |= {name: TRAINING[name] for name in ("train_batch_size", "learning_rate")} | {"limit": LIMIT}
    settings |= {"weights": [weight for _, weight in sources], "classifier": args.classifier is not None}
    claim_folder(args.output_dir, settings, files + [args.classifier] * settings["classifier"])


def cut_crops(args: argparse.Namespace) -> Path:
    """The folder of training pictures for all runs."""
    folder, each = args.output_dir / "crops", 100
    if folder.exists():
        return folder
    temporary = Path(tempfile.mkdtemp(".incomplete", "crops-", args.output_dir))
    view = CropView([(SIZE, SIZE, 1.0)], each * SIZE**2, flip=False)
    dataset = make_dataset(view, SourceSettings(args.train_data_dir, cache_gib=TRAINING["cache_gib"]))
    for number, crops in enumerate(iterate_pixels(dataset, -(-args.num_crops // each))):
        for index, crop in enumerate(crops[:, :, 0]):
            Image.fromarray(crop.permute(1, 2, 0).numpy()).save(temporary / f"{each * number + index:07}.png")
    if folder.exists():  # the process of another seed was faster: its crops are the same
        shutil.rmtree(temporary)
    else:
        replace_durably(temporary, folder)
    return folder


def train(point: Point, seed: int, folder: Path, args: argparse.Namespace) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config, steps = folder / "model_config.json", args.max_train_steps * point.passes
    config.write_text(json.dumps(point.model_config()))
    options = TRAINING | {"model_config": config, "mixed_precision": point.mixed_precision, "seed": seed}
    options |= {"max_train_steps": steps, "lr_warmup_steps": steps // 20, "checkpointing_steps": max(1, steps // 2)}
    options |= {"train_data_dir": cut_crops(args), "output_dir": folder}
    if list_checkpoints(folder):
        options["resume_from_checkpoint"] = "latest"
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    subprocess.run([sys.executable, "-m", "vitok_hf.commands", "train", *arguments], check=True)


@torch.no_grad()
def evaluate(folder: Path, args: argparse.Namespace, lengths: dict[str, int]) -> dict[str, float]:
    """Quality of codes of this length, a mean over the test folders, and parameters of the towers."""
    device = PartialState().device
    vae = AutoencoderViTok.from_pretrained(folder / "vae").to(device).eval()
    classifier = None if args.classifier is None else Classifier.load(args.classifier).to(device)
    rows = []
    for path in args.test_data_dir:
        images = load_evaluation_images(path, SIZE, LIMIT)
        metrics, reconstructions = evaluate_reconstruction(vae, images, batch_size=32, lengths=lengths)
        if classifier is not None:
            metrics["frechet_distance"] = classifier.distance(reconstructions.to(device), images.to(device))
        rows.append(metrics)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if classifier is not None:
        means["log2_frechet_distance"] = math.log2(max(means["frechet_distance"], 1e-12))
    for tower in ("encoder", "decoder"):
        means[f"{tower}_parameters"] = sum(parameter.numel() for parameter in getattr(vae, tower).parameters())
    return means


def run(args: argparse.Namespace) -> None:
    """Trains and measures what is missing. The first seed goes first."""
    points = dict.fromkeys(point for study in args.studies for point in STUDIES[study])
    for seed in args.seeds:
        for point in points:
            folder = args.output_dir / "runs" / f"{point.name}-seed{seed}"
            if (folder / "rows.json").exists():
                continue
            if not (folder / "vae").exists():
                train(point, seed, folder, args)
            rows = [
                {"name": point.name, "seed": seed, "floats": floats} | asdict(point) | evaluate(folder, args, lengths)
                for floats, lengths in point.lengths.items()
            ]
            write_json(folder / "rows.json", rows)
            for row in rows:
                print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def read_rows(output_dir: Path) -> list[dict]:
    """The rows of the runs that are finished, also those of other seeds and studies."""
    points = dict.fromkeys(point for study in STUDIES.values() for point in study)
    files = (path for point in points for path in sorted(output_dir.glob(f"runs/{point.name}-seed*/rows.json")))
    return [row for path in files for row in json.loads(path.read_text())]


def main():
    parser = make_parser("scaling_study.py", __doc__)
    parser.add_argument("--train_data_dir", nargs="+", required=True, help="folders with optional weights")
    parser.add_argument("--test_data_dir", nargs="+", required=True, help="folders; each counts as much as the others")
    parser.add_argument("--classifier", help="output of train_classifier.py, for Frechet distances")
    parser.add_argument("--studies", nargs="+", choices=STUDIES, default=list(STUDIES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--max_train_steps", type=int, default=1500)
    parser.add_argument("--num_crops", type=int, default=20_000, help="training pictures, rounded up to hundreds")
    parser.add_argument("--output_dir", type=Path, default=Path("study"))
    args = parser.parse_args()
    if args.classifier is not None:
        Classifier.load(args.classifier)  # says so now if it cannot be read
    claim(args)
    run(args)
    report(read_rows(args.output_dir), args.output_dir)


if __name__ == "__main__":
    run_command(main)
